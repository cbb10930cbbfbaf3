//! Compensation: closed-form repair of an output layer (`o_proj`, `down_proj`) that lost some of its inputs. No training.

use crate::Result;
use crate::gram::{Cross, Gram};
use crate::linalg::{self, Matrix};
use crate::names::named;
use serde::{Deserialize, Serialize};

/// How what remains makes up for what went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compensation {
    /// Not at all.
    None,
    /// The removed inputs' mean contribution becomes a bias: b = W[:, removed] . mean[removed] (FLAP, arXiv 2312.11983, section 3.4).
    Bias,
    /// Ridge regression of the whole output on the kept inputs, shrunk towards their old weights; lambda by held-out error.
    Refit,
    /// The best rotation and scale of the kept weights' output (RCPU, arXiv 2510.07782): cannot overfit a small sample much.
    Rotate,
}

named!(Compensation, "none" => Compensation::None, "bias" => Compensation::Bias, "refit" => Compensation::Refit, "rotate" => Compensation::Rotate);

/// How what remains makes up for a whole sub-block that is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SkipCompensation {
    /// Not at all.
    None,
    /// The residual stream is scaled by what the sub-block did to its magnitude (Prune&Comp, arXiv 2507.18212, eq. 4).
    Scale,
    /// The sub-block kept before it learns to give the missing update too: its output layer is refitted with that update added to its target
    /// (the normal equations of ReplaceMe, arXiv 2505.02819, section 3, solved for the whole output layer).
    Linear,
}

named!(SkipCompensation, "none" => SkipCompensation::None, "scale" => SkipCompensation::Scale, "linear" => SkipCompensation::Linear);

/// Ridge strengths that are tried, relative to the mean diagonal of X^T X.
pub(crate) const RIDGES: [f64; 5] = [1e-4, 1e-3, 1e-2, 1e-1, 1.0];

/// Sums over tokens of a linear layer's inputs x and of what it should give.
#[derive(Debug, Clone)]
pub(crate) struct Regression {
    pub gram: Gram,
    /// What the layer itself gives; and that with the updates of one, two, … following sub-blocks added.
    pub targets: Vec<Target>,
}

/// All that least squares needs to know of a target y.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    /// X^T Y, [inputs, outputs].
    pub cross: Matrix,
    /// Sum of y, [outputs].
    pub sums: Vec<f64>,
    /// Sum of |y|^2.
    pub energy: f64,
    /// The same of what was added to the layer's own output.
    pub added: f64,
}

impl Regression {
    /// Targets are what the full weight [outputs, inputs] gives on the same inputs, and that with each of `following` added: updates of later
    /// sub-blocks on the same tokens.
    pub fn of_layer(gram: Gram, weight: &Matrix, following: &[Cross]) -> Self {
        let (size, outputs) = (gram.size(), weight.nrows());
        let h = Matrix::from_fn(size, size, |i, j| gram.products[i * size + j]);
        let cross = linalg::product(&h, &weight.transpose().to_owned());
        let at = || (0..outputs).flat_map(move |o| (0..size).map(move |j| (o, j)));
        let energy = at().map(|(o, j)| weight[(o, j)] * cross[(j, o)]).sum();
        let sums = (0..outputs).map(|o| (0..size).map(|j| weight[(o, j)] * gram.sums[j]).sum()).collect();
        let own = Target { cross, sums, energy, added: 0.0 };
        let with = |more: &Cross| Target {
            cross: Matrix::from_fn(size, outputs, |j, o| own.cross[(j, o)] + more.products[j * outputs + o]),
            sums: own.sums.iter().zip(&more.sums).map(|(a, b)| a + b).collect(),
            added: more.energy,
            energy: own.energy + more.energy + 2.0 * at().map(|(o, j)| weight[(o, j)] * more.products[j * outputs + o]).sum::<f64>(),
        };
        let mut targets: Vec<Target> = following.iter().map(with).collect();
        targets.insert(0, own);
        Self { gram, targets }
    }

    /// H over the kept inputs with `damping` on its diagonal.
    fn kept_products(&self, kept: &[usize], damping: f64) -> Matrix {
        let size = self.gram.size();
        Matrix::from_fn(kept.len(), kept.len(), |i, j| self.gram.products[kept[i] * size + kept[j]] + if i == j { damping } else { 0.0 })
    }

    /// The squared error that a repaired layer makes of a target on these tokens, relative to the target's energy.
    pub fn error(&self, target: usize, repaired: &Repaired, kept: &[usize]) -> f64 {
        let (w, target) = (&repaired.weight, &self.targets[target]);
        let wh = linalg::product(w, &self.kept_products(kept, 0.0));
        let mut error = target.energy;
        for o in 0..w.nrows() {
            for (i, j) in kept.iter().enumerate() {
                error += w[(o, i)] * (wh[(o, i)] - 2.0 * target.cross[(*j, o)]);
            }
        }
        if let Some(bias) = &repaired.bias {
            for (o, b) in bias.iter().enumerate() {
                let given: f64 = kept.iter().enumerate().map(|(i, j)| w[(o, i)] * self.gram.sums[*j]).sum();
                error += b * (self.gram.rows as f64 * b - 2.0 * (target.sums[o] - given));
            }
        }
        error / target.energy.max(f64::MIN_POSITIVE)
    }

    /// The ridge solution for a target over the kept inputs, shrunk towards `prior` [outputs, kept].
    pub fn ridge(&self, target: usize, kept: &[usize], prior: &Matrix, strength: f64) -> Result<Matrix> {
        let damping = (strength * self.gram.mean_square()).max(f64::MIN_POSITIVE);
        let cross = &self.targets[target].cross;
        let right = Matrix::from_fn(kept.len(), prior.nrows(), |i, o| cross[(kept[i], o)] + damping * prior[(o, i)]);
        Ok(linalg::solve_spd(&self.kept_products(kept, damping), &right)?.transpose().to_owned())
    }
}

/// An output layer over the kept inputs.
#[derive(Debug, Clone)]
pub(crate) struct Repaired {
    /// [outputs, kept].
    pub weight: Matrix,
    /// [outputs].
    pub bias: Option<Vec<f64>>,
}

/// The columns `kept` of a weight.
pub(crate) fn columns(weight: &Matrix, kept: &[usize]) -> Matrix {
    Matrix::from_fn(weight.nrows(), kept.len(), |o, i| weight[(o, kept[i])])
}

impl Compensation {
    /// Repairs `weight` [outputs, inputs] after all inputs but `kept` have gone; `ridge` is the strength that `refit` uses.
    ///
    /// # Errors
    /// [`crate::Error::Activations`] when a system has no solution.
    pub(crate) fn repair(self, data: &Regression, weight: &Matrix, kept: &[usize], ridge: f64) -> Result<Repaired> {
        let raw = columns(weight, kept);
        Ok(match self {
            Self::None => Repaired { weight: raw, bias: None },
            Self::Bias => {
                let mut is_kept = vec![false; data.gram.size()];
                kept.iter().for_each(|j| is_kept[*j] = true);
                let removed = |o: usize| (0..is_kept.len()).filter(|j| !is_kept[*j]).map(|j| weight[(o, j)] * data.gram.mean(j)).sum();
                Repaired { bias: Some((0..weight.nrows()).map(removed).collect()), weight: raw }
            }
            Self::Refit => Repaired { weight: data.ridge(0, kept, &raw, ridge)?, bias: None },
            Self::Rotate => {
                let kept_cross = Matrix::from_fn(kept.len(), weight.nrows(), |i, o| data.targets[0].cross[(kept[i], o)]);
                // Y Y'^T with Y' = W_kept X_kept
                let outputs = linalg::product(&raw, &kept_cross).transpose().to_owned();
                let (rotation, trace) = linalg::nearest_rotation(&outputs)?;
                let own = linalg::product(&linalg::product(&raw, &data.kept_products(kept, 0.0)), &raw.transpose().to_owned());
                let energy: f64 = (0..own.nrows()).map(|o| own[(o, o)]).sum();
                let scale = trace / energy.max(f64::MIN_POSITIVE);
                let turned = linalg::product(&rotation, &raw);
                Repaired { weight: Matrix::from_fn(turned.nrows(), turned.ncols(), |o, i| scale * turned[(o, i)]), bias: None }
            }
        })
    }
}

/// The ridge strength of least error for a target on held-out tokens, and that error.
pub(crate) fn choose_ridge(train: &Regression, held_out: &Regression, target: usize, weight: &Matrix, kept: &[usize]) -> Result<(f64, f64)> {
    let prior = columns(weight, kept);
    let mut best = (RIDGES[0], f64::INFINITY);
    for strength in RIDGES {
        let repaired = Repaired { weight: train.ridge(target, kept, &prior, strength)?, bias: None };
        let error = held_out.error(target, &repaired, kept);
        if error < best.1 {
            best = (strength, error);
        }
    }
    Ok(best)
}

/// Relative error of a refit on its own data, for tests of importance orders.
#[cfg(test)]
pub(crate) fn refit_error(gram: &Gram, weight: &Matrix, kept: &[usize], ridge: f64) -> Result<f64> {
    let data = Regression::of_layer(gram.clone(), weight, &[]);
    let repaired = Compensation::Refit.repair(&data, weight, kept, ridge)?;
    Ok(data.error(0, &repaired, kept))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::normal;
    use evop_model::{Device, Span, Tensor};

    fn correlated(seed: u64, rows: usize, scale: f32) -> Gram {
        let noise = normal(seed, 0.0, 1.0, (rows, 6));
        let mix = Tensor::from_vec((0..72).map(|i| ((i * 37 % 23) as f32 - 11.0) / 11.0).collect::<Vec<_>>(), (6, 12), &Device::Cpu).unwrap();
        let own = normal(seed + 1, 0.5, scale, (rows, 12));
        let x = (noise.matmul(&mix).unwrap() + own).unwrap();
        let mut gram = Gram::new(12);
        gram.add(&x, &[Span::prompt(rows)]).unwrap();
        gram.finish();
        gram
    }

    fn weight() -> Matrix {
        Matrix::from_fn(5, 12, |o, j| ((o * 5 + j * 7) % 13) as f64 / 6.0 - 1.0)
    }

    #[test]
    fn every_compensation_is_better_than_none_and_refit_is_best_on_its_own_data() {
        let (data, w) = (Regression::of_layer(correlated(1, 500, 0.3), &weight(), &[]), weight());
        let kept: Vec<usize> = (0..8).collect();
        let error = |c: Compensation| data.error(0, &c.repair(&data, &w, &kept, 1e-8).unwrap(), &kept);
        assert!(error(Compensation::Bias) < error(Compensation::None));
        assert!(error(Compensation::Rotate) < error(Compensation::None));
        for other in [Compensation::None, Compensation::Rotate] {
            assert!(error(Compensation::Refit) <= error(other), "{other}");
        }
        let all: Vec<usize> = (0..12).collect();
        for c in Compensation::ALL {
            assert!(data.error(0, &c.repair(&data, &w, &all, 1e-2).unwrap(), &all).abs() < 1e-9, "{c}: nothing removed, nothing lost");
        }
    }

    #[test]
    fn the_error_from_moments_is_the_error_on_the_tokens() {
        let x = normal(3, 0.2, 1.0, (50, 12));
        let mut gram = Gram::new(12);
        gram.add(&x, &[Span::prompt(50)]).unwrap();
        gram.finish();
        let (w, kept) = (weight(), vec![0, 3, 4, 8, 11]);
        let data = Regression::of_layer(gram, &w, &[]);
        for c in Compensation::ALL {
            let repaired = c.repair(&data, &w, &kept, 1e-2).unwrap();
            let (mut error, mut energy) = (0.0, 0.0);
            for row in x.to_vec2::<f32>().unwrap() {
                for o in 0..5 {
                    let y: f64 = (0..12).map(|j| w[(o, j)] * f64::from(row[j])).sum();
                    let given: f64 = kept.iter().enumerate().map(|(i, j)| repaired.weight[(o, i)] * f64::from(row[*j])).sum();
                    error += (y - given - repaired.bias.as_ref().map_or(0.0, |b| b[o])).powi(2);
                    energy += y * y;
                }
            }
            assert!((data.error(0, &repaired, &kept) - error / energy).abs() < 1e-5, "{c}");
        }
    }

    #[test]
    fn few_tokens_ask_for_a_stronger_ridge_than_many() {
        let w = weight();
        let kept: Vec<usize> = (0..9).collect();
        let held_out = Regression::of_layer(correlated(10, 4000, 1.0), &w, &[]);
        let chosen = |rows| choose_ridge(&Regression::of_layer(correlated(20, rows, 1.0), &w, &[]), &held_out, 0, &w, &kept).unwrap();
        let (few, many) = (chosen(14), chosen(4000));
        assert!(few.0 > many.0, "{few:?} {many:?}");
        assert!(few.1 > many.1);
    }

    #[test]
    fn nearly_singular_moments_give_finite_weights_that_fit() {
        // channels 6..12 are copies of 0..6 up to one part in a million: a condition number of about 1e12
        let base = normal(4, 0.0, 1.0, (300, 6));
        let jitter = normal(5, 0.0, 1e-6, (300, 6));
        let x = Tensor::cat(&[&base, &(&base + jitter).unwrap()], 1).unwrap();
        let mut gram = Gram::new(12);
        gram.add(&x, &[Span::prompt(300)]).unwrap();
        gram.finish();
        let w = weight();
        let data = Regression::of_layer(gram, &w, &[]);
        let kept: Vec<usize> = (0..6).chain([7, 9]).collect();
        let repaired = Compensation::Refit.repair(&data, &w, &kept, 1e-8).unwrap();
        let norm: f64 = (0..5).flat_map(|o| (0..8).map(move |i| (o, i))).map(|at| repaired.weight[at].powi(2)).sum::<f64>().sqrt();
        assert!(norm.is_finite() && norm < 50.0, "{norm}");
        assert!(data.error(0, &repaired, &kept) < 1e-6, "copies stand in for what went");
    }
}
