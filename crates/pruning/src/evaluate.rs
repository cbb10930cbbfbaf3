//! The fitness of many patterns, fast: nothing is computed twice.
//!
//! - **Memo**: a pattern is never evaluated twice on the same tokens.
//! - **Prefix reuse**: the patterns of a batch are walked as a trie; the residual stream at a sub-block boundary is computed once
//!   for all patterns that agree up to there. Boundary states of the patterns that a search goes on from ([`Evaluator::anchor`]) stay in a
//!   cache bounded in bytes, so that their children start where they first differ.
//! - **Nested widths**: patterns that differ in one sub-block's width share what lies before its output layer.
//! - **Partial evaluation**: a search may ask for the first sequences only, and for the rest later.
//!
//! - **Patterns side by side**: on a GPU, patterns that have parted go through a sub-block together, since a launch costs as much as its work.
//!
//! The kernels give a row the same bits whatever is beside it, so a pattern's loss doesn't depend on how it was batched.

mod look;
mod walk;

use crate::key_tokens;
use crate::loss::{Reference, Scoring};
use crate::objective::{Fitness, FitnessKind, Objective, Segment};
use crate::pack::pack;
use crate::prefix_cache::PrefixCache;
use crate::supernet::Supernet;
use crate::{Error, Result};
use evop_model::{Batch, NoCache, Pattern, Span};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::OnceLock;
use walk::Walk;

/// Tokens that one walk carries, so that the boundary states of a path fit in memory.
const TOKENS_AT_ONCE: usize = 1_024;

/// How much was computed, in sub-blocks (one attention or one MLP) over one sequence, whatever its length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Evaluations that the search asked for, repetitions included.
    pub requested: usize,
    /// Evaluations that were computed, in part or whole.
    pub evaluated: usize,
    /// Sub-blocks run.
    pub block_forwards: usize,
    /// What evaluating everything that was asked for, each on its own, would have run.
    pub naive_block_forwards: usize,
    /// What evaluating everything once, each on its own, would have run (a memo but no prefix reuse).
    pub memo_block_forwards: usize,
}

impl Work {
    /// Adds another part of the same run.
    pub fn add(&mut self, other: Self) {
        self.requested += other.requested;
        self.evaluated += other.evaluated;
        self.block_forwards += other.block_forwards;
        self.naive_block_forwards += other.naive_block_forwards;
        self.memo_block_forwards += other.memo_block_forwards;
    }

    /// What was done after `earlier` of the same count.
    #[must_use]
    pub fn since(self, earlier: Self) -> Self {
        Self {
            requested: self.requested - earlier.requested,
            evaluated: self.evaluated - earlier.evaluated,
            block_forwards: self.block_forwards - earlier.block_forwards,
            naive_block_forwards: self.naive_block_forwards - earlier.naive_block_forwards,
            memo_block_forwards: self.memo_block_forwards - earlier.memo_block_forwards,
        }
    }
}

/// Called with each batch's new results, before they are used: the run writes them down. A pattern's numbers are the mean losses of
/// its first segments; a longer list replaces a shorter one.
pub type Recorder<'a> = dyn FnMut(&[(Pattern, Vec<f64>)], Work) -> Result<()> + 'a;

/// Which savings are made; all of them unless an ablation switches one off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Savings {
    /// Never evaluate a pattern twice.
    pub memo: bool,
    /// Share the boundary states of patterns that agree up to there.
    pub prefix: bool,
    /// Bytes of boundary states kept between batches.
    pub prefix_cache_bytes: usize,
}

impl Default for Savings {
    fn default() -> Self {
        Self { memo: true, prefix: true, prefix_cache_bytes: 1 << 30 }
    }
}

/// A sequence to score patterns on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Tokens, at least two.
    pub tokens: Vec<u32>,
    /// The CCDS cluster that it stands for.
    pub cluster: usize,
}

/// Sequences that are computed together.
struct Pack {
    tokens: Vec<u32>,
    batch: Batch,
    /// The same sequences 1, 2, … times over, for as many patterns at once; made when they are first needed.
    copies: Vec<OnceLock<Batch>>,
    scoring: Scoring,
    /// Segments of this pack, in order; each belongs to a span.
    segments: Vec<(usize, Range<usize>)>,
}

/// Scores patterns of one model on fixed sequences.
pub struct Evaluator<'a> {
    supernet: &'a Supernet,
    packs: Vec<Pack>,
    /// Of all packs, one after the other.
    segments: Vec<Segment>,
    objective: Objective,
    savings: Savings,
    memo: HashMap<Pattern, Vec<f64>>,
    anchors: Vec<Pattern>,
    cache: PrefixCache,
    work: Work,
    record: Box<Recorder<'a>>,
}

impl std::fmt::Debug for Evaluator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evaluator").field("packs", &self.packs.len()).field("memo", &self.memo.len()).field("work", &self.work).finish_non_exhaustive()
    }
}

impl<'a> Evaluator<'a> {
    /// An evaluator over these samples; `known` are results of an earlier part of the run.
    ///
    /// # Errors
    /// [`Error::Model`] when a sample is longer than the model's context or the device fails.
    pub fn new(
        supernet: &'a Supernet,
        samples: &[Sample],
        objective: Objective,
        savings: Savings,
        known: HashMap<Pattern, Vec<f64>>,
        work: Work,
        record: Box<Recorder<'a>>,
    ) -> Result<Self> {
        let decoder = supernet.decoder();
        let tokens: Vec<Vec<u32>> = samples.iter().map(|s| s.tokens.clone()).collect();
        let mut segments = Vec::new();
        let mut packs = Vec::new();
        for range in pack(&tokens, TOKENS_AT_ONCE) {
            let spans: Vec<Span> = tokens[range.clone()].iter().map(|s| Span::prompt(s.len())).collect();
            let mut own = Vec::new();
            for (span, sample) in samples[range.clone()].iter().enumerate() {
                for positions in objective.segments(sample.tokens.len().saturating_sub(1)) {
                    segments.push(Segment { cluster: sample.cluster, tokens: positions.len() });
                    own.push((span, positions));
                }
            }
            let (tokens, batch) = (tokens[range].concat(), decoder.batch(&spans)?);
            let copies = vec![OnceLock::new(); walk::patterns_at_once(decoder.device(), tokens.len())];
            packs.push(Pack { tokens, batch, copies, scoring: Scoring::default(), segments: own });
        }
        let mut gains = Vec::new();
        if objective.kind != FitnessKind::Nll || objective.key_tokens > 0.0 {
            for pack in &mut packs {
                decoder.device().with_context(|| -> Result<()> {
                    let (tokens, spans) = (&pack.tokens, pack.batch.spans());
                    let hidden = decoder.forward(tokens, &pack.batch, &mut NoCache)?;
                    if objective.key_tokens > 0.0 {
                        gains.push(key_tokens::find(decoder, &hidden, tokens, spans)?);
                    }
                    if objective.kind != FitnessKind::Nll {
                        pack.scoring.refusals = objective.for_drafts();
                        pack.scoring.reference = Some(Reference::new(decoder, &hidden, spans)?);
                    }
                    Ok(())
                })?;
            }
        }
        for (pack, keys) in packs.iter_mut().zip(key_tokens::weigh(gains, objective.key_tokens)) {
            pack.scoring.keys = Some(keys);
        }
        let cache = PrefixCache::new(if savings.prefix { savings.prefix_cache_bytes } else { 0 });
        Ok(Self { supernet, packs, segments, objective, savings, memo: known, anchors: Vec::new(), cache, work, record })
    }

    /// The model with its levels.
    pub fn supernet(&self) -> &'a Supernet {
        self.supernet
    }

    /// What has been computed so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// How losses become a fitness.
    pub fn objective(&self) -> Objective {
        self.objective
    }

    /// The number of packs: what a partial evaluation counts.
    pub fn packs(&self) -> usize {
        self.packs.len()
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.packs.iter().map(|p| p.tokens.len()).sum()
    }

    /// Bytes of the dense model's distributions, and of the boundary states kept (now, at most).
    pub fn bytes(&self) -> (usize, usize, usize) {
        (self.packs.iter().filter_map(|p| p.scoring.reference.as_ref()).map(Reference::bytes).sum(), self.cache.bytes(), self.cache.limit())
    }

    /// The patterns that come next are children of these: their boundary states are worth keeping.
    pub fn anchor(&mut self, patterns: &[Pattern]) {
        self.anchors = patterns.to_vec();
    }

    /// The fitness of every pattern over all packs, in the order given.
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails; whatever the recorder returns.
    pub fn evaluate(&mut self, patterns: &[Pattern]) -> Result<Vec<Fitness>> {
        self.evaluate_first(patterns, self.packs.len())
    }

    /// The fitness of every pattern over the first `packs` packs, in the order given.
    ///
    /// # Errors
    /// As [`Evaluator::evaluate`].
    pub fn evaluate_first(&mut self, patterns: &[Pattern], packs: usize) -> Result<Vec<Fitness>> {
        let packs = packs.min(self.packs.len());
        let wanted: usize = self.packs[..packs].iter().map(|p| p.segments.len()).sum();
        let known = |memo: &HashMap<Pattern, Vec<f64>>, p: &Pattern| memo.get(p).map_or(0, Vec::len);
        let mut new: Vec<Pattern> = patterns.iter().filter(|p| known(&self.memo, p) < wanted).cloned().collect();
        // sorted by genes, patterns with a common start lie side by side, those that skip next first: the sorted list is the trie
        new.sort_unstable();
        if self.savings.memo {
            new.dedup();
        }
        let mut losses: Vec<Vec<f64>> = new.iter().map(|p| self.memo.get(p).cloned().unwrap_or_default()).collect();
        let kept = |p: &Pattern| (0..2 * p.layers().len()).filter(|s| p.keeps(*s)).count();
        let mut work = Work { requested: patterns.len(), evaluated: new.len(), ..Work::default() };
        let mut before = 0;
        for (index, pack) in self.packs[..packs].iter().enumerate() {
            let sequences = pack.batch.spans().len();
            work.naive_block_forwards += patterns.iter().map(kept).sum::<usize>() * sequences;
            let todo: Vec<usize> = (0..new.len()).filter(|i| losses[*i].len() <= before).collect();
            before += pack.segments.len();
            if todo.is_empty() {
                continue;
            }
            let group: Vec<&Pattern> = todo.iter().map(|i| &new[*i]).collect();
            work.memo_block_forwards += group.iter().map(|p| kept(p)).sum::<usize>() * sequences;
            let mut walk = Walk::new(self.supernet, pack, index, &group, &self.anchors, &mut self.cache);
            let device = self.supernet.decoder().device().clone();
            device.with_context(|| walk.run(self.savings.prefix))?;
            work.block_forwards += walk.block_forwards;
            for (i, found) in todo.iter().zip(walk.losses) {
                losses[*i].extend(found);
            }
        }
        let results: Vec<(Pattern, Vec<f64>)> = new.into_iter().zip(losses).collect();
        (self.record)(&results, work)?;
        self.work.add(work);
        let fitness = |losses: &[f64]| self.objective.fitness(&self.segments, &losses[..wanted.min(losses.len())]);
        if self.savings.memo {
            self.memo.extend(results);
            return patterns.iter().map(|p| self.memo.get(p).map(|l| fitness(l)).ok_or(Error::NotFinite(f64::NAN))).collect();
        }
        let found: HashMap<&Pattern, &Vec<f64>> = results.iter().map(|(p, l)| (p, l)).collect();
        patterns.iter().map(|p| found.get(p).map(|l| fitness(l)).ok_or(Error::NotFinite(f64::NAN))).collect()
    }

    /// Every pattern known on at least the first `packs` packs, with its fitness there; sorted by genes.
    pub fn known(&self, packs: usize) -> Vec<(Pattern, Fitness)> {
        let wanted: usize = self.packs[..packs.min(self.packs.len())].iter().map(|p| p.segments.len()).sum();
        let mut known: Vec<(Pattern, Fitness)> = self
            .memo
            .iter()
            .filter(|(_, losses)| losses.len() >= wanted)
            .map(|(pattern, losses)| (pattern.clone(), self.objective.fitness(&self.segments, &losses[..wanted])))
            .collect();
        known.sort_by(|a, b| a.0.cmp(&b.0));
        known
    }
}
