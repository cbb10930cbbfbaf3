//! A GGUF's tensors under Hugging Face names, q and k rows put back into Hugging Face's order.

use super::metadata::Metadata;
use super::{ZERO_ATTENTION, ZERO_FEED_FORWARD};
use crate::config::{Architecture, Config};
use crate::held::Held;
use crate::kernels::ggml::BlockType;
use crate::safetensors_source::Bytes;
use crate::source::{RawTensor, Source, Stored, TensorBytes};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use candle_core::quantized::ggml_file::qtensor_from_ggml;
use candle_core::quantized::gguf_file::{Content, TensorInfo};
use candle_core::{DType, Device};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// GGUF's name of a tensor in a layer, Hugging Face's.
const LAYER_TENSORS: [(&str, &str); 11] = [
    ("attn_norm", "input_layernorm"),
    ("ffn_norm", "post_attention_layernorm"),
    ("attn_q", "self_attn.q_proj"),
    ("attn_k", "self_attn.k_proj"),
    ("attn_v", "self_attn.v_proj"),
    ("attn_output", "self_attn.o_proj"),
    ("attn_q_norm", "self_attn.q_norm"),
    ("attn_k_norm", "self_attn.k_norm"),
    ("ffn_gate", "mlp.gate_proj"),
    ("ffn_up", "mlp.up_proj"),
    ("ffn_down", "mlp.down_proj"),
];

/// The same outside of layers.
const TENSORS: [(&str, &str); 3] =
    [("token_embd.weight", "model.embed_tokens.weight"), ("output_norm.weight", "model.norm.weight"), ("output.weight", "lm_head.weight")];

/// GGUF's name of a tensor that Hugging Face calls `name`.
pub fn gguf_name(name: &str) -> Option<String> {
    if let Some((gguf, _)) = TENSORS.iter().find(|(_, hf)| *hf == name) {
        return Some((*gguf).to_string());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (part, kind) = rest.rsplit_once('.')?;
    let (gguf, _) = LAYER_TENSORS.iter().find(|(_, hf)| *hf == part)?;
    Some(format!("blk.{layer}.{gguf}.{kind}"))
}

fn hugging_face_name(gguf: &str) -> Option<(String, usize, &str)> {
    if let Some((_, plain)) = TENSORS.iter().find(|(name, _)| *name == gguf) {
        return Some(((*plain).to_string(), 0, ""));
    }
    let mut parts = gguf.strip_prefix("blk.")?.split('.');
    let (layer, part, kind) = (parts.next()?.parse().ok()?, parts.next()?, parts.next()?);
    let (_, name) = LAYER_TENSORS.iter().find(|(g, _)| *g == part)?;
    Some((format!("model.layers.{layer}.{name}.{kind}"), layer, part))
}

/// Which way the rows of q and k are put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RowOrder {
    /// Hugging Face keeps the two halves of a rotary head apart, …
    HuggingFace,
    /// … llama.cpp's llama and deci take turns between them.
    LlamaCpp,
}

/// Puts the rows of a matrix (or of a bias) into another order, head by head. `bytes` holds `heads` heads of an even number of equal rows.
pub fn permute_rows(bytes: &[u8], rows: usize, heads: usize, to: RowOrder) -> Vec<u8> {
    let (row, head_dim) = (bytes.len() / rows.max(1), rows / heads.max(1));
    let half = head_dim / 2;
    let mut permuted = Vec::with_capacity(bytes.len());
    for at in 0..rows {
        let (head, i) = (at / head_dim, at % head_dim);
        let from = head * head_dim
            + match to {
                RowOrder::HuggingFace => 2 * (i % half) + i / half,
                RowOrder::LlamaCpp => i / 2 + half * (i % 2),
            };
        permuted.extend_from_slice(&bytes[from * row..(from + 1) * row]);
    }
    permuted
}

/// A tensor's numbers as f32.
pub(super) fn dequantized(content: &Content, bytes: &Bytes, info: &TensorInfo) -> Result<Vec<f32>> {
    // (candle reads blocks as numbers where they lie, which a file needn't have aligned)
    let blocks = file_bytes(content, bytes, info).into_vec();
    let tensor = qtensor_from_ggml(info.ggml_dtype, &blocks, info.shape.dims().to_vec(), &Device::Cpu)?;
    Ok(tensor.dequantize(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}

/// A tensor's bytes in the file; `open` made sure that they are there.
fn file_bytes<'a>(content: &Content, bytes: &'a Bytes, info: &TensorInfo) -> TensorBytes<'a> {
    let start = (content.tensor_data_offset + info.offset) as usize;
    bytes.tensor(start..start + file_size(info))
}

pub(super) struct GgufSource {
    path: PathBuf,
    bytes: Bytes,
    content: Arc<Content>,
    /// Hugging Face name -> (GGUF name, heads to un-permute).
    names: BTreeMap<String, (String, Option<usize>)>,
}

impl std::fmt::Debug for GgufSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GgufSource({})", self.path.display())
    }
}

impl GgufSource {
    pub fn new(path: &Path, bytes: Bytes, content: Arc<Content>, config: &Config, metadata: &Metadata<'_>) -> Result<Self> {
        let (no_attention, no_mlp) = (metadata.layers(ZERO_ATTENTION)?, metadata.layers(ZERO_FEED_FORWARD)?);
        let mut names = BTreeMap::new();
        for gguf in content.tensor_infos.keys() {
            let Some((name, layer, part)) = hugging_face_name(gguf) else { continue };
            if (part.starts_with("attn_") && no_attention.contains(&layer)) || (part.starts_with("ffn_") && no_mlp.contains(&layer)) {
                continue;
            }
            // llama.cpp interleaves the halves of every rotary head of the llama architecture (and deci) only
            let heads = match (config.architecture, part) {
                (Architecture::Llama, "attn_q") => Some(config.layers.get(layer).map_or(0, |l| l.shape.kv_groups * l.shape.group_size)),
                (Architecture::Llama, "attn_k") => Some(config.layers.get(layer).map_or(0, |l| l.shape.kv_groups)),
                _ => None,
            };
            names.insert(name, (gguf.clone(), heads.filter(|h| *h > 0)));
        }
        Ok(Self { path: path.to_path_buf(), bytes, content, names })
    }

    fn info(&self, name: &str) -> Result<(&TensorInfo, &str, Option<usize>)> {
        let found = self.names.get(name).and_then(|(gguf, heads)| Some((self.content.tensor_infos.get(gguf)?, gguf.as_str(), *heads)));
        found.ok_or_else(|| self.mismatch(name, "a tensor of that name", "nothing: it is missing from the file"))
    }

    /// The rows of a tensor in Hugging Face's order.
    fn in_order<'a>(&self, name: &str, bytes: TensorBytes<'a>, rows: usize, heads: Option<usize>) -> Result<TensorBytes<'a>> {
        match heads {
            None => Ok(bytes),
            Some(heads) if rows > 0 && rows.is_multiple_of(2 * heads) => Ok(permute_rows(&bytes, rows, heads, RowOrder::HuggingFace).into()),
            Some(heads) => Err(self.mismatch(name, &format!("rows of {heads} heads of an even width"), &format!("{rows} rows"))),
        }
    }

    fn file_bytes(&self, info: &TensorInfo) -> TensorBytes<'_> {
        file_bytes(&self.content, &self.bytes, info)
    }
}

/// Rows are made of whole blocks.
///
/// # Errors
/// [`Error::Tensor`] for a row that isn't.
pub(super) fn check_blocks(path: &Path, name: &str, info: &TensorInfo) -> Result<()> {
    let (shape, block) = (info.shape.dims(), info.ggml_dtype.block_size());
    if shape.last().copied().unwrap_or(1).is_multiple_of(block) {
        return Ok(());
    }
    let kind = type_name(info.ggml_dtype);
    Err(Error::Tensor {
        path: path.to_path_buf(),
        tensor: name.into(),
        expected: format!("rows of a multiple of {block} numbers, which is a block of its type {kind}"),
        found: format!("shape {shape:?}"),
    })
}

/// A type as everybody writes it: Q4_K, not candle's Q4K.
fn type_name(kind: GgmlDType) -> String {
    let name = format!("{kind:?}");
    name.strip_suffix('K').map_or(name.clone(), |bits| format!("{bits}_K"))
}

fn file_size(info: &TensorInfo) -> usize {
    info.shape.elem_count() / info.ggml_dtype.block_size() * info.ggml_dtype.type_size()
}

/// The types whose elements need no decoding.
fn plain_type(kind: GgmlDType) -> Option<DType> {
    match kind {
        GgmlDType::F32 => Some(DType::F32),
        GgmlDType::F16 => Some(DType::F16),
        GgmlDType::BF16 => Some(DType::BF16),
        _ => None,
    }
}

/// What holds blocks of a type as they are; plain numbers, and what ggml has for activations alone, are read as f32.
fn held(kind: GgmlDType) -> Option<Held> {
    let blocks = || BlockType::ALL.into_iter().find(|of| of.ggml() == kind).map(Held::Blocks);
    if kind == GgmlDType::Q8_0 { Some(Held::Q8_0) } else { blocks() }
}

impl Source for GgufSource {
    fn names(&self) -> Vec<String> {
        self.names.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.info(name).ok().map(|(info, _, _)| info.shape.dims().to_vec())
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        Ok(plain_type(self.info(name)?.0.ggml_dtype).unwrap_or(DType::F32))
    }

    fn stored(&self, name: &str) -> Result<Stored> {
        let (info, _, _) = self.info(name)?;
        Ok(Stored { kind: type_name(info.ggml_dtype), bytes: file_size(info) as u64 })
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let (info, gguf, heads) = self.info(name)?;
        let shape = info.shape.dims().to_vec();
        let (dtype, bytes) = match plain_type(info.ggml_dtype) {
            Some(dtype) => (dtype, self.file_bytes(info)),
            None => {
                let values = dequantized(&self.content, &self.bytes, info).map_err(|e| Error::corrupt(&self.path, format!("tensor `{gguf}`: {e}")))?;
                (DType::F32, values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into())
            }
        };
        let bytes = self.in_order(name, bytes, shape.first().copied().unwrap_or(0), heads)?;
        Ok(RawTensor { dtype, shape, bytes })
    }

    fn block_type(&self, name: &str) -> Result<Option<Held>> {
        Ok(held(self.info(name)?.0.ggml_dtype))
    }

    fn blocks(&self, name: &str) -> Result<TensorBytes<'_>> {
        let (info, _, heads) = self.info(name)?;
        self.in_order(name, self.file_bytes(info), info.shape.dims().first().copied().unwrap_or(0), heads)
    }

    fn keeps_types(&self) -> bool {
        true
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        let tensor = self.names.get(name).map_or_else(|| name.to_string(), |(gguf, _)| gguf.clone());
        Error::Tensor { path: self.path.clone(), tensor, expected: expected.into(), found: found.into() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_from_llama_cpps_order() {
        let rows: Vec<u8> = (0..24).collect(); // 2 heads of 6 rows of 2 bytes
        let there = permute_rows(&rows, 12, 2, RowOrder::LlamaCpp);
        assert_eq!(there.iter().step_by(2).map(|b| b / 2).collect::<Vec<_>>(), [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]);
        assert_eq!(permute_rows(&there, 12, 2, RowOrder::HuggingFace), rows);
    }

    #[test]
    fn names_map_both_ways() {
        for name in ["model.layers.3.self_attn.q_proj.bias", "model.layers.11.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"] {
            assert_eq!(hugging_face_name(&gguf_name(name).unwrap()).unwrap().0, name);
        }
        assert_eq!(gguf_name("model.layers.3.self_attn.rotary_emb.inv_freq"), None);
    }
}
