//! Writing a model as a checkpoint that other tools load: Hugging Face, Nemotron-NAS, GGUF.
//!
//! A writer takes a model *as it is to be written* ([`Contents`]): a config whose layers may differ and a source that holds exactly its tensors.
//! It knows nothing of patterns or searches; [`MaskedSource`] makes such a model of a parent and a pattern.
//!
//! | format | layers are equal | layers differ |
//! | --- | --- | --- |
//! | [`Format::Hf`] | a plain config of the family | `per_layer_config` and a modelling file, by a `model_type` of our own |
//! | [`Format::NemotronNas`] | `block_configs` | `block_configs` |
//! | [`Format::Gguf`] | `llama`, `qwen2`, `qwen3` | `deci` |

mod config_json;
mod convert;
mod gguf;
mod hf;
mod masked;
mod nemotron;
mod plan;
mod weights;

use crate::{Error, Result, storage};
use evop_model::{ChatTemplate, Checkpoint, Config, GenerationConfig, Pattern, Source, Tokenizer};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};

pub use masked::MaskedSource;

/// A kind of checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Format {
    /// A Hugging Face directory.
    #[default]
    Hf,
    /// A Hugging Face directory in the dialect of NVIDIA's Nemotron-NAS models (`DeciLMForCausalLM`).
    NemotronNas,
    /// One file for llama.cpp and what is built on it.
    Gguf,
}

/// How numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileType {
    /// 32-bit floats.
    #[serde(rename = "f32")]
    F32,
    /// 16-bit floats of IEEE 754.
    #[serde(rename = "f16")]
    F16,
    /// The upper half of 32-bit floats.
    #[serde(rename = "bf16")]
    Bf16,
    /// Blocks of 32 8-bit integers (GGUF only).
    #[serde(rename = "q8_0")]
    Q8_0,
    /// Blocks of 256 4-bit integers, the head 6-bit (GGUF only).
    #[serde(rename = "q4_k")]
    Q4K,
}

/// What to write: a format, and how its numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Target {
    /// The kind of checkpoint.
    pub format: Format,
    /// `None`: as the source has them.
    pub weights: Option<FileType>,
}

impl From<Format> for Target {
    fn from(format: Format) -> Self {
        Self { format, weights: None }
    }
}

/// The names of an option's values, and the way back.
macro_rules! named {
    ($type:ty, $option:literal, $($name:literal => $value:path),+ $(,)?) => {
        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self { $($value => $name,)+ })
            }
        }

        impl std::str::FromStr for $type {
            type Err = Error;

            fn from_str(text: &str) -> Result<Self> {
                match text {
                    $($name => Ok($value),)+
                    _ => Err(Error::option($option, format!("expected one of {}; found {text:?}", [$($name),+].join(", ")))),
                }
            }
        }
    };
}

named!(Format, "--format", "hf" => Self::Hf, "nemotron-nas" => Self::NemotronNas, "gguf" => Self::Gguf);
named!(FileType, "--type", "f32" => Self::F32, "f16" => Self::F16, "bf16" => Self::Bf16, "q8_0" => Self::Q8_0, "q4_k" => Self::Q4K);

/// A model as it is to be written.
#[derive(Debug, Clone, Copy)]
pub struct Contents<'a> {
    /// What the model is called.
    pub name: &'a str,
    /// One entry a layer; a shape of 0 is a sub-block that isn't there. A layer without both goes, and the ones after it move up.
    pub config: &'a Config,
    /// The tensors of that config, under Hugging Face's names and the config's layer numbers. Biases may be there that the family doesn't have.
    pub source: &'a dyn Source,
    /// Files that go beside the weights of a Hugging Face directory: (name, contents).
    pub companions: &'a [(String, Vec<u8>)],
    /// The tokenizer, for formats that hold it.
    pub tokenizer: &'a Tokenizer,
    /// The chat template, for formats that hold it.
    pub chat_template: Option<&'a ChatTemplate>,
    /// Which tokens end a generation, for formats that hold it.
    pub generation: &'a GenerationConfig,
    /// What `evop.json` is to say; it is written last.
    pub provenance: Option<&'a Value>,
}

impl<'a> Contents<'a> {
    /// A checkpoint as it is.
    pub fn of(checkpoint: &'a Checkpoint) -> Self {
        // a file's name without its kind, a directory's as it is
        let path = checkpoint.path();
        let name = if path.extension().is_some_and(|e| e == "gguf") { path.file_stem() } else { path.file_name() };
        Self {
            name: name.and_then(|n| n.to_str()).unwrap_or("model"),
            config: checkpoint.config(),
            source: checkpoint.source().as_ref(),
            companions: checkpoint.tokenizer_files(),
            tokenizer: checkpoint.tokenizer(),
            chat_template: checkpoint.chat_template(),
            generation: checkpoint.generation(),
            provenance: checkpoint.provenance(),
        }
    }

    /// The same tokenizer and templates around another model.
    #[must_use]
    pub fn around(self, config: &'a Config, source: &'a dyn Source) -> Self {
        Self { config, source, provenance: None, ..self }
    }

    /// Writes the checkpoint into the directory `out`; a GGUF also to a file of a name that ends in `.gguf`.
    ///
    /// Every file is whole or not there. `evop.json`, if there is provenance, comes last.
    ///
    /// # Errors
    /// [`Error::Format`] for what the format can't express, with the formats that can; [`Error::Io`] for a full disk or a directory that can't be
    /// written; [`Error::Model`] for tensors that don't fit the config.
    pub fn write(&self, target: impl Into<Target>, out: &Path) -> Result<Written> {
        let target = target.into();
        let file = out.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
        let mut written = match target.format {
            Format::Gguf if file => return gguf::write(self, target.weights, out),
            _ if file => return Err(Error::option("--out", format!("{} is a name of a GGUF file, the format is {}", out.display(), target.format))),
            Format::Hf => hf::write(self, target.weights, out)?,
            Format::NemotronNas => nemotron::write(self, target.weights, out)?,
            Format::Gguf => gguf::write(self, target.weights, &out.join("model.gguf"))?,
        };
        if let Some(provenance) = self.provenance {
            let path = out.join(crate::run::PROVENANCE);
            storage::write_json(&path, provenance)?;
            written.files.push(path);
        }
        Ok(written)
    }

    /// Writes what `pattern` leaves of the model.
    ///
    /// # Errors
    /// As [`Contents::write`].
    pub fn write_pattern(self, pattern: &Pattern, target: impl Into<Target>, out: &Path) -> Result<Written> {
        let pruned = self.config.with_pattern(pattern);
        let source = MaskedSource::new(self.source, self.config, pattern)?;
        self.around(&pruned, &source).write(target, out)
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Written {
    /// What a reader finds: `LlamaForCausalLM`, `EvopLlamaForCausalLM`, `DeciLMForCausalLM`, or a GGUF's architecture.
    pub architecture: String,
    /// The files, the weights first.
    pub files: Vec<PathBuf>,
    /// Bytes of the weights' file.
    pub weight_bytes: u64,
    /// What a tool that reads the format can't do with it, or will do otherwise than one would think.
    pub notes: Vec<String>,
}

/// SHA-256 over names, shapes, types and bytes of all tensors, in order of names: what a pattern was found for.
///
/// # Errors
/// [`Error::Model`] for a tensor that can't be read.
pub fn fingerprint(source: &dyn Source) -> Result<String> {
    let mut hash = Sha256::new();
    for name in source.names() {
        let raw = source.raw(&name)?;
        hash.update(format!("{name} {:?} {:?}\n", raw.dtype, raw.shape));
        hash.update(&*raw.bytes);
    }
    Ok(hash.finalize().iter().map(|b| format!("{b:02x}")).collect())
}

/// The shortest sliding window of a model, where its context is longer.
fn shortest_window(config: &Config) -> Option<usize> {
    config.layers.iter().filter(|l| l.shape.kv_groups > 0).filter_map(|l| l.sliding_window).min().filter(|window| *window < config.max_position_embeddings)
}

/// Formats without windows say the same of contexts that fit one.
fn window_note(window: usize, config: &Config) -> String {
    format!("the format has no sliding windows: the context is limited to the shortest one, {window} tokens of {}", config.max_position_embeddings)
}
