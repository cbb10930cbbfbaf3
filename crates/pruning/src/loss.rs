//! Cross-entropy of next tokens, computed a few rows at a time so that logits never take much memory.

use crate::Result;
use evop_model::{Decoder, Span, Tensor, kernels};
use rayon::prelude::*;

/// Logits held at once, in elements (64 MB of f32).
const LOGITS_ELEMENTS: usize = 16 << 20;

/// Negative log-likelihoods in nats of each span's tokens given those before: `span.len - 1` numbers a span.
///
/// `hidden` [tokens, hidden] is the residual stream after the last layer; `tokens` are the packed inputs.
pub(crate) fn token_losses(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Vec<Vec<f32>>> {
    let vocab = decoder.config().vocab_size;
    let rows_at_once = (LOGITS_ELEMENTS / vocab).max(1);
    let mut losses = Vec::with_capacity(spans.len());
    let mut start = 0;
    for span in spans {
        let mut of_span = Vec::with_capacity(span.len.saturating_sub(1));
        let predicting = span.len.saturating_sub(1);
        for first in (0..predicting).step_by(rows_at_once) {
            let count = rows_at_once.min(predicting - first);
            let logits = decoder.logits(&hidden.narrow(0, start + first, count)?)?;
            let logits = logits.flatten_all()?.to_vec1::<f32>()?;
            let targets = &tokens[start + first + 1..start + first + 1 + count];
            of_span.par_extend(logits.par_chunks(vocab).zip(targets).map(|(row, target)| kernels::log_sum_exp(row) - row[*target as usize]));
        }
        losses.push(of_span);
        start += span.len;
    }
    Ok(losses)
}

/// Mean in f64, in order.
pub(crate) fn mean(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64
}
