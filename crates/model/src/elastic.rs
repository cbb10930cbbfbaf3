//! A model and thinner forms of it over one copy of the weights, in one pass.

use crate::batch::Batch;
use crate::cache::KvCache;
use crate::decoder::Decoder;
use crate::pattern::Pattern;
use crate::sub_block::SubBlock;
use crate::widths::Widths;
use crate::{Error, Result};
use candle_core::Tensor;
use std::ops::Range;

/// A decoder and masked forms of it. Member 0 is the decoder itself.
#[derive(Debug, Clone)]
pub struct Elastic {
    members: Vec<Decoder>,
}

impl From<Decoder> for Elastic {
    /// The decoder alone.
    fn from(parent: Decoder) -> Self {
        Self { members: vec![parent] }
    }
}

impl Elastic {
    /// The decoder, its units in the order of `widths`, and one more member a pattern: views, no copies.
    ///
    /// # Errors
    /// [`Error::Pattern`] when a pattern doesn't fit.
    pub fn new(parent: Decoder, patterns: &[Pattern], widths: &Widths) -> Result<Self> {
        let mut members = patterns.iter().map(|pattern| widths.masked(&parent, pattern)).collect::<Result<Vec<_>>>()?;
        members.insert(0, parent);
        Ok(Self { members })
    }

    /// The whole model.
    pub fn parent(&self) -> &Decoder {
        &self.members[0]
    }

    /// The `index`-th member, 0 the whole model.
    pub fn member(&self, index: usize) -> Option<&Decoder> {
        self.members.get(index)
    }

    /// Their number, the whole model included.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Never: there is always the whole model.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Embedding and all layers, [tokens, hidden], before the final norm: span i goes through member `members[i]`. Neighbouring spans that ask the
    /// same of a sub-block go through it together, so spans of one member should lie side by side, thinner ones later.
    ///
    /// # Errors
    /// [`Error::Input`] for a member that there isn't or a number of members that isn't the number of spans; as [`Decoder::forward`].
    pub fn forward(&self, tokens: &[u32], batch: &Batch, members: &[usize], cache: &mut dyn KvCache) -> Result<Tensor> {
        let decoders: Vec<&Decoder> = members.iter().filter_map(|m| self.member(*m)).collect();
        if decoders.len() != members.len() || members.len() != batch.spans().len() {
            return Err(Error::Input(format!("{} spans, members {members:?} of {}", batch.spans().len(), self.len())));
        }
        match members.first() {
            Some(first) if members.iter().all(|m| m == first) => return self.members[*first].forward(tokens, batch, cache),
            _ => {}
        }
        let mut hidden = self.parent().embed(tokens, batch)?;
        for s in 0..self.parent().last_boundary() {
            hidden = self.sub_block(s, &decoders, &hidden, batch, cache)?;
        }
        Ok(hidden)
    }

    /// The residual stream after sub-block `s`.
    fn sub_block(&self, s: usize, decoders: &[&Decoder], hidden: &Tensor, batch: &Batch, cache: &mut dyn KvCache) -> Result<Tensor> {
        let parent = self.parent();
        let runs = runs(decoders, s);
        if let [(_, block)] = runs.as_slice() {
            return block.map_or(Ok(hidden.clone()), |block| parent.apply(block, s, hidden, batch, cache));
        }
        let mut parts = Vec::with_capacity(runs.len());
        for (spans, block) in runs {
            let part = batch.part(spans)?;
            let rows = hidden.narrow(0, part.place().first_row - batch.place().first_row, part.tokens())?;
            parts.push(match block {
                Some(block) => parent.apply(block, s, &rows.contiguous()?, &part, cache)?,
                None => rows,
            });
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}

/// Neighbouring spans whose decoders have the same sub-block `s`.
fn runs<'d>(decoders: &[&'d Decoder], s: usize) -> Vec<(Range<usize>, Option<&'d SubBlock>)> {
    let mut runs: Vec<(Range<usize>, Option<&SubBlock>)> = Vec::new();
    for (span, decoder) in decoders.iter().enumerate() {
        let block = decoder.sub_block(s);
        match runs.last_mut() {
            Some((run, of)) if of.map(SubBlock::width) == block.map(SubBlock::width) => run.end = span + 1,
            _ => runs.push((span..span + 1, block)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{BLOCK_TOKENS, Checkpoint, DType, Device, FixedCache, Gene, NoCache, Span};
    use std::path::Path;

    fn elastic() -> Elastic {
        let checkpoint = Checkpoint::open(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/tiny"))).unwrap();
        let parent = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
        let mut widths = Widths::default();
        widths.insert(1, 0..384, [(128, vec![0.1; parent.config().hidden_size])]);
        let pattern = |every: usize, ffn: usize| {
            let gene = |l: usize| Gene { kv_groups: if l % every == 1 { 0 } else { 2 - l % 2 }, ffn: if l % every == 2 { 0 } else { ffn } };
            Pattern::new((0..12).map(gene).collect(), parent.config()).unwrap()
        };
        let patterns = [pattern(4, 384), pattern(3, 128)];
        Elastic::new(parent, &patterns, &widths).unwrap()
    }

    #[test]
    fn members_side_by_side_give_the_bits_that_they_give_alone() {
        let elastic = elastic();
        let prompts: Vec<Vec<u32>> = [40, 7, 33, 1, 20].iter().map(|n| (0..*n).map(|i| (i * 131 + n) % 4_000).collect()).collect();
        let members = [0, 0, 1, 2, 2];
        let capacities: Vec<usize> = prompts.iter().map(|p| p.len() + 3).collect();
        let cache = || FixedCache::new(elastic.parent().config(), DType::F32, &Device::Cpu, &capacities).unwrap();
        let (mut together, mut alone) = (cache(), cache());
        for step in 0..3 {
            let now: Vec<Vec<u32>> = prompts.iter().map(|p| if step == 0 { p.clone() } else { vec![p[0] + step] }).collect();
            let spans: Vec<Span> =
                prompts.iter().zip(&now).map(|(p, n)| Span { past: if step == 0 { 0 } else { p.len() + step as usize - 1 }, len: n.len() }).collect();
            let batch = elastic.parent().batch(&spans).unwrap();
            let mixed = elastic.forward(&now.concat(), &batch, &members, &mut together.of(0..5)).unwrap();
            let mut row = 0;
            for (i, tokens) in now.iter().enumerate() {
                let decoder = elastic.member(members[i]).unwrap();
                let own = decoder.forward(tokens, &decoder.batch(&spans[i..=i]).unwrap(), &mut alone.of([i])).unwrap();
                let found = mixed.narrow(0, row, tokens.len()).unwrap();
                assert_eq!(found.to_vec2::<f32>().unwrap(), own.to_vec2::<f32>().unwrap(), "step {step}, span {i}");
                row += tokens.len();
            }
        }
        assert!(capacities.iter().any(|c| *c > BLOCK_TOKENS));
    }

    #[test]
    fn members_that_there_are_not_are_refused() {
        let elastic = elastic();
        let batch = elastic.parent().batch(&[Span::prompt(2), Span::prompt(1)]).unwrap();
        for members in [&[0, 3][..], &[0], &[0, 1, 2]] {
            assert!(matches!(elastic.forward(&[1, 2, 3], &batch, members, &mut NoCache), Err(Error::Input(_))));
        }
    }
}
