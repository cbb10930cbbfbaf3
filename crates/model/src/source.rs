//! Where tensors come from: one trait, two implementations (safetensors and GGUF), so that all after it is the same.

use crate::held::Held;
use crate::{Architecture, Error, Result};
use candle_core::{DType, Device, Tensor};
use std::borrow::Cow;

/// A tensor as it is stored, row-major.
#[derive(Debug)]
pub struct RawTensor<'a> {
    /// Element type: f32, f16 or bf16.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Cow<'a, [u8]>,
}

/// A tensor's place in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The type's name: `F32`, `BF16`, `Q8_0`, ….
    pub kind: String,
    /// Bytes that it takes.
    pub bytes: u64,
}

/// A weights file under Hugging Face's tensor names.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// All tensor names, sorted.
    fn names(&self) -> Vec<String>;

    /// Dimensions of a tensor, `None` when there is no such tensor.
    fn shape(&self, name: &str) -> Option<Vec<usize>>;

    /// The tensor's bytes; quantised GGUF types come dequantised to f32.
    ///
    /// # Errors
    /// [`Error::Tensor`] when it is missing or of a type that can't be read.
    fn raw(&self, name: &str) -> Result<RawTensor<'_>>;

    /// The type of the elements that [`Source::raw`] gives. A file's header says it without reading them.
    ///
    /// # Errors
    /// As [`Source::raw`].
    fn dtype(&self, name: &str) -> Result<DType> {
        Ok(self.raw(name)?.dtype)
    }

    /// What holds a tensor's blocks as they are, of one that is stored in blocks. `None`: [`Source::dtype`] is what it is stored in.
    ///
    /// # Errors
    /// As [`Source::raw`].
    fn block_type(&self, _name: &str) -> Result<Option<Held>> {
        Ok(None)
    }

    /// The blocks of a tensor that has a [`Source::block_type`], as ggml has their bytes.
    ///
    /// # Errors
    /// As [`Source::raw`], and for a tensor without blocks.
    fn blocks(&self, name: &str) -> Result<Cow<'_, [u8]>> {
        Err(self.mismatch(name, "a tensor in blocks", "plain numbers"))
    }

    /// Whether the types that tensors are stored in were chosen for running the model, as a GGUF's are.
    fn keeps_types(&self) -> bool {
        false
    }

    /// How the tensor is stored.
    ///
    /// # Errors
    /// As [`Source::raw`].
    fn stored(&self, name: &str) -> Result<Stored> {
        let raw = self.raw(name)?;
        Ok(Stored { kind: format!("{:?}", raw.dtype), bytes: raw.bytes.len() as u64 })
    }

    /// An [`Error::Tensor`] about `name`, with the file that holds (or should hold) it.
    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error;

    /// Loads a tensor, checking its shape and that every number is finite.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing tensor, another shape, or a NaN or infinite element.
    fn load(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        match self.shape(name) {
            Some(found) if found == shape => {}
            Some(found) => return Err(self.mismatch(name, &format!("shape {shape:?}"), &format!("shape {found:?}"))),
            None => return Err(self.mismatch(name, &format!("shape {shape:?}"), "nothing: it is missing from the file")),
        }
        let raw = self.raw(name)?;
        let values = raw.to_f32();
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(self.mismatch(name, "finite numbers", &format!("{} at element {at}: the weights are damaged", values[at])));
        }
        let host = Tensor::from_vec(values, shape, &Device::Cpu)?;
        Ok(host.to_dtype(dtype)?.to_device(device)?)
    }
}

impl RawTensor<'_> {
    /// The elements widened to f32 (exact for all three types).
    pub fn to_f32(&self) -> Vec<f32> {
        let halves = || self.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]));
        match self.dtype {
            DType::BF16 => halves().map(|b| f32::from_bits(u32::from(b) << 16)).collect(),
            DType::F16 => halves().map(|b| half::f16::from_bits(b).to_f32()).collect(),
            _ => self.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        }
    }
}

/// Tensor names of a family, as Hugging Face spells them. The part after the layer's prefix is what differs.
#[derive(Debug, Clone, Copy)]
pub struct TensorNames {
    opt: bool,
}

macro_rules! layer_names {
    ($($(#[$doc:meta])* $method:ident: $llama:literal, $opt:literal;)*) => {$(
        $(#[$doc])*
        pub fn $method(&self, layer: usize) -> String {
            format!("{}{}", self.layer_prefix(layer), if self.opt { $opt } else { $llama })
        }
    )*};
}

impl TensorNames {
    /// The names of a family.
    pub fn of(architecture: Architecture) -> Self {
        Self { opt: architecture == Architecture::Opt }
    }

    /// `model.layers.3.`, what all of a layer's tensors start with.
    pub fn layer_prefix(&self, layer: usize) -> String {
        format!("model.{}layers.{layer}.", if self.opt { "decoder." } else { "" })
    }

    /// Which layer a tensor belongs to, and its name within the layer (`self_attn.q_proj.weight`).
    pub fn in_layer<'a>(&self, name: &'a str) -> Option<(usize, &'a str)> {
        let (layer, rest) = name.strip_prefix(if self.opt { "model.decoder.layers." } else { "model.layers." })?.split_once('.')?;
        Some((layer.parse().ok()?, rest))
    }

    layer_names! {
        /// Query projection, [heads * head_dim, hidden].
        q: "self_attn.q_proj.weight", "self_attn.q_proj.weight";
        /// Key projection, [kv_groups * head_dim, hidden].
        k: "self_attn.k_proj.weight", "self_attn.k_proj.weight";
        /// Value projection, [kv_groups * head_dim, hidden].
        v: "self_attn.v_proj.weight", "self_attn.v_proj.weight";
        /// Attention output projection, [hidden, heads * head_dim].
        o: "self_attn.o_proj.weight", "self_attn.out_proj.weight";
        /// Qwen3's norm of every query head, [head_dim].
        q_norm: "self_attn.q_norm.weight", "self_attn.q_norm.weight";
        /// Qwen3's norm of every key head, [head_dim].
        k_norm: "self_attn.k_norm.weight", "self_attn.k_norm.weight";
        /// Norm of the attention's input, [hidden].
        attention_norm: "input_layernorm.weight", "self_attn_layer_norm.weight";
        /// Norm of the MLP's input, [hidden].
        mlp_norm: "post_attention_layernorm.weight", "final_layer_norm.weight";
        /// Gate projection, [ffn, hidden]; only gated MLPs have it.
        gate: "mlp.gate_proj.weight", "gate_proj.weight";
        /// Up projection (OPT: fc1), [ffn, hidden].
        up: "mlp.up_proj.weight", "fc1.weight";
        /// Down projection (OPT: fc2), [hidden, ffn].
        down: "mlp.down_proj.weight", "fc2.weight";
    }

    /// Token embeddings, [vocab, hidden].
    pub fn embedding(&self) -> &'static str {
        if self.opt { "model.decoder.embed_tokens.weight" } else { "model.embed_tokens.weight" }
    }

    /// OPT's learned positions, [max_position_embeddings + offset, hidden].
    pub fn positions(&self) -> &'static str {
        "model.decoder.embed_positions.weight"
    }

    /// Norm before the head, [hidden].
    pub fn final_norm(&self) -> &'static str {
        if self.opt { "model.decoder.final_layer_norm.weight" } else { "model.norm.weight" }
    }

    /// Output head of an untied model, [vocab, hidden].
    pub fn head(&self) -> &'static str {
        "lm_head.weight"
    }
}

/// `x.weight` -> `x.bias`.
pub fn bias_of(weight: &str) -> String {
    format!("{}bias", weight.strip_suffix("weight").unwrap_or(weight))
}
