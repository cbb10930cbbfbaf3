//! Log-likelihoods of continuations: many requests a pass, logits only where a token is predicted.

use super::encode::Encoded;
use super::shared_prefix::Pack;
use crate::Result;
use evop_model::{Decoder, Tensor, kernels};
use rayon::prelude::*;

/// A pass has as many items as it takes to reach this number of tokens.
const TOKENS_AT_ONCE: usize = 2_048;
/// Logits held at once, in elements (64 MB of f32).
const LOGITS_ELEMENTS: usize = 16 << 20;

/// What the model makes of one continuation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Loglikelihood {
    /// Sum over the continuation's tokens, in nats.
    pub logprob: f64,
    /// Whether every token is the most likely one, as greedy decoding would choose.
    pub greedy: bool,
}

/// One token whose probability is asked for.
struct Target {
    /// Packed row that predicts it.
    row: u32,
    token: u32,
    /// Sequence of the pack.
    sequence: usize,
}

/// The log-likelihoods of every item's sequences. `progress` is called with the number of items done.
///
/// Packing has no padding, so items go in the order given.
pub(super) fn loglikelihoods(decoder: &Decoder, items: &[Vec<Encoded>], mut progress: impl FnMut(usize)) -> Result<Vec<Vec<Loglikelihood>>> {
    let mut results = Vec::with_capacity(items.len());
    while results.len() < items.len() {
        let mut pack = Pack::default();
        let mut end = results.len();
        while end < items.len() && pack.tokens.len() < TOKENS_AT_ONCE {
            pack.push(&items[end], decoder.config());
            end += 1;
        }
        let group = &items[results.len()..end];
        let scores = decoder.device().with_context(|| score(decoder, &pack, group))?;
        let mut scores = scores.into_iter();
        results.extend(group.iter().map(|item| scores.by_ref().take(item.len()).collect::<Vec<_>>()));
        progress(results.len());
    }
    Ok(results)
}

/// One pass: a result a sequence.
fn score(decoder: &Decoder, pack: &Pack, group: &[Vec<Encoded>]) -> Result<Vec<Loglikelihood>> {
    let hidden = pack.forward(decoder)?;
    let mut targets: Vec<Target> = Vec::new();
    for (sequence, (encoded, rows)) in group.iter().flatten().zip(&pack.sequences).enumerate() {
        let predicting = &rows[rows.len() - encoded.targets.len()..];
        targets.extend(predicting.iter().zip(&encoded.targets).map(|(row, token)| Target { row: *row, token: *token, sequence }));
    }
    // a row that predicts a token of several sequences gets its logits once; stable, so a sequence's tokens stay in order
    targets.sort_by_key(|t| t.row);
    let rows: Vec<&[Target]> = targets.chunk_by(|a, b| a.row == b.row).collect();
    let vocab = decoder.config().vocab_size;
    let mut results = vec![Loglikelihood { logprob: 0.0, greedy: true }; pack.sequences.len()];
    for rows in rows.chunks((LOGITS_ELEMENTS / vocab).max(1)) {
        let index = Tensor::new(rows.iter().map(|targets| targets[0].row).collect::<Vec<_>>(), decoder.device())?;
        let logits = decoder.logits(&hidden.index_select(&index, 0)?)?;
        let most = rows.iter().map(|targets| targets.len()).max().unwrap_or(1);
        // (as many of each row: the last again where a row has fewer)
        let ids: Vec<u32> = rows.iter().flat_map(|targets| (0..most).map(|i| targets[i.min(targets.len() - 1)].token)).collect();
        let log_probabilities = kernels::log_probabilities(&logits, &ids)?;
        let best = greedy_tokens(&logits)?;
        for ((targets, best), found) in rows.iter().zip(best).zip(log_probabilities.chunks(most)) {
            for (target, log_probability) in targets.iter().zip(found) {
                let result = &mut results[target.sequence];
                result.logprob += f64::from(*log_probability);
                result.greedy &= target.token == best;
            }
        }
    }
    Ok(results)
}

/// The first of the largest of every row.
fn greedy_tokens(logits: &Tensor) -> Result<Vec<u32>> {
    if !logits.device().is_cpu() {
        return Ok(logits.argmax(1)?.to_vec1()?);
    }
    let argmax = |row: &[f32]| {
        let best = row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best });
        best.0 as u32
    };
    Ok(kernels::with_slice(logits, |l| l.par_chunks(logits.dims()[1]).map(argmax).collect())?)
}
