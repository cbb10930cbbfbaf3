//! What a search minimises: a loss a token, put together over tokens and clusters.

use crate::names::named;
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// The loss of one position.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FitnessKind {
    /// Cross-entropy of the next token.
    Nll,
    /// KL(dense || pruned) of the next-token distribution.
    Kl,
    /// How often a token that the pruned model guesses is refused by the dense one: half of the time at temperature 1, where that is the total variation
    /// between their next-token distributions (Leviathan et al. 2023, arXiv 2211.17192, section 3.3), half of it at 0. A search weighs it against time ([`crate::budget::LatencyTable::drafting`]).
    Draft,
}

named!(FitnessKind, "nll" => FitnessKind::Nll, "kl" => FitnessKind::Kl, "draft" => FitnessKind::Draft);

/// How positions become one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Aggregate {
    /// The mean over all positions.
    Mean,
    /// The worst cluster's mean: robust against a change of traffic.
    WorstCluster,
    /// The clusters' mean plus their standard deviation.
    #[serde(rename = "mean+std")]
    MeanStd,
}

named!(Aggregate, "mean" => Aggregate::Mean, "worst-cluster" => Aggregate::WorstCluster, "mean+std" => Aggregate::MeanStd);

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Objective {
    /// Of a position.
    pub kind: FitnessKind,
    /// Of all of them.
    pub aggregate: Aggregate,
    /// The part of the loss, 0 to 1, that the positions make up whose token the dense model takes from far back: few, so that a plain mean sells
    /// them for a little everywhere else.
    pub key_tokens: f64,
}

impl std::fmt::Display for Objective {
    /// Such as `kl, 50% of it key tokens`; the plain mean goes without saying.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.kind)?;
        if self.key_tokens > 0.0 {
            write!(f, ", {:.0}% of it key tokens", 100.0 * self.key_tokens)?;
        }
        if self.aggregate != Aggregate::Mean {
            write!(f, ", {}", self.aggregate)?;
        }
        Ok(())
    }
}

/// What a pattern scored; lower is better.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fitness {
    /// The objective: nats a token; of a draft, the share of its tokens that are refused.
    pub loss: f64,
    /// The same of each segment: the paired samples that racing compares.
    pub segments: Vec<f64>,
}

/// Some positions of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub cluster: usize,
    pub tokens: usize,
}

/// Positions of a segment: short enough for many paired samples, long enough that neighbours are nearly independent.
const SEGMENT: usize = 64;

impl Objective {
    /// # Errors
    /// [`Error::Option`] for a part of the loss outside of 0 to 1.
    pub fn check(&self) -> Result<()> {
        match self.key_tokens {
            part if self.for_drafts() && part > 0.0 => {
                Err(Error::option("--key-tokens", "expected none with --fitness draft: a token is refused or not".to_string()))
            }
            part if (0.0..=1.0).contains(&part) => Ok(()),
            other => Err(Error::option("--key-tokens", format!("expected a part of the loss, 0 to 1, found {other}"))),
        }
    }

    /// Whether patterns are judged as drafts: agreement and time in one number.
    pub fn for_drafts(&self) -> bool {
        self.kind == FitnessKind::Draft
    }

    /// The segments of a sequence with this many predicting positions.
    pub(crate) fn segments(self, positions: usize) -> impl Iterator<Item = Range<usize>> {
        (0..positions).step_by(SEGMENT).map(move |start| start..positions.min(start + SEGMENT))
    }

    /// Puts the first segments' losses together.
    pub(crate) fn fitness(self, segments: &[Segment], losses: &[f64]) -> Fitness {
        let clusters = segments.iter().map(|s| s.cluster + 1).max().unwrap_or(0);
        let mut sums = vec![(0.0, 0usize); clusters];
        for (segment, loss) in segments.iter().zip(losses) {
            let (sum, tokens) = &mut sums[segment.cluster];
            *sum += loss * segment.tokens as f64;
            *tokens += segment.tokens;
        }
        sums.retain(|(_, tokens)| *tokens > 0);
        let means: Vec<f64> = sums.iter().map(|(sum, tokens)| sum / *tokens as f64).collect();
        let loss = match self.aggregate {
            Aggregate::Mean => sums.iter().map(|(sum, _)| sum).sum::<f64>() / sums.iter().map(|(_, tokens)| tokens).sum::<usize>() as f64,
            // a cluster that isn't a number is the worst
            Aggregate::WorstCluster => means.iter().copied().fold(f64::NEG_INFINITY, |worst, m| if m > worst || m.is_nan() { m } else { worst }),
            Aggregate::MeanStd => {
                let mean = means.iter().sum::<f64>() / means.len() as f64;
                mean + (means.iter().map(|m| (m - mean).powi(2)).sum::<f64>() / means.len() as f64).sqrt()
            }
        };
        Fitness { loss, segments: losses.to_vec() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn aggregates_weigh_positions_and_clusters_as_they_say() {
        let segments = [(0, 64), (0, 32), (1, 64)].map(|(cluster, tokens)| Segment { cluster, tokens });
        let losses = [1.0, 2.0, 4.0];
        let loss = |aggregate| Objective { kind: FitnessKind::Nll, aggregate, key_tokens: 0.0 }.fitness(&segments, &losses).loss;
        assert!((loss(Aggregate::Mean) - (64.0 + 64.0 + 256.0) / 160.0).abs() < 1e-12);
        assert_eq!(loss(Aggregate::WorstCluster), 4.0);
        let (a, b) = (4.0 / 3.0, 4.0);
        assert!((loss(Aggregate::MeanStd) - ((a + b) / 2.0 + (b - a) / 2.0)).abs() < 1e-12);
    }

    #[test]
    fn segments_cover_a_sequence() {
        let objective = Objective { kind: FitnessKind::Kl, aggregate: Aggregate::Mean, key_tokens: 0.0 };
        assert_eq!(objective.segments(130).collect::<Vec<_>>(), [0..64, 64..128, 128..130]);
        assert_eq!(objective.segments(0).count(), 0);
    }
}
