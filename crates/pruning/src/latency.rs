//! What sub-blocks cost in time on this device: one new token of one sequence through each, the median of many passes.

use crate::Result;
use crate::budget::LatencyTable;
use evop_model::{AttentionSpec, Decoder, NoCache, Span, SubBlock, Tensor};
use std::collections::BTreeMap;
use std::time::Instant;

/// Passes that are timed; the median counts.
const PASSES: usize = 15;
/// Guesses before a check of which the time is measured.
const MOST_DRAFTS: usize = 8;

/// What decides a sub-block's time: the attention's shape or that it is an MLP, and the width.
type Shape = (Option<AttentionSpec>, usize);

/// Measures every sub-block at every width (0 takes no time). Sub-blocks of one shape share the median of all their passes: what noise there is
/// must not make a search prefer one layer to another.
///
/// # Errors
/// [`crate::Error::Model`] when the device fails; whatever `on` returns.
///
/// With `drafts` whole passes are measured too, over up to [`MOST_DRAFTS`] + 1 tokens.
pub(crate) fn measure(decoder: &Decoder, widths: &[Vec<usize>], drafts: bool, on: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<LatencyTable> {
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
            let mut times = times(decoder, || Ok(decoder.apply(&narrow, s, &hidden, &batch, &mut NoCache)?))?;
            let shape = shape(block, *width);
            match passes.iter_mut().find(|(known, _)| *known == shape) {
                Some((_, all)) => all.append(&mut times),
                None => passes.push((shape, times)),
            }
        }
    }
    let medians: Vec<(Shape, f64)> = passes.into_iter().map(|(shape, times)| (shape, median(times))).collect();
    let median_of = |shape: Shape| medians.iter().find(|(known, _)| *known == shape).map_or(0.0, |(_, median)| *median);
    let of_block = |(s, of_block): (usize, &Vec<usize>)| -> BTreeMap<usize, f64> {
        let present = |block: &SubBlock| of_block.iter().filter(|w| **w > 0).map(|w| (*w, median_of(shape(block, *w)))).collect();
        decoder.sub_block(s).map(present).unwrap_or_default()
    };
    let mut milliseconds: Vec<BTreeMap<usize, f64>> = widths.iter().enumerate().map(of_block).collect();
    monotone(&mut milliseconds);
    let held = decoder.weight_type().as_str();
    let description = format!("{:?}, weights in {held}, one token of one sequence, medians of {PASSES} passes a sub-block", decoder.device().location());
    let mut table = LatencyTable { description, milliseconds, ..LatencyTable::default() };
    if drafts {
        table.head = median(times(decoder, || Ok(decoder.logits(&decoder.embed(&[0], &batch)?)?))?);
        for tokens in 1..=MOST_DRAFTS + 1 {
            let (batch, ids) = (decoder.batch(&[Span::prompt(tokens)])?, vec![0; tokens]);
            table.passes.push(median(times(decoder, || Ok(decoder.logits(&decoder.forward(&ids, &batch, &mut NoCache)?)?))?));
        }
    }
    Ok(table)
}

/// Milliseconds of [`PASSES`] computations of a tensor.
fn times(decoder: &Decoder, compute: impl Fn() -> Result<Tensor> + Sync) -> Result<Vec<f64>> {
    let time = |_| {
        let started = Instant::now();
        let result = decoder.device().with_context(&compute)?;
        result.device().synchronize()?;
        Ok(started.elapsed().as_secs_f64() * 1e3)
    };
    let mut times = (0..PASSES + 2).map(time).collect::<Result<Vec<f64>>>()?;
    // the first passes warm caches up
    times.drain(..2);
    Ok(times)
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
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
