//! Which checkpoint a `--model` means: the bundled one, random weights, a path, or a hub id.

use crate::hub;
use crate::shape::Shape;
use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use evop_model::{Checkpoint, EmbeddedFiles};
use std::path::{Path, PathBuf};

/// The model inside the binary: a small real Llama, so that everything runs without a download.
static BUNDLED: EmbeddedFiles = EmbeddedFiles {
    name: BUNDLED_NAME,
    config: include_str!("../../models/tiny/config.json"),
    weights: include_bytes!("../../models/tiny/model.safetensors"),
    tokenizer: include_str!("../../models/tiny/tokenizer.json"),
    tokenizer_config: include_str!("../../models/tiny/tokenizer_config.json"),
    generation_config: include_str!("../../models/tiny/generation_config.json"),
};

/// What the bundled model is called.
pub const BUNDLED_NAME: &str = "evop-tiny";

/// What comes before the name of a shape.
const RANDOM: &str = "random:";

/// What a `--model` was found to mean.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// The one inside the binary.
    Bundled,
    /// Random weights in a known model's shape, to measure speeds with.
    Random(Shape),
    /// A directory or a .gguf file.
    Local(PathBuf),
    /// A repository of the Hugging Face hub.
    Hub {
        /// Organisation or user.
        owner: String,
        /// Repository.
        name: String,
    },
}

impl ModelSource {
    /// Tells paths from hub ids. What exists is a path; what looks like a path and doesn't exist is an error.
    ///
    /// # Errors
    /// A text that is neither.
    pub fn parse(model: Option<&str>) -> Result<Self> {
        let Some(model) = model.map(str::trim).filter(|m| !m.is_empty()) else { return Ok(Self::Bundled) };
        if let Some(shape) = model.strip_prefix(RANDOM) {
            let names = || Shape::value_variants().iter().map(Shape::to_string).collect::<Vec<_>>().join(", ");
            return Shape::from_str(shape, false).map(Self::Random).map_err(|_| anyhow::anyhow!("{model}: expected {RANDOM} and one of {}", names()));
        }
        let path = expand_home(model);
        if path.exists() {
            return Ok(Self::Local(path));
        }
        if looks_like_a_path(model) {
            bail!("no such directory: {}", path.display());
        }
        match hub_id(model) {
            Some((owner, name)) => Ok(Self::Hub { owner, name }),
            None => bail!("no such directory: {model} (and not a hub id, which has the form org/name)"),
        }
    }

    /// What the model is called where it has no other name.
    pub fn name(&self) -> String {
        match self {
            Self::Bundled => BUNDLED_NAME.to_string(),
            Self::Random(shape) => format!("{RANDOM}{shape}"),
            Self::Hub { owner, name } => format!("{owner}/{name}"),
            Self::Local(path) => path_name(path),
        }
    }

    /// Opens the checkpoint, fetching it first if it is on the hub. Blocks.
    ///
    /// # Errors
    /// One that says what to do about it.
    pub fn open(&self, revision: Option<&str>) -> Result<Checkpoint> {
        if revision.is_some() && !matches!(self, Self::Hub { .. }) {
            tracing::warn!("--revision is only for models from the hub and is ignored here");
        }
        match self {
            Self::Bundled => Checkpoint::embedded(&BUNDLED).context("the bundled model"),
            Self::Random(shape) => shape.checkpoint(),
            Self::Local(path) => Ok(Checkpoint::open(path)?),
            Self::Hub { owner, name } => {
                let directory = hub::download(owner, name, revision)?;
                Checkpoint::open(&directory).with_context(|| format!("{owner}/{name} (downloaded from the hub)"))
            }
        }
    }
}

/// `models/llama` is `llama`, `llama.q8_0.gguf` is `llama.q8_0`, `/` is `model`.
fn path_name(path: &Path) -> String {
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    let name = absolute.file_name().map_or_else(|| "model".into(), |n| n.to_string_lossy().into_owned());
    match name.strip_suffix(".gguf") {
        Some(stem) if !stem.is_empty() => stem.to_string(),
        _ => name,
    }
}

fn expand_home(text: &str) -> PathBuf {
    match (text.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => Path::new(&home).join(rest),
        _ => PathBuf::from(text),
    }
}

fn looks_like_a_path(text: &str) -> bool {
    let starts = ["/", "./", "../", "~"].iter().any(|s| text.starts_with(s));
    starts || text == "." || text == ".." || text.contains('\\') || text.ends_with(".gguf") || text.ends_with('/') || text.matches('/').count() > 1
}

fn hub_id(text: &str) -> Option<(String, String)> {
    let (owner, name) = text.split_once('/')?;
    let valid = |part: &str| !part.is_empty() && !part.starts_with(['.', '-']) && part.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c));
    (valid(owner) && valid(name)).then(|| (owner.to_string(), name.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_means_the_bundled_model() {
        assert_eq!(ModelSource::parse(None).unwrap(), ModelSource::Bundled);
        assert_eq!(ModelSource::parse(Some(" ")).unwrap(), ModelSource::Bundled);
        let checkpoint = ModelSource::Bundled.open(None).unwrap();
        assert_eq!(checkpoint.config().vocab_size, 4096);
    }

    #[test]
    fn an_existing_path_is_a_path_even_if_it_could_be_a_hub_id() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().to_str().unwrap();
        assert_eq!(ModelSource::parse(Some(path)).unwrap(), ModelSource::Local(path.into()));
    }

    #[test]
    fn a_missing_path_is_called_a_missing_path() {
        for path in ["/no/where", "./nowhere", "../x/y", "~/nowhere-at-all", "model.gguf", "a/b/c", "org/name/", "lonely"] {
            let error = ModelSource::parse(Some(path)).unwrap_err().to_string();
            assert!(error.starts_with("no such directory"), "{path}: {error}");
        }
    }

    #[test]
    fn random_weights_have_a_shape() {
        let source = ModelSource::parse(Some("random:smollm-135m")).unwrap();
        assert_eq!((&source, source.name().as_str()), (&ModelSource::Random(Shape::Smollm135m), "random:smollm-135m"));
        let checkpoint = source.open(None).unwrap();
        assert_eq!((checkpoint.config().num_layers(), checkpoint.tokenizer().get_vocab_size(true)), (30, 49_152));
        assert_eq!(checkpoint.encode("t7 t49151", true).unwrap(), [7, 49_151]);
        let error = ModelSource::parse(Some("random:gpt")).unwrap_err().to_string();
        assert!(error.contains("smollm-135m, llama-3.2-1b"), "{error}");
    }

    #[test]
    fn two_parts_are_a_hub_id() {
        let source = ModelSource::parse(Some("HuggingFaceTB/SmolLM2-135M")).unwrap();
        assert_eq!(source, ModelSource::Hub { owner: "HuggingFaceTB".into(), name: "SmolLM2-135M".into() });
        assert_eq!(source.name(), "HuggingFaceTB/SmolLM2-135M");
    }

    #[test]
    fn a_model_is_named_after_its_directory_or_file() {
        assert_eq!(ModelSource::Local("/models/llama".into()).name(), "llama");
        assert_eq!(ModelSource::Local("/models/llama-3.2.q8_0.gguf".into()).name(), "llama-3.2.q8_0");
    }
}
