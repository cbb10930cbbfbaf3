//! A checkpoint on disk (Hugging Face directory or GGUF file) or inside the binary, opened but not yet loaded to a device.

use crate::chat::ChatTemplate;
use crate::config::Config;
use crate::decoder::Decoder;
use crate::gguf;
use crate::heterogeneous;
use crate::random_source::RandomSource;
use crate::safetensors_source::{Bytes, SafetensorsSource};
use crate::source::{Source, TensorNames};
use crate::{Error, Result, WeightType};
use candle_core::Device;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokenizers::Tokenizer;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

/// Sampling defaults that a checkpoint suggests (`generation_config.json`).
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationConfig {
    /// `temperature`, when sampling is the default.
    pub temperature: Option<f64>,
    /// `top_p`.
    pub top_p: Option<f64>,
    /// `top_k`.
    pub top_k: Option<usize>,
    /// `repetition_penalty`.
    pub repetition_penalty: Option<f64>,
    /// Tokens that end a generation, besides the config's.
    pub eos_token_ids: Vec<u32>,
}

/// A checkpoint compiled into the binary.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedFiles {
    /// What to call it in errors and listings.
    pub name: &'static str,
    /// `config.json`.
    pub config: &'static str,
    /// `model.safetensors`.
    pub weights: &'static [u8],
    /// `tokenizer.json`.
    pub tokenizer: &'static str,
    /// `tokenizer_config.json`.
    pub tokenizer_config: &'static str,
    /// `generation_config.json`.
    pub generation_config: &'static str,
}

/// Configuration, weights, tokenizer and templates of one model.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    source: Arc<dyn Source>,
    tokenizer: Tokenizer,
    tokenizer_files: Vec<(String, Vec<u8>)>,
    chat_template: Option<ChatTemplate>,
    generation: GenerationConfig,
    provenance: Option<Value>,
}

/// What `evop prune` and `evop export` say of where a checkpoint came from.
const PROVENANCE: &str = "evop.json";

/// Files that a copy of the checkpoint takes along unchanged.
const COMPANIONS: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
];

impl Checkpoint {
    /// Opens a Hugging Face directory, a `.gguf` file or a directory that holds one, and checks that its tensors are those that its config asks for.
    ///
    /// # Errors
    /// One that names the file, what was expected and what was found.
    pub fn open(path: &Path) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if metadata.is_file() {
            if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
                return gguf::open(path);
            }
            return Err(Error::NotACheckpoint { path: path.to_path_buf(), message: "expected a directory with config.json, or a .gguf file".into() });
        }
        if let Some(unfinished) = unfinished(path) {
            return Err(Error::NotACheckpoint { path: path.to_path_buf(), message: unfinished });
        }
        if let Some(file) = lone_gguf(path)? {
            let mut checkpoint = gguf::open(&file)?;
            checkpoint.provenance = provenance(path)?.or(checkpoint.provenance);
            return Ok(checkpoint);
        }
        let read = |name: &str| -> Result<Option<String>> {
            let file = path.join(name);
            match std::fs::read_to_string(&file) {
                Ok(text) => Ok(Some(text)),
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
                Err(e) => Err(Error::io(&file, e)),
            }
        };
        let (config, source) = open_weights(path)?;
        let tokenizer_path = path.join("tokenizer.json");
        let tokenizer_text = read("tokenizer.json")?.ok_or_else(|| Error::Tokenizer {
            path: tokenizer_path.clone(),
            message: "missing: expected a fast tokenizer (transformers' save_pretrained writes it)".into(),
        })?;
        let mut files = Vec::new();
        for name in COMPANIONS {
            if let Ok(bytes) = std::fs::read(path.join(name)) {
                files.push((name.to_string(), bytes));
            }
        }
        let parts = Parts {
            path: path.to_path_buf(),
            config,
            source,
            tokenizer: parse_tokenizer(&tokenizer_text, &tokenizer_path)?,
            tokenizer_files: files,
            tokenizer_config: read("tokenizer_config.json")?,
            template_file: read("chat_template.jinja")?,
            generation_config: read("generation_config.json")?,
            provenance: provenance(path)?,
        };
        parts.assemble()
    }

    /// Random weights in a shape, for speeds: [`crate::RandomSource`]. Its tokens are the words `t0`, `t1`, …; other words are `t0`.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] for a vocabulary that can't be made.
    pub fn random(name: &str, config: Config) -> Result<Self> {
        let path = PathBuf::from(name);
        let refused = |message: String| Error::Tokenizer { path: path.clone(), message };
        let word = |id: usize| format!("t{id}");
        let words = WordLevel::builder().vocab((0..config.vocab_size).map(|id| (word(id), id as u32)).collect()).unk_token(word(0)).build();
        let mut tokenizer = Tokenizer::new(words.map_err(|e| refused(e.to_string()))?);
        tokenizer.with_pre_tokenizer(Some(WhitespaceSplit));
        let file = tokenizer.to_string(false).map_err(|e| refused(e.to_string()))?;
        let parts = Parts {
            source: Arc::new(RandomSource::new(&config)),
            path,
            config,
            tokenizer,
            tokenizer_files: vec![("tokenizer.json".to_string(), file.into_bytes())],
            tokenizer_config: None,
            template_file: None,
            generation_config: None,
            provenance: None,
        };
        parts.assemble()
    }

    /// Opens a checkpoint that is part of the binary.
    pub fn embedded(files: &EmbeddedFiles) -> Result<Self> {
        let path = PathBuf::from(files.name);
        let companion = |name: &str, text: &str| (name.to_string(), text.as_bytes().to_vec());
        let weights = SafetensorsSource::from_files(vec![(path.join("model.safetensors"), Bytes::Embedded(files.weights))])?;
        let (config, source) = checked(Config::from_json(files.config, &path.join("config.json"))?, Arc::new(weights))?;
        let parts = Parts {
            config,
            source,
            tokenizer: parse_tokenizer(files.tokenizer, &path.join("tokenizer.json"))?,
            tokenizer_files: vec![
                companion("tokenizer.json", files.tokenizer),
                companion("tokenizer_config.json", files.tokenizer_config),
                companion("generation_config.json", files.generation_config),
            ],
            tokenizer_config: Some(files.tokenizer_config.to_string()),
            template_file: None,
            generation_config: Some(files.generation_config.to_string()),
            provenance: None,
            path,
        };
        parts.assemble()
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The configuration.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The weights' file(s).
    pub fn source(&self) -> &Arc<dyn Source> {
        &self.source
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Tokenizer and template files to copy beside a derived checkpoint: (name, contents).
    pub fn tokenizer_files(&self) -> &[(String, Vec<u8>)] {
        &self.tokenizer_files
    }

    /// The chat template, if there is one.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// Suggested sampling.
    pub fn generation(&self) -> &GenerationConfig {
        &self.generation
    }

    /// What `evop.json` says of where it came from, if it was pruned.
    pub fn provenance(&self) -> Option<&Value> {
        self.provenance.as_ref()
    }

    /// Token ids of a text, special tokens in it recognised; `add_special_tokens` adds what the model expects around a sequence.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        let encoding =
            self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| Error::Tokenizer { path: self.path.clone(), message: e.to_string() })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Loads the weights to a device.
    pub fn decoder(&self, device: &Device, weights: impl Into<WeightType>) -> Result<Decoder> {
        Decoder::load(&self.config, self.source.as_ref(), device, weights)
    }
}

/// Configuration and weights of a Hugging Face directory, without a tokenizer.
///
/// # Errors
/// As [`Checkpoint::open`].
pub fn open_weights(directory: &Path) -> Result<(Config, Arc<dyn Source>)> {
    let path = directory.join("config.json");
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    checked(Config::from_json(&text, &path)?, Arc::new(SafetensorsSource::open(directory)?))
}

/// Holds the config's shapes against the tensors'.
pub(crate) fn checked(mut config: Config, source: Arc<dyn Source>) -> Result<(Config, Arc<dyn Source>)> {
    let names = TensorNames::of(config.architecture);
    heterogeneous::resolve(&mut config, source.as_ref(), &names)?;
    if config.tie_word_embeddings && source.shape(names.head()).is_some() && source.raw(names.head())?.bytes[..] != source.raw(names.embedding())?.bytes[..] {
        // as transformers 5 does: a head of its own in the file outweighs the flag
        tracing::warn!(file = %config.path.display(), "`tie_word_embeddings` is set, but `{}` differs from the embedding: used untied", names.head());
        config.tie_word_embeddings = false;
    }
    Ok((config, source))
}

/// A directory that a pruning run began and did not finish.
fn unfinished(path: &Path) -> Option<String> {
    let started = path.join("run.json").exists() && !path.join("evop.json").exists();
    started.then(|| format!("a pruning run that has not finished: go on with `evop prune --resume {}`", path.display()))
}

/// The GGUF file of a directory without a config.json, if there is just one.
fn lone_gguf(directory: &Path) -> Result<Option<PathBuf>> {
    if directory.join("config.json").exists() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(|e| Error::io(directory, e))? {
        let path = entry.map_err(|e| Error::io(directory, e))?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
            found.push(path);
        }
    }
    match found.len() {
        0 | 1 => Ok(found.pop()),
        n => Err(Error::NotACheckpoint { path: directory.to_path_buf(), message: format!("holds {n} .gguf files: name one of them") }),
    }
}

fn provenance(directory: &Path) -> Result<Option<Value>> {
    let path = directory.join(PROVENANCE);
    match std::fs::read_to_string(&path) {
        Ok(text) => serde_json::from_str(&text).map(Some).map_err(|e| Error::config(&path, format!("not valid JSON: {e}"))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(&path, e)),
    }
}

pub(crate) struct Parts {
    pub path: PathBuf,
    pub config: Config,
    pub source: Arc<dyn Source>,
    pub tokenizer: Tokenizer,
    pub tokenizer_files: Vec<(String, Vec<u8>)>,
    pub tokenizer_config: Option<String>,
    pub template_file: Option<String>,
    pub generation_config: Option<String>,
    pub provenance: Option<Value>,
}

impl Parts {
    pub fn assemble(self) -> Result<Checkpoint> {
        let json = |text: &Option<String>, name: &str| -> Result<Value> {
            text.as_ref().map_or(Ok(Value::Null), |t| serde_json::from_str(t).map_err(|e| Error::config(&self.path.join(name), format!("not valid JSON: {e}"))))
        };
        let tokenizer_config = json(&self.tokenizer_config, "tokenizer_config.json")?;
        let generation = json(&self.generation_config, "generation_config.json")?;
        let chat_template = chat_template(&tokenizer_config, self.template_file);
        let path = self.path.join("generation_config.json");
        let fields = crate::config::Fields { json: &generation.as_object().cloned().unwrap_or_default(), path: &path };
        let sampling = fields.bool_or("do_sample", false)?;
        let sampled = |name: &str| generation.get(name).and_then(Value::as_f64).filter(|_| sampling);
        let generation = GenerationConfig {
            temperature: sampled("temperature"),
            top_p: sampled("top_p"),
            top_k: sampled("top_k").map(|k| k as usize),
            repetition_penalty: generation.get("repetition_penalty").and_then(Value::as_f64),
            eos_token_ids: fields.token_ids("eos_token_id")?,
        };
        Ok(Checkpoint {
            path: self.path,
            config: self.config,
            source: self.source,
            tokenizer: self.tokenizer,
            tokenizer_files: self.tokenizer_files,
            chat_template,
            generation,
            provenance: self.provenance,
        })
    }
}

fn parse_tokenizer(text: &str, path: &Path) -> Result<Tokenizer> {
    let mut tokenizer: Tokenizer = text.parse().map_err(|e| Error::Tokenizer { path: path.to_path_buf(), message: format!("not a tokenizer file: {e}") })?;
    // what a file says of padding and truncation is for training batches
    tokenizer.with_padding(None);
    tokenizer.with_truncation(None).map_err(|e| Error::Tokenizer { path: path.to_path_buf(), message: e.to_string() })?;
    Ok(tokenizer)
}

fn chat_template(tokenizer_config: &Value, file: Option<String>) -> Option<ChatTemplate> {
    let token = |name: &str| match tokenizer_config.get(name) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Object(added)) => added.get("content").and_then(Value::as_str).unwrap_or_default().to_string(),
        _ => String::new(),
    };
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|t| t.get("name").and_then(Value::as_str) == Some("default")).or(list.first())?;
        default.get("template").and_then(Value::as_str).map(str::to_string)
    };
    let source = file.or_else(|| match tokenizer_config.get("chat_template") {
        Some(Value::String(text)) => Some(text.clone()),
        Some(Value::Array(list)) => named(list),
        _ => None,
    })?;
    Some(ChatTemplate { source, bos_token: token("bos_token"), eos_token: token("eos_token") })
}
