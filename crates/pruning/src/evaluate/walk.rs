//! One pack of sequences through many patterns: a walk over the trie of their genes.

use super::Pack;
use crate::levels::Level;
use crate::prefix_cache::PrefixCache;
use crate::supernet::Supernet;
use crate::{Result, loss};
use evop_model::{Batch, Device, NoCache, Pattern, Tensor};
use std::ops::Range;

/// Tokens of several patterns that go through a sub-block together on a GPU.
const TOKENS_TOGETHER: usize = 16_384;

/// Patterns that go through a sub-block together. On the CPU a pack of one pattern is work enough for all cores, and stays in its caches.
pub(super) fn patterns_at_once(device: &Device, tokens: usize) -> usize {
    if device.is_cpu() { 1 } else { (TOKENS_TOGETHER / tokens.max(1)).max(1) }
}

/// A walk over sorted patterns: depth first while many are left, the last few side by side.
pub(super) struct Walk<'w> {
    supernet: &'w Supernet,
    pack: &'w Pack,
    index: usize,
    patterns: &'w [&'w Pattern],
    anchors: &'w [Pattern],
    cache: &'w mut PrefixCache,
    /// Per pattern, the mean losses of this pack's segments.
    pub losses: Vec<Vec<f64>>,
    pub block_forwards: usize,
}

/// A residual stream that some patterns have in common.
struct Stem {
    /// [tokens, hidden].
    hidden: Tensor,
    /// The patterns.
    group: Range<usize>,
    /// Anchors that agree with them up to here.
    anchors: Vec<usize>,
}

/// Patterns of a stem that ask the same of the next sub-block.
struct Branch {
    level: Level,
    group: Range<usize>,
    anchors: Vec<usize>,
    /// What the cache has the residual stream after it under.
    key: Vec<usize>,
    /// The residual stream after it, where the cache had it.
    known: Option<Tensor>,
}

impl Branch {
    fn is_computed(&self) -> bool {
        self.level.width > 0 && self.known.is_none()
    }
}

impl<'w> Walk<'w> {
    /// `index` is the pack's; `patterns` are sorted.
    pub fn new(supernet: &'w Supernet, pack: &'w Pack, index: usize, patterns: &'w [&'w Pattern], anchors: &'w [Pattern], cache: &'w mut PrefixCache) -> Self {
        Self { supernet, pack, index, patterns, anchors, cache, losses: vec![Vec::new(); patterns.len()], block_forwards: 0 }
    }

    /// Fills [`Walk::losses`]; `share` what patterns have in common.
    pub fn run(&mut self, share: bool) -> Result<()> {
        let hidden = self.supernet.decoder().embed(&self.pack.tokens, &self.pack.batch)?;
        if share {
            let anchors = (0..self.anchors.len()).collect();
            return self.descend(Stem { hidden, group: 0..self.patterns.len(), anchors }, 0);
        }
        (0..self.patterns.len()).try_for_each(|p| self.descend(Stem { hidden: hidden.clone(), group: p..p + 1, anchors: Vec::new() }, 0))
    }

    /// Goes on from a residual stream before sub-block `s`.
    fn descend(&mut self, stem: Stem, s: usize) -> Result<()> {
        if s == self.supernet.decoder().last_boundary() {
            return self.score(&stem);
        }
        let at_once = self.pack.copies.len();
        if at_once > 1 && stem.group.len() <= at_once {
            return self.descend_together(vec![stem], s);
        }
        self.advance(vec![stem], s)?.into_iter().try_for_each(|stem| self.descend(stem, s + 1))
    }

    /// The same for a few, side by side.
    fn descend_together(&mut self, mut stems: Vec<Stem>, s: usize) -> Result<()> {
        for s in s..self.supernet.decoder().last_boundary() {
            stems = self.advance(stems, s)?;
        }
        stems.iter().try_for_each(|stem| self.score(stem))
    }

    /// What the patterns of a stem ask of sub-block `s`, in order.
    fn branches(&mut self, stem: &Stem, s: usize) -> Vec<Branch> {
        let mut runs: Vec<(Level, Range<usize>)> = Vec::new();
        for p in stem.group.clone() {
            let level = self.supernet.level(self.patterns[p], s);
            match runs.last_mut() {
                Some((l, run)) if *l == level => run.end = p + 1,
                _ => runs.push((level, p..p + 1)),
            }
        }
        let branch = |(level, group): (Level, Range<usize>)| {
            let widths = (0..=s).map(|s| self.patterns[group.start].width(s));
            let key: Vec<usize> = widths.chain(std::iter::once(level.absorbed)).collect();
            let anchors = stem.anchors.iter().copied().filter(|a| self.supernet.level(&self.anchors[*a], s) == level).collect();
            // (taken now: what is stored on the way down may push it out)
            let known = self.cache.get(self.index, &key);
            Branch { level, group, anchors, key, known }
        };
        runs.into_iter().map(branch).collect()
    }

    /// The stems after sub-block `s`, in order.
    fn advance(&mut self, stems: Vec<Stem>, s: usize) -> Result<Vec<Stem>> {
        let branches: Vec<Vec<Branch>> = stems.iter().map(|stem| self.branches(stem, s)).collect();
        let stems: Vec<(Stem, Vec<Branch>)> = stems.into_iter().zip(branches).collect();
        let mut computed = self.compute(&stems, s)?.into_iter();
        let mut grown = Vec::new();
        for (stem, branches) in stems {
            for branch in branches {
                let hidden = match branch.known {
                    Some(known) => known,
                    None if branch.level.width == 0 => self.supernet.skip(s, &stem.hidden)?,
                    // (a sub-block that the parent doesn't have is the identity)
                    None => match computed.next() {
                        Some(after) => {
                            if !branch.anchors.is_empty() {
                                self.cache.insert(self.index, branch.key, &after);
                            }
                            after
                        }
                        None => stem.hidden.clone(),
                    },
                };
                grown.push(Stem { hidden, group: branch.group, anchors: branch.anchors });
            }
        }
        Ok(grown)
    }

    /// The residual streams after sub-block `s` of every branch that has to be computed, in order.
    fn compute(&mut self, stems: &[(Stem, Vec<Branch>)], s: usize) -> Result<Vec<Tensor>> {
        let decoder = self.supernet.decoder();
        let Some(block) = decoder.sub_block(s) else { return Ok(Vec::new()) };
        let growing: Vec<&(Stem, Vec<Branch>)> = stems.iter().filter(|(_, branches)| branches.iter().any(Branch::is_computed)).collect();
        // (index among the growing stems, level), in order
        let branches: Vec<(usize, Level)> =
            growing.iter().enumerate().flat_map(|(i, (_, branches))| branches.iter().filter(|b| b.is_computed()).map(move |b| (i, b.level))).collect();
        let Some(widest) = branches.iter().map(|(_, level)| level.width).max() else { return Ok(Vec::new()) };
        self.block_forwards += branches.len() * self.pack.batch.spans().len();
        let batch = self.batch(growing.len())?;
        let hidden = stack(growing.iter().map(|(stem, _)| stem.hidden.clone()).collect())?;
        // what lies before the output layer is computed once a stem, at the largest width that has to be computed
        let inner = decoder.inner(&block.narrowed(widest)?, s, &hidden, batch, &mut NoCache)?;
        let tokens = self.pack.tokens.len();
        let part = |of: &Tensor, i: usize| -> Result<Tensor> { Ok(of.narrow(0, i * tokens, tokens)?) };
        let mut levels: Vec<Level> = branches.iter().map(|(_, level)| *level).collect();
        levels.sort_unstable();
        levels.dedup();
        let mut after: Vec<Option<Tensor>> = vec![None; branches.len()];
        for level in levels {
            let Some(block) = self.supernet.sub_block(s, level)? else { continue };
            let own: Vec<usize> = (0..branches.len()).filter(|b| branches[*b].1 == level).collect();
            let rows = |of: &Tensor| -> Result<Tensor> {
                if own.len() == growing.len() { Ok(of.clone()) } else { stack(own.iter().map(|b| part(of, branches[*b].0)).collect::<Result<_>>()?) }
            };
            let inputs = rows(&inner)?.narrow(1, 0, level.width * block.unit())?;
            let streams = decoder.add(&block, &rows(&hidden)?, &block.output().forward(&inputs)?)?;
            for (i, b) in own.iter().enumerate() {
                // (a part of a larger tensor would hold all of it for as long as the cache does)
                after[*b] = Some(if own.len() == 1 { streams.clone() } else { part(&streams, i)?.copy()? });
            }
        }
        Ok(after.into_iter().flatten().collect())
    }

    /// This pack's sequences for `count` patterns.
    fn batch(&self, count: usize) -> Result<&'w Batch> {
        let pack = self.pack;
        if count == 1 {
            return Ok(&pack.batch);
        }
        let copies = &pack.copies[count - 1];
        match copies.get() {
            Some(batch) => Ok(batch),
            None => {
                let batch = pack.batch.repeated(count)?;
                Ok(copies.get_or_init(|| batch))
            }
        }
    }

    /// The losses at the end of a stem.
    fn score(&mut self, stem: &Stem) -> Result<()> {
        let (decoder, pack) = (self.supernet.decoder(), self.pack);
        let losses = pack.scoring.losses(decoder, &stem.hidden, &pack.tokens, pack.batch.spans())?;
        let means: Vec<f64> = pack.segments.iter().map(|(span, positions)| loss::mean(&losses[*span][positions.clone()])).collect();
        stem.group.clone().for_each(|p| self.losses[p].clone_from(&means));
        Ok(())
    }
}

/// One below the other.
fn stack(mut tensors: Vec<Tensor>) -> Result<Tensor> {
    if tensors.len() == 1 { Ok(tensors.swap_remove(0)) } else { Ok(Tensor::cat(&tensors, 0)?) }
}

#[cfg(test)]
mod tests {
    use super::super::{Evaluator, Sample, Savings, Work};
    use super::*;
    use crate::objective::{Aggregate, FitnessKind, Objective};
    use evop_model::Gene;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use std::collections::HashMap;
    use std::sync::OnceLock;

    #[test]
    fn patterns_side_by_side_score_as_they_do_one_after_the_other() {
        let decoder = crate::testing::tiny();
        let supernet = Supernet::raw(&decoder);
        let samples: Vec<Sample> = [30, 41, 24].iter().map(|n| Sample { tokens: (0..*n).map(|i| i * 97 % 4_000).collect(), cluster: 0 }).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut draw = |like: Option<&Pattern>| {
            let gene = |l: usize, rng: &mut ChaCha8Rng| match like {
                Some(like) if rng.random_bool(0.8) => like.layers()[l],
                _ => Gene { kv_groups: [0, 2, 2][rng.random_range(0..3)], ffn: [0, 128, 256, 384][rng.random_range(0..4)] },
            };
            Pattern::new((0..decoder.config().num_layers()).map(|l| gene(l, &mut rng)).collect(), decoder.config()).unwrap()
        };
        let parents: Vec<Pattern> = (0..2).map(|_| draw(None)).collect();
        let children: Vec<Pattern> = (0..17).map(|i| draw(Some(&parents[i % 2]))).collect();
        let score = |together: usize| {
            let objective = Objective { kind: FitnessKind::Kl, aggregate: Aggregate::Mean, key_tokens: 0.25 };
            let record = Box::new(|_: &[(Pattern, Vec<f64>)], _: Work| Ok(()));
            let mut evaluator = Evaluator::new(&supernet, &samples, objective, Savings::default(), HashMap::new(), Work::default(), record).unwrap();
            evaluator.packs.iter_mut().for_each(|pack| pack.copies = vec![OnceLock::new(); together]);
            evaluator.anchor(&parents);
            let mut losses = evaluator.evaluate(&parents).unwrap();
            losses.extend(evaluator.evaluate(&children).unwrap());
            let bits: Vec<u64> = losses.iter().flat_map(|f| f.segments.iter().map(|l| l.to_bits())).collect();
            (bits, evaluator.work())
        };
        let one_by_one = score(1);
        assert!(one_by_one.1.block_forwards < one_by_one.1.memo_block_forwards, "something is shared");
        for together in [2, 5, 64] {
            assert_eq!(score(together), one_by_one, "{together} together");
        }
    }
}
