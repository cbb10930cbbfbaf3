//! FLAP (arXiv 2312.11983): weighted input feature variance (WIFV, eq. 6), standardised within each layer and module, and one global ranking of
//! heads and channels (AL-AM, section 3.3): how much each layer loses follows from its scores. A head counts as its parameters do, which here
//! is the budgets themselves. Widths are rounded to the space's options. The bias that makes up for what goes is the level database's.

use super::widths::SubBlockUnit;
use super::{Found, Progress, Strategy, one_shot};
use crate::evaluate::Evaluator;
use crate::linalg;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use evop_model::SubBlock;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let units = SubBlockUnit::all(space, Strategy::Flap)?;
    let decoder = evaluator.supernet().decoder();
    let mut moments: Vec<Moments> = (0..decoder.last_boundary()).map(|s| Moments::new(decoder.sub_block(s).map_or(0, |b| b.output().inputs()))).collect();
    evaluator.visit(space.dense(), |s, passage| moments[s].add(passage.inputs))?;
    // (score, unit of the space), a line a head or channel, the most important first
    let mut ranking: Vec<(f64, usize)> = Vec::new();
    for (u, unit) in units.iter().enumerate() {
        let Some(block) = decoder.sub_block(unit.sub_block) else { continue };
        ranking.extend(scores(block, &moments[unit.sub_block])?.into_iter().map(|score| (score, u)));
    }
    ranking.sort_by(|a, b| b.0.total_cmp(&a.0));
    one_shot(evaluator, space, &allocate(space, &units, &ranking), on_round)
}

/// The genome that keeps as much of the head of the ranking as fits.
fn allocate(space: &SearchSpace, units: &[SubBlockUnit], ranking: &[(f64, usize)]) -> Genome {
    // (what the space can't remove is there whatever the ranking says: the lowest option)
    let keeping = |first: usize| -> Genome {
        let mut counts = vec![0; units.len()];
        ranking[..first].iter().for_each(|(_, u)| counts[*u] += 1);
        units.iter().zip(counts).map(|(unit, count)| unit.nearest(count)).collect()
    };
    // widths grow with the number kept, and costs with widths
    let (mut fits, mut exceeds) = (0, ranking.len() + 1);
    while exceeds - fits > 1 {
        let middle = fits.midpoint(exceeds);
        if space.fits(&keeping(middle)) { fits = middle } else { exceeds = middle }
    }
    let mut genome = keeping(fits);
    // what rounding left goes, a step each, to those whose heads and channels come next
    let mut raised = vec![false; units.len()];
    for (_, u) in &ranking[fits..] {
        if !std::mem::replace(&mut raised[*u], true)
            && let Some(more) = space.raised(&genome, *u).filter(|more| space.fits(more))
        {
            genome = more;
        }
    }
    genome
}

/// One score a key/value group or channel: WIFV standardised over the layer; a group's is the mean over its channels of the square, standardised.
fn scores(block: &SubBlock, moments: &Moments) -> Result<Vec<f64>> {
    let weight = linalg::from_tensor(&block.output().weight()?)?;
    let norm = |j: usize| (0..weight.nrows()).map(|o| weight[(o, j)].powi(2)).sum::<f64>();
    let mut channels: Vec<f64> = (0..weight.ncols()).map(|j| moments.variance(j) * norm(j)).collect();
    if block.attention().is_some() {
        channels.iter_mut().for_each(|s| *s *= *s);
    }
    standardise(&mut channels);
    if channels.iter().any(|s| !s.is_finite()) {
        return Err(Error::Activations("a fluctuation score is not finite".into()));
    }
    Ok(channels.chunks(block.unit()).map(|unit| unit.iter().sum::<f64>() / unit.len() as f64).collect())
}

/// (x - mean) / standard deviation; of equal values all are 0.
fn standardise(values: &mut [f64]) {
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let deviation = (values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0)).sqrt();
    values.iter_mut().for_each(|v| *v = if deviation > 0.0 { (*v - mean) / deviation } else { 0.0 });
}

/// Running first and second moments of every channel.
struct Moments {
    sums: Vec<f64>,
    squares: Vec<f64>,
    rows: usize,
}

impl Moments {
    fn new(channels: usize) -> Self {
        Self { sums: vec![0.0; channels], squares: vec![0.0; channels], rows: 0 }
    }

    /// Adds rows, [tokens, channels].
    fn add(&mut self, x: &Tensor) -> Result<()> {
        for row in x.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec2::<f32>()? {
            self.rows += 1;
            for ((sum, square), value) in self.sums.iter_mut().zip(&mut self.squares).zip(row) {
                let value = f64::from(value);
                *sum += value;
                *square += value * value;
            }
        }
        Ok(())
    }

    fn variance(&self, channel: usize) -> f64 {
        let rows = self.rows.max(1) as f64;
        (self.squares[channel] / rows - (self.sums[channel] / rows).powi(2)).max(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_give_the_variance_and_scores_are_standardised() {
        let mut moments = Moments::new(2);
        moments.add(&Tensor::new(&[[1f32, 5.0], [3.0, 5.0]], &Device::Cpu).unwrap()).unwrap();
        moments.add(&Tensor::new(&[[5f32, 5.0]], &Device::Cpu).unwrap()).unwrap();
        assert!((moments.variance(0) - 8.0 / 3.0).abs() < 1e-12 && moments.variance(1) == 0.0);
        let mut values = [1.0, 2.0, 3.0];
        standardise(&mut values);
        assert_eq!(values, [-1.0, 0.0, 1.0]);
        let mut equal = [4.0, 4.0];
        standardise(&mut equal);
        assert_eq!(equal, [0.0, 0.0]);
    }
}
