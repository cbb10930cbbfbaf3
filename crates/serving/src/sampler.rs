//! From a row of logits to a token, on the host.
//!
//! The order is vLLM's: logit bias, allowed ids and the end-of-sequence mask of `min_tokens`; repetition, presence and frequency penalties;
//! temperature; min-p; top-k and top-p; the draw. One draw a token from the sequence's own generator, so that a seed gives
//! the same tokens whatever else is in the batch.

use crate::logprobs::{argmax, token_logprobs};
use crate::output::TokenLogprobs;
use crate::params::SamplingParams;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

/// Below this a temperature is greedy (the division would overflow).
const GREEDY_TEMPERATURE: f32 = 1e-5;

/// A token and, if asked for, its log probabilities.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampled {
    pub id: u32,
    pub logprobs: Option<TokenLogprobs>,
}

/// One sequence's parameters, generator and memory of its own tokens.
#[derive(Debug)]
pub(crate) struct Sampler {
    params: Arc<SamplingParams>,
    rng: ChaCha12Rng,
    /// Tokens that may not come before `min_tokens`.
    enders: Vec<u32>,
    /// The prompt's tokens, kept only if there is a repetition penalty.
    in_prompt: HashSet<u32>,
    /// How often each token was made.
    counts: HashMap<u32, u32>,
    made: usize,
}

/// A token that can still be drawn.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
    /// Proportional to its probability; the best candidate's is 1.
    weight: f64,
}

/// Best first, the lowest id first on ties: a total order, so that cutting by it is reproducible.
fn best_first(a: &Candidate, b: &Candidate) -> Ordering {
    b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
}

impl Sampler {
    pub fn new(params: Arc<SamplingParams>, prompt: &[u32], eos: &[u32], choice: usize) -> Self {
        let mut rng = params.seed.map_or_else(ChaCha12Rng::from_os_rng, ChaCha12Rng::seed_from_u64);
        rng.set_stream(choice as u64);
        let mut enders = params.stop_token_ids.clone();
        if !params.ignore_eos {
            enders.extend(eos);
        }
        let in_prompt = if params.repetition_penalty == 1.0 { HashSet::new() } else { prompt.iter().copied().collect() };
        Self { params, rng, enders, in_prompt, counts: HashMap::new(), made: 0 }
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// When the logits and the parameters leave nothing to choose.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, String> {
        let id = if self.is_plain_greedy() {
            argmax(logits)
        } else {
            let mut adjusted = logits.to_vec();
            self.constrain(&mut adjusted);
            self.penalise(&mut adjusted);
            if self.params.temperature < GREEDY_TEMPERATURE { argmax(&adjusted) } else { self.draw(&adjusted) }
        };
        let id = id.ok_or("no token can be sampled: every one is excluded by allowed_token_ids and min_tokens, or the model's logits are not numbers")?;
        *self.counts.entry(id).or_default() += 1;
        self.made += 1;
        let logprobs = self.params.logprobs.map(|top| token_logprobs(logits, id, top));
        Ok(Sampled { id, logprobs })
    }

    /// Nothing but the temperature is set, and that to zero.
    fn is_plain_greedy(&self) -> bool {
        let p = &self.params;
        p.temperature < GREEDY_TEMPERATURE
            && p.logit_bias.is_empty()
            && p.allowed_token_ids.is_none()
            && self.made >= p.min_tokens
            && p.repetition_penalty == 1.0
            && p.presence_penalty == 0.0
            && p.frequency_penalty == 0.0
    }

    fn constrain(&self, logits: &mut [f32]) {
        for (id, bias) in &self.params.logit_bias {
            logits[*id as usize] += bias;
        }
        if let Some(allowed) = &self.params.allowed_token_ids {
            let kept: Vec<(u32, f32)> = allowed.iter().map(|id| (*id, logits[*id as usize])).collect();
            logits.fill(f32::NEG_INFINITY);
            for (id, logit) in kept {
                logits[id as usize] = logit;
            }
        }
        if self.made < self.params.min_tokens {
            for id in &self.enders {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    fn penalise(&self, logits: &mut [f32]) {
        let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = *self.params;
        if repetition_penalty != 1.0 {
            let only_in_output = self.counts.keys().filter(|id| !self.in_prompt.contains(id));
            for id in self.in_prompt.iter().chain(only_in_output) {
                let logit = &mut logits[*id as usize];
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            }
        }
        for (id, count) in &self.counts {
            logits[*id as usize] -= presence_penalty + frequency_penalty * *count as f32;
        }
    }

    fn draw(&mut self, logits: &[f32]) -> Option<u32> {
        let best = argmax(logits)?;
        let max = logits[best as usize];
        if max == f32::INFINITY {
            return Some(best);
        }
        let candidate = |(id, &logit): (usize, &f32)| Candidate { id: id as u32, logit, weight: 0.0 };
        let mut candidates: Vec<Candidate> = logits.iter().enumerate().filter(|(_, l)| **l > f32::NEG_INFINITY).map(candidate).collect();
        // min-p, top-k and top-p each keep the best few in the same order, so cutting to k first changes nothing but the work
        let top_k = self.params.top_k;
        if top_k > 0 && top_k < candidates.len() {
            candidates.select_nth_unstable_by(top_k - 1, best_first);
            candidates.truncate(top_k);
            candidates.sort_unstable_by(best_first);
        }
        for c in &mut candidates {
            c.weight = f64::from((c.logit - max) / self.params.temperature).exp();
        }
        let min_p = f64::from(self.params.min_p);
        candidates.retain(|c| c.weight >= min_p);
        if self.params.top_p < 1.0 {
            cut_to_nucleus(&mut candidates, f64::from(self.params.top_p));
        }
        let total: f64 = candidates.iter().map(|c| c.weight).sum();
        let mut left = self.rng.random::<f64>() * total;
        for c in &candidates {
            left -= c.weight;
            if left < 0.0 {
                return Some(c.id);
            }
        }
        Some(best)
    }
}

/// Keeps the smallest set of the best candidates that has `top_p` of their probability, sorting no more of them than it takes.
fn cut_to_nucleus(candidates: &mut Vec<Candidate>, top_p: f64) {
    let wanted = top_p * candidates.iter().map(|c| c.weight).sum::<f64>();
    let (mut sorted, mut block, mut sum) = (0, 64, 0.0);
    while sorted < candidates.len() {
        let end = candidates.len().min(sorted + block);
        if end < candidates.len() {
            candidates[sorted..].select_nth_unstable_by(end - sorted, best_first);
        }
        candidates[sorted..end].sort_unstable_by(best_first);
        for i in sorted..end {
            sum += candidates[i].weight;
            if sum >= wanted {
                candidates.truncate(i + 1);
                return;
            }
        }
        (sorted, block) = (end, block * 4);
    }
}
