//! The decoder, run over the running sequences' scheduled tokens.

use crate::logprobs::token_logprobs;
use crate::sequence::Sequence;
use evop_model::{Decoder, Device, KvPool, Result, Span, Tensor};

/// Rows of logits that prompt scoring holds at a time: bounds memory for large vocabularies.
const PROMPT_LOGITS_ROWS: usize = 64;

/// Stands in for a model that fails.
#[cfg(test)]
pub(crate) type Fault = fn(&[u32]) -> Result<()>;

/// Owns the decoder and its keys and values; all of it happens on the engine's thread.
#[derive(Debug)]
pub(crate) struct ModelRunner {
    decoder: Decoder,
    pool: KvPool,
    /// Called before every forward pass with its tokens.
    #[cfg(test)]
    pub fault: Option<Fault>,
}

impl ModelRunner {
    /// With so many blocks of 32 tokens.
    pub fn new(decoder: Decoder, blocks: usize) -> Result<Self> {
        Ok(Self {
            pool: KvPool::new(decoder.config(), decoder.dtype(), decoder.device(), blocks)?,
            decoder,
            #[cfg(test)]
            fault: None,
        })
    }

    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// Blocks of the pool.
    pub fn blocks(&self) -> usize {
        self.pool.blocks()
    }

    pub fn device(&self) -> &Device {
        self.decoder.device()
    }

    /// One pass over what was scheduled; leaves in each sequence what was sampled for it and its prompt's log probabilities.
    pub fn step(&mut self, running: &mut [Sequence]) -> Result<()> {
        let mut scheduled: Vec<&mut Sequence> = running.iter_mut().filter(|s| s.scheduled > 0).collect();
        let hidden = self.forward(&scheduled)?;
        let mut sampling_rows = Vec::new();
        let mut start = 0;
        for sequence in &mut scheduled {
            if let Some(top) = sequence.prompt_logprobs_wanted() {
                self.score_prompt(sequence, &hidden, start, top)?;
            }
            start += sequence.scheduled;
            if sequence.samples() {
                sampling_rows.push(start as u32 - 1);
            }
        }
        if sampling_rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(sampling_rows, self.device())?;
        let logits = self.logits(&hidden.index_select(&rows, 0)?)?;
        let sampling = scheduled.into_iter().filter(|s| s.samples());
        for (sequence, row) in sampling.zip(logits.chunks_exact(self.decoder.config().vocab_size)) {
            sequence.sampled = Some(sequence.sampler.sample(row));
        }
        Ok(())
    }

    /// [tokens, hidden_size], the sequences packed one after the other.
    fn forward(&mut self, scheduled: &[&mut Sequence]) -> Result<Tensor> {
        let tokens: Vec<u32> = scheduled.iter().flat_map(|s| s.scheduled_tokens()).copied().collect();
        #[cfg(test)]
        if let Some(fault) = self.fault {
            fault(&tokens)?;
        }
        let spans: Vec<Span> = scheduled.iter().map(|s| s.span()).collect();
        let batch = self.decoder.batch(&spans)?;
        let mut cache = self.pool.paged(scheduled.iter().map(|s| s.table.as_slice()).collect());
        self.decoder.forward(&tokens, &batch, &mut cache)
    }

    /// [rows, hidden_size] -> rows x vocab_size on the host.
    fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        Ok(self.decoder.logits(hidden)?.flatten_all()?.to_vec1()?)
    }

    /// Log probabilities of the prompt tokens that follow this step's tokens; `start` is the sequence's first row in `hidden`.
    fn score_prompt(&self, sequence: &mut Sequence, hidden: &Tensor, start: usize, top: usize) -> Result<()> {
        if sequence.computed == 0 {
            // nothing comes before the first token
            sequence.prompt_logprobs.push(None);
        }
        let first = sequence.computed + 1;
        let last = sequence.group.prompt.len().min(sequence.computed + sequence.scheduled + 1);
        let mut row = start;
        for block in sequence.group.prompt[first..last].chunks(PROMPT_LOGITS_ROWS) {
            let logits = self.logits(&hidden.narrow(0, row, block.len())?)?;
            for (id, logits) in block.iter().zip(logits.chunks_exact(self.decoder.config().vocab_size)) {
                sequence.prompt_logprobs.push(Some(token_logprobs(logits, *id, top)));
            }
            row += block.len();
        }
        Ok(())
    }
}
