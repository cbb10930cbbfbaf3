//! What a position loses: cross-entropy of the next token, or divergence from the dense model's next-token distribution. Computed a few
//! rows at a time so that logits never take much memory.

use crate::Result;
use evop_model::{DType, Decoder, Device, Span, Tensor, kernels};
use rayon::prelude::*;

/// Logits held at once, in elements (32 MB of f32).
const LOGITS_ELEMENTS: usize = 8 << 20;
/// Most likely tokens of the dense model that are kept of each position; the others count as one.
const TOP: usize = 64;

/// The dense model's next-token distributions: its [`TOP`] most likely tokens, and the rest as one outcome.
#[derive(Debug, Clone, Default)]
pub(crate) struct Reference {
    /// Outcomes kept of a position.
    top: usize,
    /// Token ids, `top` a position.
    ids: Vec<u32>,
    /// Their log-probabilities.
    log_probabilities: Vec<f32>,
    /// Log-probability of all others together, one a position.
    rest: Vec<f32>,
}

/// Positions that predict a token of their own sequence, packed: (row of `hidden`, the token that follows).
fn predictions<'a>(tokens: &'a [u32], spans: &'a [Span]) -> impl Iterator<Item = (usize, usize)> + 'a {
    let mut start = 0;
    spans.iter().map(move |span| {
        let first = start;
        start += span.len;
        debug_assert!(start <= tokens.len());
        (first, span.len.saturating_sub(1))
    })
}

/// Calls `f(position, target, logits)` for every predicting position of every span and gathers the results, a vector a span.
fn map_logits<T: Send>(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span], f: impl Fn(usize, u32, &[f32]) -> T + Sync) -> Result<Vec<Vec<T>>> {
    let vocab = decoder.config().vocab_size;
    let rows_at_once = (LOGITS_ELEMENTS / vocab).max(1);
    let mut results = Vec::with_capacity(spans.len());
    let mut position = 0;
    for (start, predicting) in predictions(tokens, spans) {
        let mut of_span = Vec::with_capacity(predicting);
        for first in (0..predicting).step_by(rows_at_once) {
            let count = rows_at_once.min(predicting - first);
            let logits = decoder.logits(&hidden.narrow(0, start + first, count)?)?.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
            let targets = &tokens[start + first + 1..start + first + 1 + count];
            kernels::with_slice(&logits, |logits| {
                of_span.par_extend(logits.par_chunks(vocab).zip(targets).enumerate().map(|(i, (row, target))| f(position + i, *target, row)));
            })?;
            position += count;
        }
        results.push(of_span);
    }
    Ok(results)
}

/// Losses in nats of each span's positions: `span.len - 1` numbers a span. Negative log-likelihood of the next token, or with a reference
/// KL(dense || this) over its top tokens and the rest.
///
/// `hidden` [tokens, hidden] is the residual stream after the last layer; `tokens` are the packed inputs.
pub(crate) fn token_losses(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span], reference: Option<&Reference>) -> Result<Vec<Vec<f32>>> {
    match reference {
        None => map_logits(decoder, hidden, tokens, spans, |_, target, row| kernels::log_sum_exp(row) - row[target as usize]),
        Some(dense) => map_logits(decoder, hidden, tokens, spans, |position, _, row| dense.divergence(position, row)),
    }
}

impl Reference {
    /// The distributions after the dense model's last layer.
    pub fn new(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Self> {
        let top = TOP.min(decoder.config().vocab_size);
        let rows = map_logits(decoder, hidden, tokens, spans, |_, _, row| {
            let mut ids: Vec<u32> = (0..row.len() as u32).collect();
            let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
            if top < ids.len() {
                ids.select_nth_unstable_by(top - 1, by_logit);
                ids.truncate(top);
            }
            ids.sort_unstable_by(by_logit);
            let normaliser = kernels::log_sum_exp(row);
            let log_probabilities: Vec<f32> = ids.iter().map(|id| row[*id as usize] - normaliser).collect();
            let rest = rest(log_probabilities.iter().copied());
            (ids, log_probabilities, rest)
        })?;
        let mut reference = Self { top, ..Self::default() };
        for (ids, log_probabilities, rest) in rows.into_iter().flatten() {
            reference.ids.extend(ids);
            reference.log_probabilities.extend(log_probabilities);
            reference.rest.push(rest);
        }
        Ok(reference)
    }

    /// KL(dense || q) in nats at a position, q given by its logits.
    fn divergence(&self, position: usize, logits: &[f32]) -> f32 {
        let range = position * self.top..(position + 1) * self.top;
        let normaliser = kernels::log_sum_exp(logits);
        let q = |id: &u32| logits[*id as usize] - normaliser;
        let term = |p: f32, q: f32| f64::from(p).exp() * f64::from(p - q);
        let kept: f64 = self.ids[range.clone()].iter().zip(&self.log_probabilities[range.clone()]).map(|(id, p)| term(*p, q(id))).sum();
        let others = rest(self.ids[range].iter().map(q));
        (kept + term(self.rest[position], others)) as f32
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.ids.len() * 8 + self.rest.len() * 4
    }
}

/// ln(1 - sum of the probabilities), at least ln(1e-7): rounding must not make nothing out of little.
fn rest(log_probabilities: impl Iterator<Item = f32>) -> f32 {
    let kept: f64 = log_probabilities.map(|p| f64::from(p).exp()).sum();
    (1.0 - kept).max(1e-7).ln() as f32
}

/// Mean in f64, in order.
pub(crate) fn mean(values: &[f32]) -> f64 {
    values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_is_zero_from_itself_positive_from_others_and_at_most_the_full_one() {
        let vocab = 500;
        let logits = |seed: usize| (0..vocab).map(|i| ((i * 131 + seed * 71) % 97) as f32 / 12.0).collect::<Vec<f32>>();
        let log_softmax = |l: &[f32]| l.iter().map(|v| v - kernels::log_sum_exp(l)).collect::<Vec<_>>();
        let (p, q) = (log_softmax(&logits(1)), log_softmax(&logits(2)));
        let mut ids: Vec<u32> = (0..vocab as u32).collect();
        ids.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
        ids.truncate(64);
        let log_probabilities: Vec<f32> = ids.iter().map(|i| p[*i as usize]).collect();
        let dense = Reference { top: 64, rest: vec![rest(log_probabilities.iter().copied())], ids, log_probabilities };
        assert!(dense.divergence(0, &logits(1)).abs() < 1e-5);
        let full: f64 = p.iter().zip(&q).map(|(p, q)| f64::from(*p).exp() * f64::from(p - q)).sum();
        let topped = f64::from(dense.divergence(0, &logits(2)));
        assert!(topped > 0.01 && topped <= full + 1e-6, "{topped} of {full}");
    }
}
