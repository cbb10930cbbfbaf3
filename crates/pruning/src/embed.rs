//! What a chunk of text is about, as a vector: the model's own hidden states, or a sentence-transformers BERT.

use crate::pack::pack;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::bert::{BertModel, Config as BertConfig};
use evop_model::{Config, Decoder, NoCache, Span};
use std::path::Path;
use tokenizers::Tokenizer;

/// Word pieces or tokens of a chunk that are looked at (BERT's own limit).
const MAX_TOKENS: usize = 512;

/// Tokens of a text that the pruned model looks at in a run.
const FIRST_TOKENS: usize = 128;

/// Tokens that the pruned model embeds together.
const TOKENS_AT_ONCE: usize = 1_024;

/// Turns chunks of text into vectors.
pub trait Embedder {
    /// What it is, for reports.
    fn name(&self) -> String;

    /// One vector a chunk, all of one length.
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails or a text can't be tokenised.
    fn embed(&self, chunks: &[&str], progress: &mut dyn FnMut(usize)) -> Result<Vec<Vec<f64>>>;
}

/// Mean over tokens of the residual stream in the middle of the model that is pruned: needs no second model.
#[derive(Debug)]
pub struct HiddenStates<'a> {
    /// The dense model.
    pub decoder: &'a Decoder,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Tokens of a chunk that are looked at.
    pub max_tokens: usize,
}

impl<'a> HiddenStates<'a> {
    /// As a run embeds its chunks, and a server the prompts that it compares with them.
    pub fn new(decoder: &'a Decoder, tokenizer: &'a Tokenizer) -> Self {
        Self { decoder, tokenizer, max_tokens: FIRST_TOKENS }
    }

    /// [`Embedder::name`] of what [`HiddenStates::new`] makes over a model of this configuration.
    pub fn name_over(config: &Config) -> String {
        name(config, FIRST_TOKENS)
    }

    /// One vector a text, of the hidden size. Texts are tokens without special ones; a text without any lies at the origin.
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails, or for a token beyond the vocabulary.
    pub fn vectors(&self, texts: &[Vec<u32>], progress: &mut dyn FnMut(usize)) -> Result<Vec<Vec<f64>>> {
        let config = self.decoder.config();
        let middle = config.num_layers() / 2 * 2;
        let limit = self.max_tokens.min(config.max_position_embeddings);
        let tokens: Vec<Vec<u32>> = texts.iter().map(|text| text[..text.len().min(limit)].to_vec()).collect();
        let mut vectors = Vec::with_capacity(tokens.len());
        for range in pack(&tokens, TOKENS_AT_ONCE) {
            let spans: Vec<Span> = tokens[range.clone()].iter().map(|t| Span::prompt(t.len())).collect();
            let together = tokens[range].concat();
            if together.is_empty() {
                vectors.extend(spans.iter().map(|_| vec![0.0; config.hidden_size]));
                continue;
            }
            let batch = self.decoder.batch(&spans)?;
            let hidden = self.decoder.embed(&together, &batch)?;
            let hidden = self.decoder.device().with_context(|| self.decoder.forward_range(hidden, 0..middle, &batch, &mut NoCache))?;
            let mut start = 0;
            for span in spans {
                let rows = hidden.narrow(0, start, span.len)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
                let mean = |j: usize| rows.iter().map(|r| f64::from(r[j])).sum::<f64>() / rows.len().max(1) as f64;
                vectors.push((0..config.hidden_size).map(mean).collect());
                start += span.len;
            }
            progress(vectors.len());
        }
        Ok(vectors)
    }
}

impl Embedder for HiddenStates<'_> {
    fn name(&self) -> String {
        name(self.decoder.config(), self.max_tokens)
    }

    fn embed(&self, chunks: &[&str], progress: &mut dyn FnMut(usize)) -> Result<Vec<Vec<f64>>> {
        let tokens: Vec<Vec<u32>> = chunks.iter().map(|chunk| encode(self.tokenizer, chunk)).collect::<Result<_>>()?;
        self.vectors(&tokens, progress)
    }
}

fn name(config: &Config, max_tokens: usize) -> String {
    format!("hidden states after layer {}, mean of the first {max_tokens} tokens", config.num_layers() / 2)
}

fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let encoding = tokenizer.encode_fast(text, false).map_err(|e| Error::Corpus(format!("a chunk can't be tokenised: {e}")))?;
    Ok(encoding.get_ids().to_vec())
}

/// A BERT encoder with mean pooling over its word pieces, from a sentence-transformers directory.
pub struct SentenceTransformer {
    model: BertModel,
    tokenizer: Tokenizer,
    name: String,
    device: Device,
    max_tokens: usize,
}

impl std::fmt::Debug for SentenceTransformer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SentenceTransformer({})", self.name)
    }
}

impl SentenceTransformer {
    /// Opens a directory with `config.json`, `tokenizer.json` and `model.safetensors` of a BERT.
    ///
    /// # Errors
    /// [`Error::Option`] that says what is missing or unreadable.
    pub fn open(directory: &Path, device: &Device) -> Result<Self> {
        let wrong = |message: String| Error::option("--embedder", format!("{}: {message}", directory.display()));
        let read = |name: &str| std::fs::read_to_string(directory.join(name)).map_err(|e| wrong(format!("{name}: {e}")));
        let json: serde_json::Value = serde_json::from_str(&read("config.json")?).map_err(|e| wrong(format!("config.json: {e}")))?;
        if json["model_type"] != "bert" {
            return Err(wrong(format!("config.json: expected `model_type` bert, found {}", json["model_type"])));
        }
        let config: BertConfig = serde_json::from_value(json).map_err(|e| wrong(format!("config.json: {e}")))?;
        let mut tokenizer: Tokenizer = read("tokenizer.json")?.parse().map_err(|e| wrong(format!("tokenizer.json: {e}")))?;
        tokenizer.with_padding(None);
        tokenizer.with_truncation(None).map_err(|e| wrong(format!("tokenizer.json: {e}")))?;
        let weights = std::fs::read(directory.join("model.safetensors")).map_err(|e| wrong(format!("model.safetensors: {e}")))?;
        let weights = VarBuilder::from_buffered_safetensors(weights, DType::F32, device).map_err(|e| wrong(format!("model.safetensors: {e}")))?;
        let model = BertModel::load(weights, &config).map_err(|e| wrong(format!("model.safetensors: {e}")))?;
        let max_tokens = MAX_TOKENS.min(config.max_position_embeddings);
        Ok(Self { model, tokenizer, name: directory.display().to_string(), device: device.clone(), max_tokens })
    }
}

impl Embedder for SentenceTransformer {
    fn name(&self) -> String {
        format!("BERT {}, mean of the first {} word pieces", self.name, self.max_tokens)
    }

    fn embed(&self, chunks: &[&str], progress: &mut dyn FnMut(usize)) -> Result<Vec<Vec<f64>>> {
        let mut vectors = Vec::with_capacity(chunks.len());
        for (done, chunk) in chunks.iter().enumerate() {
            let encoding = self.tokenizer.encode_fast(*chunk, true).map_err(|e| Error::Corpus(format!("a chunk can't be tokenised: {e}")))?;
            let ids = encoding.get_ids();
            let kept = ids.len().min(self.max_tokens);
            let mut ids = ids[..kept].to_vec();
            if let (Some(last), Some(end)) = (ids.last_mut(), encoding.get_ids().last()) {
                *last = *end; // a cut text still ends with [SEP], as the reference truncates
            }
            let ids = Tensor::new(ids, &self.device)?.unsqueeze(0)?;
            let hidden = self.device.with_context(|| self.model.forward(&ids, &ids.zeros_like()?, None))?;
            vectors.push(hidden.squeeze(0)?.mean(0)?.to_vec1::<f32>()?.into_iter().map(f64::from).collect());
            progress(done + 1);
        }
        Ok(vectors)
    }
}
