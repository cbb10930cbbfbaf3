//! Key tokens: those that a model gets right because of what lies far back, such as a name that comes again. LongPPL (Fang et al. 2024, arXiv 2410.23771,
//! section 3.2) finds them by how much better a token is predicted with the whole sequence before it than with its last few tokens. Here that
//! gain, in nats, is what a token counts.
//!
//! They are a few per cent of running text. A search that minimises the plain mean gives up the sub-blocks that carry them for a little
//! gain everywhere else, and answers that hang on the context go first. What counts of them is the likelihood that the text's own token loses, not a
//! divergence: it says better what becomes of such answers.

use crate::{Result, loss, pack};
use evop_model::{Decoder, NoCache, Span, Tensor};

/// Tokens of context that count as near: between this many and twice as many.
const NEAR: usize = 16;
/// The most that a token counts, in nats: one surprise must not outweigh many.
const MOST: f32 = 5.0;
/// The least log-likelihood, with the whole context, of a token that the model gets right.
const LIKELY: f32 = -3.0;
/// Tokens of windows that are computed together.
const TOKENS_AT_ONCE: usize = 2_048;

/// What the predicting positions of packed spans have of key tokens, one number a position each.
#[derive(Debug)]
pub(crate) struct Gains {
    /// Nats that far context is worth to the dense model.
    gains: Vec<f32>,
    /// The dense model's log-likelihood of the token that comes.
    log_likelihoods: Vec<f32>,
}

/// Weights under which key tokens make up a share of the mean loss, where all losses are equal.
#[derive(Debug)]
pub(crate) struct KeyTokens {
    /// What any position's loss counts.
    pub others: f32,
    /// What the likelihood counts that the token at a position loses against the dense model.
    pub weights: Vec<f32>,
    /// The dense model's log-likelihood of it.
    pub dense: Vec<f32>,
}

/// `hidden` [tokens, hidden] is the dense model's residual stream after the last layer.
pub(crate) fn find(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Gains> {
    let mut found = Gains { gains: Vec::new(), log_likelihoods: Vec::new() };
    let mut start = 0;
    for (span, far) in spans.iter().zip(loss::token_losses(decoder, hidden, tokens, spans)?) {
        let near = near_losses(decoder, &tokens[start..start + span.len])?;
        found.gains.extend(far.iter().zip(near).map(|(far, near)| gain(*far, near)));
        found.log_likelihoods.extend(far.iter().map(|far| -far));
        start += span.len;
    }
    Ok(found)
}

/// What a token counts, by its negative log-likelihoods with the whole context and with its last tokens.
fn gain(far: f32, near: f32) -> f32 {
    if -far > LIKELY { (near - far).clamp(0.0, MOST) } else { 0.0 }
}

/// Negative log-likelihoods of every token of a sequence but its first, given the [`NEAR`] or more tokens before it.
fn near_losses(decoder: &Decoder, sequence: &[u32]) -> Result<Vec<f32>> {
    let starts: Vec<usize> = (0..sequence.len()).step_by(NEAR).collect();
    let windows: Vec<Vec<u32>> = starts.iter().map(|s| sequence[s.saturating_sub(NEAR)..sequence.len().min(s + NEAR)].to_vec()).collect();
    let mut near = Vec::with_capacity(sequence.len());
    for range in pack::pack(&windows, TOKENS_AT_ONCE) {
        let spans: Vec<Span> = windows[range.clone()].iter().map(|w| Span::prompt(w.len())).collect();
        let found = losses(decoder, &windows[range.clone()].concat(), &spans)?;
        // a window's first half is context that the window before it has scored; the first window has none
        near.extend(found.into_iter().zip(range).flat_map(|(losses, window)| losses.into_iter().skip(if window == 0 { 0 } else { NEAR - 1 })));
    }
    Ok(near)
}

fn losses(decoder: &Decoder, tokens: &[u32], spans: &[Span]) -> Result<Vec<Vec<f32>>> {
    decoder.device().with_context(|| {
        let batch = decoder.batch(spans)?;
        loss::token_losses(decoder, &decoder.forward(tokens, &batch, &mut NoCache)?, tokens, spans)
    })
}

/// The weights of all packs for this share of the loss. Without a gain anywhere the other positions have all of it.
pub(crate) fn weigh(packs: Vec<Gains>, share: f64) -> Vec<KeyTokens> {
    let positions = packs.iter().map(|p| p.gains.len()).sum::<usize>() as f64;
    let sum: f64 = packs.iter().flat_map(|p| &p.gains).map(|g| f64::from(*g)).sum();
    let (others, a_nat) = if sum > 0.0 { (1.0 - share, share * positions / sum) } else { (1.0, 0.0) };
    let weighed =
        |pack: Gains| KeyTokens { others: others as f32, weights: pack.gains.iter().map(|gain| gain * a_nat as f32).collect(), dense: pack.log_likelihoods };
    packs.into_iter().map(weighed).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_has_sixteen_to_thirty_one_tokens_of_near_context() {
        let decoder = crate::testing::tiny();
        let sequence: Vec<u32> = (0..50).map(|i| i * 37 % 4_000).collect();
        let near = near_losses(&decoder, &sequence).unwrap();
        assert_eq!(near.len(), 49);
        let given = |first: usize, token: usize| *losses(&decoder, &sequence[first..=token], &[Span::prompt(token + 1 - first)]).unwrap()[0].last().unwrap();
        for (token, first) in [(1, 0), (15, 0), (16, 0), (31, 0), (32, 16), (47, 16), (48, 32), (49, 32)] {
            assert_eq!(near[token - 1].to_bits(), given(first, token).to_bits(), "token {token}");
        }
        // within the first two windows near is all there is
        assert_eq!(near_losses(&decoder, &sequence[..32]).unwrap(), losses(&decoder, &sequence[..32], &[Span::prompt(32)]).unwrap()[0]);
    }

    #[test]
    fn a_token_counts_the_nats_that_far_context_gives_it_up_to_five_if_the_model_gets_it_right() {
        assert_eq!(gain(1.0, 3.5), 2.5);
        assert_eq!(gain(0.25, 9.0), MOST);
        assert_eq!(gain(2.0, 1.5), 0.0, "the whole context was worse");
        assert_eq!(gain(3.5, 9.0), 0.0, "not right even so");
        assert_eq!(gain(f32::NAN, 1.0), 0.0);
    }

    #[test]
    fn key_tokens_have_their_share_by_what_they_gain() {
        let pack = |gains: &[f32]| Gains { gains: gains.to_vec(), log_likelihoods: vec![-1.0; gains.len()] };
        let found = weigh(vec![pack(&[3.0, 0.0, 0.0, 0.0, 0.0]), pack(&[0.0, 1.0, 0.0])], 0.25);
        // a quarter of 8 positions' loss is 2, which 4 nats share
        assert_eq!(found[0].weights, [1.5, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(found[1].weights, [0.0, 0.5, 0.0]);
        assert!(found.iter().all(|k| k.others == 0.75));
        let none = weigh(vec![pack(&[0.0; 4])], 0.25);
        assert!(none[0].others == 1.0 && none[0].weights == [0.0; 4]);
    }
}
