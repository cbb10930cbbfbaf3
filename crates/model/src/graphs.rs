//! Steps that generate, recorded once and replayed: a GPU computes a small step faster than its launches can be made one by one.

use crate::{Elastic, PagedCache, Result, Span};

/// CUDA graphs of generating steps, by their size and form; recorded when a size is first asked for. There are none on a CPU, without candle-flash-attn, or
/// in f32: then every step is launched as it comes.
#[derive(Debug, Default)]
pub struct StepGraphs {
    #[cfg(feature = "flash-attn")]
    graphs: Option<crate::cuda::graphs::Graphs>,
}

impl StepGraphs {
    /// For steps of at most `rows` tokens of all sequences together, of any of the model's forms.
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when the device has no memory for their inputs and logits.
    pub fn new(model: &Elastic, rows: usize) -> Result<Self> {
        #[cfg(feature = "flash-attn")]
        return Ok(Self { graphs: crate::cuda::graphs::Graphs::new(model, rows)? });
        #[cfg(not(feature = "flash-attn"))]
        {
            let _ = (model, rows);
            Ok(Self::default())
        }
    }

    /// Whether steps are replayed at all.
    pub fn are_on(&self) -> bool {
        #[cfg(feature = "flash-attn")]
        return self.graphs.is_some();
        #[cfg(not(feature = "flash-attn"))]
        false
    }

    /// Logits after every token of a step in which all sequences go through one member, [tokens, vocab] one row after the other; `None` for a step that is
    /// too large, which is to be launched as it comes. Keys and values are written to the cache either way.
    ///
    /// # Errors
    /// [`crate::Error::Input`] for a token beyond the vocabulary or tables that don't hold the sequences; [`crate::Error::Candle`] of the device.
    pub fn logits(&mut self, member: usize, tokens: &[u32], spans: &[Span], cache: &mut PagedCache<'_>) -> Result<Option<&[f32]>> {
        #[cfg(feature = "flash-attn")]
        if let Some(graphs) = &mut self.graphs {
            return graphs.logits(member, tokens, spans, cache);
        }
        let _ = (member, tokens, spans, cache);
        Ok(None)
    }
}
