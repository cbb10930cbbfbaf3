//! Sequences that begin alike, their beginning computed once.

use super::encode::Encoded;
use evop_model::{AttentionSpec, Batch, Config, Decoder, KvCache, NoCache, Positions, RopeScaling, Span, Tensor};

/// Items packed for one pass. Of each item, the tokens that all its sequences begin with come once, then what each goes on with.
#[derive(Debug, Default)]
pub(super) struct Pack {
    /// Packed token ids.
    pub tokens: Vec<u32>,
    /// What is packed: shared beginnings (no past) and ends (their beginning as past).
    spans: Vec<Span>,
    /// Of every sequence, in the order pushed, the packed row of each of its tokens.
    pub sequences: Vec<Vec<u32>>,
}

impl Pack {
    /// Adds one item's sequences.
    pub fn push(&mut self, sequences: &[Encoded], config: &Config) {
        let shared = if can_share(config) { common_prefix(sequences) } else { 0 };
        let beginning = self.push_rows(sequences.first().map_or(&[], |s| &s.input[..shared]), 0);
        for sequence in sequences {
            let end = self.push_rows(&sequence.input[shared..], shared);
            self.sequences.push(beginning.clone().chain(end).collect());
        }
    }

    fn push_rows(&mut self, tokens: &[u32], past: usize) -> std::ops::Range<u32> {
        let first = self.tokens.len() as u32;
        self.tokens.extend(tokens);
        if !tokens.is_empty() {
            self.spans.push(Span { past, len: tokens.len() });
        }
        first..self.tokens.len() as u32
    }

    /// The residual stream of the packed rows after the last layer, [tokens, hidden].
    pub fn forward(&self, decoder: &Decoder) -> crate::Result<Tensor> {
        let batch = decoder.batch(&self.spans)?;
        if self.spans.iter().all(|span| span.past == 0) && self.spans.len() == self.sequences.len() {
            return Ok(decoder.forward(&self.tokens, &batch, &mut NoCache)?);
        }
        let whole: Vec<Span> = self.sequences.iter().map(|rows| Span::prompt(rows.len())).collect();
        let gathered: Vec<u32> = self.sequences.iter().flatten().copied().collect();
        // of a shared row's copies, which all hold the same, the last one written is taken
        let mut copies = vec![0u32; self.tokens.len()];
        for (position, row) in gathered.iter().enumerate() {
            copies[*row as usize] = position as u32;
        }
        let index = |rows: Vec<u32>| Tensor::new(rows, decoder.device());
        let mut cache = SharedPrefix { whole: decoder.batch(&whole)?, gather: index(gathered)?, scatter: index(copies)? };
        Ok(decoder.forward(&self.tokens, &batch, &mut cache)?)
    }
}

/// Attention as if every sequence stood alone: rows are gathered into whole sequences for it. All other work is done on packed rows.
///
/// A row depends on nothing but itself and the keys it sees, so the numbers are those of [`NoCache`] on whole sequences, bit for bit on the CPU.
struct SharedPrefix {
    /// The sequences, none with a past.
    whole: Batch,
    /// Packed row of each row of `whole`.
    gather: Tensor,
    /// Row of `whole` for each packed row.
    scatter: Tensor,
}

impl KvCache for SharedPrefix {
    fn attend(&mut self, layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, _batch: &Batch) -> evop_model::Result<Tensor> {
        let whole = |t: &Tensor| t.contiguous()?.index_select(&self.gather, 0);
        let attended = NoCache.attend(layer, spec, &whole(q)?, &whole(k)?, &whole(v)?, &self.whole)?;
        Ok(attended.index_select(&self.scatter, 0)?)
    }
}

/// Not where a token's rotation depends on the length of its sequence.
fn can_share(config: &Config) -> bool {
    !matches!(&config.positions, Positions::Rope(rope) if matches!(rope.scaling, Some(RopeScaling::Dynamic { .. })))
}

/// Tokens that all inputs begin with.
fn common_prefix(sequences: &[Encoded]) -> usize {
    let Some((first, others)) = sequences.split_first() else { return 0 };
    let common = |other: &Encoded| first.input.iter().zip(&other.input).take_while(|(a, b)| a == b).count();
    others.iter().map(common).min().unwrap_or(0)
}
