//! Log probabilities from a row of logits.

use crate::output::{TokenLogprob, TokenLogprobs};
use std::cmp::Ordering;

/// The best logit's token, the lowest id on ties; `None` if no logit is above minus infinity (NaN is not).
pub(crate) fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best: Option<(usize, f32)> = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.map_or(f32::NEG_INFINITY, |(_, b)| b) {
            best = Some((id, logit));
        }
    }
    best.map(|(id, _)| id as u32)
}

/// Of one token and the `top` most probable ones, under log_softmax of the logits as they are.
pub(crate) fn token_logprobs(logits: &[f32], id: u32, top: usize) -> TokenLogprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|l| f64::from(l - max).exp()).sum();
    let normaliser = f64::from(max) + sum.ln();
    let logprob = |id: u32| TokenLogprob { id, logprob: (f64::from(logits[id as usize]) - normaliser) as f32 };
    let own = logits[id as usize];
    let rank = 1 + logits.iter().filter(|l| **l > own).count();
    TokenLogprobs { token: logprob(id), rank, top: best(logits, top).into_iter().map(logprob).collect() }
}

/// The `count` best tokens, best first, the lowest id first on ties.
fn best(logits: &[f32], count: usize) -> Vec<u32> {
    let order = |a: &u32, b: &u32| -> Ordering { logits[*b as usize].total_cmp(&logits[*a as usize]).then(a.cmp(b)) };
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    if count == 0 {
        return Vec::new();
    }
    if count < ids.len() {
        ids.select_nth_unstable_by(count - 1, order);
        ids.truncate(count);
    }
    ids.sort_unstable_by(order);
    ids
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_id_wins_a_tie_and_nan_never_wins() {
        assert_eq!(argmax(&[1.0, 3.0, 3.0]), Some(1));
        assert_eq!(argmax(&[f32::NAN, -1.0, f32::NAN]), Some(1));
        assert_eq!(argmax(&[f32::NEG_INFINITY, f32::NAN]), None);
    }

    #[test]
    fn logprobs_are_natural_logs_of_the_softmax() {
        let logits = [0.0_f32, 3.0_f32.ln(), 4.0_f32.ln()];
        let found = token_logprobs(&logits, 1, 2);
        assert!((found.token.logprob - (3.0_f32 / 8.0).ln()).abs() < 1e-6);
        assert_eq!(found.rank, 2);
        assert_eq!(found.top.iter().map(|t| t.id).collect::<Vec<_>>(), [2, 1]);
        assert!((found.top[0].logprob - 0.5_f32.ln()).abs() < 1e-6);
        assert_eq!(token_logprobs(&logits, 0, 0).top, []);
        assert_eq!(token_logprobs(&logits, 0, 20).top.len(), 3);
    }

    #[test]
    fn large_logits_do_not_overflow() {
        let found = token_logprobs(&[1000.0, 0.0], 0, 1);
        assert_eq!(found.token.logprob, 0.0);
        assert_eq!(token_logprobs(&[1000.0, 0.0], 1, 1).token.logprob, -1000.0);
    }
}
