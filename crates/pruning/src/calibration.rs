//! CCDS, cluster-based calibration dataset sampling (EvoP, arXiv 2502.14910): sentences -> chunks -> vectors -> k-means ->
//! sequences from every cluster.

use crate::embed::Embedder;
use crate::evaluate::Sample;
use crate::levels::tokens_sha256;
use crate::names::named;
use crate::{Error, Result, projection, storage};
use evop_model::Config;
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
use std::collections::HashSet;
use std::path::Path;
use tokenizers::Tokenizer;

/// Text to calibrate on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    /// What it is called in reports.
    pub label: String,
    /// Its documents.
    pub documents: Vec<String>,
}

/// How sequences are filled from clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mixing {
    /// A sequence takes chunks of clusters drawn at random until it is full (the authors' code).
    Mixed,
    /// A sequence is text of one cluster, so that a loss can be told for every cluster.
    Apart,
    /// No clusters at all: chunks in random order. The control.
    Random,
}

named!(Mixing, "mixed" => Mixing::Mixed, "apart" => Mixing::Apart, "random" => Mixing::Random);

/// How often a cluster's turn comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    /// All clusters alike (EvoP).
    Uniform,
    /// In proportion to their chunks.
    Size,
}

named!(Weights, "uniform" => Weights::Uniform, "size" => Weights::Size);

/// How the sequences are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CalibrationOptions {
    /// Sequences that patterns are scored on.
    pub sequences: usize,
    /// Tokens of each.
    pub sequence_length: usize,
    /// Clusters of k-means.
    pub clusters: usize,
    /// Sentences that make a chunk.
    pub sentences_per_chunk: usize,
    /// Chunks that are looked at, drawn from all corpora at random; `None`: all.
    pub max_chunks: Option<usize>,
    /// How sequences are filled.
    pub mixing: Mixing,
    /// How often a cluster's turn comes.
    pub weights: Weights,
    /// Leave out documents and chunks that were there before (white space aside).
    pub deduplicate: bool,
    /// Tokens that activations are measured on for importance and compensation, in sequences of the same length.
    pub statistics_tokens: usize,
    /// Tokens kept apart from all of that, spread over the clusters: for choices among finished patterns and ridge strengths.
    pub held_out_tokens: usize,
    /// Seed of the clustering and of the choice of chunks.
    pub seed: u64,
}

impl CalibrationOptions {
    /// What the authors' code does: 5 sequences of 2,048 tokens from 5 clusters of 60-sentence chunks.
    pub fn paper() -> Self {
        Self {
            sequences: 5,
            sequence_length: 2048,
            clusters: 5,
            sentences_per_chunk: 60,
            max_chunks: None,
            mixing: Mixing::Mixed,
            weights: Weights::Uniform,
            deduplicate: false,
            statistics_tokens: 0,
            held_out_tokens: 0,
            seed: 31,
        }
    }

    /// Whether a model of this context can be calibrated so: asked before anything is computed.
    ///
    /// # Errors
    /// [`Error::Option`] that names the option.
    pub fn check(&self, context: usize) -> Result<()> {
        for (option, value, least) in [
            ("--sequences", self.sequences, 1),
            ("--sequence-length", self.sequence_length, 2),
            ("--clusters", self.clusters, 1),
            ("--sentences-per-chunk", self.sentences_per_chunk, 1),
        ] {
            if value < least {
                return Err(Error::option(option, format!("expected at least {least}, found {value}")));
            }
        }
        if self.sequence_length > context {
            let message = format!("expected at most {context} tokens, the model's context, found {}", self.sequence_length);
            return Err(Error::option("--sequence-length", message));
        }
        Ok(())
    }
}

impl Default for CalibrationOptions {
    /// This project's: short sequences, each from one cluster; many more tokens for statistics than for scoring.
    fn default() -> Self {
        Self {
            sequences: 16,
            sequence_length: 256,
            clusters: 8,
            sentences_per_chunk: 16,
            max_chunks: Some(1_024),
            mixing: Mixing::Apart,
            weights: Weights::Uniform,
            deduplicate: true,
            statistics_tokens: 65_536,
            held_out_tokens: 8_192,
            seed: 31,
        }
    }
}

/// A calibration set: what the search scores patterns on, what activations are measured on, and what neither ever sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// How it was made.
    pub options: CalibrationOptions,
    /// What turned chunks into vectors.
    pub embedder: String,
    /// The corpora: label, chunks, documents and chunks left out as duplicates.
    pub corpora: Vec<CorpusReport>,
    /// Chunks in each cluster (those held out not counted).
    pub cluster_sizes: Vec<usize>,
    /// The chunks in a plane (the two principal components of their vectors).
    pub picture: Vec<Point>,
    /// The chunks' vectors, where they were embedded in this process.
    #[serde(skip)]
    pub vectors: Vec<Vec<f64>>,
    /// The sequences that patterns are scored on.
    pub sequences: Vec<Sequence>,
    /// More sequences for statistics; those above are part of them.
    pub statistics: Vec<Sequence>,
    /// Sequences of chunks that nothing above was made of.
    pub held_out: Vec<Sequence>,
}

/// What a corpus gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CorpusReport {
    /// Its name.
    pub label: String,
    /// Chunks used or held out.
    pub chunks: usize,
    /// Documents and chunks left out because they were there before.
    pub duplicates: usize,
}

/// A chunk in the picture of the clusters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// First principal component.
    pub x: f32,
    /// Second principal component.
    pub y: f32,
    /// Its cluster.
    pub cluster: usize,
}

/// One calibration sequence.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sequence {
    /// Token ids.
    pub tokens: Vec<u32>,
    /// The cluster that most of it is from.
    pub cluster: usize,
    /// The chunks that it was filled from, in order.
    pub chunks: Vec<ChunkRef>,
}

/// A chunk of the corpora, counted over all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkRef {
    /// Its number.
    pub chunk: usize,
    /// Its cluster.
    pub cluster: usize,
}

/// One chunk in this many of each cluster is held out.
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
    /// Samples corpora.
    ///
    /// # Errors
    /// [`Error::Corpus`] for corpora that are empty or shorter than a sequence; [`Error::Option`] for numbers that can't be met.
    pub fn sample(
        corpora: &[Corpus],
        tokenizer: &Tokenizer,
        embedder: &dyn Embedder,
        options: &CalibrationOptions,
        mut progress: impl FnMut(CalibrationStep),
    ) -> Result<Self> {
        options.check(usize::MAX)?;
        let (chunks, corpora) = chunk_corpora(corpora, options);
        let chunks = draw(chunks, options);
        if chunks.is_empty() {
            return Err(Error::Corpus("it is empty: expected text".into()));
        }
        let tokenise = |text: &String| -> Result<Vec<u32>> {
            let encoding = tokenizer.encode_fast(text.as_str(), false).map_err(|e| Error::Corpus(format!("it can't be tokenised: {e}")))?;
            Ok(encoding.get_ids().to_vec())
        };
        let tokens: Vec<Vec<u32>> = chunks.iter().map(tokenise).collect::<Result<_>>()?;
        let total: usize = tokens.iter().map(Vec::len).sum();
        if total < options.sequence_length {
            return Err(Error::Corpus(format!(
                "it has {total} tokens, fewer than one sequence of {}: expected a longer text, or a smaller --sequence-length",
                options.sequence_length
            )));
        }
        let clusters = if options.mixing == Mixing::Random { 1 } else { options.clusters.min(chunks.len()) };
        let (mut picture, mut embedded) = (Vec::new(), Vec::new());
        let assignment = if clusters == 1 {
            vec![0; chunks.len()]
        } else {
            let texts: Vec<&str> = chunks.iter().map(String::as_str).collect();
            let vectors = embedder.embed(&texts, &mut |done| progress(CalibrationStep::Embedding { done, all: texts.len() }))?;
            progress(CalibrationStep::Clustering);
            let assignment = cluster(&vectors, clusters, options.seed)?;
            let plane = projection::plane(&vectors);
            picture = plane.into_iter().zip(&assignment).map(|((x, y), cluster)| Point { x, y, cluster: *cluster }).collect();
            embedded = vectors;
            assignment
        };
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); clusters];
        let mut held_out: Vec<Vec<usize>> = vec![Vec::new(); clusters];
        let mut counts = vec![0; clusters];
        for (chunk, cluster) in assignment.iter().enumerate() {
            counts[*cluster] += 1;
            // every tenth chunk of a cluster, if the corpus is long enough to spare it
            let spared = chunks.len() >= 2 * HELD_OUT_EVERY && counts[*cluster] % HELD_OUT_EVERY == 0;
            if spared { held_out[*cluster].push(chunk) } else { members[*cluster].push(chunk) }
        }
        let length = options.sequence_length;
        let (sequences, statistics) = if options.mixing == Mixing::Mixed {
            let sequences = fill(&members, &tokens, options)?;
            (sequences, Pieces::new(&members, &tokens, length, options).take_all(options.statistics_tokens / length))
        } else {
            let mut pieces = Pieces::new(&members, &tokens, length, options);
            let sequences = pieces.take(options.sequences);
            if sequences.len() < options.sequences {
                return Err(Error::Corpus(format!(
                    "it gives {} sequences of {length} tokens, {} were asked for: expected a longer text, or smaller --sequences or --sequence-length",
                    sequences.len(),
                    options.sequences
                )));
            }
            let more = pieces.take_all((options.statistics_tokens / length).saturating_sub(sequences.len()));
            let statistics = if options.statistics_tokens == 0 { Vec::new() } else { sequences.iter().cloned().chain(more).collect() };
            (sequences, statistics)
        };
        let held_out = Pieces::new(&held_out, &tokens, length, options).take_all(options.held_out_tokens.div_ceil(length));
        Ok(Self {
            options: options.clone(),
            embedder: embedder.name(),
            corpora,
            cluster_sizes: members.iter().map(Vec::len).collect(),
            picture,
            vectors: embedded,
            sequences,
            statistics,
            held_out,
        })
    }

    /// Reads a `calibration.json`, of the run at hand or of an earlier one, for a model.
    ///
    /// # Errors
    /// [`Error::RunDirectory`] that names the file and what in it isn't of this model, or of no calibration set.
    pub fn read(path: &Path, config: &Config) -> Result<Self> {
        let calibration: Self = storage::read_json(path)?;
        calibration.check(config).map_err(|message| Error::RunDirectory { path: path.to_path_buf(), message })?;
        Ok(calibration)
    }

    /// What is wrong with the sequences.
    fn check(&self, config: &Config) -> std::result::Result<(), String> {
        if self.sequences.is_empty() {
            return Err("expected sequences, found none".into());
        }
        let (context, vocabulary, clusters) = (config.max_position_embeddings, config.vocab_size, self.cluster_sizes.len());
        for (list, sequences) in [("sequences", &self.sequences), ("statistics", &self.statistics), ("held_out", &self.held_out)] {
            for (number, sequence) in sequences.iter().enumerate() {
                let wrong = |message: String| Err(format!("{list}, number {number}: {message}"));
                let length = sequence.tokens.len();
                if length < 2 || length > context {
                    return wrong(format!("expected 2 to {context} tokens (the model's context), found {length}"));
                }
                if let Some(token) = sequence.tokens.iter().find(|token| **token as usize >= vocabulary) {
                    return wrong(format!("token {token} isn't among the model's {vocabulary}: expected a set of a model with the same tokenizer"));
                }
                if sequence.cluster >= clusters {
                    return wrong(format!("expected one of {clusters} clusters, found {}", sequence.cluster));
                }
            }
        }
        Ok(())
    }

    /// SHA-256 of all tokens: of the scored sequences, those for statistics and those held out.
    pub fn sha256(&self) -> String {
        tokens_sha256([&self.sequences, &self.statistics, &self.held_out].into_iter().flatten().map(|s| &s.tokens))
    }

    /// What patterns are scored on.
    pub fn samples(&self) -> Vec<Sample> {
        samples(&self.sequences)
    }

    /// Up to `most` sequences of one cluster: those for statistics, which begin with the scored ones.
    pub fn cluster_samples(&self, cluster: usize, most: usize) -> Vec<Sample> {
        let sequences = if self.statistics.is_empty() { &self.sequences } else { &self.statistics };
        samples(sequences).into_iter().filter(|s| s.cluster == cluster).take(most).collect()
    }

    /// What a choice among finished patterns is made on; the scored sequences where nothing could be held out.
    pub fn held_out_samples(&self) -> Vec<Sample> {
        samples(if self.held_out.is_empty() { &self.sequences } else { &self.held_out })
    }

    /// Tokens of the sequences that activations are measured on; the scored ones where no more were asked for.
    pub fn statistics_tokens(&self) -> Vec<Vec<u32>> {
        let sequences = if self.statistics.is_empty() { &self.sequences } else { &self.statistics };
        sequences.iter().map(|s| s.tokens.clone()).collect()
    }

    /// Tokens of the held-out sequences; the scored ones where nothing could be held out.
    pub fn held_out_tokens(&self) -> Vec<Vec<u32>> {
        self.held_out_samples().into_iter().map(|s| s.tokens).collect()
    }
}

fn samples(sequences: &[Sequence]) -> Vec<Sample> {
    sequences.iter().map(|s| Sample { tokens: s.tokens.clone(), cluster: s.cluster }).collect()
}

/// Chunks of all corpora, and what each gave.
fn chunk_corpora(corpora: &[Corpus], options: &CalibrationOptions) -> (Vec<String>, Vec<CorpusReport>) {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    let mut reports = Vec::new();
    for corpus in corpora {
        let mut is_new = |text: &&String| !options.deduplicate || seen.insert(text.split_whitespace().collect::<Vec<_>>().join(" "));
        let documents: Vec<&str> = corpus.documents.iter().filter(&mut is_new).map(String::as_str).collect();
        let mut duplicates = corpus.documents.len() - documents.len();
        let mut chunks = chunks(&documents.join("\n\n"), options.sentences_per_chunk);
        if options.deduplicate {
            let before = chunks.len();
            let mut chunks_seen = HashSet::new();
            chunks.retain(|chunk| chunks_seen.insert(chunk.clone()));
            duplicates += before - chunks.len();
        }
        reports.push(CorpusReport { label: corpus.label.clone(), chunks: chunks.len(), duplicates });
        all.extend(chunks);
    }
    (all, reports)
}

/// At most `max_chunks` of the chunks, in their order.
fn draw(chunks: Vec<String>, options: &CalibrationOptions) -> Vec<String> {
    let Some(most) = options.max_chunks.filter(|most| *most < chunks.len()) else { return chunks };
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let mut chosen = rand::seq::index::sample(&mut rng, chunks.len(), most).into_vec();
    chosen.sort_unstable();
    let mut chunks: Vec<Option<String>> = chunks.into_iter().map(Some).collect();
    chosen.into_iter().filter_map(|i| chunks[i].take()).collect()
}

/// The clusters' chunks in random order, cut into pieces of one length; a chunk's rest begins the next piece.
struct Pieces {
    /// Per cluster, in order; taken from the end.
    left: Vec<Vec<Sequence>>,
    weights: Weights,
    /// Pieces taken of each cluster, and there at the start.
    taken: Vec<usize>,
    all: Vec<usize>,
}

impl Pieces {
    fn new(members: &[Vec<usize>], tokens: &[Vec<u32>], length: usize, options: &CalibrationOptions) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
        let cut = |(cluster, chunks): (usize, &Vec<usize>)| {
            let mut chunks = chunks.clone();
            chunks.shuffle(&mut rng);
            let mut pieces = Vec::new();
            let mut piece = Sequence { tokens: Vec::new(), cluster, chunks: Vec::new() };
            for chunk in chunks {
                let mut rest = tokens[chunk].as_slice();
                while !rest.is_empty() {
                    let (now, later) = rest.split_at(rest.len().min(length - piece.tokens.len()));
                    piece.tokens.extend(now);
                    piece.chunks.push(ChunkRef { chunk, cluster });
                    rest = later;
                    if piece.tokens.len() == length {
                        pieces.push(std::mem::replace(&mut piece, Sequence { tokens: Vec::new(), cluster, chunks: Vec::new() }));
                    }
                }
            }
            pieces.reverse();
            pieces
        };
        let left: Vec<Vec<Sequence>> = members.iter().enumerate().map(cut).collect();
        Self { taken: vec![0; left.len()], all: left.iter().map(Vec::len).collect(), left, weights: options.weights }
    }

    /// Up to `count` pieces, the cluster whose share is furthest behind next.
    fn take(&mut self, count: usize) -> Vec<Sequence> {
        let mut sequences = Vec::with_capacity(count);
        while sequences.len() < count {
            let behind = |c: &usize| match self.weights {
                Weights::Uniform => self.taken[*c] as f64,
                Weights::Size => (self.taken[*c] as f64 + 0.5) / self.all[*c] as f64,
            };
            let next = (0..self.left.len()).filter(|c| !self.left[*c].is_empty()).min_by(|a, b| behind(a).total_cmp(&behind(b)));
            let Some(piece) = next.and_then(|c| {
                self.taken[c] += 1;
                self.left[c].pop()
            }) else {
                break;
            };
            sequences.push(piece);
        }
        sequences
    }

    /// As [`Pieces::take`], consuming the rest.
    fn take_all(mut self, count: usize) -> Vec<Sequence> {
        self.take(count)
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
        let mut sequence = Sequence { tokens: Vec::with_capacity(options.sequence_length), cluster: 0, chunks: Vec::new() };
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
        let count = |cluster: usize| sequence.chunks.iter().filter(|c| c.cluster == cluster).count();
        sequence.cluster = (0..members.len()).max_by_key(|c| (count(*c), std::cmp::Reverse(*c))).unwrap_or(0);
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
        let options = CalibrationOptions { sequences: 3, sequence_length: 25, ..CalibrationOptions::paper() };
        let sequences = fill(&[vec![0, 2, 4], vec![1, 3, 5], vec![]], &tokens, &options).unwrap();
        for s in &sequences {
            assert_eq!(s.tokens.len(), 25);
            assert_eq!(s.chunks.len(), 3);
            assert_eq!(s.tokens[0] as usize, s.chunks[0].chunk);
            assert!(s.chunks.iter().all(|c| c.cluster < 2 && c.chunk % 2 == c.cluster));
        }
        assert_eq!(sequences, fill(&[vec![0, 2, 4], vec![1, 3, 5], vec![]], &tokens, &options).unwrap());
    }

    #[test]
    fn pieces_use_every_token_once_and_clusters_in_turn() {
        let tokens: Vec<Vec<u32>> = (0..7u32).map(|i| (0..10).map(|t| i * 10 + t).collect()).collect();
        let members = vec![vec![0, 1, 2, 3, 4], vec![5, 6]];
        let take = |weights, count| Pieces::new(&members, &tokens, 5, &CalibrationOptions { weights, ..Default::default() }).take(count);
        let clusters = |pieces: &[Sequence]| pieces.iter().map(|s| s.cluster).collect::<Vec<_>>();
        assert_eq!(clusters(&take(Weights::Uniform, 6)), [0, 1, 0, 1, 0, 1]);
        let by_size = clusters(&take(Weights::Size, 7));
        assert_eq!(by_size.iter().filter(|c| **c == 0).count(), 5, "{by_size:?}");
        let all = take(Weights::Uniform, 100);
        assert_eq!(all.len(), 14);
        let mut seen: Vec<u32> = all.iter().flat_map(|s| s.tokens.clone()).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..70).collect::<Vec<_>>());
    }

    #[test]
    fn a_document_that_was_there_before_is_left_out_and_counted() {
        let document = |n: usize| format!("Sentence {n} of a document. It goes on. And ends.");
        let corpus = |label: &str, numbers: &[usize]| Corpus { label: label.into(), documents: numbers.iter().map(|n| document(*n)).collect() };
        let corpora = [corpus("a", &[1, 2, 1]), corpus("b", &[2, 3])];
        let options = CalibrationOptions { sentences_per_chunk: 3, ..Default::default() };
        let (chunks, reports) = chunk_corpora(&corpora, &options);
        assert_eq!(chunks, [document(1), document(2), document(3)]);
        assert_eq!(reports.iter().map(|r| r.duplicates).collect::<Vec<_>>(), [1, 1]);
        let (all, _) = chunk_corpora(&corpora, &CalibrationOptions { deduplicate: false, ..options });
        assert_eq!(all.len(), 5);
    }
}
