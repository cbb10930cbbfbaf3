//! Key tokens: those that a model gets right because of what lies far back, such as a name that comes again. Found as LongPPL finds them (Fang et al. 2024,
//! arXiv 2410.23771, section 3.2): the model predicts them well, and much better with the whole sequence before them than with its last few tokens.
//!
//! They are a few per cent of running text. A search that minimises the plain mean gives up the sub-blocks that carry them for a little
//! gain everywhere else, and answers that hang on the context go first.

use crate::{Result, loss, pack};
use evop_model::{Decoder, NoCache, Span, Tensor};

/// Tokens of context that count as near: between this many and twice as many.
const NEAR: usize = 16;
/// Nats that the rest of the context has to be worth (LongPPL's alpha).
const GAIN: f32 = 2.0;
/// The worst log-likelihood with the whole context (LongPPL's beta).
const LIKELY: f32 = -2.0;
/// Tokens of windows that are computed together.
const TOKENS_AT_ONCE: usize = 2_048;

/// Which predicting positions of each packed span have a key token after them: `span.len - 1` flags a span. `hidden` [tokens, hidden] is the dense
/// model's residual stream after the last layer.
pub(crate) fn find(decoder: &Decoder, hidden: &Tensor, tokens: &[u32], spans: &[Span]) -> Result<Vec<Vec<bool>>> {
    let far = loss::token_losses(decoder, hidden, tokens, spans, None)?;
    let mut start = 0;
    let mut found = Vec::with_capacity(spans.len());
    for (span, far) in spans.iter().zip(far) {
        let near = near_losses(decoder, &tokens[start..start + span.len])?;
        found.push(far.iter().zip(near).map(|(far, near)| near - far > GAIN && -far > LIKELY).collect());
        start += span.len;
    }
    Ok(found)
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
        loss::token_losses(decoder, &decoder.forward(tokens, &batch, &mut NoCache)?, tokens, spans, None)
    })
}

/// Weights of mean 1 under which key tokens make up `share` of the mean loss, where all losses are equal. Without a key token all weights are 1.
pub(crate) fn weights(keys: &[Vec<Vec<bool>>], share: f64) -> Vec<Vec<Vec<f32>>> {
    let flags = || keys.iter().flatten().flatten();
    let (all, key) = (flags().count(), flags().filter(|k| **k).count());
    let (others, extra) = if key == 0 { (1.0, 0.0) } else { (1.0 - share, share * all as f64 / key as f64) };
    let weight = |key: &bool| (others + if *key { extra } else { 0.0 }) as f32;
    keys.iter().map(|pack| pack.iter().map(|span| span.iter().map(weight).collect()).collect()).collect()
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
        // within the first two windows near is all there is: nothing is gained from afar
        let spans = [Span::prompt(32)];
        let hidden = decoder.forward(&sequence[..32], &decoder.batch(&spans).unwrap(), &mut NoCache).unwrap();
        assert!(find(&decoder, &hidden, &sequence[..32], &spans).unwrap()[0].iter().all(|key| !key));
    }

    #[test]
    fn weights_keep_the_mean_and_give_key_tokens_their_share() {
        let keys = vec![vec![vec![true, false, false], vec![false, false]], vec![vec![false, true, false]]];
        let found = weights(&keys, 0.25);
        let flat = |w: &[Vec<Vec<f32>>]| w.iter().flatten().flatten().copied().collect::<Vec<f32>>();
        assert!((flat(&found).iter().sum::<f32>() / 8.0 - 1.0).abs() < 1e-6);
        // the two key positions have 3/4 of a plain mean's weight as all others do, and a quarter of the whole between them
        assert!((found[0][0][0] - (0.75 + 1.0)).abs() < 1e-6 && (found[0][0][1] - 0.75).abs() < 1e-6);
        assert!(flat(&weights(&[vec![vec![false; 4]]], 0.25)).iter().all(|w| *w == 1.0));
    }
}
