//! The residual stream of many sequences, taken through the model one sub-block at a time: memory for the stream and one sub-block's
//! statistics, whatever the depth.

use crate::Result;
use evop_model::{Batch, Decoder, NoCache, Span, SubBlock, Tensor};

/// Tokens that are computed together.
const TOKENS_AT_ONCE: usize = 2_048;

/// Packs of whole sequences at one sub-block boundary.
pub(crate) struct Stream {
    pub packs: Vec<Pack>,
}

/// Sequences that are computed together.
pub(crate) struct Pack {
    pub batch: Batch,
    /// [tokens, hidden].
    pub hidden: Tensor,
}

impl Stream {
    /// The embeddings of these sequences.
    pub fn embed(decoder: &Decoder, sequences: &[Vec<u32>]) -> Result<Self> {
        let packs = crate::pack::pack(sequences, TOKENS_AT_ONCE)
            .into_iter()
            .map(|range| {
                let spans: Vec<Span> = sequences[range.clone()].iter().map(|s| Span::prompt(s.len())).collect();
                let tokens = sequences[range].concat();
                let batch = decoder.batch(&spans)?;
                Ok(Pack { hidden: decoder.embed(&tokens, &batch)?, batch })
            })
            .collect::<Result<_>>()?;
        Ok(Self { packs })
    }

    /// Runs `block` in the place of sub-block `s`; `visit` sees every pack go through it.
    pub fn advance(&mut self, decoder: &Decoder, block: &SubBlock, s: usize, mut visit: impl FnMut(&Passage<'_>) -> Result<()>) -> Result<()> {
        for pack in &mut self.packs {
            pack.hidden = Passage::through(decoder, block, s, &pack.hidden, &pack.batch, &mut visit)?;
        }
        Ok(())
    }

    /// Bytes of the stream.
    pub fn bytes(&self) -> usize {
        self.packs.iter().map(|p| p.hidden.elem_count() * p.hidden.dtype().size_in_bytes()).sum()
    }
}

/// One pack going through one sub-block.
pub(crate) struct Passage<'p> {
    /// Of the output layer, [tokens, width * unit].
    pub inputs: &'p Tensor,
    /// The residual stream, [tokens, hidden].
    pub before: &'p Tensor,
    /// The same after the sub-block.
    pub after: &'p Tensor,
    /// Its sequences.
    pub batch: &'p Batch,
}

impl Passage<'_> {
    /// Runs `block` in the place of sub-block `s`, shows what goes through it, and gives the residual stream after it.
    pub fn through(
        decoder: &Decoder,
        block: &SubBlock,
        s: usize,
        before: &Tensor,
        batch: &Batch,
        visit: impl FnOnce(&Passage<'_>) -> Result<()>,
    ) -> Result<Tensor> {
        let inputs = decoder.device().with_context(|| decoder.inner(block, s, before, batch, &mut NoCache))?;
        let after = decoder.device().with_context(|| decoder.add(block, before, &block.output().forward(&inputs)?))?;
        visit(&Passage { inputs: &inputs, before, after: &after, batch })?;
        Ok(after)
    }
}
