//! A sub-block of a layer: attention or MLP, each `x -> x + output(inner(norm(x)))`.
//!
//! Both end in a linear layer (`o_proj`, `down_proj`) whose inputs are what structured pruning removes: whole key/value groups or single
//! channels. A narrower sub-block keeps the first ones; [`SubBlock::reordered`] puts them in order of importance.

use crate::attention::AttentionSpec;
use crate::batch::Batch;
use crate::cache::KvCache;
use crate::config::Activation;
use crate::kernels;
use crate::linear::{Linear, Norm};
use crate::{Error, Result};
use candle_core::Tensor;

/// One attention or MLP sub-block with its norm. Cloning and narrowing share the weights.
#[derive(Debug, Clone)]
pub struct SubBlock {
    pub(crate) norm: Norm,
    pub(crate) inner: Inner,
    pub(crate) output: Linear,
}

/// What happens between the norm and the output layer.
#[derive(Debug, Clone)]
pub(crate) enum Inner {
    Attention {
        q: Linear,
        k: Linear,
        v: Linear,
        /// All three as one layer over the same weights, where that is one product on the device.
        joint: Option<Linear>,
        /// Qwen3's norms of every query and key head.
        qk_norm: Option<(Norm, Norm)>,
        spec: AttentionSpec,
    },
    Mlp {
        /// Gated families only.
        gate: Option<Linear>,
        up: Linear,
        /// Both as one layer, likewise.
        joint: Option<Linear>,
        activation: Activation,
    },
}

impl SubBlock {
    /// Key/value groups of an attention, channels of an MLP.
    pub fn width(&self) -> usize {
        self.inner.width()
    }

    /// Inputs of the output layer that one unit of width stands for: `group_size * head_dim`, or 1.
    pub fn unit(&self) -> usize {
        match &self.inner {
            Inner::Attention { spec, .. } => spec.group_size * spec.head_dim,
            Inner::Mlp { .. } => 1,
        }
    }

    /// The shape of the attention; `None` for an MLP.
    pub fn attention(&self) -> Option<&AttentionSpec> {
        match &self.inner {
            Inner::Attention { spec, .. } => Some(spec),
            Inner::Mlp { .. } => None,
        }
    }

    /// `o_proj` or `down_proj`.
    pub fn output(&self) -> &Linear {
        &self.output
    }

    /// All of its linear layers.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        let inner: [Option<&Linear>; 3] = match &self.inner {
            Inner::Attention { q, k, v, .. } => [Some(q), Some(k), Some(v)],
            Inner::Mlp { gate, up, .. } => [gate.as_ref(), Some(up), None],
        };
        inner.into_iter().flatten().chain([&self.output])
    }

    /// The same sub-block with another output layer, over the first `output.inputs() / unit` groups or channels.
    ///
    /// # Errors
    /// [`Error::Input`] when the layer's inputs are no whole number of units, or more than there are.
    pub fn with_output(&self, output: Linear) -> Result<Self> {
        let width = output.inputs() / self.unit();
        if width == 0 || width > self.width() || width * self.unit() != output.inputs() || output.outputs() != self.output.outputs() {
            return Err(Error::Input(format!(
                "an output layer {} x {} doesn't fit a sub-block of {} units of {} inputs and {} outputs",
                output.outputs(),
                output.inputs(),
                self.width(),
                self.unit(),
                self.output.outputs()
            )));
        }
        Ok(Self { inner: self.inner.narrowed(width)?, output, norm: self.norm.clone() })
    }

    /// The same sub-block, its output layer with this bias, [hidden], in the place of its own.
    #[must_use]
    pub(crate) fn with_bias(&self, bias: Tensor) -> Self {
        Self { output: self.output.with_bias(bias), ..self.clone() }
    }

    /// The first `width` groups or channels, as views.
    pub fn narrowed(&self, width: usize) -> Result<Self> {
        if width == self.width() {
            return Ok(self.clone());
        }
        Ok(Self { inner: self.inner.narrowed(width)?, output: self.output.narrow_in(width * self.unit())?, norm: self.norm.clone() })
    }

    /// Groups or channels in another order: unit `order[i]` becomes unit i. Copies the weights; the function stays the same up to
    /// the rounding of a sum in another order. `order` may be shorter than the width: the rest is left out.
    ///
    /// # Errors
    /// [`Error::Input`] for an order that names a unit that isn't there.
    pub fn reordered(&self, order: &[usize]) -> Result<Self> {
        if let Some(unit) = order.iter().find(|u| **u >= self.width()) {
            return Err(Error::Input(format!("unit {unit} of a sub-block that has {}", self.width())));
        }
        let rows = |layer: &Linear, per_unit: usize| layer.select_out(&expand(order, per_unit));
        let inner = match &self.inner {
            Inner::Attention { q, k, v, qk_norm, spec, .. } => {
                let qkv = [rows(q, spec.group_size * spec.head_dim)?, rows(k, spec.head_dim)?, rows(v, spec.head_dim)?];
                Inner::attention(qkv, qk_norm.clone(), AttentionSpec { kv_groups: order.len(), ..*spec })?
            }
            Inner::Mlp { gate, up, activation, .. } => Inner::mlp(gate.as_ref().map(|g| rows(g, 1)).transpose()?, rows(up, 1)?, *activation)?,
        };
        Ok(Self { inner, output: self.output.select_in(&expand(order, self.unit()))?, norm: self.norm.clone() })
    }

    /// Normed x [tokens, hidden] -> inputs of the output layer, [tokens, width * unit].
    pub(crate) fn inner(&self, x: &Tensor, layer: usize, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        match &self.inner {
            Inner::Attention { q, k, v, joint, qk_norm, spec } => {
                let AttentionSpec { kv_groups, head_dim, .. } = *spec;
                let tokens = x.dim(0)?;
                let widths = [spec.heads(), kv_groups, kv_groups];
                let [mut q, mut k, v] = match joint {
                    Some(joint) => parts(&joint.forward(x)?.reshape((tokens, widths.iter().sum::<usize>(), head_dim))?, widths)?,
                    None => {
                        let [q, k, v] = Linear::forward_all([q, k, v], x)?;
                        let heads = |t: Tensor, count: usize| t.reshape((tokens, count, head_dim));
                        [heads(q, widths[0])?, heads(k, widths[1])?, heads(v, widths[2])?]
                    }
                };
                if let Some((q_norm, k_norm)) = qk_norm {
                    (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
                }
                if let Some(angles) = &batch.rope {
                    (q, k) = rotate(&q, &k, angles)?;
                }
                cache.attend(layer, spec, &q, &k, &v, batch)
            }
            Inner::Mlp { gate, up, joint, activation } => {
                let Some(gate) = gate else { return activate(&up.forward(x)?, *activation) };
                let [gate, up] = match joint {
                    Some(joint) => parts(&joint.forward(x)?, [gate.outputs(), up.outputs()])?,
                    None => Linear::forward_all([gate, up], x)?,
                };
                if *activation != Activation::Silu {
                    return Ok((activate(&gate, *activation)? * up)?);
                }
                silu_mul(&gate, &up)
            }
        }
    }
}

/// Neighbouring parts of the second dimension, of these widths.
fn parts<const N: usize>(of: &Tensor, widths: [usize; N]) -> Result<[Tensor; N]> {
    let mut first = 0;
    let parts = widths.map(|width| {
        first += width;
        of.narrow(1, first - width, width)
    });
    let parts = parts.into_iter().collect::<candle_core::Result<Vec<_>>>()?;
    parts.try_into().map_err(|_| Error::Input("a part was lost".into()))
}

/// Rotary embedding of q [tokens, heads, d] and k [tokens, kv_groups, d] by (cos, sin).
fn rotate(q: &Tensor, k: &Tensor, (cos, sin): &(Tensor, Tensor)) -> Result<(Tensor, Tensor)> {
    #[cfg(feature = "cuda")]
    if q.device().is_cuda() {
        return crate::cuda::rotate(q, k, cos, sin);
    }
    Ok((kernels::elementwise::rotate(q, cos, sin)?, kernels::elementwise::rotate(k, cos, sin)?))
}

/// silu(gate) * up, [tokens, width].
fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if gate.device().is_cuda() {
        return crate::cuda::silu_mul(gate, up);
    }
    kernels::elementwise::silu_mul(gate, up)
}

impl Inner {
    fn width(&self) -> usize {
        match self {
            Self::Attention { spec, .. } => spec.kv_groups,
            Self::Mlp { up, .. } => up.outputs(),
        }
    }

    /// Queries, keys and values, as one product where the device does that.
    pub fn attention(qkv: [Linear; 3], qk_norm: Option<(Norm, Norm)>, spec: AttentionSpec) -> Result<Self> {
        let (joint, [q, k, v]) = Linear::joined(qkv)?;
        Ok(Self::Attention { q, k, v, joint, qk_norm, spec })
    }

    /// Gate and up, as one product where the device does that.
    pub fn mlp(gate: Option<Linear>, up: Linear, activation: Activation) -> Result<Self> {
        let Some(gate) = gate else { return Ok(Self::Mlp { gate, up, joint: None, activation }) };
        let (joint, [gate, up]) = Linear::joined([gate, up])?;
        Ok(Self::Mlp { gate: Some(gate), up, joint, activation })
    }

    fn narrowed(&self, width: usize) -> Result<Self> {
        if width == self.width() {
            return Ok(self.clone());
        }
        // (the parts that are left don't lie side by side)
        let joint = None;
        Ok(match self {
            Self::Attention { q, k, v, qk_norm, spec, .. } => {
                let spec = AttentionSpec { kv_groups: width, ..*spec };
                let kv_width = width * spec.head_dim;
                Self::Attention {
                    q: q.narrow_out(spec.heads() * spec.head_dim)?,
                    k: k.narrow_out(kv_width)?,
                    v: v.narrow_out(kv_width)?,
                    joint,
                    qk_norm: qk_norm.clone(),
                    spec,
                }
            }
            Self::Mlp { gate, up, activation, .. } => {
                Self::Mlp { gate: gate.as_ref().map(|g| g.narrow_out(width)).transpose()?, up: up.narrow_out(width)?, joint, activation: *activation }
            }
        })
    }
}

/// Units -> the rows that they stand for.
pub(crate) fn expand(units: &[usize], per_unit: usize) -> Vec<u32> {
    units.iter().flat_map(|u| u * per_unit..(u + 1) * per_unit).map(|row| row as u32).collect()
}

fn activate(x: &Tensor, activation: Activation) -> Result<Tensor> {
    Ok(match activation {
        Activation::Silu => x.silu()?,
        Activation::Gelu => x.gelu_erf()?,
        Activation::GeluTanh => x.gelu()?,
        Activation::Relu => x.relu()?,
    })
}
