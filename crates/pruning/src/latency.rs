//! What sub-blocks cost in time on this device: one new token of one sequence through each, the median of many passes.

use crate::Result;
use crate::budget::LatencyTable;
use evop_model::{Decoder, NoCache, Span, Tensor};
use std::collections::BTreeMap;
use std::time::Instant;

/// Passes that are timed; the median counts.
const PASSES: usize = 15;

/// Measures every sub-block at every width (0 takes no time).
///
/// # Errors
/// [`crate::Error::Model`] when the device fails; whatever `on` returns.
pub(crate) fn measure(decoder: &Decoder, widths: &[Vec<usize>], on: &mut dyn FnMut(usize, usize) -> Result<()>) -> Result<LatencyTable> {
    let batch = decoder.batch(&[Span::prompt(1)])?;
    let hidden = decoder.embed(&[0], &batch)?;
    let mut milliseconds = Vec::with_capacity(widths.len());
    for (s, of_block) in widths.iter().enumerate() {
        on(s, widths.len())?;
        let mut table = BTreeMap::new();
        if let Some(block) = decoder.sub_block(s) {
            for width in of_block.iter().filter(|w| **w > 0) {
                let narrow = block.narrowed(*width)?;
                // a view has rows as far apart as the whole matrix: a copy is what a checkpoint will have
                let order: Vec<usize> = (0..*width).collect();
                let narrow = if narrow.width() < block.width() { block.reordered(&order)? } else { narrow };
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
                times.sort_by(f64::total_cmp);
                table.insert(*width, times[PASSES / 2]);
            }
        }
        milliseconds.push(table);
    }
    monotone(&mut milliseconds);
    let description = format!("{:?}, one token of one sequence, median of {PASSES} passes", decoder.device().location());
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
