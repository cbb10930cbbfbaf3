//! The decoder: `embed -> [attention?, mlp?] x layers -> norm -> head`, dense, masked or sliced, one implementation.
//!
//! A **masked** decoder ([`Decoder::masked`]) is this same struct over views of the parent's weights; a **sliced** one was loaded from
//! smaller tensors. Sub-block boundaries are numbered 0..=2L: boundary 2l lies before layer l's attention, 2l + 1 before its MLP.

use crate::attention::AttentionSpec;
use crate::batch::{Batch, Span};
use crate::cache::KvCache;
use crate::config::{Config, LayerShape, Positions};
use crate::device::weight_type;
use crate::held::WeightType;
use crate::kernels;
use crate::linear::{Linear, Norm, Types};
use crate::matrix::Matrix;
use crate::pattern::{Gene, Pattern};
use crate::source::{Source, TensorNames};
use crate::sub_block::{Inner, SubBlock};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::ops::Range;

/// A model on a device. Cloning and masking share the weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    pub(crate) embedding: Matrix,
    /// Learned positions (OPT).
    pub(crate) positions: Option<Tensor>,
    /// Two a layer, attention first; an absent one is the identity on the residual stream.
    sub_blocks: Vec<Option<SubBlock>>,
    pub(crate) final_norm: Option<Norm>,
    pub(crate) head: Linear,
    device: Device,
    types: Types,
}

impl Decoder {
    /// Loads all weights.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing, misshapen or non-finite tensor; [`Error::Device`] for a dtype that the device can't compute in.
    pub fn load(config: &Config, source: &dyn Source, device: &Device, weights: impl Into<WeightType>) -> Result<Self> {
        let types = Types::on(device, weight_type(device, Some(weights.into()))?)?;
        let names = TensorNames::of(config.architecture);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let held = types.weights.of(source, names.embedding(), hidden, config.tie_word_embeddings)?;
        let embedding = Matrix::load(source, names.embedding(), [vocab, hidden], held, device)?;
        let positions = match config.positions {
            Positions::Learned { offset } => Some(source.load(names.positions(), &[config.max_position_embeddings + offset, hidden], types.compute, device)?),
            Positions::Rope(_) => None,
        };
        let norm = |name: &str, width: usize| Norm::load(source, name, width, config.norm, config.norm_eps, types.compute, device);
        let linear = |name: String, out: usize, input: usize, bias: bool| {
            let held = types.weights.of(source, &name, input, name == names.head())?;
            Linear::load(source, &name, [out, input], bias, held, types.compute, device)
        };
        let d = config.head_dim;
        let mut sub_blocks = Vec::with_capacity(2 * config.num_layers());
        for (l, layer) in config.layers.iter().enumerate() {
            let LayerShape { kv_groups, group_size, ffn } = layer.shape;
            let heads = kv_groups * group_size;
            sub_blocks.push(if kv_groups == 0 {
                None
            } else {
                let head_norm = |name: String| Norm::load(source, &name, d, crate::NormKind::Rms, config.norm_eps, types.compute, device);
                Some(SubBlock {
                    norm: norm(&names.attention_norm(l), hidden)?,
                    inner: Inner::attention(
                        [
                            linear(names.q(l), heads * d, hidden, config.qkv_bias)?,
                            linear(names.k(l), kv_groups * d, hidden, config.qkv_bias)?,
                            linear(names.v(l), kv_groups * d, hidden, config.qkv_bias)?,
                        ],
                        if config.qk_norm { Some((head_norm(names.q_norm(l))?, head_norm(names.k_norm(l))?)) } else { None },
                        AttentionSpec { kv_groups, group_size, head_dim: d, scale: (d as f32).sqrt().recip(), window: layer.sliding_window },
                    )?,
                    output: linear(names.o(l), hidden, heads * d, config.output_bias)?,
                })
            });
            sub_blocks.push(if ffn == 0 {
                None
            } else {
                Some(SubBlock {
                    norm: norm(&names.mlp_norm(l), hidden)?,
                    inner: Inner::mlp(
                        if config.gated_mlp { Some(linear(names.gate(l), ffn, hidden, config.mlp_bias)?) } else { None },
                        linear(names.up(l), ffn, hidden, config.mlp_bias)?,
                        config.activation,
                    )?,
                    output: linear(names.down(l), hidden, ffn, config.mlp_bias)?,
                })
            });
        }
        let final_norm = if config.pre_norm { Some(norm(names.final_norm(), hidden)?) } else { None };
        let head = if config.tie_word_embeddings { Linear::over(embedding.clone()) } else { linear(names.head().to_string(), vocab, hidden, false)? };
        Ok(Self { config: config.clone(), embedding, positions, sub_blocks, final_norm, head, device: device.clone(), types })
    }

    /// The same weights under a pattern: views, no copies.
    ///
    /// # Errors
    /// [`Error::Pattern`] when the pattern is for a model of another depth or keeps more than there is.
    pub fn masked(&self, pattern: &Pattern) -> Result<Self> {
        let pattern = Pattern::new(pattern.layers().to_vec(), &self.config)?;
        let widths = pattern.layers().iter().flat_map(|gene| [gene.kv_groups, gene.ffn]);
        let narrowed = |(block, width): (&Option<SubBlock>, usize)| block.as_ref().filter(|_| width > 0).map(|b| b.narrowed(width)).transpose();
        let sub_blocks = self.sub_blocks.iter().zip(widths).map(narrowed).collect::<Result<_>>()?;
        Ok(Self { config: self.config.with_pattern(&pattern), sub_blocks, ..self.clone() })
    }

    /// The same embedding, norm and head around other sub-blocks (two a layer, attention first).
    ///
    /// # Errors
    /// [`Error::Pattern`] when their number differs or one is wider than this decoder's.
    pub fn with_sub_blocks(&self, sub_blocks: Vec<Option<SubBlock>>) -> Result<Self> {
        let width = |s: usize| sub_blocks.get(s).and_then(Option::as_ref).map_or(0, SubBlock::width);
        let genes = (0..sub_blocks.len() / 2).map(|l| Gene { kv_groups: width(2 * l), ffn: width(2 * l + 1) }).collect();
        let pattern = Pattern::new(genes, &self.config)?;
        Ok(Self { config: self.config.with_pattern(&pattern), sub_blocks, ..self.clone() })
    }

    /// The configuration of what this decoder computes (under its mask, if it has one).
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it computes in: the type of activations and caches.
    pub fn dtype(&self) -> DType {
        self.types.compute
    }

    /// What its matrices were asked to be held in.
    pub fn weight_type(&self) -> WeightType {
        self.types.weights
    }

    /// Bytes of the weights that a pass multiplies its tokens with: of all sub-blocks and the head.
    pub fn multiplied_bytes(&self) -> usize {
        let blocks = self.sub_blocks.iter().flatten().flat_map(SubBlock::linears);
        blocks.chain([&self.head]).map(Linear::weight_bytes).sum()
    }

    /// Sub-block `s` (0: attention of layer 0, 1: its MLP, 2: attention of layer 1, …), `None` where it is absent.
    pub fn sub_block(&self, s: usize) -> Option<&SubBlock> {
        self.sub_blocks.get(s).and_then(Option::as_ref)
    }

    /// Sub-block boundaries: 2 x layers.
    pub fn last_boundary(&self) -> usize {
        self.sub_blocks.len()
    }

    /// Prepares a pass over these spans.
    ///
    /// # Errors
    /// [`Error::Input`] when a learned position table has no entry for a position.
    pub fn batch(&self, spans: &[Span]) -> Result<Batch> {
        if let Positions::Learned { .. } = self.config.positions {
            let limit = self.config.max_position_embeddings;
            if let Some(span) = spans.iter().find(|s| s.past + s.len > limit) {
                return Err(Error::Input(format!("position {} is beyond the model's {limit} learned positions", span.past + span.len - 1)));
            }
        }
        Batch::new(&self.config, spans, &self.device)
    }

    /// Token embeddings (plus learned positions), [tokens, hidden].
    ///
    /// # Errors
    /// [`Error::Input`] for a token beyond the vocabulary or a count that differs from the batch's.
    pub fn embed(&self, tokens: &[u32], batch: &Batch) -> Result<Tensor> {
        self.check_tokens(tokens, batch.tokens())?;
        let hidden = self.embedding.select_rows(tokens)?.to_dtype(self.dtype())?;
        self.positioned(hidden, batch)
    }

    pub(crate) fn check_tokens(&self, tokens: &[u32], expected: usize) -> Result<()> {
        if tokens.len() != expected {
            return Err(Error::Input(format!("expected {expected} tokens, found {}", tokens.len())));
        }
        match tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            Some(token) => Err(Error::Input(format!("token id {token} is beyond the vocabulary of {}", self.config.vocab_size))),
            None => Ok(()),
        }
    }

    /// The same of ids on the device, [tokens] u32, that are known to be in the vocabulary.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn embed_ids(&self, ids: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.positioned(self.embedding.tensor()?.index_select(ids, 0)?, batch)
    }

    fn positioned(&self, hidden: Tensor, batch: &Batch) -> Result<Tensor> {
        match (&self.positions, &batch.position_ids) {
            (Some(table), Some(rows)) => Ok((hidden + table.index_select(rows, 0)?)?),
            _ => Ok(hidden),
        }
    }

    /// Runs the sub-blocks between two boundaries on the residual stream, [tokens, hidden] -> [tokens, hidden].
    pub fn forward_range(&self, hidden: Tensor, boundaries: Range<usize>, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let mut hidden = hidden;
        let mut blocks = boundaries.filter_map(|s| Some((s, self.sub_block(s)?))).peekable();
        // what the next sub-block takes in, where it came with the sum
        let mut normed: Option<Tensor> = None;
        while let Some((s, block)) = blocks.next() {
            let inner = match normed {
                Some(normed) => block.inner(&normed, s / 2, batch, cache)?,
                None => self.inner(block, s, &hidden, batch, cache)?,
            };
            let update = block.output().forward(&inner)?;
            let next = blocks.peek().filter(|_| self.config.pre_norm).map(|(_, next)| &next.norm);
            (hidden, normed) = match next.map(|norm| norm.after_sum(&hidden, &update)).transpose()?.flatten() {
                Some((sum, normed)) => (sum, Some(normed)),
                None => (self.add(block, &hidden, &update)?, None),
            };
        }
        Ok(hidden)
    }

    /// Runs `block` in the place of sub-block `s` on the residual stream, [tokens, hidden] -> [tokens, hidden].
    pub fn apply(&self, block: &SubBlock, s: usize, hidden: &Tensor, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let update = block.output().forward(&self.inner(block, s, hidden, batch, cache)?)?;
        self.add(block, hidden, &update)
    }

    /// What `block` gives to its output layer in the place of sub-block `s`: [tokens, hidden] -> [tokens, width * unit].
    pub fn inner(&self, block: &SubBlock, s: usize, hidden: &Tensor, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        if self.config.pre_norm { block.inner(&block.norm.forward(hidden)?, s / 2, batch, cache) } else { block.inner(hidden, s / 2, batch, cache) }
    }

    /// The residual stream after a sub-block whose output layer gave `update`.
    pub fn add(&self, block: &SubBlock, hidden: &Tensor, update: &Tensor) -> Result<Tensor> {
        let on_cpu = hidden.device().is_cpu() && hidden.dtype() == DType::F32;
        let sum = if on_cpu { kernels::elementwise::add(hidden, update)? } else { (hidden + update)? };
        if self.config.pre_norm { Ok(sum) } else { block.norm.forward(&sum) }
    }

    /// Embedding and all layers: [tokens, hidden], before the final norm.
    pub fn forward(&self, tokens: &[u32], batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let hidden = self.embed(tokens, batch)?;
        self.forward_range(hidden, 0..self.last_boundary(), batch, cache)
    }

    /// Final norm and head: [rows, hidden] -> [rows, vocab] in f32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        Ok(self.head.forward(&self.normed(hidden)?)?.to_dtype(DType::F32)?)
    }

    /// Natural logarithms of the probabilities of next tokens after every row of the residual stream [rows, hidden]: `ids` are as many of each row, to
    /// as many numbers. Needs no room for logits.
    ///
    /// # Errors
    /// [`Error::Input`] for a token beyond the vocabulary or a number of ids that isn't a multiple of the rows.
    pub fn log_probabilities(&self, hidden: &Tensor, ids: &[u32]) -> Result<Vec<f32>> {
        kernels::head::log_probabilities(&self.normed(hidden)?, &self.head, ids)
    }

    fn normed(&self, hidden: &Tensor) -> Result<Tensor> {
        match &self.final_norm {
            Some(norm) => norm.forward(hidden),
            None => Ok(hidden.clone()),
        }
    }
}
