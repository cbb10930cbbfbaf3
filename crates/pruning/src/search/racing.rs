//! Racing: few tokens for many candidates, many for few. A candidate goes when it is worse than the incumbent beyond chance.

use super::rankable;
use crate::Result;
use crate::evaluate::Evaluator;
use crate::objective::Fitness;
use evop_model::Pattern;
use statrs::distribution::{ContinuousCDF, StudentsT};
use std::cmp::Ordering;

/// One-sided probability under which a worse mean is taken for worse.
const SIGNIFICANCE: f64 = 0.01;

/// Whether `candidate` is worse than `incumbent` beyond chance: a paired, one-sided t test over the segments that both have.
pub(super) fn is_worse(candidate: &Fitness, incumbent: &Fitness) -> bool {
    if !candidate.loss.is_finite() {
        return true;
    }
    let differences: Vec<f64> = candidate.segments.iter().zip(&incumbent.segments).map(|(c, i)| c - i).collect();
    let n = differences.len() as f64;
    if n < 2.0 {
        return false;
    }
    let mean = differences.iter().sum::<f64>() / n;
    let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / (n - 1.0);
    if mean <= 0.0 || variance <= 0.0 {
        return mean > 0.0;
    }
    let t = mean / (variance / n).sqrt();
    StudentsT::new(0.0, 1.0, n - 1.0).is_ok_and(|d| 1.0 - d.cdf(t) < SIGNIFICANCE)
}

/// Packs after which candidates are compared: an eighth, a quarter, a half, all.
pub(super) fn stages(packs: usize) -> Vec<usize> {
    let mut stages: Vec<usize> = [8, 4, 2, 1].iter().map(|part| packs.div_ceil(*part)).collect();
    stages.dedup();
    stages
}

/// Losses of all candidates after the first stage; number and fitness of those that came through.
pub(super) type Raced = (Vec<f64>, Vec<(usize, Fitness)>);

/// Evaluates candidates stage by stage against an incumbent; those that lose, and all but the best `share` of the stage's, go. Returns the
/// losses after the first stage of all (for a surrogate), and the fitness over all packs of those that came through.
pub(super) fn race(evaluator: &mut Evaluator<'_>, candidates: &[Pattern], incumbent: Option<&Pattern>) -> Result<Raced> {
    let stages = stages(evaluator.packs());
    let mut running: Vec<usize> = (0..candidates.len()).collect();
    let mut first = Vec::new();
    let mut last = Vec::new();
    for (stage, packs) in stages.iter().enumerate() {
        let patterns: Vec<Pattern> = running.iter().map(|i| candidates[*i].clone()).collect();
        let mut fitness: Vec<(usize, Fitness)> = running.iter().copied().zip(evaluator.evaluate_first(&patterns, *packs)?).collect();
        if stage == 0 {
            first = fitness.iter().map(|(_, f)| f.loss).collect();
        }
        if stage + 1 < stages.len() {
            if let Some(incumbent) = incumbent {
                // known already: the incumbent has been through all packs
                let reference = evaluator.evaluate_first(std::slice::from_ref(incumbent), *packs)?.remove(0);
                fitness.retain(|(_, f)| !is_worse(f, &reference));
            }
            fitness.sort_by(best_first);
            fitness.truncate(candidates.len().div_ceil(SHARE.pow(stage as u32 + 1)));
        }
        running = fitness.iter().map(|(i, _)| *i).collect();
        last = fitness;
    }
    Ok((first, last))
}

/// By loss, which isn't a number at the end; ties by number.
fn best_first(a: &(usize, Fitness), b: &(usize, Fitness)) -> Ordering {
    rankable(a.1.loss).total_cmp(&rankable(b.1.loss)).then(a.0.cmp(&b.0))
}

/// At most one in this many goes on to the next stage.
const SHARE: usize = 2;

#[cfg(test)]
mod tests {
    use super::*;

    fn fitness(segments: &[f64]) -> Fitness {
        Fitness { loss: segments.iter().sum::<f64>() / segments.len() as f64, segments: segments.to_vec() }
    }

    #[test]
    fn a_constant_difference_is_beyond_chance_and_a_noisy_one_is_not() {
        let incumbent = fitness(&[1.0, 3.0, 2.0, 5.0, 4.0, 2.5]);
        assert!(is_worse(&fitness(&[1.2, 3.21, 2.2, 5.19, 4.2, 2.7]), &incumbent));
        assert!(!is_worse(&fitness(&[0.8, 3.6, 1.7, 5.5, 3.9, 2.6]), &incumbent));
        assert!(!is_worse(&fitness(&[0.9, 2.9, 1.9, 4.9, 3.9, 2.4]), &incumbent));
        assert!(is_worse(&fitness(&[f64::NAN; 6]), &incumbent));
    }

    #[test]
    fn what_is_no_number_comes_last_whatever_its_sign() {
        let losses = [f64::NAN, 2.0, -f64::NAN, f64::INFINITY, 1.0];
        let mut field: Vec<(usize, Fitness)> = losses.iter().map(|loss| fitness(&[*loss])).enumerate().collect();
        field.sort_by(best_first);
        assert_eq!(field.iter().map(|(i, _)| *i).collect::<Vec<_>>(), [4, 1, 0, 2, 3]);
    }

    #[test]
    fn stages_end_with_everything() {
        assert_eq!(stages(16), [2, 4, 8, 16]);
        assert_eq!(stages(3), [1, 2, 3]);
        assert_eq!(stages(1), [1]);
    }
}
