//! What a finished run reports.

use super::Run;
use crate::budget::{Budget, Drafting};
use crate::calibration::{CorpusReport, Point};
use crate::checkpoint::Written;
use crate::compensate::SkipCompensation;
use crate::eval::Perplexity;
use crate::evaluate::Work;
use crate::levels::{Level, LevelReport};
use crate::per_cluster::ClusterPattern;
use crate::search::{Certificate, Found};
use serde::Serialize;

/// What a finished run reports.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Outcome {
    /// The inputs.
    pub run: Run,
    /// The pattern chosen.
    pub found: Found,
    /// The search's result against the optimum, where the space was enumerated.
    pub certificate: Option<Certificate>,
    /// The objective of the dense model on the calibration sequences.
    pub dense_loss: f64,
    /// The choice among the best patterns on held-out sequences.
    pub held_out: HeldOut,
    /// What the pattern does as a draft on held-out sequences, where drafts were searched for.
    pub drafting: Option<Drafting>,
    /// A pattern for every cluster, where they were asked for.
    pub clusters: Vec<ClusterPattern>,
    /// What they cost in addition.
    pub clusters_work: Work,
    /// Perplexity of the dense model on text that the search never saw.
    pub dense: Perplexity,
    /// The same of the pruned model.
    pub pruned: Perplexity,
    /// What the search computed (the certificate not counted).
    pub work: Work,
    /// What the certificate computed in addition.
    pub certificate_work: Work,
    /// Seconds by phase; the search's over all attempts.
    pub seconds: Seconds,
    /// Block parameters before and after.
    pub block_parameters: (usize, usize),
    /// All parameters before and after.
    pub parameters: (usize, usize),
    /// Key/value cache bytes per token (2 bytes a number) before and after.
    pub kv_bytes_per_token: (usize, usize),
    /// Fractions of each budget's resource that are kept.
    pub kept_of_budgets: Vec<(Budget, f64)>,
    /// The calibration set, its tokens left out.
    pub calibration: CalibrationReport,
    /// What was chosen for every sub-block with levels.
    pub levels: Vec<LevelReport>,
    /// How skipped sub-blocks are made up for.
    pub skips: SkipCompensation,
    /// Per sub-block, the level of the pattern.
    pub pattern_levels: Vec<Level>,
    /// The model's widths: whole, and kept.
    pub widths: Vec<(usize, usize)>,
    /// Bytes held for speed: statistics and residual streams at most, dense distributions, boundary states (now, at most).
    pub memory: Memory,
    /// The checkpoint's files, and what tools that read it can't do with it.
    pub written: Written,
}

/// A choice on held-out sequences.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct HeldOut {
    /// Patterns that were compared.
    pub candidates: usize,
    /// Place of the chosen one in the search's own order, from 0.
    pub chosen: usize,
    /// Its loss there.
    pub loss: f64,
    /// Its loss on the sequences that the search saw, less than the other by what was overfitted.
    pub search_loss: f64,
}

/// Where the time went.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// Sampling the calibration set.
    pub calibration: f64,
    /// The level database (0 where it was there).
    pub levels: f64,
    /// Search and certificate, over all attempts.
    pub search: f64,
    /// The clusters' own patterns, in this attempt.
    pub clusters: f64,
    /// Held-out choice, perplexities and writing.
    pub finish: f64,
}

/// Bytes held beside the model.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Memory {
    /// Statistics of one sub-block and the residual streams, while levels were built.
    pub statistics: usize,
    /// The dense model's next-token distributions.
    pub distributions: usize,
    /// Boundary states at the end, and their bound.
    pub prefix_cache: (usize, usize),
    /// Repaired output layers that are kept in memory, and their bound.
    pub outputs: (usize, usize),
    /// The most that this process ever held, where the system tells (Linux).
    pub peak_resident: Option<usize>,
}

/// `VmHWM` of /proc/self/status.
pub(super) fn peak_resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes: usize = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.trim().trim_end_matches(" kB").trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// A calibration set without its tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalibrationReport {
    /// SHA-256 of its tokens.
    pub sha256: String,
    /// What turned chunks into vectors.
    pub embedder: String,
    /// What each corpus gave.
    pub corpora: Vec<CorpusReport>,
    /// Chunks in each cluster.
    pub cluster_sizes: Vec<usize>,
    /// The chunks in a plane.
    pub picture: Vec<Point>,
    /// Tokens of the sequences that patterns were scored on, of those for statistics, of those held out.
    pub tokens: [usize; 3],
}
