//! What a position loses: cross-entropy of the next token, or divergence from the dense model's next-token distribution. Computed a few
//! rows at a time so that logits never take much memory.

use crate::Result;
use evop_model::{Decoder, Device, Span, Tensor, kernels};
use rayon::prelude::*;

/// Logits held at once, in elements (32 MB of f32).
const LOGITS_ELEMENTS: usize = 8 << 20;
/// The same where they don't pass through the processor's caches (512 MB).
const LOGITS_ELEMENTS_ON_DEVICE: usize = 128 << 20;
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

/// Calls `f(rows, logits)` with the logits [rows, vocab] of the rows of `hidden` that predict a token of their own span, some rows at a time.
fn each_logits(decoder: &Decoder, hidden: &Tensor, spans: &[Span], mut f: impl FnMut(&[u32], &Tensor) -> Result<()>) -> Result<()> {
    let elements = if decoder.device().is_cpu() { LOGITS_ELEMENTS } else { LOGITS_ELEMENTS_ON_DEVICE };
    let mut predicting: Vec<u32> = Vec::new();
    let mut start = 0;
    for span in spans {
        predicting.extend(start..start + span.len.saturating_sub(1) as u32);
        start += span.len as u32;
    }
    for rows in predicting.chunks((elements / decoder.config().vocab_size).max(1)) {
        let index = Tensor::from_slice(rows, rows.len(), decoder.device())?;
        f(rows, &decoder.logits(&hidden.index_select(&index, 0)?)?)?;
    }
    Ok(())
}

/// Natural logarithms of the probabilities of some tokens at every row: logits [rows, vocab] and `ids`, as many of each row, to as many numbers.
/// Computed where the logits are: only what was asked for leaves the device.
pub(crate) fn log_probabilities(logits: &Tensor, ids: &[u32]) -> Result<Vec<f32>> {
    let (rows, vocab) = logits.dims2()?;
    let of_row = ids.len() / rows;
    if logits.device().is_cpu() {
        return Ok(kernels::with_slice(logits, |logits| {
            let of_row = |(row, ids): (&[f32], &[u32])| -> Vec<f32> {
                let normaliser = kernels::log_sum_exp(row);
                ids.iter().map(|id| row[*id as usize] - normaliser).collect()
            };
            logits.par_chunks(vocab).zip(ids.par_chunks(ids.len() / rows)).flat_map_iter(of_row).collect()
        })?);
    }
    let ids = Tensor::from_slice(ids, (rows, of_row), logits.device())?;
    let normaliser = logits.log_sum_exp(1)?.unsqueeze(1)?;
    Ok(logits.gather(&ids, 1)?.broadcast_sub(&normaliser)?.flatten_all()?.to_vec1()?)
}

/// Losses in nats of each span's positions: `span.len - 1` numbers a span. Negative log-likelihood of the next token, or with a reference
/// KL(dense || this) over its top tokens and the rest.
///
/// `hidden` [tokens, hidden] is the residual stream after the last layer; `tokens` are the packed inputs.
pub(crate) fn token_losses(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span], reference: Option<&Reference>) -> Result<Vec<Vec<f32>>> {
    let mut losses = Vec::with_capacity(tokens.len());
    each_logits(decoder, hidden, spans, |rows, logits| {
        match reference {
            None => {
                let next: Vec<u32> = rows.iter().map(|row| tokens[*row as usize + 1]).collect();
                losses.extend(log_probabilities(logits, &next)?.iter().map(|l| -l));
            }
            Some(dense) => {
                let first = losses.len();
                let found = log_probabilities(logits, &dense.ids[first * dense.top..(first + rows.len()) * dense.top])?;
                losses.extend(found.chunks(dense.top).enumerate().map(|(i, q)| dense.divergence(first + i, q)));
            }
        }
        Ok(())
    })?;
    let mut losses = losses.into_iter();
    Ok(spans.iter().map(|span| losses.by_ref().take(span.len.saturating_sub(1)).collect()).collect())
}

impl Reference {
    /// The distributions after the dense model's last layer; `hidden` and `spans` as in [`token_losses`].
    pub fn new(decoder: &Decoder, hidden: &Tensor, spans: &[Span]) -> Result<Self> {
        let top = TOP.min(decoder.config().vocab_size);
        let mut reference = Self { top, ..Self::default() };
        each_logits(decoder, hidden, spans, |_, logits| {
            let logits = logits.to_device(&Device::Cpu)?;
            let ids: Vec<u32> =
                kernels::with_slice(&logits, |l| l.par_chunks(decoder.config().vocab_size).flat_map_iter(|row| most_likely(row, top)).collect())?;
            let log_probabilities = log_probabilities(&logits, &ids)?;
            reference.rest.extend(log_probabilities.chunks(top).map(|kept| rest(kept.iter().copied())));
            reference.ids.extend(ids);
            reference.log_probabilities.extend(log_probabilities);
            Ok(())
        })?;
        Ok(reference)
    }

    /// KL(dense || q) in nats at a position; q are the other model's log-probabilities of the tokens that are kept of it.
    fn divergence(&self, position: usize, q: &[f32]) -> f32 {
        let range = position * self.top..(position + 1) * self.top;
        let term = |p: f32, q: f32| f64::from(p).exp() * f64::from(p - q);
        let kept: f64 = self.log_probabilities[range].iter().zip(q).map(|(p, q)| term(*p, *q)).sum();
        (kept + term(self.rest[position], rest(q.iter().copied()))) as f32
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.ids.len() * 8 + self.rest.len() * 4
    }
}

/// The ids of the `top` largest logits, the largest first.
fn most_likely(row: &[f32], top: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top - 1, by_logit);
        ids.truncate(top);
    }
    ids.sort_unstable_by(by_logit);
    ids
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
        let of = |log_probabilities: &[f32]| ids.iter().map(|i| log_probabilities[*i as usize]).collect::<Vec<f32>>();
        let dense = Reference { top: 64, rest: vec![rest(of(&p).into_iter())], ids: ids.clone(), log_probabilities: of(&p) };
        assert!(dense.divergence(0, &of(&p)).abs() < 1e-5);
        let full: f64 = p.iter().zip(&q).map(|(p, q)| f64::from(*p).exp() * f64::from(p - q)).sum();
        let topped = f64::from(dense.divergence(0, &of(&q)));
        assert!(topped > 0.01 && topped <= full + 1e-6, "{topped} of {full}");
    }
}
