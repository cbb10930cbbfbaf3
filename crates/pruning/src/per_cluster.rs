//! One pattern a cluster (EvoP, arXiv 2502.14910, section 3.3): for text of one kind, what the common pattern removes may not be what can go.
//!
//! A server chooses among them by the clusters of the calibration chunks nearest to a prompt, so the chunks' vectors are kept beside the patterns.

use crate::calibration::Calibration;
use crate::evaluate::{Evaluator, Recorder, Sample, Work};
use crate::run::PruneOptions;
use crate::search::{self, Progress};
use crate::space::SearchSpace;
use crate::supernet::Supernet;
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

/// What has been evaluated for a cluster before.
pub(crate) type Known<'k> = dyn FnMut(usize) -> Result<HashMap<Pattern, Vec<f64>>> + 'k;

/// Searches a pattern for every cluster that has sequences, in the space and with the strategy of the run. `known` gives what an earlier part of the
/// run evaluated for a cluster, `recorder` makes the recorder of one.
pub(crate) fn search<'a>(
    supernet: &'a Supernet,
    space: &SearchSpace,
    calibration: &Calibration,
    options: &PruneOptions,
    common: &Pattern,
    known: &mut Known<'_>,
    recorder: &'a dyn Fn(usize, &[(Pattern, Vec<f64>)], Work) -> Result<()>,
    on_round: &mut dyn FnMut(usize, usize, Progress) -> Result<()>,
) -> Result<Vec<ClusterPattern>> {
    let clusters = calibration.cluster_sizes.len();
    let tokens = |samples: &[Sample]| samples.iter().map(|s| s.tokens.len()).sum();
    let mut found = Vec::with_capacity(clusters);
    for cluster in 0..clusters {
        let samples = calibration.cluster_samples(cluster, options.calibration.sequences);
        if samples.is_empty() {
            continue;
        }
        let record: Box<Recorder<'_>> = Box::new(move |results, work| recorder(cluster, results, work));
        let mut evaluator = Evaluator::new(supernet, &samples, options.objective, options.savings, known(cluster)?, Work::default(), record)?;
        let own = search::search(&mut evaluator, space, &options.search, &mut |p| on_round(cluster, clusters, p))?;
        if own.adjustment.is_some() {
            let message = format!("{} changes weights beside the pattern, which no two clusters could share: expected another", options.search.strategy);
            return Err(Error::option("--per-cluster", message));
        }
        let held_out: Vec<Sample> = calibration.held_out_samples().into_iter().filter(|s| s.cluster == cluster).collect();
        let mut losses = None;
        if !held_out.is_empty() {
            let mut unseen = Evaluator::new(supernet, &held_out, options.objective, options.savings, HashMap::new(), Work::default(), Box::new(|_, _| Ok(())))?;
            let fitness = unseen.evaluate(&[own.pattern.clone(), common.clone()])?;
            losses = Some((fitness[0].loss, fitness[1].loss));
        }
        found.push(ClusterPattern { cluster, pattern: own.pattern.layers().to_vec(), tokens: (tokens(&samples), tokens(&held_out)), held_out: losses });
    }
    Ok(found)
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
