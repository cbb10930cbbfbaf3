//! What one forward pass computes: the new tokens of several sequences, packed one after the other.

use crate::config::Positions;
use crate::rope::RopeParameters;
use crate::{Config, Result};
use candle_core::{Device, Tensor};
use std::ops::Range;

/// The new tokens of one sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Tokens that the cache already holds.
    pub past: usize,
    /// Tokens in this pass.
    pub len: usize,
}

impl Span {
    /// A whole sequence from its start.
    pub fn prompt(len: usize) -> Self {
        Self { past: 0, len }
    }
}

/// Which part of a pass a batch is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Its first sequence, among those of the pass.
    pub first_span: usize,
    /// Its first row.
    pub first_row: usize,
    /// All sequences of the pass.
    pub spans: usize,
}

/// Packed sequences and what depends on their positions alone, made by [`crate::Decoder::batch`].
#[derive(Debug, Clone)]
pub struct Batch {
    spans: Vec<Span>,
    tokens: usize,
    place: Place,
    /// (cos, sin), each [1, tokens, head_dim / 2] f32.
    pub(crate) rope: Option<(Tensor, Tensor)>,
    /// [tokens] u32 rows of the learned table.
    pub(crate) position_ids: Option<Tensor>,
    /// [spans + 1] u32 first rows of the spans and the number of rows, for kernels that take all spans at once.
    #[cfg(feature = "flash-attn")]
    pub(crate) offsets: Tensor,
}

impl Batch {
    pub(crate) fn new(config: &Config, spans: &[Span], device: &Device) -> Result<Self> {
        let tokens = spans.iter().map(|s| s.len).sum();
        let (mut rope, mut position_ids) = (None, None);
        match &config.positions {
            Positions::Rope(parameters) => rope = Some(tables(parameters, config.head_dim, spans, device)?),
            Positions::Learned { offset } => {
                let ids: Vec<u32> = spans.iter().flat_map(|s| s.past..s.past + s.len).map(|p| (p + offset) as u32).collect();
                position_ids = Some(Tensor::from_vec(ids, tokens, device)?);
            }
        }
        #[cfg(feature = "flash-attn")]
        let offsets = rows_of(spans, device)?;
        Ok(Self {
            spans: spans.to_vec(),
            tokens,
            place: Place { first_span: 0, first_row: 0, spans: spans.len() },
            rope,
            position_ids,
            #[cfg(feature = "flash-attn")]
            offsets,
        })
    }

    /// Rows whose sequences are known to the cache alone.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn of_rows(tokens: usize, rope: Option<(Tensor, Tensor)>, position_ids: Tensor, offsets: Tensor) -> Self {
        let place = Place { first_span: 0, first_row: 0, spans: 0 };
        Self { spans: Vec::new(), tokens, place, rope, position_ids: Some(position_ids), offsets }
    }

    /// The same sequences `count` times over.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when the device runs out of memory.
    pub fn repeated(&self, count: usize) -> Result<Self> {
        let spans = self.spans.repeat(count);
        let rope = self.rope.as_ref().map(|(cos, sin)| -> Result<_> { Ok((cos.repeat((1, count, 1))?, sin.repeat((1, count, 1))?)) }).transpose()?;
        Ok(Self {
            tokens: self.tokens * count,
            place: Place { first_span: 0, first_row: 0, spans: spans.len() },
            rope,
            position_ids: self.position_ids.as_ref().map(|ids| ids.repeat(count)).transpose()?,
            #[cfg(feature = "flash-attn")]
            offsets: rows_of(&spans, self.offsets.device())?,
            spans,
        })
    }

    /// Some neighbouring sequences of this pass.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when the device runs out of memory.
    pub fn part(&self, spans: Range<usize>) -> Result<Self> {
        let rows = |spans: &[Span]| spans.iter().map(|s| s.len).sum::<usize>();
        let (row, tokens) = (rows(&self.spans[..spans.start]), rows(&self.spans[spans.clone()]));
        let rope = self.rope.as_ref().map(|(cos, sin)| -> Result<_> {
            let part = |table: &Tensor| -> Result<Tensor> { Ok(table.narrow(1, row, tokens)?.contiguous()?) };
            Ok((part(cos)?, part(sin)?))
        });
        Ok(Self {
            tokens,
            place: Place { first_span: self.place.first_span + spans.start, first_row: self.place.first_row + row, ..self.place },
            rope: rope.transpose()?,
            position_ids: self.position_ids.as_ref().map(|ids| ids.narrow(0, row, tokens)).transpose()?,
            #[cfg(feature = "flash-attn")]
            offsets: rows_of(&self.spans[spans.clone()], self.offsets.device())?,
            spans: self.spans[spans].to_vec(),
        })
    }

    /// Where it stands in the whole pass.
    pub fn place(&self) -> Place {
        self.place
    }

    /// The sequences.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Rows of this pass: all spans' lengths added.
    pub fn tokens(&self) -> usize {
        self.tokens
    }
}

/// Where each span begins, and where the last one ends.
#[cfg(feature = "flash-attn")]
fn rows_of(spans: &[Span], device: &Device) -> Result<Tensor> {
    Ok(Tensor::from_vec(offsets(spans.iter().map(|span| span.len)), spans.len() + 1, device)?)
}

/// Where things of these lengths begin, one behind the other, and where the last one ends.
#[cfg(feature = "flash-attn")]
pub(crate) fn offsets(lengths: impl Iterator<Item = usize>) -> Vec<u32> {
    let ends = lengths.scan(0, |end, length| {
        *end += length as u32;
        Some(*end)
    });
    std::iter::once(0).chain(ends).collect()
}

/// (cos, sin), [1, tokens, head_dim / 2] f32 each.
fn tables(parameters: &RopeParameters, head_dim: usize, spans: &[Span], device: &Device) -> Result<(Tensor, Tensor)> {
    let (cos, sin) = angles(parameters, head_dim, spans);
    let tensor = |values: Vec<f32>| -> Result<Tensor> {
        let tokens = values.len() / (head_dim / 2);
        Ok(Tensor::from_vec(values, (1, tokens, head_dim / 2), device)?)
    };
    Ok((tensor(cos)?, tensor(sin)?))
}

/// Cosines and sines of the angles of all tokens, [tokens, head_dim / 2] each.
pub(crate) fn angles(parameters: &RopeParameters, head_dim: usize, spans: &[Span]) -> (Vec<f32>, Vec<f32>) {
    let tokens: usize = spans.iter().map(|s| s.len).sum();
    let factor = parameters.attention_factor();
    let (mut cos, mut sin) = (Vec::with_capacity(tokens * head_dim / 2), Vec::with_capacity(tokens * head_dim / 2));
    let shared = (!parameters.depends_on_length()).then(|| parameters.inverse_frequencies(head_dim, 0));
    for span in spans {
        let own;
        let frequencies = match &shared {
            Some(f) => f,
            None => {
                own = parameters.inverse_frequencies(head_dim, span.past + span.len);
                &own
            }
        };
        for position in span.past..span.past + span.len {
            for frequency in frequencies {
                // the angle is rounded to f32, as the reference implementation has it
                let (s, c) = f64::from(position as f32 * frequency).sin_cos();
                cos.push((c * factor) as f32);
                sin.push((s * factor) as f32);
            }
        }
    }
    (cos, sin)
}
