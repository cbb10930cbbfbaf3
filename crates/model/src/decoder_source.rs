//! A decoder's tensors under their file names: what was evaluated is what is written.

use crate::decoder::Decoder;
use crate::linear::{Linear, Norm};
use crate::matrix::Matrix;
use crate::source::{RawTensor, Source, TensorNames, bias_of};
use crate::sub_block::Inner;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

/// A [`Source`] over a decoder in memory, masked, reordered and repaired as it is. Layers keep their numbers; an absent sub-block has
/// no tensors. Elements become plain numbers of their stored type when they are read: the decoder's memory is shared until then.
#[derive(Debug)]
pub struct DecoderSource {
    tensors: BTreeMap<String, (Numbers, DType)>,
}

#[derive(Debug, Clone)]
enum Numbers {
    Tensor(Tensor),
    Matrix(Matrix),
}

impl Numbers {
    fn shape(&self) -> Vec<usize> {
        match self {
            Self::Tensor(tensor) => tensor.dims().to_vec(),
            Self::Matrix(matrix) => vec![matrix.rows(), matrix.columns()],
        }
    }

    /// Some rows at a time: what is laid out is nowhere as a whole besides.
    fn bytes(&self, dtype: DType) -> Result<Vec<u8>> {
        const ROWS: usize = 1024;
        match self {
            Self::Tensor(tensor) => bytes(tensor, dtype),
            Self::Matrix(matrix) => {
                let mut whole = Vec::with_capacity(matrix.rows() * matrix.columns() * dtype.size_in_bytes());
                for from in (0..matrix.rows()).step_by(ROWS) {
                    whole.extend(bytes(&matrix.rows_at(from..matrix.rows().min(from + ROWS))?, dtype)?);
                }
                Ok(whole)
            }
        }
    }
}

/// Little-endian elements, rounded to `dtype`.
fn bytes(tensor: &Tensor, dtype: DType) -> Result<Vec<u8>> {
    // (a view's own numbers: the whole memory behind it would be copied)
    let tensor = if tensor.device().is_cpu() { tensor.clone() } else { tensor.force_contiguous()? };
    let flat = tensor.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(dtype)?;
    Ok(match dtype {
        DType::BF16 => flat.to_vec1::<half::bf16>()?.into_iter().flat_map(half::bf16::to_le_bytes).collect(),
        DType::F16 => flat.to_vec1::<half::f16>()?.into_iter().flat_map(half::f16::to_le_bytes).collect(),
        _ => flat.to_dtype(DType::F32)?.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes).collect(),
    })
}

impl DecoderSource {
    /// The tensors of `decoder`, each in the type that `like` has it in; in that of `like`'s embedding where `like` has no such tensor.
    ///
    /// # Errors
    /// [`Error::Tensor`] when `like` has no embedding.
    pub fn new(decoder: &Decoder, like: &dyn Source) -> Result<Self> {
        let names = TensorNames::of(decoder.config().architecture);
        let fallback = like.dtype(names.embedding())?;
        let mut source = Self { tensors: BTreeMap::new() };
        let mut put = |name: String, numbers: Numbers| {
            let dtype = if like.shape(&name).is_some() { like.dtype(&name).unwrap_or(fallback) } else { fallback };
            source.tensors.insert(name, (numbers, dtype));
        };
        put(names.embedding().into(), Numbers::Matrix(decoder.embedding.clone()));
        if let Some(positions) = &decoder.positions {
            put(names.positions().into(), Numbers::Tensor(positions.clone()));
        }
        if !decoder.config().tie_word_embeddings {
            put(names.head().into(), Numbers::Matrix(decoder.head.matrix().clone()));
        }
        let mut norm = |name: String, norm: &Norm| {
            // a LayerNorm without parameters has none in files
            if norm.is_stored() {
                if let Some(bias) = norm.bias() {
                    put(bias_of(&name), Numbers::Tensor(bias.clone()));
                }
                put(name, Numbers::Tensor(norm.weight().clone()));
            }
        };
        if let Some(last) = &decoder.final_norm {
            norm(names.final_norm().into(), last);
        }
        for s in 0..decoder.last_boundary() {
            let Some(block) = decoder.sub_block(s) else { continue };
            let l = s / 2;
            norm(if s.is_multiple_of(2) { names.attention_norm(l) } else { names.mlp_norm(l) }, &block.norm);
            if let Inner::Attention { qk_norm: Some((q, k)), .. } = &block.inner {
                norm(names.q_norm(l), q);
                norm(names.k_norm(l), k);
            }
        }
        let mut linear = |name: String, layer: &Linear| {
            if let Some(bias) = layer.bias() {
                put(bias_of(&name), Numbers::Tensor(bias.clone()));
            }
            put(name, Numbers::Matrix(layer.matrix().clone()));
        };
        for s in 0..decoder.last_boundary() {
            let Some(block) = decoder.sub_block(s) else { continue };
            let l = s / 2;
            match &block.inner {
                Inner::Attention { q, k, v, .. } => {
                    for (name, layer) in [(names.q(l), q), (names.k(l), k), (names.v(l), v), (names.o(l), block.output())] {
                        linear(name, layer);
                    }
                }
                Inner::Mlp { gate, up, .. } => {
                    if let Some(gate) = gate {
                        linear(names.gate(l), gate);
                    }
                    linear(names.up(l), up);
                    linear(names.down(l), block.output());
                }
            }
        }
        Ok(source)
    }
}

impl Source for DecoderSource {
    fn names(&self) -> Vec<String> {
        self.tensors.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|(numbers, _)| numbers.shape())
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        self.tensors.get(name).map(|(_, dtype)| *dtype).ok_or_else(|| self.mismatch(name, "a tensor", "nothing: the decoder has none of this name"))
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let Some((numbers, dtype)) = self.tensors.get(name) else {
            return Err(self.mismatch(name, "a tensor", "nothing: the decoder has none of this name"));
        };
        Ok(RawTensor { dtype: *dtype, shape: numbers.shape(), bytes: numbers.bytes(*dtype)?.into() })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        Error::Tensor { path: "the decoder in memory".into(), tensor: name.into(), expected: expected.into(), found: found.into() }
    }
}
