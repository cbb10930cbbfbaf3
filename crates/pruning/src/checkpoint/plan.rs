//! Which tensors a checkpoint has: the config's, in its order, layers without any sub-block gone and the others moved up.

use super::Contents;
use crate::{Error, Result};
use evop_model::{Config, DType, NormKind, Positions, Source, TensorNames, bias_of};
use std::collections::BTreeSet;

/// A linear layer of a sub-block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Projection {
    Q,
    K,
    V,
    O,
    Gate,
    Up,
    Down,
}

impl Projection {
    pub const ATTENTION: [Self; 4] = [Self::Q, Self::K, Self::V, Self::O];
    pub const QKV: [Self; 3] = [Self::Q, Self::K, Self::V];
    pub const MLP: [Self; 3] = [Self::Gate, Self::Up, Self::Down];

    /// Where it is in transformers' layer.
    pub fn module(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }
}

/// Where a tensor's numbers come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Origin {
    /// The tensor of that name of the contents' source.
    Source(String),
    /// They are zeros.
    Zeros,
}

/// One tensor of the checkpoint.
#[derive(Debug, Clone)]
pub(super) struct Planned {
    /// Hugging Face's, with the new layer number.
    pub name: String,
    pub origin: Origin,
    pub shape: Vec<usize>,
    /// The type in which `origin` gives it.
    pub dtype: DType,
}

/// A checkpoint's tensors and the config that goes with them.
#[derive(Debug)]
pub(super) struct Plan {
    /// The layers that are left, under their new numbers. Its `json` is still the contents'.
    pub config: Config,
    /// Which of the contents' layers they are.
    pub kept: Vec<usize>,
    pub tensors: Vec<Planned>,
    /// Projections of which some layer has a bias.
    pub biases: BTreeSet<Projection>,
    /// Tensors of the source that the config has no use for.
    pub left_out: Vec<String>,
}

impl Plan {
    /// Plans the checkpoint of `contents`, every tensor's shape held against the config.
    pub fn new(contents: &Contents<'_>) -> Result<Self> {
        let mut config = contents.config.clone();
        let exists = |l: &usize| config.layers[*l].shape.kv_groups + config.layers[*l].shape.ffn > 0;
        let kept: Vec<usize> = (0..config.num_layers()).filter(exists).collect();
        if kept.is_empty() {
            return Err(Error::Format("expected at least one attention or MLP, found a model without any".into()));
        }
        config.layers = kept.iter().map(|l| contents.config.layers[*l].clone()).collect();
        let mut planner = Planner { source: contents.source, names: TensorNames::of(config.architecture), tensors: Vec::new(), biases: BTreeSet::new() };
        planner.plan(&config, &kept)?;
        let Planner { tensors, biases, .. } = planner;
        let used: BTreeSet<&str> = tensors.iter().filter_map(|t| if let Origin::Source(name) = &t.origin { Some(name.as_str()) } else { None }).collect();
        let head = planner.names.head();
        let known = |name: &String| used.contains(name.as_str()) || (config.tie_word_embeddings && name == head) || name.ends_with("rotary_emb.inv_freq");
        let left_out = contents.source.names().into_iter().filter(|name| !known(name)).collect();
        Ok(Self { config, kept, tensors, biases, left_out })
    }

    /// Whether all layers have the same shape, both sub-blocks there.
    pub fn is_uniform(&self) -> bool {
        let first = self.config.layers[0].shape;
        first.kv_groups > 0 && first.ffn > 0 && self.config.layers.iter().all(|l| l.shape == first)
    }

    /// Query heads of the widest attention; 0 when there is none.
    pub fn most_heads(&self) -> usize {
        self.config.layers.iter().map(|l| l.shape.kv_groups * l.shape.group_size).max().unwrap_or(0)
    }

    /// Gives every layer that has one of these projections its bias, of zeros where there is none, if some layer has one.
    pub fn complete_biases(&mut self, of: &[Projection]) {
        if !of.iter().any(|p| self.biases.contains(p)) {
            return;
        }
        for projection in of {
            let suffix = format!("{}.weight", projection.module());
            let weights: Vec<(usize, Planned)> =
                self.tensors.iter().enumerate().filter(|(_, t)| t.name.ends_with(&suffix)).map(|(i, t)| (i, t.clone())).collect();
            for (at, weight) in weights.into_iter().rev() {
                let name = bias_of(&weight.name);
                if self.tensors.iter().all(|t| t.name != name) {
                    self.tensors.insert(at + 1, Planned { name, origin: Origin::Zeros, shape: weight.shape[..1].to_vec(), dtype: weight.dtype });
                }
            }
            self.biases.insert(*projection);
        }
    }

    /// A note about tensors that no tool would look at.
    pub fn left_out_note(&self) -> Option<String> {
        let first = self.left_out.first()?;
        let others = match self.left_out.len() {
            1 => String::new(),
            n => format!(" and {} more", n - 1),
        };
        Some(format!("`{first}`{others} left out: the architecture has no such tensor"))
    }
}

struct Planner<'a> {
    source: &'a dyn Source,
    names: TensorNames,
    tensors: Vec<Planned>,
    biases: BTreeSet<Projection>,
}

impl Planner<'_> {
    fn plan(&mut self, config: &Config, kept: &[usize]) -> Result<()> {
        let (hidden, d, names) = (config.hidden_size, config.head_dim, self.names);
        self.same(names.embedding(), &[config.vocab_size, hidden])?;
        if let Positions::Learned { offset } = config.positions {
            self.same(names.positions(), &[config.max_position_embeddings + offset, hidden])?;
        }
        for (new, (old, layer)) in kept.iter().zip(&config.layers).enumerate() {
            let (old, shape) = (*old, layer.shape);
            let (q, kv, ffn) = (shape.kv_groups * shape.group_size * d, shape.kv_groups * d, shape.ffn);
            if kv > 0 {
                self.norm(&names.attention_norm(old), &names.attention_norm(new), config)?;
                self.linear(Projection::Q, &names.q(old), &names.q(new), [q, hidden], config.qkv_bias)?;
                self.linear(Projection::K, &names.k(old), &names.k(new), [kv, hidden], config.qkv_bias)?;
                self.linear(Projection::V, &names.v(old), &names.v(new), [kv, hidden], config.qkv_bias)?;
                self.linear(Projection::O, &names.o(old), &names.o(new), [hidden, q], config.output_bias)?;
                if config.qk_norm {
                    self.tensor(&names.q_norm(old), &names.q_norm(new), &[d])?;
                    self.tensor(&names.k_norm(old), &names.k_norm(new), &[d])?;
                }
            }
            if ffn > 0 {
                self.norm(&names.mlp_norm(old), &names.mlp_norm(new), config)?;
                if config.gated_mlp {
                    self.linear(Projection::Gate, &names.gate(old), &names.gate(new), [ffn, hidden], config.mlp_bias)?;
                }
                self.linear(Projection::Up, &names.up(old), &names.up(new), [ffn, hidden], config.mlp_bias)?;
                self.linear(Projection::Down, &names.down(old), &names.down(new), [hidden, ffn], config.mlp_bias)?;
            }
        }
        if config.pre_norm {
            self.norm(names.final_norm(), names.final_norm(), config)?;
        }
        if !config.tie_word_embeddings {
            self.same(names.head(), &[config.vocab_size, hidden])?;
        }
        Ok(())
    }

    fn same(&mut self, name: &str, shape: &[usize]) -> Result<()> {
        self.tensor(name, name, shape)
    }

    fn tensor(&mut self, old: &str, new: &str, shape: &[usize]) -> Result<()> {
        match self.source.shape(old) {
            Some(found) if found == shape => {
                let origin = Origin::Source(old.to_string());
                self.tensors.push(Planned { name: new.to_string(), origin, shape: shape.to_vec(), dtype: self.source.dtype(old)? });
                Ok(())
            }
            Some(found) => Err(self.source.mismatch(old, &format!("shape {shape:?}"), &format!("shape {found:?}")).into()),
            None => Err(self.source.mismatch(old, &format!("shape {shape:?}"), "nothing: it is missing").into()),
        }
    }

    fn linear(&mut self, projection: Projection, old: &str, new: &str, shape: [usize; 2], bias: bool) -> Result<()> {
        self.tensor(old, new, &shape)?;
        if bias || self.source.shape(&bias_of(old)).is_some() {
            self.tensor(&bias_of(old), &bias_of(new), &shape[..1])?;
            self.biases.insert(projection);
        }
        Ok(())
    }

    fn norm(&mut self, old: &str, new: &str, config: &Config) -> Result<()> {
        match config.norm {
            NormKind::Rms => self.tensor(old, new, &[config.hidden_size]),
            NormKind::Layer { affine: true } => {
                self.tensor(old, new, &[config.hidden_size])?;
                self.tensor(&bias_of(old), &bias_of(new), &[config.hidden_size])
            }
            NormKind::Layer { affine: false } => Ok(()),
        }
    }
}
