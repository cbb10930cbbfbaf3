//! What matrices are held in: what was asked for a model, and what that means for each of its matrices.

use crate::kernels::ggml::BlockType;
use crate::kernels::packed::STEP;
use crate::source::{Source, TensorNames};
use crate::{Config, Error, Result};
use candle_core::DType;
use std::collections::BTreeMap;

/// What a model's matrices are to be held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightType {
    /// Plain numbers.
    Plain(DType),
    /// GGUF's Q8_0 on the CPU: blocks of 32 inputs in 8 bits with a 16-bit scale, multiplied with activations in 8 bits.
    Q8_0,
    /// GGUF's Q4_K on the CPU, the head in Q6_K; as llama.cpp has it, Q5_0 and Q8_0 for rows that are no whole number of 256 weights.
    Q4K,
    /// Every matrix in the type that its file has it in, on the CPU.
    Stored,
}

/// What one matrix is held in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Held {
    /// Plain numbers.
    Plain(DType),
    /// Q8_0.
    Q8_0,
    /// Another of GGUF's block types.
    Blocks(BlockType),
}

/// Tensors and bytes of a model that are held in one type, by the type's name.
pub type HeldBytes = BTreeMap<&'static str, (usize, usize)>;

impl From<DType> for WeightType {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl WeightType {
    /// Its name: `f32`, `bf16`, `q8_0`, `q4_k`, `stored`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.as_str(),
            Self::Q8_0 => "q8_0",
            Self::Q4K => "q4_k",
            Self::Stored => "stored",
        }
    }

    /// The plain type, for what changes weights.
    ///
    /// # Errors
    /// [`Error::Device`] for a quantised type.
    pub fn plain(self) -> Result<DType> {
        match self {
            Self::Plain(dtype) => Ok(dtype),
            other => Err(Error::Device(format!("weights in {} can be run, not changed: load the model with --dtype f32, bf16 or f16", other.as_str()))),
        }
    }

    /// What the matrix `name`, with rows of `columns` weights, is held in. `is_head`: it gives the logits.
    ///
    /// # Errors
    /// [`Error::Tensor`] for rows that the type can't hold; as [`Source::dtype`].
    pub fn of(self, source: &dyn Source, name: &str, columns: usize, is_head: bool) -> Result<Held> {
        let Self::Q4K = self else {
            return Ok(match self {
                Self::Plain(dtype) => Held::Plain(dtype),
                Self::Stored => match source.block_type(name)? {
                    Some(held) => held,
                    None => Held::Plain(source.dtype(name)?),
                },
                _ => Held::Q8_0,
            });
        };
        let fits = |of: BlockType| columns.is_multiple_of(of.layout().block);
        match is_head {
            true if fits(BlockType::Q6K) => Ok(Held::Blocks(BlockType::Q6K)),
            true => Ok(Held::Q8_0),
            false if fits(BlockType::Q4K) => Ok(Held::Blocks(BlockType::Q4K)),
            false if fits(BlockType::Q5_0) => Ok(Held::Blocks(BlockType::Q5_0)),
            false => Err(source.mismatch(
                name,
                &format!("rows of a multiple of {STEP} weights, which q4_k needs (of 256, else they are q5_0)"),
                &format!("rows of {columns}: use --dtype q8_0, f16 or bf16"),
            )),
        }
    }

    /// What all matrices of a model are held in, without reading them.
    ///
    /// # Errors
    /// As [`WeightType::of`].
    pub fn of_all(self, config: &Config, source: &dyn Source) -> Result<HeldBytes> {
        let names = TensorNames::of(config.architecture);
        let mut held = HeldBytes::new();
        let mut add = |name: &str, is_head: bool| -> Result<()> {
            let Some([rows, columns]) = source.shape(name).and_then(|shape| <[usize; 2]>::try_from(shape).ok()) else { return Ok(()) };
            let of = self.of(source, name, columns, is_head)?;
            let (tensors, bytes) = held.entry(of.as_str()).or_default();
            (*tensors, *bytes) = (*tensors + 1, *bytes + of.bytes(rows, columns));
            Ok(())
        };
        add(names.embedding(), config.tie_word_embeddings)?;
        for (l, layer) in config.layers.iter().enumerate() {
            if layer.shape.kv_groups > 0 {
                [names.q(l), names.k(l), names.v(l), names.o(l)].iter().try_for_each(|name| add(name, false))?;
            }
            if layer.shape.ffn > 0 {
                let gate = config.gated_mlp.then(|| names.gate(l));
                gate.iter().chain([&names.up(l), &names.down(l)]).try_for_each(|name| add(name, false))?;
            }
        }
        if !config.tie_word_embeddings {
            add(names.head(), true)?;
        }
        Ok(held)
    }

    /// What is to be said to who asked for this type: that some matrices can't be held in it.
    ///
    /// # Errors
    /// As [`WeightType::of`].
    pub fn warning(self, config: &Config, source: &dyn Source) -> Result<Option<String>> {
        if self != Self::Q4K {
            return Ok(None);
        }
        let mut held = self.of_all(config, source)?;
        held.retain(|of, _| ![BlockType::Q4K.as_str(), BlockType::Q6K.as_str()].contains(of));
        let tensors: usize = held.values().map(|(tensors, _)| tensors).sum();
        let said =
            || format!("{tensors} matrices whose rows are no multiple of 256 weights are not in q4_k, but as llama.cpp has them: {}", held_in_words(&held));
        Ok((tensors > 0).then(said))
    }
}

impl Held {
    /// Its name: `f32`, `q8_0`, `q5_0`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.as_str(),
            Self::Q8_0 => "q8_0",
            Self::Blocks(of) => of.as_str(),
        }
    }

    /// Bytes of a matrix.
    pub fn bytes(self, rows: usize, columns: usize) -> usize {
        match self {
            Self::Plain(dtype) => rows * columns * dtype.size_in_bytes(),
            Self::Q8_0 => rows * columns.div_ceil(STEP) * (STEP + 2),
            Self::Blocks(of) => of.layout().held_bytes(rows, columns),
        }
    }
}

/// `q4_k 61.2 MB, q6_k 24.0 MB`: the types of a model's matrices, the largest first.
pub fn held_in_words(held: &HeldBytes) -> String {
    let mut types: Vec<_> = held.iter().collect();
    types.sort_by_key(|(_, (_, bytes))| std::cmp::Reverse(*bytes));
    types.iter().map(|(name, (_, bytes))| format!("{name} {:.1} MB", *bytes as f64 / 1e6)).collect::<Vec<_>>().join(", ")
}
