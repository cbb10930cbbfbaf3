//! One pattern a cluster (EvoP, arXiv 2502.14910, section 3.3): for text of one kind, what the common pattern removes may not be what can go.
//!
//! A server chooses among them by the clusters of the calibration chunks nearest to a prompt, so the chunks' vectors are kept beside the patterns.

use crate::calibration::Calibration;
use crate::evaluate::{Evaluator, Sample, Work};
use crate::run::PruneOptions;
use crate::search::{self, Progress};
use crate::space::SearchSpace;
use crate::{Error, Result, storage};
use candle_core::{Device, Tensor};
use evop_model::{Gene, Pattern};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::Path;

/// The pattern found for one cluster, and what it gains there.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterPattern {
    /// The cluster.
    pub cluster: usize,
    /// What is kept for its text.
    pub pattern: Vec<Gene>,
    /// Tokens that it was searched on, and held-out ones.
    pub tokens: (usize, usize),
    /// Its loss on the cluster's held-out sequences, and the common pattern's, where there are any.
    pub held_out: Option<(f64, f64)>,
}

/// Searches a pattern for one cluster, on whose sequences `evaluator` scores, in the space and with the strategy of the run.
pub(crate) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    options: &PruneOptions,
    cluster: usize,
    held_out: &[Sample],
    common: &Pattern,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<ClusterPattern> {
    let own = search::search(evaluator, space, &options.search, on_round)?;
    if own.adjustment.is_some() {
        let message = format!("{} changes weights beside the pattern, which no two clusters could share: expected another", options.search.strategy);
        return Err(Error::option("--per-cluster", message));
    }
    let mut losses = None;
    if !held_out.is_empty() {
        let (objective, savings) = (options.objective, options.savings);
        let unseen = Evaluator::new(evaluator.supernet(), held_out, objective, savings, HashMap::new(), Work::default(), Box::new(|_, _| Ok(())));
        let fitness = unseen?.evaluate(&[own.pattern.clone(), common.clone()])?;
        losses = Some((fitness[0].loss, fitness[1].loss));
    }
    let tokens = (evaluator.tokens(), held_out.iter().map(|s| s.tokens.len()).sum());
    Ok(ClusterPattern { cluster, pattern: own.pattern.layers().to_vec(), tokens, held_out: losses })
}

/// Writes the chunks' vectors [chunks, size] in f32 and their clusters [chunks] in u32.
pub(crate) fn write_vectors(path: &Path, calibration: &Calibration) -> Result<()> {
    let size = calibration.vectors.first().map_or(0, Vec::len);
    let values: Vec<f32> = calibration.vectors.iter().flatten().map(|v| *v as f32).collect();
    let clusters: Vec<u32> = calibration.picture.iter().map(|p| p.cluster as u32).collect();
    let tensors = HashMap::from([
        ("vectors".to_string(), Tensor::from_vec(values, (calibration.vectors.len(), size), &Device::Cpu)?),
        ("clusters".to_string(), Tensor::from_vec(clusters, calibration.picture.len(), &Device::Cpu)?),
    ]);
    let bytes = safetensors::serialize(&tensors, None).map_err(|e| Error::io(path, std::io::Error::other(e)))?;
    storage::write(path, &bytes)
}
