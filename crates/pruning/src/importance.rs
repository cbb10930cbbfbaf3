//! Which channels (or key/value groups) of a sub-block go first.
//!
//! Every measure gives one nested order, most important first: a narrower level keeps a prefix of a wider one's units.

use crate::compensate;
use crate::gram::Gram;
use crate::linalg::{self, Matrix};
use crate::names::named;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};

/// How the importance of a unit is measured, from the inputs x of the output layer and its weight W.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Importance {
    /// mean |W[:, j]| . ||x_j|| (Wanda, arXiv 2306.11695, summed over the structure).
    Wanda,
    /// var(x_j) . ||W[:, j]||^2 (FLAP's WIFV, arXiv 2312.11983 eq. 6).
    Flap,
    /// Mean over sequences of ||x_j||_2 (2SSP, arXiv 2501.17771, stage 1).
    Norm2ssp,
    /// Second order: the unit of least W_p^T [(H^-1)_pp]^-1 W_p goes, H^-1 is downdated, and so on (optimal brain surgeon; ZipLM, arXiv
    /// 2302.04089; OSSCAR, 2403.18219). Channels go 16 at a time, each chosen after a downdate within the 64 cheapest.
    Obs,
    /// mean |W[:, j]| alone: the control that looks at no data.
    Magnitude,
}

named!(Importance, "wanda" => Importance::Wanda, "flap" => Importance::Flap, "norm2ssp" => Importance::Norm2ssp, "obs" => Importance::Obs, "magnitude" => Importance::Magnitude);

/// Damping of H, relative to its mean diagonal.
const DAMPING: f64 = 0.01;
/// Single channels that go before the whole inverse is downdated.
const GROUP: usize = 16;
/// The cheapest channels, from which a group is chosen.
const POOL: usize = 64;

impl Importance {
    /// Units in order of importance, the most important first. `weight` [out, units * unit] is the output layer's, `unit` the inputs of one.
    ///
    /// # Errors
    /// [`Error::Activations`] when the statistics are not finite.
    pub fn order(self, gram: &Gram, weight: &Matrix, unit: usize) -> Result<Vec<usize>> {
        if self == Self::Obs {
            return obs(gram, weight, unit);
        }
        let scores = self.scores(gram, weight, unit);
        if scores.iter().any(|s| !s.is_finite()) {
            return Err(Error::Activations(format!("an importance ({self}) is not finite")));
        }
        let mut order: Vec<usize> = (0..scores.len()).collect();
        // ties keep their place, so that the order doesn't depend on the sort
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
        Ok(order)
    }

    /// One score a unit, for the measures that have one (`obs` has only an order).
    pub fn scores(self, gram: &Gram, weight: &Matrix, unit: usize) -> Vec<f64> {
        let column = |j: usize| (0..weight.nrows()).map(move |o| weight[(o, j)]);
        let score = |j: usize| match self {
            Self::Wanda => column(j).map(f64::abs).sum::<f64>() / weight.nrows() as f64 * gram.square(j).sqrt(),
            Self::Flap => gram.variance(j) * column(j).map(|w| w * w).sum::<f64>(),
            Self::Norm2ssp => gram.sequence_norms[j] / gram.sequences.max(1) as f64,
            Self::Obs | Self::Magnitude => column(j).map(f64::abs).sum::<f64>() / weight.nrows() as f64,
        };
        (0..weight.ncols() / unit).map(|u| (u * unit..(u + 1) * unit).map(score).sum()).collect()
    }
}

/// The order in which the optimal brain surgeon would remove units, reversed.
fn obs(gram: &Gram, weight: &Matrix, unit: usize) -> Result<Vec<usize>> {
    let (size, units) = (gram.size(), gram.size() / unit);
    let damping = DAMPING * gram.mean_square();
    let h = Matrix::from_fn(size, size, |i, j| gram.products[i * size + j] + if i == j { damping } else { 0.0 });
    let mut inverse = linalg::inverse_spd(&h)?;
    let mut w = weight.clone();
    let mut left: Vec<usize> = (0..units).collect();
    let mut removed = Vec::with_capacity(units);
    while !left.is_empty() {
        let mut scored: Vec<(f64, usize)> = left.iter().map(|u| Ok((saliency(&w, &inverse, u * unit..(u + 1) * unit)?, *u))).collect::<Result<_>>()?;
        scored.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        let mut group = if unit == 1 { cheapest_group(&w, &inverse, &scored)? } else { vec![scored[0].1] };
        removed.extend(&group);
        left.retain(|u| !group.contains(u));
        group.sort_unstable();
        let columns: Vec<usize> = group.iter().flat_map(|u| u * unit..(u + 1) * unit).collect();
        if !left.is_empty() {
            linalg::downdate(&mut inverse, &mut w, &columns)?;
        }
    }
    removed.reverse();
    Ok(removed)
}

/// Up to [`GROUP`] channels in the order in which they go, from `scored` (saliency and channel, cheapest first). Two channels that stand in for each
/// other are both cheap until one of them has gone, so each is chosen after a downdate of the cheapest [`POOL`] among themselves; the group ends
/// where a channel outside the pool would be cheaper.
fn cheapest_group(w: &Matrix, inverse: &Matrix, scored: &[(f64, usize)]) -> Result<Vec<usize>> {
    let pool: Vec<usize> = scored.iter().take(POOL).map(|(_, u)| *u).collect();
    let outside = scored.get(POOL).map_or(f64::INFINITY, |(s, _)| *s);
    let mut inverse = Matrix::from_fn(pool.len(), pool.len(), |i, j| inverse[(pool[i], pool[j])]);
    let mut w = compensate::columns(w, &pool);
    let mut left: Vec<usize> = (0..pool.len()).collect();
    let mut group = Vec::with_capacity(GROUP);
    while group.len() < GROUP && !left.is_empty() {
        let scores: Vec<f64> = left.iter().map(|i| saliency(&w, &inverse, *i..i + 1)).collect::<Result<_>>()?;
        let best = (0..left.len()).min_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap_or_default();
        if !group.is_empty() && scores[best] > outside {
            break;
        }
        let gone = left.remove(best);
        group.push(pool[gone]);
        linalg::downdate(&mut inverse, &mut w, &[gone])?;
    }
    Ok(group)
}

/// tr(W_p [(H^-1)_pp]^-1 W_p^T).
fn saliency(w: &Matrix, inverse: &Matrix, columns: std::ops::Range<usize>) -> Result<f64> {
    if columns.len() == 1 {
        let j = columns.start;
        return Ok((0..w.nrows()).map(|o| w[(o, j)].powi(2)).sum::<f64>() / inverse[(j, j)]);
    }
    let (start, size) = (columns.start, columns.len());
    let block = Matrix::from_fn(size, size, |i, j| inverse[(start + i, start + j)]);
    let part = Matrix::from_fn(size, w.nrows(), |i, o| w[(o, start + i)]);
    let solved = linalg::solve_spd(&block, &part)?;
    Ok((0..size).flat_map(|i| (0..w.nrows()).map(move |o| (i, o))).map(|at| part[at] * solved[at]).sum())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use evop_model::{Device, Span, Tensor};

    fn gram(x: &Tensor) -> Gram {
        let mut gram = Gram::new(x.dim(1).unwrap());
        gram.add(x, &[Span::prompt(x.dim(0).unwrap())]).unwrap();
        gram.finish();
        gram
    }

    /// x with column 5 a copy of column 2, and column 9 dead.
    fn setting() -> (Gram, Matrix) {
        let x = normal(1, 0.0, 1.0, (400, 40)).to_vec2::<f32>().unwrap();
        let rows: Vec<f32> = x.iter().flat_map(|r| (0..40).map(|j| if j == 9 { 0.0 } else { r[if j == 5 { 2 } else { j }] }).collect::<Vec<_>>()).collect();
        let w = Matrix::from_fn(8, 40, |o, j| ((o * 7 + j * 13) % 11) as f64 - 5.0);
        (gram(&Tensor::from_vec(rows, (400, 40), &Device::Cpu).unwrap()), w)
    }

    #[test]
    fn a_dead_channel_goes_first_under_every_measure_that_looks_at_data() {
        let (gram, w) = setting();
        for measure in [Importance::Wanda, Importance::Flap, Importance::Norm2ssp] {
            assert_eq!(measure.order(&gram, &w, 1).unwrap().last(), Some(&9), "{measure}");
        }
        let mut sorted = Importance::Obs.order(&gram, &w, 1).unwrap();
        assert!(sorted[24..].contains(&9));
        sorted.sort_unstable();
        assert_eq!(sorted, (0..40).collect::<Vec<_>>());
    }

    #[test]
    fn second_order_sees_that_a_copy_is_redundant_where_the_diagonal_does_not() {
        let (gram, mut w) = setting();
        // the twins have the largest weights of all
        for o in 0..8 {
            w[(o, 2)] = 10.0;
            w[(o, 5)] = 10.0;
        }
        let obs = Importance::Obs.order(&gram, &w, 1).unwrap();
        let wanda = Importance::Wanda.order(&gram, &w, 1).unwrap();
        assert!(wanda[..2].contains(&2) && wanda[..2].contains(&5));
        let places: Vec<usize> = [2, 5].iter().filter_map(|twin| obs.iter().position(|j| j == twin)).collect();
        assert!(places.contains(&0) && places.contains(&38), "one of the twins goes after the dead channel only, the other last: {obs:?}");
        // and the error after a refit is lower at every level
        for kept in [38, 32] {
            let error = |order: &[usize]| compensate::refit_error(&gram, &w, &order[..kept], 1e-6).unwrap();
            assert!(error(&obs) <= error(&wanda) * 1.5 + 1e-6, "{kept}");
        }
    }
}
