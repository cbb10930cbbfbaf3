//! The decoder: `embed -> [attention?, mlp?] x layers -> norm -> head`, dense, masked or sliced, one implementation.
//!
//! A **masked** decoder ([`Decoder::masked`]) is this same struct over views of the parent's weights; a **sliced** one was loaded from
//! smaller tensors. Sub-block boundaries are numbered 0..=2L: boundary 2l lies before layer l's attention, 2l + 1 before its MLP.

use crate::attention::AttentionSpec;
use crate::batch::{Batch, Span};
use crate::cache::KvCache;
use crate::config::{Activation, Config, LayerShape, Positions};
use crate::kernels;
use crate::linear::{Linear, Norm};
use crate::pattern::{Gene, Pattern};
use crate::source::{Source, TensorNames};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::rotary_emb::rope_thd;
use std::ops::Range;

/// One attention sub-block with its norm.
#[derive(Debug, Clone)]
pub struct Attention {
    norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    /// Qwen3's norms of every query and key head.
    qk_norm: Option<(Norm, Norm)>,
    spec: AttentionSpec,
}

/// One MLP sub-block with its norm.
#[derive(Debug, Clone)]
pub struct Mlp {
    norm: Norm,
    /// Gated families only.
    gate: Option<Linear>,
    up: Linear,
    down: Linear,
    activation: Activation,
}

/// One decoder layer; an absent sub-block is the identity on the residual stream.
#[derive(Debug, Clone)]
pub struct Layer {
    /// Self-attention.
    pub attention: Option<Attention>,
    /// Feed-forward network.
    pub mlp: Option<Mlp>,
}

/// A model on a device. Cloning and masking share the weights.
#[derive(Debug, Clone)]
pub struct Decoder {
    config: Config,
    embedding: Tensor,
    /// Learned positions (OPT).
    positions: Option<Tensor>,
    layers: Vec<Layer>,
    final_norm: Option<Norm>,
    head: Linear,
    device: Device,
    dtype: DType,
}

impl Decoder {
    /// Loads all weights.
    ///
    /// # Errors
    /// [`Error::Tensor`] for a missing, misshapen or non-finite tensor; [`Error::Device`] for a dtype that the device can't compute in.
    pub fn load(config: &Config, source: &dyn Source, device: &Device, dtype: DType) -> Result<Self> {
        if device.is_cpu() && dtype != DType::F32 {
            return Err(Error::Device(format!("{dtype:?} arithmetic is not available on the CPU: use f32 (bf16 and f16 checkpoints are widened exactly)")));
        }
        let names = TensorNames::of(config.architecture);
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embedding = source.load(names.embedding(), &[vocab, hidden], dtype, device)?;
        let positions = match config.positions {
            Positions::Learned { offset } => Some(source.load(names.positions(), &[config.max_position_embeddings + offset, hidden], dtype, device)?),
            Positions::Rope(_) => None,
        };
        let norm = |name: &str, width: usize| Norm::load(source, name, width, config.norm, config.norm_eps, dtype, device);
        let linear = |name: String, out: usize, input: usize, bias: bool| Linear::load(source, &name, out, input, bias, dtype, device);
        let d = config.head_dim;
        let mut layers = Vec::with_capacity(config.num_layers());
        for (l, layer) in config.layers.iter().enumerate() {
            let LayerShape { kv_groups, group_size, ffn } = layer.shape;
            let heads = kv_groups * group_size;
            let attention = if kv_groups == 0 {
                None
            } else {
                let head_norm = |name: String| Norm::load(source, &name, d, crate::NormKind::Rms, config.norm_eps, dtype, device);
                Some(Attention {
                    norm: norm(&names.attention_norm(l), hidden)?,
                    q: linear(names.q(l), heads * d, hidden, config.qkv_bias)?,
                    k: linear(names.k(l), kv_groups * d, hidden, config.qkv_bias)?,
                    v: linear(names.v(l), kv_groups * d, hidden, config.qkv_bias)?,
                    o: linear(names.o(l), hidden, heads * d, config.output_bias)?,
                    qk_norm: if config.qk_norm { Some((head_norm(names.q_norm(l))?, head_norm(names.k_norm(l))?)) } else { None },
                    spec: AttentionSpec { kv_groups, group_size, head_dim: d, scale: (d as f32).sqrt().recip(), window: layer.sliding_window },
                })
            };
            let mlp = if ffn == 0 {
                None
            } else {
                Some(Mlp {
                    norm: norm(&names.mlp_norm(l), hidden)?,
                    gate: if config.gated_mlp { Some(linear(names.gate(l), ffn, hidden, config.mlp_bias)?) } else { None },
                    up: linear(names.up(l), ffn, hidden, config.mlp_bias)?,
                    down: linear(names.down(l), hidden, ffn, config.mlp_bias)?,
                    activation: config.activation,
                })
            };
            layers.push(Layer { attention, mlp });
        }
        let final_norm = if config.pre_norm { Some(norm(names.final_norm(), hidden)?) } else { None };
        let head = if config.tie_word_embeddings { Linear::from_weight(embedding.clone()) } else { linear(names.head().to_string(), vocab, hidden, false)? };
        Ok(Self { config: config.clone(), embedding, positions, layers, final_norm, head, device: device.clone(), dtype })
    }

    /// The same weights under a pattern: views, no copies.
    ///
    /// # Errors
    /// [`Error::Pattern`] when the pattern is for a model of another depth or keeps more than there is.
    pub fn masked(&self, pattern: &Pattern) -> Result<Self> {
        let pattern = Pattern::new(pattern.layers().to_vec(), &self.config)?;
        let layers = self.layers.iter().zip(pattern.layers()).map(|(layer, gene)| layer.masked(*gene)).collect::<Result<_>>()?;
        Ok(Self { config: self.config.with_pattern(&pattern), layers, ..self.clone() })
    }

    /// The configuration of what this decoder computes (under its mask, if it has one).
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// Where the weights are.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What it computes in.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The layers.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// Sub-block boundaries: 2 x layers.
    pub fn last_boundary(&self) -> usize {
        2 * self.layers.len()
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
        Batch::new(&self.config, spans, self.dtype, &self.device)
    }

    /// Token embeddings (plus learned positions), [tokens, hidden].
    ///
    /// # Errors
    /// [`Error::Input`] for a token beyond the vocabulary or a count that differs from the batch's.
    pub fn embed(&self, tokens: &[u32], batch: &Batch) -> Result<Tensor> {
        if tokens.len() != batch.tokens() {
            return Err(Error::Input(format!("expected {} tokens, found {}", batch.tokens(), tokens.len())));
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.config.vocab_size) {
            return Err(Error::Input(format!("token id {token} is beyond the vocabulary of {}", self.config.vocab_size)));
        }
        let ids = Tensor::from_slice(tokens, tokens.len(), &self.device)?;
        let hidden = self.embedding.index_select(&ids, 0)?;
        match (&self.positions, &batch.position_ids) {
            (Some(table), Some(rows)) => Ok((hidden + table.index_select(rows, 0)?)?),
            _ => Ok(hidden),
        }
    }

    /// Runs the sub-blocks between two boundaries on the residual stream, [tokens, hidden] -> [tokens, hidden].
    pub fn forward_range(&self, hidden: Tensor, boundaries: Range<usize>, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let mut hidden = hidden;
        for boundary in boundaries {
            let layer = &self.layers[boundary / 2];
            if boundary.is_multiple_of(2) {
                if let Some(attention) = &layer.attention {
                    hidden = self.residual(hidden, &attention.norm, |x| attention.forward(x, boundary / 2, batch, cache))?;
                }
            } else if let Some(mlp) = &layer.mlp {
                hidden = self.residual(hidden, &mlp.norm, |x| mlp.forward(x))?;
            }
        }
        Ok(hidden)
    }

    /// x + f(norm(x)), or norm(x + f(x)) where the family normalises last.
    fn residual(&self, hidden: Tensor, norm: &Norm, f: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Tensor> {
        if self.config.pre_norm {
            let update = f(&norm.forward(&hidden)?)?;
            Ok((hidden + update)?)
        } else {
            let update = f(&hidden)?;
            norm.forward(&(hidden + update)?)
        }
    }

    /// Embedding and all layers: [tokens, hidden], before the final norm.
    pub fn forward(&self, tokens: &[u32], batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let hidden = self.embed(tokens, batch)?;
        self.forward_range(hidden, 0..self.last_boundary(), batch, cache)
    }

    /// Final norm and head: [rows, hidden] -> [rows, vocab] in f32.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let normed = match &self.final_norm {
            Some(norm) => norm.forward(hidden)?,
            None => hidden.clone(),
        };
        Ok(self.head.forward(&normed)?.to_dtype(DType::F32)?)
    }
}

impl Layer {
    fn masked(&self, gene: Gene) -> Result<Self> {
        let attention = match &self.attention {
            Some(attention) if gene.kv_groups > 0 => Some(attention.narrowed(gene.kv_groups)?),
            _ => None,
        };
        let mlp = match &self.mlp {
            Some(mlp) if gene.ffn > 0 => Some(mlp.narrowed(gene.ffn)?),
            _ => None,
        };
        Ok(Self { attention, mlp })
    }
}

impl Attention {
    /// The first `kv_groups` groups with their query heads, as views.
    fn narrowed(&self, kv_groups: usize) -> Result<Self> {
        let spec = AttentionSpec { kv_groups, ..self.spec };
        let (q_width, kv_width) = (spec.heads() * spec.head_dim, kv_groups * spec.head_dim);
        Ok(Self {
            q: self.q.narrow_out(q_width)?,
            k: self.k.narrow_out(kv_width)?,
            v: self.v.narrow_out(kv_width)?,
            o: self.o.narrow_in(q_width)?,
            spec,
            ..self.clone()
        })
    }

    /// Normed x [tokens, hidden] -> update [tokens, hidden].
    fn forward(&self, x: &Tensor, layer: usize, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let AttentionSpec { kv_groups, head_dim, .. } = self.spec;
        let tokens = x.dim(0)?;
        let mut q = self.q.forward(x)?.reshape((tokens, self.spec.heads(), head_dim))?;
        let mut k = self.k.forward(x)?.reshape((tokens, kv_groups, head_dim))?;
        let v = self.v.forward(x)?.reshape((tokens, kv_groups, head_dim))?;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some((cos, sin)) = &batch.rope {
            let rotate = |t: Tensor| -> Result<Tensor> { Ok(rope_thd(&t.unsqueeze(0)?, cos, sin)?.squeeze(0)?) };
            (q, k) = (rotate(q)?, rotate(k)?);
        }
        let attended = cache.attend(layer, &self.spec, &q, &k, &v, batch)?;
        self.o.forward(&attended)
    }
}

impl Mlp {
    /// The first `ffn` channels, as views.
    fn narrowed(&self, ffn: usize) -> Result<Self> {
        Ok(Self {
            gate: self.gate.as_ref().map(|g| g.narrow_out(ffn)).transpose()?,
            up: self.up.narrow_out(ffn)?,
            down: self.down.narrow_in(ffn)?,
            ..self.clone()
        })
    }

    /// Normed x [tokens, hidden] -> update [tokens, hidden].
    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let up = self.up.forward(x)?;
        let inner = match &self.gate {
            Some(gate) => {
                let gate = gate.forward(x)?;
                if self.activation == Activation::Silu && gate.device().is_cpu() && gate.dtype() == DType::F32 {
                    kernels::elementwise::silu_mul(&gate, &up)?
                } else {
                    (self.activate(&gate)? * up)?
                }
            }
            None => self.activate(&up)?,
        };
        self.down.forward(&inner)
    }

    fn activate(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self.activation {
            Activation::Silu => x.silu()?,
            Activation::Gelu => x.gelu_erf()?,
            Activation::GeluTanh => x.gelu()?,
            Activation::Relu => x.relu()?,
        })
    }
}
