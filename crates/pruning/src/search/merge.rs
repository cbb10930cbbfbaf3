//! Two layers as one: side by side on the same input, then back to the width of one (FlattenGPT, arXiv 2602.08858, sections 3.2 and 3.3).
//!
//! The norms' gains go into the projections behind them, since the two layers' differ and the merged layer has one norm. The doubled layer computes
//! H + A1(H) + A2(H), then the same with its MLPs; which of its heads and channels stay is the strategy's choice.

use super::adjust::rounded;
use crate::{Error, Result};
use candle_core::{D, DType, Device, Tensor};
use evop_model::{Config, Decoder, DecoderSource, Linear, NormKind, RawTensor, Source, SubBlock, TensorNames, bias_of};
use serde::Serialize;
use std::collections::BTreeMap;

/// The name of a tensor of a layer.
type Name = fn(&TensorNames, usize) -> String;

/// A layer that takes in a later one and is then cut back to its own width.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Merge {
    /// The layer that takes in.
    pub into: usize,
    /// The layer that is taken in; the pattern drops it.
    pub from: usize,
    /// Key/value groups that stay, of those of both layers one after the other.
    pub groups: Vec<usize>,
    /// MLP channels that stay, of those of both.
    pub channels: Vec<usize>,
    /// The refitted down projection, [hidden, channels] row by row.
    #[serde(skip)]
    pub down: Vec<f32>,
}

/// Makes one merge; layer `from` stays as it was, for the pattern to drop.
pub(super) fn merge(decoder: &Decoder, merge: &Merge) -> Result<Decoder> {
    let doubled = doubled(decoder, merge.into, merge.from)?;
    let attention = kept(&doubled, 2 * merge.into, &merge.groups)?;
    let mlp = kept(&doubled, 2 * merge.into + 1, &merge.channels)?;
    let like = mlp.output().weight()?;
    let weight = Tensor::from_slice(&merge.down, like.shape(), &Device::Cpu)?.to_device(decoder.device())?;
    let weight = rounded(&weight, &like)?;
    let mlp = mlp.with_output(Linear::new(weight, mlp.output().bias().cloned())?)?;
    with_layer(decoder, merge.into, attention, mlp)
}

/// The decoder with another layer `l` of the same shape.
pub(super) fn with_layer(decoder: &Decoder, l: usize, attention: SubBlock, mlp: SubBlock) -> Result<Decoder> {
    let mut blocks: Vec<Option<SubBlock>> = (0..decoder.last_boundary()).map(|s| decoder.sub_block(s).cloned()).collect();
    (blocks[2 * l], blocks[2 * l + 1]) = (Some(attention), Some(mlp));
    Ok(decoder.with_sub_blocks(blocks)?)
}

/// Some units of a sub-block, in this order.
pub(super) fn kept(decoder: &Decoder, s: usize, units: &[usize]) -> Result<SubBlock> {
    match decoder.sub_block(s) {
        Some(block) => Ok(block.reordered(units)?),
        None => Err(Error::Format(format!("sub-block {s} is absent: a layer without it can't be merged"))),
    }
}

/// Whether layers of this model can be merged, and why not.
pub(super) fn can_merge(config: &Config) -> std::result::Result<(), &'static str> {
    match config {
        c if !c.pre_norm || c.norm != NormKind::Rms => Err("its norms are not RMS norms before the blocks"),
        c if c.qk_norm => Err("its layers have norms of their own on queries and keys"),
        c if c.layers.iter().any(|l| l.shape.kv_groups == 0 || l.shape.ffn == 0) => Err("some of its layers lack attention or MLP"),
        c if c.layers.iter().any(|l| l.shape.group_size != c.layers[0].shape.group_size || l.sliding_window != c.layers[0].sliding_window) => {
            Err("its layers differ in query heads a group or in their window")
        }
        _ => Ok(()),
    }
}

/// The decoder whose layer `into` is as wide as `into` and `from` together and computes both on its input.
pub(super) fn doubled(decoder: &Decoder, into: usize, from: usize) -> Result<Decoder> {
    let names = TensorNames::of(decoder.config().architecture);
    let base = DecoderSource::new(decoder, &Wide)?;
    let mut tensors: BTreeMap<String, Tensor> = BTreeMap::new();
    let load = |name: &str| -> Result<Option<Tensor>> { base.shape(name).map(|shape| Ok(base.load(name, &shape, DType::F32, &Device::Cpu)?)).transpose() };
    let need = |name: String| load(&name)?.ok_or_else(|| Error::Format(format!("{name} is missing: a layer without it can't be merged")));
    let attention_gains = [need(names.attention_norm(into))?, need(names.attention_norm(from))?];
    let mlp_gains = [need(names.mlp_norm(into))?, need(names.mlp_norm(from))?];
    // projections that read the stream, the gains folded in, one above the other
    let reading: [(Name, &[Tensor; 2]); 5] = [
        (TensorNames::q, &attention_gains),
        (TensorNames::k, &attention_gains),
        (TensorNames::v, &attention_gains),
        (TensorNames::gate, &mlp_gains),
        (TensorNames::up, &mlp_gains),
    ];
    for (name, gains) in reading {
        let [a, b] = [name(&names, into), name(&names, from)];
        if let (Some(x), Some(y)) = (load(&a)?, load(&b)?) {
            let fold = |w: &Tensor, gain: &Tensor| -> Result<Tensor> { rounded(&w.broadcast_mul(gain)?, w) };
            tensors.insert(a.clone(), Tensor::cat(&[fold(&x, &gains[0])?, fold(&y, &gains[1])?], 0)?);
        }
        if let (Some(x), Some(y)) = (load(&bias_of(&a))?, load(&bias_of(&b))?) {
            tensors.insert(bias_of(&a), Tensor::cat(&[x, y], 0)?);
        }
    }
    // projections that write to it side by side; their biases add up
    for name in [TensorNames::o as Name, TensorNames::down] {
        let [a, b] = [name(&names, into), name(&names, from)];
        tensors.insert(a.clone(), Tensor::cat(&[need(a.clone())?, need(b.clone())?], D::Minus1)?);
        match (load(&bias_of(&a))?, load(&bias_of(&b))?) {
            (Some(x), Some(y)) => drop(tensors.insert(bias_of(&a), (x + y)?)),
            (None, Some(y)) => drop(tensors.insert(bias_of(&a), y)),
            _ => {}
        }
    }
    for (name, gains) in [(names.attention_norm(into), &attention_gains), (names.mlp_norm(into), &mlp_gains)] {
        tensors.insert(name, gains[0].ones_like()?);
    }
    let mut config = decoder.config().clone();
    let taken = config.layers[from].shape;
    let shape = &mut config.layers[into].shape;
    (shape.kv_groups, shape.ffn) = (shape.kv_groups + taken.kv_groups, shape.ffn + taken.ffn);
    Ok(Decoder::load(&config, &Overlaid { base: &base, tensors }, decoder.device(), decoder.weight_type())?)
}

/// Says that every tensor is stored in f32: a decoder read through it loses nothing.
#[derive(Debug)]
struct Wide;

impl Source for Wide {
    fn names(&self) -> Vec<String> {
        Vec::new()
    }

    fn shape(&self, _: &str) -> Option<Vec<usize>> {
        None
    }

    fn dtype(&self, _: &str) -> evop_model::Result<DType> {
        Ok(DType::F32)
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        Err(self.mismatch(name, "a tensor", "nothing: types alone are known here"))
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> evop_model::Error {
        in_memory(name, expected, found)
    }
}

/// A source with some tensors replaced.
#[derive(Debug)]
struct Overlaid<'s> {
    base: &'s dyn Source,
    tensors: BTreeMap<String, Tensor>,
}

impl Source for Overlaid<'_> {
    fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.base.names().into_iter().chain(self.tensors.keys().cloned()).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.tensors.get(name).map(|t| t.dims().to_vec()).or_else(|| self.base.shape(name))
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        let Some(tensor) = self.tensors.get(name) else { return self.base.raw(name) };
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        let bytes: Vec<u8> = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(RawTensor { dtype: DType::F32, shape: tensor.dims().to_vec(), bytes: bytes.into() })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> evop_model::Error {
        in_memory(name, expected, found)
    }
}

fn in_memory(name: &str, expected: &str, found: &str) -> evop_model::Error {
    evop_model::Error::Tensor { path: "the decoder in memory".into(), tensor: name.into(), expected: expected.into(), found: found.into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_model::{NoCache, Span};

    #[test]
    fn the_doubled_layer_adds_what_both_layers_compute_on_the_same_stream() {
        let decoder = crate::testing::tiny();
        let (into, from) = (3, 4);
        let tokens = [5, 17, 300, 4, 1000, 12, 9];
        let batch = decoder.batch(&[Span::prompt(tokens.len())]).unwrap();
        let hidden = decoder.forward_range(decoder.embed(&tokens, &batch).unwrap(), 0..2 * into, &batch, &mut NoCache).unwrap();
        let doubled = doubled(&decoder, into, from).unwrap();
        for (a, b) in [(2 * into, 2 * from), (2 * into + 1, 2 * from + 1)] {
            let update = |s: usize| (decoder.forward_range(hidden.clone(), s..s + 1, &batch, &mut NoCache).unwrap() - &hidden).unwrap();
            let expected = (&hidden + (update(a) + update(b)).unwrap()).unwrap();
            let found = doubled.forward_range(hidden.clone(), a..a + 1, &batch, &mut NoCache).unwrap();
            let difference = (expected - found).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            // gains folded into bf16 weights are rounded
            let size = hidden.abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_scalar::<f32>().unwrap();
            assert!(difference < 0.01 * size, "{difference} of {size}");
        }
        let shape = doubled.config().layers[into].shape;
        assert_eq!((shape.kv_groups, shape.ffn), (4, 768));
    }
}
