//! A run's clusters read back: which of its patterns is for a text, by a vote among the calibration chunks nearest to it (as EvoP's released code does).

use crate::per_cluster::ClusterPattern;
use crate::run::{self, CALIBRATION, CLUSTER_VECTORS, CLUSTERS, Run};
use crate::{Error, Result, storage};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use std::path::Path;

/// Chunks that vote.
const VOTERS: usize = 8;

/// What `evop prune --per-cluster` left in its directory.
#[derive(Debug, Clone)]
pub struct Clusters {
    /// The run's inputs.
    pub run: Run,
    /// A pattern a cluster, for the clusters that have one.
    pub patterns: Vec<ClusterPattern>,
    /// [`crate::Embedder::name`] of what made the chunks' vectors.
    pub embedder: String,
    chunks: Chunks,
}

/// The part of `calibration.json` that is needed here.
#[derive(Deserialize)]
struct Sampled {
    embedder: String,
}

impl Clusters {
    /// Reads a run's directory.
    ///
    /// # Errors
    /// [`Error::RunDirectory`] that names the file: there is none, it is damaged, or vectors and patterns don't fit together.
    pub fn read(directory: &Path) -> Result<Self> {
        let run = run::inputs(directory)?;
        for file in [CLUSTERS, CLUSTER_VECTORS, CALIBRATION] {
            let path = directory.join(file);
            if !path.exists() {
                return Err(Error::RunDirectory { path, message: "not there: expected the directory of an `evop prune --per-cluster` that has ended".into() });
            }
        }
        let patterns: Vec<ClusterPattern> = storage::read_json(&directory.join(CLUSTERS))?;
        let Sampled { embedder } = storage::read_json(&directory.join(CALIBRATION))?;
        let path = directory.join(CLUSTER_VECTORS);
        let bytes = std::fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let chunks = Chunks::parse(&bytes, &patterns, run.options.calibration.clusters).map_err(|message| Error::RunDirectory { path, message })?;
        Ok(Self { run, patterns, embedder, chunks })
    }

    /// Numbers of a chunk's vector.
    pub fn vector_size(&self) -> usize {
        self.chunks.size
    }

    /// Chunks that may vote.
    pub fn chunks(&self) -> usize {
        self.chunks.patterns.len()
    }

    /// The index in `patterns` of the pattern for a text with this vector (of [`Self::vector_size`] numbers): that of most of the 8 nearest chunks by
    /// Euclidean distance, as in the k-means that made the clusters. Among equals, the one whose nearest chunk is nearer.
    pub fn vote(&self, vector: &[f64]) -> usize {
        self.chunks.vote(vector)
    }
}

/// The chunks whose cluster has a pattern.
#[derive(Debug, Clone)]
struct Chunks {
    /// [chunks, size].
    vectors: Vec<f32>,
    size: usize,
    /// Each chunk's index in the list of patterns.
    patterns: Vec<usize>,
}

impl Chunks {
    /// From a file with `vectors` [chunks, size] in f32 and `clusters` [chunks] in u32. A cluster too small for a sequence has chunks and no pattern.
    fn parse(bytes: &[u8], patterns: &[ClusterPattern], clusters: usize) -> std::result::Result<Self, String> {
        let file = SafeTensors::deserialize(bytes).map_err(|e| format!("not a safetensors file: {e}"))?;
        let tensor = |name: &str, dtype: Dtype, dimensions: usize| {
            let tensor = file.tensor(name).map_err(|_| format!("expected a tensor `{name}`"))?;
            let fits = tensor.dtype() == dtype && tensor.shape().len() == dimensions;
            let found = || format!("{name}: expected {dimensions} dimensions of {dtype:?}, found {:?} of {:?}", tensor.shape(), tensor.dtype());
            if fits { Ok(tensor) } else { Err(found()) }
        };
        let (vectors, of) = (tensor("vectors", Dtype::F32, 2)?, tensor("clusters", Dtype::U32, 1)?);
        let (count, size) = (vectors.shape()[0], vectors.shape()[1]);
        if of.shape()[0] != count {
            return Err(format!("expected as many clusters as vectors, {count}, found {}", of.shape()[0]));
        }
        let values: Vec<f32> = words(&vectors).map(f32::from_le_bytes).collect();
        let mut chunks = Self { vectors: Vec::new(), size, patterns: Vec::new() };
        for (i, cluster) in words(&of).map(u32::from_le_bytes).enumerate() {
            let vector = &values[i * size..(i + 1) * size];
            if vector.iter().any(|v| !v.is_finite()) {
                return Err(format!("the vector of chunk {i} has a number that isn't finite"));
            }
            if cluster as usize >= clusters {
                return Err(format!("chunk {i}: expected one of the run's {clusters} clusters, found {cluster}"));
            }
            if let Some(pattern) = patterns.iter().position(|p| p.cluster == cluster as usize) {
                chunks.vectors.extend(vector);
                chunks.patterns.push(pattern);
            }
        }
        if chunks.patterns.is_empty() {
            return Err(format!("none of the {count} chunks is of a cluster that {CLUSTERS} has a pattern of"));
        }
        Ok(chunks)
    }

    fn vote(&self, vector: &[f64]) -> usize {
        let distance = |chunk: usize| {
            let chunk = &self.vectors[chunk * self.size..(chunk + 1) * self.size];
            chunk.iter().zip(vector).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum::<f64>()
        };
        let mut nearest: Vec<(f64, usize)> = (0..self.patterns.len()).map(|chunk| (distance(chunk), chunk)).collect();
        nearest.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.cmp(&b.1)));
        nearest.truncate(VOTERS);
        let ballots: Vec<usize> = nearest.iter().map(|(_, chunk)| self.patterns[*chunk]).collect();
        let votes = |pattern: usize| ballots.iter().filter(|ballot| **ballot == pattern).count();
        // the ballots stand in the order of distance, so among equals the first one counts
        ballots.iter().copied().reduce(|best, other| if votes(other) > votes(best) { other } else { best }).unwrap_or(0)
    }
}

/// A tensor's numbers of four bytes.
fn words<'t>(tensor: &'t TensorView<'_>) -> impl Iterator<Item = [u8; 4]> + 't {
    tensor.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]])
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use std::collections::HashMap;

    /// Chunks on a line, each with its pattern.
    fn on_a_line(chunks: &[(f32, usize)]) -> Chunks {
        Chunks { vectors: chunks.iter().map(|c| c.0).collect(), size: 1, patterns: chunks.iter().map(|c| c.1).collect() }
    }

    #[test]
    fn the_eight_nearest_vote_and_the_nearer_wins_among_equals() {
        let even = on_a_line(&[(1.0, 1), (2.0, 1), (3.0, 1), (4.0, 1), (-1.5, 0), (-2.5, 0), (-3.5, 0), (-4.5, 0), (9.0, 0), (-9.0, 0)]);
        assert_eq!(even.vote(&[0.0]), 1, "four to four, and the nearest is of 1");
        assert_eq!(even.vote(&[-0.5]), 0, "four to four, and the nearest is of 0");
        assert_eq!(even.vote(&[-2.6]), 0, "five to three");
        let outvoted = on_a_line(&[(0.0, 2), (0.1, 2), (0.2, 2), (0.3, 0), (0.4, 0), (0.5, 0), (0.6, 0), (0.7, 1), (0.8, 2), (0.9, 2)]);
        assert_eq!(outvoted.vote(&[0.0]), 0, "the ninth doesn't count");
        assert_eq!(on_a_line(&[(5.0, 3)]).vote(&[0.0]), 3, "fewer than eight will do");
        // equally far: the first chunk is as good as any, and always the same
        assert_eq!(on_a_line(&[(1.0, 1), (-1.0, 0)]).vote(&[0.0]), 1);
    }

    #[test]
    fn distances_are_euclidean() {
        // (3, 3) is nearer than (0, 5), though further by the sum of its coordinates
        let chunks = Chunks { vectors: vec![0.0, 5.0, 3.0, 3.0], size: 2, patterns: vec![0, 1] };
        assert_eq!(chunks.vote(&[0.0, 0.0]), 1);
    }

    #[test]
    fn a_file_that_does_not_fit_says_why() {
        let pattern = |cluster| ClusterPattern { cluster, pattern: Vec::new(), tokens: (0, 0), held_out: None };
        let parse = |vectors: Tensor, clusters: Tensor| {
            let tensors = HashMap::from([("vectors", vectors), ("clusters", clusters)]);
            Chunks::parse(&safetensors::serialize(&tensors, None).unwrap(), &[pattern(2), pattern(0)], 3)
        };
        let vectors = |values: &[f32]| Tensor::from_slice(values, (values.len() / 2, 2), &Device::Cpu).unwrap();
        let clusters = |values: &[u32]| Tensor::new(values, &Device::Cpu).unwrap();
        let two = || vectors(&[1.0, 2.0, 3.0, 4.0]);
        let read = parse(vectors(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), clusters(&[0, 1, 2])).unwrap();
        assert_eq!((read.vectors, read.patterns), (vec![1.0, 2.0, 5.0, 6.0], vec![1, 0]), "cluster 1 has no pattern");
        let why = |vectors, clusters| parse(vectors, clusters).unwrap_err();
        assert!(why(two(), clusters(&[0])).contains("as many clusters as vectors, 2, found 1"));
        assert!(why(two(), clusters(&[0, 3])).contains("one of the run's 3 clusters, found 3"));
        assert!(why(two(), clusters(&[1, 1])).contains("none of the 2 chunks"));
        assert!(why(vectors(&[1.0, f32::NAN]), clusters(&[0])).contains("chunk 0 has a number that isn't finite"));
        assert!(why(two().to_dtype(candle_core::DType::F64).unwrap(), clusters(&[0, 1])).contains("vectors: expected 2 dimensions of F32"));
        assert!(why(two(), vectors(&[0.0, 1.0])).contains("clusters: expected 1 dimensions of U32"));
        assert!(Chunks::parse(b"x", &[], 1).unwrap_err().contains("not a safetensors file"));
    }
}
