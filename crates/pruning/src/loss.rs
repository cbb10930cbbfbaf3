//! What a position loses: cross-entropy of the next token, or what the next-token distribution differs from the dense model's by.

use crate::Result;
use crate::key_tokens::KeyTokens;
use evop_model::{Decoder, Device, Span, Tensor, kernels};
use rayon::prelude::*;

/// The dense model's logits held at once, in elements (32 MB of f32).
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

/// The rows of packed spans that predict a token of their own span.
fn predicting(spans: &[Span]) -> Vec<u32> {
    let starts = spans.iter().scan(0, |end, span| Some(std::mem::replace(end, *end + span.len)));
    starts.zip(spans).flat_map(|(start, span)| start as u32..(start + span.len.saturating_sub(1)) as u32).collect()
}

/// Some rows of a matrix.
fn select(of: &Tensor, rows: &[u32]) -> Result<Tensor> {
    Ok(of.index_select(&Tensor::from_slice(rows, rows.len(), of.device())?, 0)?)
}

/// The tokens that come next at those rows.
fn next(tokens: &[u32], rows: &[u32]) -> Vec<u32> {
    rows.iter().map(|row| tokens[*row as usize + 1]).collect()
}

/// Numbers of all positions, one span after the other, put by spans.
fn by_span(losses: Vec<f32>, spans: &[Span]) -> Vec<Vec<f32>> {
    let mut losses = losses.into_iter();
    spans.iter().map(|span| losses.by_ref().take(span.len.saturating_sub(1)).collect()).collect()
}

/// Negative log-likelihoods in nats of each span's next tokens: `span.len - 1` numbers a span.
///
/// `hidden` [tokens, hidden] is the residual stream after the last layer; `tokens` are the packed inputs.
pub(crate) fn token_losses(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Vec<Vec<f32>>> {
    Ok(by_span(Scoring::default().of_positions(decoder, hidden, tokens, spans)?, spans))
}

/// What the positions of packed spans are scored by: nothing but the text, unless it says otherwise.
#[derive(Debug, Default)]
pub(crate) struct Scoring {
    /// For what differs between the dense model and this one, over the reference's top tokens and the rest.
    pub reference: Option<Reference>,
    /// Its measure is how much probability lies elsewhere, not KL(dense || this).
    pub refusals: bool,
    /// For the part of the loss that is what key tokens lose.
    pub keys: Option<KeyTokens>,
}

impl Scoring {
    /// Losses in nats of each span's positions; arguments and result as of [`token_losses`].
    pub fn losses(&self, decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Vec<Vec<f32>>> {
        Ok(by_span(self.of_positions(decoder, hidden, tokens, spans)?, spans))
    }

    fn of_positions(&self, decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Vec<f32>> {
        let rows = predicting(spans);
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        // of every position the tokens that the dense model holds likely, then the one that comes
        let top = self.reference.as_ref().map_or(0, |dense| dense.top);
        let mut ids = Vec::with_capacity(rows.len() * (top + 1));
        for (position, next) in next(tokens, &rows).into_iter().enumerate() {
            ids.extend(self.reference.iter().flat_map(|dense| &dense.ids[position * top..(position + 1) * top]));
            ids.push(next);
        }
        let log_probabilities = decoder.log_probabilities(&select(hidden, &rows)?, &ids)?;
        Ok(log_probabilities.chunks(top + 1).enumerate().map(|(position, q)| self.loss(position, &q[..top], q[top])).collect())
    }

    /// `q`: log-probabilities of the reference's tokens; `next`: of the token that comes.
    fn loss(&self, position: usize, q: &[f32], next: f32) -> f32 {
        let (loss, lost) = match (&self.reference, &self.keys) {
            (None, _) => (-next, -next),
            (Some(dense), None) if self.refusals => return dense.refused(position, q),
            (Some(dense), None) => return dense.divergence(position, q),
            // what one token gains must not pay for what another loses: a search would find the gains that this sample has by chance
            (Some(dense), Some(keys)) => (dense.divergence(position, q), (keys.dense[position] - next).max(0.0)),
        };
        self.keys.as_ref().map_or(loss, |keys| keys.others * loss + keys.weights[position] * lost)
    }
}

impl Reference {
    /// The distributions after the dense model's last layer; `hidden` and `spans` as in [`token_losses`].
    pub fn new(decoder: &Decoder, hidden: &Tensor, spans: &[Span]) -> Result<Self> {
        let top = TOP.min(decoder.config().vocab_size);
        let mut reference = Self { top, ..Self::default() };
        let vocab = decoder.config().vocab_size;
        for rows in predicting(spans).chunks((LOGITS_ELEMENTS / vocab).max(1)) {
            let logits = decoder.logits(&select(hidden, rows)?)?.to_device(&Device::Cpu)?;
            let ids: Vec<u32> = kernels::with_slice(&logits, |l| l.par_chunks(vocab).flat_map_iter(|row| most_likely(row, top)).collect())?;
            let log_probabilities = kernels::log_probabilities(&logits, &ids)?;
            reference.rest.extend(log_probabilities.chunks(top).map(|kept| rest(kept.iter().copied())));
            reference.ids.extend(ids);
            reference.log_probabilities.extend(log_probabilities);
        }
        Ok(reference)
    }

    /// KL(dense || q) in nats at a position; q are the other model's log-probabilities of the tokens that are kept of it.
    fn divergence(&self, position: usize, q: &[f32]) -> f32 {
        let range = position * self.top..(position + 1) * self.top;
        let term = |p: f32, q: f32| f64::from(p).exp() * f64::from(p - q);
        let kept: f64 = self.log_probabilities[range].iter().zip(q).map(|(p, q)| term(*p, *q)).sum();
        (kept + term(self.rest[position], rest(q.iter().copied()))) as f32
    }

    /// The total variation between the dense distribution and q at a position: the probability that a guess drawn from q isn't taken.
    fn refused(&self, position: usize, q: &[f32]) -> f32 {
        let range = position * self.top..(position + 1) * self.top;
        let common = |p: f32, q: f32| f64::from(p.min(q)).exp();
        let kept: f64 = self.log_probabilities[range].iter().zip(q).map(|(p, q)| common(*p, *q)).sum();
        (1.0 - kept - common(self.rest[position], rest(q.iter().copied()))).max(0.0) as f32
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.ids.len() * 8 + self.rest.len() * 4
    }
}

/// The ids of the `top` largest logits, in order of ids.
fn most_likely(row: &[f32], top: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if top < ids.len() {
        ids.select_nth_unstable_by(top - 1, by_logit);
        ids.truncate(top);
    }
    ids.sort_unstable();
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
        let log_softmax = |l: &[f32]| {
            let logits = Tensor::from_slice(l, (1, vocab), &Device::Cpu).unwrap();
            kernels::log_probabilities(&logits, &(0..vocab as u32).collect::<Vec<_>>()).unwrap()
        };
        let (p, q) = (log_softmax(&logits(1)), log_softmax(&logits(2)));
        let mut ids: Vec<u32> = (0..vocab as u32).collect();
        ids.sort_by(|a, b| p[*b as usize].total_cmp(&p[*a as usize]));
        ids.truncate(64);
        let of = |log_probabilities: &[f32]| ids.iter().map(|i| log_probabilities[*i as usize]).collect::<Vec<f32>>();
        let dense = Reference { top: 64, rest: vec![rest(of(&p).into_iter())], ids: ids.clone(), log_probabilities: of(&p) };
        assert!(dense.divergence(0, &of(&p)).abs() < 1e-5);
        assert!(dense.refused(0, &of(&p)) < 1e-5);
        let elsewhere: f64 = p.iter().zip(&q).map(|(p, q)| (f64::from(*p).exp() - f64::from(*q).exp()).abs() / 2.0).sum();
        let refused = f64::from(dense.refused(0, &of(&q)));
        assert!(refused > 0.01 && refused <= elsewhere + 1e-6, "{refused} of {elsewhere}");
        let full: f64 = p.iter().zip(&q).map(|(p, q)| f64::from(*p).exp() * f64::from(p - q)).sum();
        let topped = f64::from(dense.divergence(0, &of(&q)));
        assert!(topped > 0.01 && topped <= full + 1e-6, "{topped} of {full}");
    }

    #[test]
    fn key_tokens_lose_the_likelihood_that_the_dense_model_gave_them() {
        let reference = || Reference { top: 2, ids: vec![0, 1], log_probabilities: vec![0.5f32.ln(), 0.3f32.ln()], rest: vec![0.2f32.ln()] };
        let keys = || KeyTokens { others: 0.5, weights: vec![3.0], dense: vec![-1.0] };
        let q = [0.4f32.ln(), 0.4f32.ln()];
        let divergence = reference().divergence(0, &q);
        let scoring = |reference, keys| Scoring { reference, keys, refusals: false }.loss(0, &q, -1.5);
        assert_eq!(scoring(None, None), 1.5);
        assert_eq!(scoring(Some(reference()), None), divergence);
        assert_eq!(scoring(Some(reference()), Some(keys())), 0.5 * divergence + 3.0 * 0.5);
        assert_eq!(scoring(None, Some(keys())), 0.5 * 1.5 + 3.0 * 1.5);
        let gains = Scoring { reference: Some(reference()), keys: Some(keys()), refusals: false }.loss(0, &q, -0.5);
        assert_eq!(gains, 0.5 * divergence, "what a token gains makes up for nothing");
    }
}
