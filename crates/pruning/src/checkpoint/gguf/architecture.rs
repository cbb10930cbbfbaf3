//! Which of llama.cpp's architectures computes a model.

use crate::checkpoint::plan::{Plan, Projection};
use crate::{Error, Result};
use evop_model::{Activation, Architecture as Family, LayerShape, Positions, RopeScaling};

/// Channels of an MLP of zeros: a block of the smallest quantised type.
pub(super) const ZERO_FFN: usize = 32;

/// An architecture, and the layers as it has to have them.
#[derive(Debug)]
pub(super) struct Architecture {
    /// llama.cpp's name.
    pub name: &'static str,
    /// Whether the halves of rotary heads take turns.
    pub interleaved: bool,
    /// The layers' shapes, those of zeros included.
    pub shapes: Vec<LayerShape>,
    /// Layers whose attention is zeros.
    pub zero_attention: Vec<usize>,
    /// Layers whose MLP is zeros.
    pub zero_mlp: Vec<usize>,
}

impl Architecture {
    /// Chooses the architecture.
    ///
    /// # Errors
    /// [`Error::Format`] when llama.cpp has none.
    pub fn of(plan: &Plan) -> Result<Self> {
        let config = &plan.config;
        let refuse = |what: &str| Err(Error::Format(format!("llama.cpp has no architecture for {what}: expected --format hf")));
        if config.activation != Activation::Silu && config.architecture != Family::Opt {
            return refuse("a Llama-like model whose activation is not silu");
        }
        if plan.most_heads() == 0 {
            return refuse("a model without any attention");
        }
        let scaling = if let Positions::Rope(rope) = &config.positions { rope.scaling.as_ref() } else { None };
        if let Some(RopeScaling::Yarn { beta_fast, beta_slow, truncate, .. }) = scaling
            && (*beta_fast, *beta_slow, *truncate) != (32.0, 1.0, true)
        {
            return refuse("YaRN with a beta_fast other than 32, a beta_slow other than 1, or without truncate");
        }
        // its Qwen architectures have one factor for all frequencies
        let divisors = matches!(scaling, Some(RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_)));
        let uniform = plan.is_uniform();
        let output_biases = [Projection::O, Projection::Gate, Projection::Up, Projection::Down].iter().any(|p| plan.biases.contains(p));
        let (name, interleaved) = match config.architecture {
            Family::Opt => return refuse("OPT"),
            Family::Qwen3 if !uniform => return refuse("layers that differ in a model that normalises queries and keys (Qwen3)"),
            Family::Qwen3 if output_biases => return refuse("a Qwen3 model with biases on output projections"),
            Family::Qwen3 if divisors => return refuse("a Qwen3 model with Llama 3's rotary scaling"),
            Family::Qwen3 => ("qwen3", false),
            // its q_proj is square, and it has biases on q, k and v only
            Family::Qwen2 if uniform && !output_biases && !divisors && plan.most_heads() * config.head_dim == config.hidden_size => ("qwen2", false),
            Family::Llama | Family::Mistral | Family::Qwen2 => (if uniform { "llama" } else { "deci" }, true),
        };
        let mut architecture =
            Self { name, interleaved, shapes: config.layers.iter().map(|l| l.shape).collect(), zero_attention: Vec::new(), zero_mlp: Vec::new() };
        if architecture.shapes[0].kv_groups == 0 {
            (architecture.shapes[0].kv_groups, architecture.shapes[0].group_size) = (1, 1);
            architecture.zero_attention.push(0);
        }
        for (layer, shape) in architecture.shapes.iter_mut().enumerate().filter(|(_, s)| s.ffn == 0) {
            shape.ffn = ZERO_FFN;
            architecture.zero_mlp.push(layer);
        }
        Ok(architecture)
    }

    /// Whether every layer has the same shape, so that one number says it.
    pub fn is_uniform(&self) -> bool {
        self.name != "deci"
    }
}
