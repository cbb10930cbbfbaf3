//! The fitness of many patterns, fast: nothing is computed twice.
//!
//! - **Memo**: a pattern is never evaluated twice on the same tokens.
//! - **Prefix reuse**: the patterns of a batch are walked as a trie; the residual stream at a sub-block boundary is computed once
//!   for all patterns that agree up to there.
//!
//! The kernels give a row the same bits whatever is beside it, so a pattern's loss doesn't depend on how it was batched.

use crate::loss;
use crate::{Error, Result};
use evop_model::{Batch, Decoder, NoCache, Pattern, Span, Tensor};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;

/// Tokens that one walk carries, so that the boundary states of a path fit in memory.
const TOKENS_AT_ONCE: usize = 2_560;

/// What a pattern scored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fitness {
    /// EvoP's fitness: the sum over sequences of mean token cross-entropy times length, in nats. Lower is better.
    pub loss: f64,
    /// Mean token cross-entropy of each sequence, in nats.
    pub sequences: Vec<f64>,
}

/// How much was computed, in sub-blocks (one attention or one MLP) over one sequence, whatever its length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Work {
    /// Patterns that the search asked for, repetitions included.
    pub requested: usize,
    /// Patterns that were computed.
    pub evaluated: usize,
    /// Sub-blocks run.
    pub block_forwards: usize,
    /// What evaluating every requested pattern on its own would have run.
    pub naive_block_forwards: usize,
    /// What evaluating every computed pattern once, on its own, would have run (a memo but no prefix reuse).
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

/// Called with each batch's new results, before they are used: the run writes them down.
pub type Recorder<'a> = dyn FnMut(&[(Pattern, Fitness)], Work) -> Result<()> + 'a;

/// Scores patterns of one model on fixed sequences.
pub struct Evaluator<'a> {
    decoder: Decoder,
    /// Packs of whole sequences: (tokens, prepared batch).
    packs: Vec<(Vec<u32>, Batch)>,
    memo: HashMap<Pattern, Fitness>,
    work: Work,
    record: Box<Recorder<'a>>,
}

impl std::fmt::Debug for Evaluator<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Evaluator").field("packs", &self.packs.len()).field("memo", &self.memo.len()).field("work", &self.work).finish_non_exhaustive()
    }
}

impl<'a> Evaluator<'a> {
    /// An evaluator over these sequences; `known` are results of an earlier part of the run.
    pub fn new(decoder: &Decoder, sequences: &[Vec<u32>], known: HashMap<Pattern, Fitness>, work: Work, record: Box<Recorder<'a>>) -> Result<Self> {
        let mut packs: Vec<Vec<&Vec<u32>>> = Vec::new();
        for sequence in sequences {
            match packs.last_mut() {
                Some(pack) if pack.iter().map(|s| s.len()).sum::<usize>() + sequence.len() <= TOKENS_AT_ONCE => pack.push(sequence),
                _ => packs.push(vec![sequence]),
            }
        }
        let prepare = |pack: Vec<&Vec<u32>>| -> Result<(Vec<u32>, Batch)> {
            let spans: Vec<Span> = pack.iter().map(|s| Span::prompt(s.len())).collect();
            Ok((pack.into_iter().flatten().copied().collect(), decoder.batch(&spans)?))
        };
        let packs = packs.into_iter().map(prepare).collect::<Result<_>>()?;
        Ok(Self { decoder: decoder.clone(), packs, memo: known, work, record })
    }

    /// The dense model.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// What has been computed so far.
    pub fn work(&self) -> Work {
        self.work
    }

    /// The number of sequences.
    pub fn sequences(&self) -> usize {
        self.packs.iter().map(|(_, batch)| batch.spans().len()).sum()
    }

    /// The fitness of every pattern, in the order given.
    ///
    /// # Errors
    /// [`Error::Model`] when the device fails; whatever the recorder returns.
    pub fn evaluate(&mut self, patterns: &[Pattern]) -> Result<Vec<Fitness>> {
        let mut new: Vec<Pattern> = patterns.iter().filter(|p| !self.memo.contains_key(*p)).cloned().collect();
        // sorted by genes, patterns with a common start lie side by side: the sorted list is the trie
        new.sort_unstable();
        new.dedup();
        let mut sequence_losses = vec![Vec::with_capacity(self.sequences()); new.len()];
        let mut block_forwards = 0;
        for (tokens, batch) in &self.packs {
            let mut walk = Walk { decoder: &self.decoder, patterns: &new, tokens, batch, losses: &mut sequence_losses, block_forwards: 0 };
            let device = self.decoder.device().clone();
            block_forwards += device.with_context(|| walk.run())?;
        }
        let lengths: Vec<usize> = self.packs.iter().flat_map(|(_, b)| b.spans().iter().map(|s| s.len)).collect();
        let results: Vec<(Pattern, Fitness)> = new
            .into_iter()
            .zip(sequence_losses)
            .map(|(pattern, sequences)| {
                let loss = sequences.iter().zip(&lengths).map(|(mean, len)| mean * *len as f64).sum();
                (pattern, Fitness { loss, sequences })
            })
            .collect();
        let cost = |p: &Pattern| (0..2 * p.layers().len()).filter(|s| p.keeps(*s)).count() * lengths.len();
        let work = Work {
            requested: patterns.len(),
            evaluated: results.len(),
            block_forwards,
            naive_block_forwards: patterns.iter().map(cost).sum(),
            memo_block_forwards: results.iter().map(|(p, _)| cost(p)).sum(),
        };
        (self.record)(&results, work)?;
        self.work.add(work);
        self.memo.extend(results);
        patterns.iter().map(|p| self.memo.get(p).cloned().ok_or(Error::NotFinite(f64::NAN))).collect()
    }

    /// The residual stream at every layer boundary of the dense model, for strategies that look at it: calls `visit(layer, before, after)`.
    pub(crate) fn visit_layers(&mut self, mut visit: impl FnMut(usize, &Tensor, &Tensor) -> Result<()>) -> Result<()> {
        let layers = self.decoder.config().num_layers();
        for (tokens, batch) in &self.packs {
            let mut hidden = self.decoder.embed(tokens, batch)?;
            for layer in 0..layers {
                let after = self.decoder.forward_range(hidden.clone(), 2 * layer..2 * layer + 2, batch, &mut NoCache)?;
                visit(layer, &hidden, &after)?;
                hidden = after;
            }
            let forwards = 2 * layers * batch.spans().len();
            let work = Work { block_forwards: forwards, naive_block_forwards: forwards, memo_block_forwards: forwards, ..Work::default() };
            (self.record)(&[], work)?;
            self.work.add(work);
        }
        Ok(())
    }
}

/// One depth-first walk over the trie of sorted patterns.
struct Walk<'w> {
    decoder: &'w Decoder,
    patterns: &'w [Pattern],
    tokens: &'w [u32],
    batch: &'w Batch,
    /// Per pattern, the mean losses of the sequences so far.
    losses: &'w mut [Vec<f64>],
    block_forwards: usize,
}

impl Walk<'_> {
    fn run(&mut self) -> Result<usize> {
        if !self.patterns.is_empty() {
            let hidden = self.decoder.embed(self.tokens, self.batch)?;
            self.descend(&hidden, 0, 0..self.patterns.len())?;
        }
        Ok(self.block_forwards)
    }

    /// `hidden` is the residual stream before layer `layer`, common to all patterns of `group`.
    fn descend(&mut self, hidden: &Tensor, layer: usize, group: std::ops::Range<usize>) -> Result<()> {
        if layer == self.decoder.config().num_layers() {
            let losses = loss::token_losses(self.decoder, hidden, self.tokens, self.batch.spans())?;
            for pattern in group {
                self.losses[pattern].extend(losses.iter().map(|l| loss::mean(l)));
            }
            return Ok(());
        }
        let gene = |p: usize| self.patterns[p].layers()[layer];
        let mut first = group.start;
        // the attention's output is kept for siblings that differ in the MLP only
        let mut attended: Option<(usize, Tensor)> = None;
        while first < group.end {
            let this = gene(first);
            let end = (first..group.end).find(|p| gene(*p) != this).unwrap_or(group.end);
            let after_attention = match &attended {
                Some((kv_groups, hidden)) if *kv_groups == this.kv_groups => hidden.clone(),
                _ => self.step(first, hidden.clone(), 2 * layer)?,
            };
            attended = Some((this.kv_groups, after_attention.clone()));
            let after = self.step(first, after_attention, 2 * layer + 1)?;
            self.descend(&after, layer + 1, first..end)?;
            first = end;
        }
        Ok(())
    }

    /// One sub-block under pattern `pattern`'s gene.
    fn step(&mut self, pattern: usize, hidden: Tensor, sub_block: usize) -> Result<Tensor> {
        let pattern = &self.patterns[pattern];
        if !pattern.keeps(sub_block) {
            return Ok(hidden);
        }
        self.block_forwards += self.batch.spans().len();
        let layer = sub_block / 2;
        let whole = self.decoder.config().layers[layer].shape;
        let gene = pattern.layers()[layer];
        let narrowed = if sub_block.is_multiple_of(2) { gene.kv_groups < whole.kv_groups } else { gene.ffn < whole.ffn };
        let range = sub_block..sub_block + 1;
        let after = if narrowed {
            self.decoder.masked(pattern)?.forward_range(hidden, range, self.batch, &mut NoCache)?
        } else {
            self.decoder.forward_range(hidden, range, self.batch, &mut NoCache)?
        };
        Ok(after)
    }
}
