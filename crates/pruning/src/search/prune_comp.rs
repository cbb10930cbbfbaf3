//! Prune&Comp (arXiv 2507.18212): layers go one at a time, and after each the magnitude that it had added to the residual stream is made up for,
//! before the next is chosen (section 3, iterative pruning with compensation). The layer that goes is the one whose removal leaves the lowest loss.
//!
//! Without layer l the stream reaches the later layers too small by a factor alpha, the mean over channels of ||output||_1 / ||input||_1 of l. The paper
//! multiplies the embedding and all output layers before l by alpha, which unties the head. An RMS norm (or LayerNorm) doesn't see the scale of
//! the stream but for its epsilon, so the same function comes from multiplying the output layers **after** l by 1 / alpha: that is what is done
//! here, and a tied head stays tied.

use super::adjust::{Adjustment, adjust};
use super::{Best, Found, Progress, Strategy, removals, whole_layers, without};
use crate::evaluate::Evaluator;
use crate::space::SearchSpace;
use crate::stream::Passage;
use crate::supernet::Supernet;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use evop_model::Pattern;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let layers = whole_layers(space, Strategy::PruneComp)?;
    let dense = evaluator.supernet().decoder();
    if !dense.config().pre_norm {
        return Err(Error::option("--strategy", "prune-comp scales the residual stream, which a model with norms after its blocks hasn't: expected another"));
    }
    let mut scales = vec![1.0; dense.last_boundary()];
    let mut adjusted = Supernet::raw(dense);
    let mut genome = space.dense_genome();
    let mut best = Best::new();
    while !space.fits(&genome) {
        let kept: Vec<usize> = (0..layers).filter(|l| genome[*l] > 0).collect();
        let rounds = best.history.len() + removals(space, &genome, &kept);
        let patterns: Vec<Pattern> = kept.iter().map(|l| space.pattern(&without(&genome, *l))).collect();
        let (layer, ratio) = evaluator.over(&adjusted, |evaluator| {
            let fitness = evaluator.evaluate(&patterns)?;
            let mut candidates = Best::new();
            candidates.offer(&patterns, &fitness);
            let chosen = candidates.finish()?.pattern;
            let layer = kept[patterns.iter().position(|p| *p == chosen).unwrap_or(0)];
            Ok((layer, magnitude_ratio(evaluator, &space.pattern(&genome), layer)?))
        })?;
        genome = without(&genome, layer);
        scales[2 * layer + 2..].iter_mut().for_each(|scale| *scale /= ratio);
        adjusted = Supernet::raw(&adjust(dense, &Adjustment::Scale(scales.clone()))?);
        let pattern = [space.pattern(&genome)];
        let fitness = evaluator.over(&adjusted, |evaluator| evaluator.evaluate(&pattern))?;
        best.restart();
        best.offer(&pattern, &fitness);
        best.end_round(rounds, evaluator, on_round)?;
    }
    Ok(Found { adjustment: Some(Adjustment::Scale(scales)), ..best.finish()? })
}

/// alpha of a layer that the pattern keeps: the mean over channels and packs of ||output||_1 / ||input||_1 over a pack's tokens (eq. 4).
fn magnitude_ratio(evaluator: &mut Evaluator<'_>, pattern: &Pattern, layer: usize) -> Result<f64> {
    let blocks: Vec<usize> = [2 * layer, 2 * layer + 1].into_iter().filter(|s| pattern.keeps(*s)).collect();
    let (mut sum, mut count) = (0.0, 0usize);
    let mut input = None;
    evaluator.visit(pattern, |s, Passage { before, after, .. }| {
        if blocks.first() == Some(&s) {
            input = Some(channel_norms(before)?);
        }
        if let (true, Some(input)) = (blocks.last() == Some(&s), &input) {
            for (after, before) in channel_norms(after)?.into_iter().zip(input).filter(|(_, before)| **before > 0.0) {
                sum += after / before;
                count += 1;
            }
        }
        Ok(())
    })?;
    let ratio = sum / count as f64;
    if ratio.is_finite() && ratio > 0.0 {
        return Ok(ratio);
    }
    Err(Error::Activations(format!("layer {layer} changes the magnitude of the residual stream by {ratio}: expected a positive factor")))
}

/// ||x_k||_1 of every channel k of x [tokens, hidden].
fn channel_norms(x: &Tensor) -> Result<Vec<f64>> {
    let sums = x.to_dtype(DType::F32)?.abs()?.sum(0)?.to_vec1::<f32>()?;
    Ok(sums.into_iter().map(f64::from).collect())
}
