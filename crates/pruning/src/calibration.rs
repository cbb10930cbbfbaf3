//! CCDS, cluster-based calibration dataset sampling (EvoP, arXiv 2502.14910): sentences -> chunks -> vectors -> k-means ->
//! sequences that mix the clusters.

use crate::embed::Embedder;
use crate::{Error, Result};
use linfa::DatasetBase;
use linfa::traits::{Fit, Predict};
use linfa_clustering::{KMeans, KMeansInit};
use ndarray::Array2;
use rand::SeedableRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand_chacha::ChaCha8Rng;
use rand_xoshiro::Xoshiro256Plus;
use rand_xoshiro::rand_core::SeedableRng as SeedableXoshiro;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

/// How the sequences are made. The defaults are those of the authors' code.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationOptions {
    /// Sequences in all.
    pub sequences: usize,
    /// Tokens of each.
    pub sequence_length: usize,
    /// Clusters of k-means.
    pub clusters: usize,
    /// Sentences that make a chunk.
    pub sentences_per_chunk: usize,
    /// Seed of the clustering and of the choice of chunks.
    pub seed: u64,
}

impl Default for CalibrationOptions {
    fn default() -> Self {
        Self { sequences: 5, sequence_length: 2048, clusters: 5, sentences_per_chunk: 60, seed: 31 }
    }
}

/// A calibration set: what the search scores patterns on, and what it never sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// How it was made.
    pub options: CalibrationOptions,
    /// What turned chunks into vectors.
    pub embedder: String,
    /// Chunks in each cluster (those held out not counted).
    pub cluster_sizes: Vec<usize>,
    /// The sequences.
    pub sequences: Vec<Sequence>,
    /// Tokens of the chunks that no sequence was made of, for the final comparison.
    pub held_out: Vec<u32>,
}

/// One calibration sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// Token ids, `sequence_length` of them.
    pub tokens: Vec<u32>,
    /// The chunks that it was filled from, in order.
    pub chunks: Vec<ChunkRef>,
}

/// A chunk of the corpus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Its number in the corpus.
    pub chunk: usize,
    /// Its cluster.
    pub cluster: usize,
}

/// One chunk in this many is held out.
const HELD_OUT_EVERY: usize = 10;

/// A step of the sampling, for progress displays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalibrationStep {
    /// `done` of `all` chunks are embedded.
    Embedding {
        /// Chunks done.
        done: usize,
        /// Chunks in all.
        all: usize,
    },
    /// k-means runs.
    Clustering,
}

impl Calibration {
    /// Samples a corpus.
    ///
    /// # Errors
    /// [`Error::Corpus`] for an empty corpus or one shorter than a sequence; [`Error::Option`] for numbers that can't be met.
    pub fn sample(
        corpus: &str,
        tokenizer: &Tokenizer,
        embedder: &dyn Embedder,
        options: &CalibrationOptions,
        mut progress: impl FnMut(CalibrationStep),
    ) -> Result<Self> {
        for (option, value, least) in [
            ("--sequences", options.sequences, 1),
            ("--sequence-length", options.sequence_length, 2),
            ("--clusters", options.clusters, 1),
            ("--sentences-per-chunk", options.sentences_per_chunk, 1),
        ] {
            if value < least {
                return Err(Error::option(option, format!("expected at least {least}, found {value}")));
            }
        }
        let chunks = chunks(corpus, options.sentences_per_chunk);
        if chunks.is_empty() {
            return Err(Error::Corpus("it is empty: expected text".into()));
        }
        let tokenise = |text: &str| -> Result<Vec<u32>> {
            let encoding = tokenizer.encode_fast(text, false).map_err(|e| Error::Corpus(format!("it can't be tokenised: {e}")))?;
            Ok(encoding.get_ids().to_vec())
        };
        let tokens: Vec<Vec<u32>> = chunks.iter().map(|c| tokenise(c)).collect::<Result<_>>()?;
        let total: usize = tokens.iter().map(Vec::len).sum();
        if total < options.sequence_length {
            return Err(Error::Corpus(format!(
                "it has {total} tokens, fewer than one sequence of {}: expected a longer text, or a smaller --sequence-length",
                options.sequence_length
            )));
        }
        let is_held_out = |i: usize| chunks.len() >= 2 * HELD_OUT_EVERY && i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1;
        let used: Vec<usize> = (0..chunks.len()).filter(|i| !is_held_out(*i)).collect();
        let clusters = options.clusters.min(used.len());
        let assignment = if clusters == 1 {
            vec![0; used.len()]
        } else {
            let texts: Vec<&str> = used.iter().map(|i| chunks[*i].as_str()).collect();
            let vectors = embedder.embed(&texts, &mut |done| progress(CalibrationStep::Embedding { done, all: texts.len() }))?;
            progress(CalibrationStep::Clustering);
            cluster(&vectors, clusters, options.seed)?
        };
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); clusters];
        for (chunk, cluster) in used.iter().zip(&assignment) {
            members[*cluster].push(*chunk);
        }
        let cluster_sizes = members.iter().map(Vec::len).collect();
        let sequences = fill(&members, &tokens, options)?;
        let held_out = (0..chunks.len()).filter(|i| is_held_out(*i)).flat_map(|i| tokens[i].iter().copied()).collect();
        Ok(Self { options: options.clone(), embedder: embedder.name(), cluster_sizes, sequences, held_out })
    }

    /// The sequences' tokens.
    pub fn tokens(&self) -> Vec<Vec<u32>> {
        self.sequences.iter().map(|s| s.tokens.clone()).collect()
    }
}

/// Groups of `sentences` sentences. A sentence ends at a full stop or exclamation mark before white space, as in the authors' code.
fn chunks(corpus: &str, sentences: usize) -> Vec<String> {
    let mut chunks = Vec::new();
    let (mut start, mut count) = (0, 0);
    let mut characters = corpus.char_indices().peekable();
    while let Some((at, c)) = characters.next() {
        let end = at + c.len_utf8();
        if matches!(c, '.' | '!') && characters.peek().is_none_or(|(_, next)| next.is_whitespace()) {
            count += 1;
            if count == sentences {
                chunks.push(corpus[start..end].trim().to_string());
                (start, count) = (end, 0);
            }
        }
    }
    chunks.push(corpus[start..].trim().to_string());
    chunks.retain(|c| !c.is_empty());
    chunks
}

/// k-means with a k-means++ start.
fn cluster(vectors: &[Vec<f64>], clusters: usize, seed: u64) -> Result<Vec<usize>> {
    let width = vectors.first().map_or(0, Vec::len);
    let flat: Vec<f64> = vectors.iter().flatten().copied().collect();
    if flat.iter().any(|v| !v.is_finite()) {
        return Err(Error::Corpus("a chunk's embedding is not a number: the model's weights are damaged".into()));
    }
    let observations = Array2::from_shape_vec((vectors.len(), width), flat).map_err(|e| Error::Corpus(format!("embeddings of different lengths: {e}")))?;
    let dataset = DatasetBase::from(observations);
    let rng = <Xoshiro256Plus as SeedableXoshiro>::seed_from_u64(seed);
    let params = KMeans::params_with_rng(clusters, rng).init_method(KMeansInit::KMeansPlusPlus).n_runs(10).max_n_iterations(300).tolerance(1e-4);
    let model = params.fit(&dataset).map_err(|e| Error::Corpus(format!("clustering failed: {e}; try fewer --clusters")))?;
    Ok(model.predict(dataset.records()).to_vec())
}

/// Fills each sequence with the next chunk of a cluster drawn uniformly, until it is long enough.
fn fill(members: &[Vec<usize>], tokens: &[Vec<u32>], options: &CalibrationOptions) -> Result<Vec<Sequence>> {
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut shuffled: Vec<(usize, Vec<usize>)> = members.iter().cloned().enumerate().filter(|(_, chunks)| !chunks.is_empty()).collect();
    for (_, chunks) in &mut shuffled {
        chunks.shuffle(&mut rng);
    }
    // one index for all clusters, as in the authors' code
    let mut next = 0;
    let mut sequences = Vec::with_capacity(options.sequences);
    for _ in 0..options.sequences {
        let mut sequence = Sequence { tokens: Vec::with_capacity(options.sequence_length), chunks: Vec::new() };
        let mut empty_draws = 0;
        while sequence.tokens.len() < options.sequence_length {
            let (cluster, chunks) = shuffled.choose(&mut rng).ok_or_else(|| Error::Corpus("it has no chunk to sample".into()))?;
            let chunk = chunks[next % chunks.len()];
            next += 1;
            if tokens[chunk].is_empty() {
                empty_draws += 1;
                if empty_draws > tokens.len() {
                    return Err(Error::Corpus("its chunks hold no tokens".into()));
                }
                continue;
            }
            sequence.tokens.extend(&tokens[chunk]);
            sequence.chunks.push(ChunkRef { chunk, cluster: *cluster });
        }
        sequence.tokens.truncate(options.sequence_length);
        sequences.push(sequence);
    }
    Ok(sequences)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_groups_of_sentences() {
        let text = "One. Two! Three v1.5 is one. Four.\nFive";
        assert_eq!(chunks(text, 2), ["One. Two!", "Three v1.5 is one. Four.", "Five"]);
        assert!(chunks(" \n\t", 2).is_empty());
    }

    #[test]
    fn clusters_of_separate_blobs_are_found_again() {
        let vectors: Vec<Vec<f64>> = (0..30).map(|i| vec![f64::from(i % 3) * 10.0 + f64::from(i) * 0.01, f64::from(i % 3)]).collect();
        let found = cluster(&vectors, 3, 7).unwrap();
        assert_eq!(found, cluster(&vectors, 3, 7).unwrap());
        for i in 0..30 {
            assert_eq!(found[i], found[i % 3]);
        }
    }

    #[test]
    fn every_sequence_has_its_length_and_says_where_it_came_from() {
        let tokens: Vec<Vec<u32>> = (0..6).map(|i| vec![i; 10]).collect();
        let options = CalibrationOptions { sequences: 3, sequence_length: 25, ..Default::default() };
        let sequences = fill(&[vec![0, 2, 4], vec![1, 3, 5], vec![]], &tokens, &options).unwrap();
        for s in &sequences {
            assert_eq!(s.tokens.len(), 25);
            assert_eq!(s.chunks.len(), 3);
            assert_eq!(s.tokens[0] as usize, s.chunks[0].chunk);
            assert!(s.chunks.iter().all(|c| c.cluster < 2 && c.chunk % 2 == c.cluster));
        }
        assert_eq!(sequences, fill(&[vec![0, 2, 4], vec![1, 3, 5], vec![]], &tokens, &options).unwrap());
    }
}
