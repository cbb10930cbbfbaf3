//! The decoder, run over the running sequences' scheduled tokens.

use crate::logprobs::token_logprobs;
use crate::sampler::Sampler;
use crate::sequence::Sequence;
use evop_model::{DType, Decoder, Device, Elastic, KvPool, Result, Span, StepGraphs, Tensor};

/// Rows of logits that prompt scoring holds at a time: bounds memory for large vocabularies.
const PROMPT_LOGITS_ROWS: usize = 64;

/// Stands in for a model that fails.
#[cfg(test)]
pub(crate) type Fault = fn(&[u32]) -> Result<()>;

/// Owns the model and its keys and values; all of it happens on the engine's thread.
#[derive(Debug)]
pub(crate) struct ModelRunner {
    /// (dropped before what they use)
    graphs: StepGraphs,
    model: Elastic,
    pool: KvPool,
    /// The member that drafts.
    drafter: usize,
    /// Called before every forward pass with its tokens.
    #[cfg(test)]
    pub fault: Option<Fault>,
}

impl ModelRunner {
    /// With so many blocks of 32 tokens, their keys and values held in `kv_dtype`. Steps that generate are replayed up to so many rows, where the device can.
    pub fn new(model: Elastic, blocks: usize, kv_dtype: DType, drafter: usize, graph_rows: usize) -> Result<Self> {
        let decoder = model.parent();
        Ok(Self {
            graphs: if graph_rows > 0 { StepGraphs::new(&model, graph_rows)? } else { StepGraphs::default() },
            pool: KvPool::new(decoder.config(), kv_dtype, decoder.device(), blocks)?,
            model,
            drafter,
            #[cfg(test)]
            fault: None,
        })
    }

    /// The whole model.
    pub fn decoder(&self) -> &Decoder {
        self.model.parent()
    }

    /// The forms of the model that there are.
    pub fn members(&self) -> usize {
        self.model.len()
    }

    /// Blocks of the pool.
    pub fn blocks(&self) -> usize {
        self.pool.blocks()
    }

    pub fn device(&self) -> &Device {
        self.decoder().device()
    }

    /// One pass over what was scheduled, after the passes that draft; leaves in each sequence what was sampled for it and its prompt's log probabilities.
    pub fn step(&mut self, running: &mut [Sequence]) -> Result<()> {
        let mut scheduled: Vec<&mut Sequence> = running.iter_mut().filter(|s| s.scheduled > 0).collect();
        // those of one form side by side
        scheduled.sort_by_key(|s| s.group.member);
        self.draft(&mut scheduled)?;
        let members: Vec<usize> = scheduled.iter().map(|s| s.group.member).collect();
        let spans: Vec<Span> = scheduled.iter().map(|s| s.span()).collect();
        let tokens: Vec<u32> = scheduled.iter().flat_map(|s| s.scheduled_tokens()).collect();
        let tables: Vec<&[u32]> = scheduled.iter().map(|s| s.table.as_slice()).collect();
        let vocab = self.decoder().config().vocab_size;
        // after every token one is sampled: what drafts and what was generated before
        if scheduled.iter().all(|s| s.samples() && s.scheduled == 1 && s.prompt_logprobs_wanted().is_none())
            && let Some(logits) = self.replay(&tokens, &spans, &members, &tables)?
        {
            sample(scheduled, logits, vocab);
            return Ok(());
        }
        let hidden = self.forward(&tokens, &spans, &members, tables)?;
        let mut sampling_rows = Vec::new();
        let mut start = 0;
        for (sequence, span) in scheduled.iter_mut().zip(&spans) {
            if let Some(top) = sequence.prompt_logprobs_wanted() {
                self.score_prompt(sequence, &hidden, start, top)?;
            }
            if sequence.samples() {
                // after its last token, and after every draft
                sampling_rows.extend((start + sequence.scheduled - 1) as u32..(start + span.len) as u32);
            }
            start += span.len;
        }
        if sampling_rows.is_empty() {
            return Ok(());
        }
        let rows = Tensor::new(sampling_rows, self.device())?;
        let logits = self.logits(&hidden.index_select(&rows, 0)?)?;
        sample(scheduled, &logits, vocab);
        Ok(())
    }

    /// Lets the drafter guess what comes next, one pass a token. Its keys and values stand where the whole model puts its own afterwards.
    fn draft(&mut self, scheduled: &mut [&mut Sequence]) -> Result<()> {
        let mut samplers: Vec<Option<Sampler>> = scheduled.iter().map(|s| if s.drafting > 0 { s.sampler.guessing() } else { None }).collect();
        loop {
            let mut guessing: Vec<(&mut &mut Sequence, &mut Sampler)> = scheduled
                .iter_mut()
                .zip(&mut samplers)
                .filter(|(s, _)| s.drafts.len() < s.drafting)
                .filter_map(|(s, sampler)| Some((s, sampler.as_mut()?)))
                .collect();
            if guessing.is_empty() {
                return Ok(());
            }
            let spans: Vec<Span> = guessing.iter().map(|(s, _)| Span { past: s.computed + s.drafts.len(), len: 1 }).collect();
            let tokens: Vec<u32> = guessing.iter().filter_map(|(s, _)| s.scheduled_tokens().last()).collect();
            let tables: Vec<&[u32]> = guessing.iter().map(|(s, _)| s.table.as_slice()).collect();
            let (members, vocab) = (vec![self.drafter; spans.len()], self.decoder().config().vocab_size);
            let launched;
            let logits = match self.replay(&tokens, &spans, &members, &tables)? {
                Some(logits) => logits,
                None => {
                    let hidden = self.forward(&tokens, &spans, &members, tables)?;
                    launched = self.logits(&hidden)?;
                    &launched
                }
            };
            for ((sequence, sampler), row) in guessing.iter_mut().zip(logits.chunks_exact(vocab)) {
                match sampler.sample(row) {
                    Ok(guess) => sequence.drafts.push(guess.id),
                    // the whole model will say what is wrong, if it is
                    Err(_) => sequence.drafting = sequence.drafts.len(),
                }
            }
        }
    }

    /// Logits after every token of a step of one member, by a recorded pass; `None` where there is none for it.
    fn replay(&mut self, tokens: &[u32], spans: &[Span], members: &[usize], tables: &[&[u32]]) -> Result<Option<&[f32]>> {
        let Some(member) = members.first().filter(|first| self.graphs.are_on() && members.iter().all(|m| m == *first)) else { return Ok(None) };
        self.graphs.logits(*member, tokens, spans, &mut self.pool.paged(tables.to_vec()))
    }

    /// [tokens, hidden_size], the sequences packed one after the other, each through its member and over its blocks.
    fn forward(&mut self, tokens: &[u32], spans: &[Span], members: &[usize], tables: Vec<&[u32]>) -> Result<Tensor> {
        #[cfg(test)]
        if let Some(fault) = self.fault {
            fault(tokens)?;
        }
        let batch = self.model.parent().batch(spans)?;
        let mut cache = self.pool.paged(tables);
        self.model.forward(tokens, &batch, members, &mut cache)
    }

    /// [rows, hidden_size] -> rows x vocab_size on the host.
    fn logits(&self, hidden: &Tensor) -> Result<Vec<f32>> {
        Ok(self.decoder().logits(hidden)?.flatten_all()?.to_vec1()?)
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
            for (id, logits) in block.iter().zip(logits.chunks_exact(self.decoder().config().vocab_size)) {
                sequence.prompt_logprobs.push(Some(token_logprobs(logits, *id, top)));
            }
            row += block.len();
        }
        Ok(())
    }
}

/// Samples for the sequences that wait for it, out of their logits one row after the other.
fn sample(scheduled: Vec<&mut Sequence>, logits: &[f32], vocab: usize) {
    let mut left = logits;
    for sequence in scheduled.into_iter().filter(|s| s.samples()) {
        let (own, others) = left.split_at((1 + sequence.drafts.len()) * vocab);
        check(sequence, own.chunks_exact(vocab));
        left = others;
    }
}

/// Samples after a sequence's last token, and after its drafts for as long as they are what was sampled.
fn check<'l>(sequence: &mut Sequence, rows: impl Iterator<Item = &'l [f32]>) {
    for (place, row) in rows.enumerate() {
        let sampled = sequence.sampler.sample(row);
        let right = matches!((&sampled, sequence.drafts.get(place)), (Ok(sampled), Some(draft)) if sampled.id == *draft);
        sequence.sampled.push(sampled);
        if !right {
            return;
        }
    }
}
