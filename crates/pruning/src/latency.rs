//! What sub-blocks cost in time on this device: one new token of one sequence through each, the median of many passes.

use crate::Result;
use crate::budget::LatencyTable;
use evop_model::{AttentionSpec, Decoder, NoCache, Span, SubBlock, Tensor};
use std::collections::BTreeMap;
use std::time::Instant;

/// Passes that are timed; the median counts.
const PASSES: usize = 15;

/// What decides a sub-block's time: the attention's shape or that it is an MLP, and the width.
type Shape = (Option<AttentionSpec>, usize);

/// Measures every sub-block at every width (0 takes no time). Sub-blocks of one shape share the median of all their passes: what noise there is
/// must not make a search prefer one layer to another.
///
/// # Errors
/// [`crate::Error::Model`] when the device fails; whatever `on` returns.
pub(crate) fn measure(decoder: &Decoder, widths: &[Vec<usize>], on: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<LatencyTable> {
    let batch = decoder.batch(&[Span::prompt(1)])?;
    let hidden = decoder.embed(&[0], &batch)?;
    let mut passes: Vec<(Shape, Vec<f64>)> = Vec::new();
    let shape = |block: &SubBlock, width: usize| -> Shape { (block.attention().copied(), width) };
    for (s, of_block) in widths.iter().enumerate() {
        on(s, widths.len())?;
        let Some(block) = decoder.sub_block(s) else { continue };
        for width in of_block.iter().filter(|w| **w > 0) {
            // a view has rows as far apart as the whole matrix: a copy is what a checkpoint will have
            let order: Vec<usize> = (0..*width).collect();
            let narrow = if *width < block.width() { block.reordered(&order)? } else { block.clone() };
            let mut times: Vec<f64> = (0..PASSES + 2)
                .map(|_| {
                    let started = Instant::now();
                    let after = decoder.device().with_context(|| decoder.apply(&narrow, s, &hidden, &batch, &mut NoCache))?;
                    synchronise(&after)?;
                    Ok(started.elapsed().as_secs_f64() * 1e3)
                })
                .collect::<Result<_>>()?;
            // the first passes warm caches up
            times.drain(..2);
            let shape = shape(block, *width);
            match passes.iter_mut().find(|(known, _)| *known == shape) {
                Some((_, all)) => all.append(&mut times),
                None => passes.push((shape, times)),
            }
        }
    }
    for (_, times) in &mut passes {
        times.sort_by(f64::total_cmp);
    }
    let median = |shape: Shape| passes.iter().find(|(known, _)| *known == shape).map_or(0.0, |(_, times)| times[times.len() / 2]);
    let of_block = |(s, of_block): (usize, &Vec<usize>)| -> BTreeMap<usize, f64> {
        let present = |block: &SubBlock| of_block.iter().filter(|w| **w > 0).map(|w| (*w, median(shape(block, *w)))).collect();
        decoder.sub_block(s).map(present).unwrap_or_default()
    };
    let mut milliseconds: Vec<BTreeMap<usize, f64>> = widths.iter().enumerate().map(of_block).collect();
    monotone(&mut milliseconds);
    let description = format!("{:?}, one token of one sequence, medians of {PASSES} passes a sub-block", decoder.device().location());
    Ok(LatencyTable { description, milliseconds })
}

/// Waits until the device has computed a tensor.
fn synchronise(tensor: &Tensor) -> Result<()> {
    Ok(tensor.device().synchronize()?)
}

/// A wider sub-block is never taken for a faster one: noise must not make a search prefer it.
fn monotone(tables: &mut [BTreeMap<usize, f64>]) {
    for table in tables {
        let mut most = 0f64;
        for milliseconds in table.values_mut() {
            most = most.max(*milliseconds);
            *milliseconds = most;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn noise_does_not_make_a_wider_block_faster() {
        let mut tables = vec![BTreeMap::from([(64, 0.2), (128, 0.19), (256, 0.4)])];
        monotone(&mut tables);
        assert_eq!(tables[0].values().copied().collect::<Vec<_>>(), [0.2, 0.2, 0.4]);
    }
}
