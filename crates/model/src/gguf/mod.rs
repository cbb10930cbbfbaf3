//! GGUF files of the llama, qwen2, qwen3 and deci architectures, read as if they were Hugging Face checkpoints.
//!
//! The names and keys that a reader and a writer have to agree on are public; the writer is `evop-pruning`'s.

mod config;
mod metadata;
mod pre_tokenizer;
mod rope;
mod source;
mod tokenizer;

use crate::checkpoint::{Checkpoint, Parts, checked};
use crate::safetensors_source::Bytes;
use crate::{Error, Result};
use candle_core::quantized::gguf_file::Content;
use metadata::Metadata;
use source::GgufSource;
use std::collections::HashMap;
use std::io::Cursor;
use std::path::Path;
use std::sync::Arc;
use tokenizers::Tokenizer;

pub use candle_core::quantized::gguf_file::Value;
pub use pre_tokenizer::name_of as pre_tokenizer_name;
pub use source::{RowOrder, gguf_name, permute_rows};

/// Layers whose attention is zeros: llama.cpp can't be told that the first layer has none.
pub const ZERO_ATTENTION: &str = "evop.zero.attention";
/// Layers whose MLP is zeros: llama.cpp forgets the attention of a layer that has no MLP.
pub const ZERO_FEED_FORWARD: &str = "evop.zero.feed_forward";
/// What `evop.json` says in a directory, as JSON text.
pub const PROVENANCE: &str = "evop.provenance";
/// One divisor a rotary frequency, [head_dim / 2].
pub const ROPE_FREQS: &str = "rope_freqs.weight";

/// The tokenizer that a GGUF's metadata describes.
///
/// # Errors
/// [`Error::Tokenizer`] or [`Error::Config`] that names `path` and the key.
pub fn tokenizer(metadata: &HashMap<String, Value>, path: &Path) -> Result<Tokenizer> {
    tokenizer::build(&Metadata { values: metadata, path })
}

/// Opens a GGUF file: configuration, tokenizer and chat template from its metadata.
pub(crate) fn open(path: &Path) -> Result<Checkpoint> {
    let bytes = Bytes::map(path)?;
    let damaged = |message: String| Error::corrupt(path, format!("not a whole GGUF file ({} bytes): {message}", bytes.len()));
    // candle divides by the file's `general.alignment` unseen: a zero there would end the process
    let content = std::panic::catch_unwind(|| Content::read(&mut Cursor::new(&bytes[..])))
        .map_err(|_| damaged("its header can't be parsed".into()))?
        .map_err(|e| damaged(e.to_string()))?;
    for (name, info) in &content.tensor_infos {
        source::check_blocks(path, name, info)?;
        let elements = info.shape.dims().iter().try_fold(1usize, |product, n| product.checked_mul(*n));
        let size = elements.and_then(|n| (n / info.ggml_dtype.block_size()).checked_mul(info.ggml_dtype.type_size()));
        let start = content.tensor_data_offset.checked_add(info.offset);
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size as u64));
        if end.is_none_or(|end| end > bytes.len() as u64) {
            return Err(damaged(format!("tensor `{name}` ends beyond the file; it may be cut short: download or copy it again")));
        }
    }
    let content = Arc::new(content);
    let metadata = Metadata { values: &content.metadata, path };
    let dequantized = |info| source::dequantized(&content, &bytes, info).map_err(|e| Error::corrupt(path, format!("tensor `{ROPE_FREQS}`: {e}")));
    let divisors = content.tensor_infos.get(ROPE_FREQS).map(dequantized).transpose()?;
    let config = config::config(&metadata, &content.tensor_infos, divisors)?;
    let tokenizer = tokenizer::build(&metadata)?;
    let source = GgufSource::new(path, bytes, Arc::clone(&content), &config, &metadata)?;
    let provenance = match metadata.text(PROVENANCE)? {
        Some(text) => Some(serde_json::from_str(text).map_err(|e| Error::config(path, format!("`{PROVENANCE}`: not valid JSON: {e}")))?),
        None => None,
    };
    let (config, source) = checked(config, Arc::new(source))?;
    let parts = Parts {
        path: path.to_path_buf(),
        config,
        source,
        tokenizer_files: tokenizer::files(&tokenizer, &metadata)?,
        tokenizer_config: Some(tokenizer::tokenizer_config(&metadata)?.to_string()),
        tokenizer,
        template_file: None,
        generation_config: Some(tokenizer::generation_config(&metadata)?.to_string()),
        provenance,
    };
    parts.assemble()
}
