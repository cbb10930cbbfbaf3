//! Where tensors come from: one trait, two implementations (safetensors and GGUF), so that all after it is the same.

use crate::held::Held;
use crate::{Architecture, Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::borrow::Cow;
use std::ops::{Deref, Range};

/// A tensor as it is stored, row-major.
#[derive(Debug)]
pub struct RawTensor<'a> {
    /// Element type: f32, f16 or bf16.
    pub dtype: DType,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: TensorBytes<'a>,
}

/// A tensor's bytes: in memory, or in a mapped file, whose pages the process lets go with them. What is loaded is held elsewhere by then, laid out for its
/// products; without this a model being loaded would count twice.
#[derive(Debug)]
pub struct TensorBytes<'a> {
    bytes: Cow<'a, [u8]>,
    /// The file, and where the tensor lies in it.
    mapped: Option<(&'a memmap2::Mmap, Range<usize>)>,
}

impl<'a> TensorBytes<'a> {
    /// Some bytes of a mapped file.
    pub(crate) fn mapped(map: &'a memmap2::Mmap, at: Range<usize>) -> Self {
        Self { bytes: Cow::Borrowed(&map[at.clone()]), mapped: Some((map, at)) }
    }

    /// Leaves out what comes after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        match &mut self.bytes {
            Cow::Borrowed(bytes) => *bytes = &bytes[..len.min(bytes.len())],
            Cow::Owned(bytes) => bytes.truncate(len),
        }
    }

    /// The bytes in memory of their own.
    pub fn into_vec(mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes).into_owned()
    }
}

impl From<Vec<u8>> for TensorBytes<'_> {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes: Cow::Owned(bytes), mapped: None }
    }
}

impl<'a> From<&'a [u8]> for TensorBytes<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self { bytes: Cow::Borrowed(bytes), mapped: None }
    }
}

impl Deref for TensorBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for TensorBytes<'_> {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some((map, at)) = &self.mapped {
            // SAFETY: the map is of a file and read-only, so that pages which are needed again are read again
            let advised = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, at.start, at.len()) };
            if let Err(error) = advised {
                tracing::debug!(%error, "pages of a mapped file stay in memory");
            }
        }
    }
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
    fn blocks(&self, name: &str) -> Result<TensorBytes<'_>> {
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

    /// As [`Source::raw`], of a tensor whose shape is known and whose numbers are finite.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing tensor, another shape, or a NaN or infinite element.
    fn checked(&self, name: &str, shape: &[usize]) -> Result<RawTensor<'_>> {
        match self.shape(name) {
            Some(found) if found == shape => {}
            Some(found) => return Err(self.mismatch(name, &format!("shape {shape:?}"), &format!("shape {found:?}"))),
            None => return Err(self.mismatch(name, &format!("shape {shape:?}"), "nothing: it is missing from the file")),
        }
        let raw = self.raw(name)?;
        match raw.not_finite() {
            Some((at, value)) => Err(self.mismatch(name, "finite numbers", &format!("{value} at element {at}: the weights are damaged"))),
            None => Ok(raw),
        }
    }

    /// Loads a tensor, checking it as [`Source::checked`] does.
    ///
    /// # Errors
    /// Those of [`Source::checked`].
    fn load(&self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let host = Tensor::from_vec(self.checked(name, shape)?.to_f32(), shape, &Device::Cpu)?;
        Ok(host.to_dtype(dtype)?.to_device(device)?)
    }
}

impl RawTensor<'_> {
    /// The elements widened to f32 (exact for all three types).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size_in_bytes()];
        self.read(0, &mut values);
        values
    }

    /// The first element that is NaN or infinite, and where it is.
    fn not_finite(&self) -> Option<(usize, f32)> {
        const SOME: usize = 4096;
        let count = self.bytes.len() / self.dtype.size_in_bytes();
        (0..count.div_ceil(SOME)).into_par_iter().find_map_first(|chunk| {
            let (from, mut some) = (chunk * SOME, [0f32; SOME]);
            let some = &mut some[..SOME.min(count - from)];
            self.read(from, some);
            some.iter().position(|value| !value.is_finite()).map(|at| (from + at, some[at]))
        })
    }

    /// Elements from the one at `from` on, in row-major order, widened to f32.
    pub fn read(&self, from: usize, to: &mut [f32]) {
        let bytes = &self.bytes[from * self.dtype.size_in_bytes()..];
        let halves = |of: fn(u16) -> f32, to: &mut [f32]| to.iter_mut().zip(bytes.as_chunks().0).for_each(|(to, b)| *to = of(u16::from_le_bytes(*b)));
        match self.dtype {
            DType::BF16 => halves(|bits| f32::from_bits(u32::from(bits) << 16), to),
            DType::F16 => halves(|bits| half::f16::from_bits(bits).to_f32(), to),
            _ => to.iter_mut().zip(bytes.as_chunks().0).for_each(|(to, b)| *to = f32::from_le_bytes(*b)),
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
