//! FlattenGPT (arXiv 2602.08858): the layer whose neighbour's input is most like its own takes the neighbour in, side by side, and is cut back to
//! the width of one layer. What is left is a model of fewer layers, all of the parent's shape.
//!
//! Heads stay by the mean magnitude of what they write to the stream (section 3.3), channels by ridge leverage, and the down projection is refitted to what
//! both MLPs gave, by the same ridge. Similarities are measured again after every merge, on the merged model.

use super::adjust::{Adjustment, adjust};
use super::merge::{Merge, can_merge, doubled, kept, with_layer};
use super::shortgpt::cosine_sum;
use super::{Best, Found, Progress, Strategy, removals, whole_layers, without};
use crate::compensate::{Compensation, Regression};
use crate::evaluate::Evaluator;
use crate::gram::Gram;
use crate::linalg::{self, Matrix};
use crate::space::SearchSpace;
use crate::stream::Passage;
use crate::supernet::Supernet;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use evop_model::{Decoder, Pattern, Span};

/// The ridge, relative to the mean eigenvalue of the activations' second moments.
const RIDGE: f64 = 10.0;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let layers = whole_layers(space, Strategy::Flatten)?;
    let dense = evaluator.supernet().decoder();
    if let Err(reason) = can_merge(dense.config()) {
        return Err(Error::option("--strategy", format!("flatten can't merge layers of this model, {reason}: expected another strategy")));
    }
    let mut merges: Vec<Merge> = Vec::new();
    let mut decoder = dense.clone();
    let mut genome = space.dense_genome();
    let mut best = Best::new();
    while !space.fits(&genome) {
        let kept: Vec<usize> = (0..layers).filter(|l| genome[*l] > 0).collect();
        let rounds = best.history.len() + removals(space, &genome, &kept);
        let pattern = space.pattern(&genome);
        let (into, from) = evaluator.over(&Supernet::raw(&decoder), |evaluator| most_alike(evaluator, &pattern))?;
        genome = without(&genome, from);
        let pattern = space.pattern(&genome);
        merges.push(choose(evaluator, &decoder, &pattern, into, from)?);
        decoder = adjust(dense, &Adjustment::Merge(merges.clone()))?;
        let patterns = [pattern];
        let fitness = evaluator.over(&Supernet::raw(&decoder), |evaluator| evaluator.evaluate(&patterns))?;
        best.restart();
        best.offer(&patterns, &fitness);
        best.end_round(rounds, evaluator, on_round)?;
    }
    Ok(Found { adjustment: Some(Adjustment::Merge(merges)), ..best.finish()? })
}

/// The two neighbours, of the layers that the pattern keeps, whose inputs have the largest mean cosine.
fn most_alike(evaluator: &mut Evaluator<'_>, pattern: &Pattern) -> Result<(usize, usize)> {
    let kept: Vec<usize> = (0..pattern.layers().len()).filter(|l| pattern.keeps(2 * l)).collect();
    let mut cosines = vec![0.0; pattern.layers().len()];
    let mut input: Option<Tensor> = None;
    evaluator.visit(pattern, |s, Passage { before, .. }| {
        if s.is_multiple_of(2)
            && let Some(earlier) = input.replace((*before).clone()).filter(|_| s / 2 != kept[0])
        {
            cosines[s / 2] += cosine_sum(&earlier, before)?.0;
        }
        Ok(())
    })?;
    let pair = (1..kept.len()).reduce(|best, other| if cosines[kept[other]] > cosines[kept[best]] { other } else { best });
    let Some(later) = pair else { return Err(Error::option("--sparsity", "flatten merges two layers: the budget leaves no room for a single one")) };
    Ok((kept[later - 1], kept[later]))
}

/// What stays of the merged layer; `pattern` keeps `into` and not `from`.
fn choose(evaluator: &mut Evaluator<'_>, decoder: &Decoder, pattern: &Pattern, into: usize, from: usize) -> Result<Merge> {
    let shape = decoder.config().layers[into].shape;
    let whole = doubled(decoder, into, from)?;
    let groups = {
        let mut energy: Vec<f64> = Vec::new();
        evaluator.over(&Supernet::raw(&whole), |e| {
            e.visit(&widened(&whole, pattern), |s, Passage { inputs, .. }| {
                if s == 2 * into {
                    let sums = inputs.to_dtype(DType::F32)?.abs()?.sum(0)?.to_vec1::<f32>()?;
                    energy.resize(sums.len(), 0.0);
                    energy.iter_mut().zip(sums).for_each(|(e, sum)| *e += f64::from(sum));
                }
                Ok(())
            })
        })?;
        let (weight, unit) = output_of(&whole, 2 * into)?;
        let norm = |c: usize| (0..weight.nrows()).map(|o| weight[(o, c)].powi(2)).sum::<f64>().sqrt();
        let scores: Vec<f64> = (0..energy.len() / unit).map(|g| (g * unit..(g + 1) * unit).map(|c| energy[c] * norm(c)).sum()).collect();
        largest(&scores, shape.kv_groups)?
    };
    // the MLPs see what the heads that stay leave them
    let mlp = kept(&whole, 2 * into + 1, &(0..whole.config().layers[into].shape.ffn).collect::<Vec<_>>())?;
    let narrowed = with_layer(&whole, into, kept(&whole, 2 * into, &groups)?, mlp)?;
    let (weight, _) = output_of(&narrowed, 2 * into + 1)?;
    let mut gram = Gram::new(weight.ncols());
    evaluator.over(&Supernet::raw(&narrowed), |e| {
        e.visit(&widened(&narrowed, pattern), |s, Passage { inputs, .. }| {
            if s != 2 * into + 1 {
                return Ok(());
            }
            let inputs = inputs.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            gram.add(&inputs, &[Span::prompt(inputs.dim(0)?)])
        })
    })?;
    gram.finish();
    let channels = largest(&leverages(&gram)?, shape.ffn)?;
    let down = Compensation::Refit.repair(&Regression::of_layer(gram, &weight, &[]), &weight, &channels, RIDGE)?;
    Ok(Merge { into, from, groups, channels, down: linalg::to_f32(&down.weight) })
}

/// The pattern's layers in a decoder whose layers are wider.
fn widened(decoder: &Decoder, pattern: &Pattern) -> Pattern {
    (0..decoder.last_boundary()).filter(|s| !pattern.keeps(*s)).fold(Pattern::dense(decoder.config()), |whole, s| whole.without(s))
}

/// The output layer's weight [hidden, inputs] of a sub-block and the inputs of a unit.
fn output_of(decoder: &Decoder, s: usize) -> Result<(Matrix, usize)> {
    match decoder.sub_block(s) {
        Some(block) => Ok((linalg::from_tensor(&block.output().weight()?)?, block.unit())),
        None => Err(Error::Format(format!("sub-block {s} is absent: a layer without it can't be merged"))),
    }
}

/// Ridge leverage [C (C + lambda I)^-1]_ii of every channel, C = X^T X.
fn leverages(gram: &Gram) -> Result<Vec<f64>> {
    let (size, lambda) = (gram.size(), RIDGE * gram.mean_square());
    let damped = Matrix::from_fn(size, size, |i, j| gram.products[i * size + j] + if i == j { lambda } else { 0.0 });
    let inverse = linalg::inverse_spd(&damped)?;
    Ok((0..size).map(|i| 1.0 - lambda * inverse[(i, i)]).collect())
}

/// The places of the `count` largest scores, ascending.
fn largest(scores: &[f64], count: usize) -> Result<Vec<usize>> {
    if scores.iter().any(|s| !s.is_finite()) {
        return Err(Error::Activations("a score of a merged layer is not finite".into()));
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(count);
    order.sort_unstable();
    Ok(order)
}
