//! Perplexity of a text, as the field computes it.

use super::encode::is_space;
use crate::{Error, Result, loss, numbers};
use evop_model::{Decoder, NoCache, Span};
use serde::{Deserialize, Serialize};

/// Windows evaluated together, in tokens.
const TOKENS_AT_ONCE: usize = 2_048;

/// A perplexity with what it was computed on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// exp of the mean negative log-likelihood.
    #[serde(deserialize_with = "numbers::number")]
    pub perplexity: f64,
    /// Mean over all predicted tokens, in nats.
    #[serde(deserialize_with = "numbers::number")]
    pub mean_nll: f64,
    /// Tokens of a window.
    pub window: usize,
    /// Windows evaluated.
    pub windows: usize,
    /// Tokens predicted: windows x (window - 1).
    pub predicted_tokens: usize,
}

/// Non-overlapping windows of `window` tokens, what is left over dropped (a text shorter than a window is one short window);
/// mean negative log-likelihood over all predicted tokens.
///
/// `progress(done, all)` is called after each group of windows.
///
/// # Errors
/// [`Error::Corpus`] for fewer than two tokens; [`Error::Option`] for a window that the model can't hold.
pub fn perplexity(decoder: &Decoder, tokens: &[u32], window: usize, mut progress: impl FnMut(usize, usize)) -> Result<Perplexity> {
    let limit = decoder.config().max_position_embeddings;
    if window < 2 || window > limit {
        return Err(Error::option("--window", format!("expected 2 to {limit} (the model's context), found {window}")));
    }
    if tokens.len() < 2 {
        return Err(Error::Corpus(format!("expected at least 2 tokens of text to evaluate, found {}", tokens.len())));
    }
    let window = window.min(tokens.len());
    let windows: Vec<&[u32]> = tokens.chunks_exact(window).collect();
    let mut sum = 0.0;
    let mut done = 0;
    for group in windows.chunks((TOKENS_AT_ONCE / window).max(1)) {
        let spans = vec![Span::prompt(window); group.len()];
        let packed = group.concat();
        let losses = decoder.device().with_context(|| -> Result<_> {
            let batch = decoder.batch(&spans)?;
            let hidden = decoder.forward(&packed, &batch, &mut NoCache)?;
            loss::token_losses(decoder, &hidden, &packed, &spans)
        })?;
        sum += losses.iter().flatten().map(|l| f64::from(*l)).sum::<f64>();
        done += group.len();
        progress(done, windows.len());
    }
    let predicted_tokens = windows.len() * (window - 1);
    let mean_nll = sum / predicted_tokens as f64;
    Ok(Perplexity { perplexity: mean_nll.exp(), mean_nll, window, windows: windows.len(), predicted_tokens })
}

/// WikiText as papers on pruning and quantisation tokenise it: its rows (lines with their ends; a blank line is the empty row) joined by blank lines.
///
/// That is `"\n\n".join(dataset["text"])` over Hugging Face's `wikitext-2-raw-v1`. The result is tokenised as one sequence, with the special tokens that the
/// tokenizer adds, and cut into windows.
///
/// ```
/// assert_eq!(evop_pruning::eval::join_rows(" \n = Title = \n \n Text . \n"), "\n\n = Title = \n\n\n\n\n Text . \n");
/// ```
pub fn join_rows(text: &str) -> String {
    let rows: Vec<&str> = text.split_inclusive('\n').map(|row| if row.chars().all(is_space) { "" } else { row }).collect();
    rows.join("\n\n")
}
