//! The options that name a model, shared by the offline commands.

use crate::config::DTypeChoice;
use crate::models::ModelSource;
use anyhow::{Context, Result};
use clap::Args;
use evop_model::device::{DeviceChoice, weight_type};
use evop_model::{Checkpoint, Config, Decoder, Device, Source, WeightType};
use std::io::Read;
use std::path::Path;

/// Which model, and where to compute.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// A checkpoint directory, a .gguf file, or a hub id (org/name); without it the small bundled model.
    #[arg(long, env = "EVOP_MODEL", value_name = "MODEL", help_heading = "Model")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id.
    #[arg(long, env = "EVOP_REVISION", value_name = "REVISION", help_heading = "Model")]
    pub revision: Option<String>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "EVOP_DEVICE", value_name = "DEVICE", default_value_t = DeviceChoice::Auto, help_heading = "Model")]
    pub device: DeviceChoice,
    /// What to compute in.
    #[arg(long, env = "EVOP_DTYPE", value_enum, default_value_t = DTypeChoice::Auto, help_heading = "Model")]
    pub dtype: DTypeChoice,
}

impl ModelArgs {
    /// The checkpoint on disk.
    pub fn checkpoint(&self) -> Result<Checkpoint> {
        ModelSource::parse(self.model.as_deref())?.open(self.revision.as_deref())
    }

    /// The checkpoint with its weights loaded, on the CPU in f32 unless another type was said.
    pub fn load(&self) -> Result<(Checkpoint, Decoder)> {
        let checkpoint = self.checkpoint()?;
        let decoder = self.decoder(&checkpoint, |_| self.dtype.weights())?;
        Ok((checkpoint, decoder))
    }

    /// A checkpoint's weights as they are run: a GGUF's in its own types, unless another type was said.
    pub fn decoder_to_run(&self, checkpoint: &Checkpoint) -> Result<Decoder> {
        self.decoder(checkpoint, |device| self.dtype.weights_to_run(device, checkpoint))
    }

    fn decoder(&self, checkpoint: &Checkpoint, weights: impl Fn(&Device) -> Option<WeightType>) -> Result<Decoder> {
        let device = self.device.open()?;
        let weights = weight_type(&device, weights(&device))?;
        warn(weights, checkpoint.config(), checkpoint.source().as_ref())?;
        Ok(checkpoint.decoder(&device, weights)?)
    }
}

/// Says on stderr what about this type is to be said.
pub fn warn(weights: WeightType, config: &Config, source: &dyn Source) -> Result<()> {
    if let Some(warning) = weights.warning(config, source)? {
        eprintln!("warning: {warning}");
    }
    Ok(())
}

const BUNDLED_CALIBRATION: &[u8] = include_bytes!("../../../models/tiny/calibration.txt.gz");
const BUNDLED_HELD_OUT: &[u8] = include_bytes!("../../../models/tiny/held-out.txt.gz");
const BUNDLED_CONTINUATIONS: &[u8] = include_bytes!("../../../models/tiny/continuations.jsonl.gz");

/// Seven public-domain books that the bundled model was trained on.
pub fn bundled_calibration() -> Result<String> {
    gunzip(BUNDLED_CALIBRATION).context("the bundled calibration text")
}

/// Five public-domain books that the bundled model never saw.
pub fn bundled_held_out() -> Result<String> {
    gunzip(BUNDLED_HELD_OUT).context("the bundled held-out text")
}

/// 400 multiple-choice questions from those five books, as JSON lines: which words follow?
pub fn bundled_continuations() -> Result<String> {
    gunzip(BUNDLED_CONTINUATIONS).context("the bundled multiple-choice set")
}

fn gunzip(bytes: &[u8]) -> Result<String> {
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(bytes).read_to_string(&mut text)?;
    Ok(text)
}

/// Whether a file's name says that it has JSON lines.
pub fn is_json_lines(path: &Path) -> bool {
    path.to_string_lossy().to_lowercase().trim_end_matches(".gz").ends_with(".jsonl")
}

/// Reads a text file, gzipped or not.
pub fn read_file(path: &Path) -> Result<String> {
    let file = || path.display().to_string();
    let mut bytes = std::fs::read(path).with_context(file)?;
    if bytes.starts_with(&[0x1f, 0x8b]) {
        let mut plain = Vec::new();
        flate2::read::MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut plain).with_context(|| format!("{}: damaged gzip file", file()))?;
        bytes = plain;
    }
    String::from_utf8(bytes).map_err(|e| anyhow::anyhow!("{}: not UTF-8 text: byte {} can't be decoded", file(), e.utf8_error().valid_up_to()))
}

/// Reads plain text, or JSON lines with a `text` field (joined by blank lines), either of them gzipped.
pub fn read_text(path: &Path) -> Result<String> {
    Ok(read_documents(path)?.join("\n\n"))
}

/// Reads the documents of JSON lines with a `text` field, or a plain text as one document, either of them gzipped.
pub fn read_documents(path: &Path) -> Result<Vec<String>> {
    let file = || path.display().to_string();
    let text = read_file(path)?;
    if !is_json_lines(path) {
        return Ok(vec![text]);
    }
    let mut documents = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let value: serde_json::Value = serde_json::from_str(line).with_context(|| format!("{}: line {}: not JSON", file(), number + 1))?;
        let text = value.get("text").and_then(|t| t.as_str()).with_context(|| format!("{}: line {}: expected a string field `text`", file(), number + 1))?;
        documents.push(text.to_string());
    }
    Ok(documents)
}
