//! From a row of logits to a token, on the host.
//!
//! The order is vLLM's: logit bias, allowed ids, bad words, the grammar and the end-of-sequence mask of `min_tokens`; repetition, presence and frequency penalties;
//! temperature; min-p; top-k and top-p; the draw. One draw a token from the sequence's own generator, so that a seed gives
//! the same tokens whatever else is in the batch.

use crate::grammar::{GrammarState, TokenMask};
use crate::logprobs::{argmax, token_logprobs};
use crate::output::TokenLogprobs;
use crate::params::SamplingParams;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;
use std::cmp::Ordering;
use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;

/// Below this a temperature is greedy (the division would overflow).
const GREEDY_TEMPERATURE: f32 = 1e-5;

/// A token and, if asked for, its log probabilities.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sampled {
    pub id: u32,
    pub logprobs: Option<TokenLogprobs>,
    /// Its grammar allows nothing after it.
    pub completes: bool,
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
    /// The last tokens that were made, as many as the longest of `bad_words` has before its last.
    tail: VecDeque<u32>,
    /// Where the output stands in its grammar.
    grammar: Option<GrammarState>,
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
        let grammar = params.grammar.as_ref().map(GrammarState::begin);
        Self { params, rng, enders, in_prompt, counts: HashMap::new(), made: 0, tail: VecDeque::new(), grammar }
    }

    /// One that would choose the same, for guesses that leave no trace. Only without a grammar.
    pub fn guessing(&self) -> Option<Self> {
        let Self { params, rng, enders, in_prompt, counts, made, tail, grammar } = self;
        let guessing = || Self {
            params: Arc::clone(params),
            rng: rng.clone(),
            enders: enders.clone(),
            in_prompt: in_prompt.clone(),
            counts: counts.clone(),
            made: *made,
            tail: tail.clone(),
            grammar: None,
        };
        grammar.is_none().then(guessing)
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// When the logits and the parameters leave nothing to choose.
    pub fn sample(&mut self, logits: &[f32]) -> Result<Sampled, String> {
        let mask = self.grammar.as_mut().map(GrammarState::allowed).transpose()?;
        let id = if mask.is_none() && self.is_plain_greedy() {
            argmax(logits)
        } else {
            let mut adjusted = logits.to_vec();
            self.constrain(&mut adjusted, mask.as_ref());
            self.penalise(&mut adjusted);
            if self.params.temperature < GREEDY_TEMPERATURE { argmax(&adjusted) } else { self.draw(&adjusted) }
        };
        let id = id.ok_or(
            "no token can be sampled: every one is excluded by allowed_token_ids, bad_words, min_tokens and the grammar, or the model's logits are not numbers",
        )?;
        *self.counts.entry(id).or_default() += 1;
        self.made += 1;
        self.remember(id);
        let completes = self.grammar.as_mut().map_or(Ok(false), |grammar| grammar.advance(id))?;
        let logprobs = self.params.logprobs.map(|top| token_logprobs(logits, id, top));
        Ok(Sampled { id, logprobs, completes })
    }

    /// Nothing but the temperature is set, and that to zero.
    fn is_plain_greedy(&self) -> bool {
        let p = &self.params;
        p.temperature < GREEDY_TEMPERATURE
            && p.logit_bias.is_empty()
            && p.allowed_token_ids.is_none()
            && p.bad_words.is_empty()
            && self.made >= p.min_tokens
            && p.repetition_penalty == 1.0
            && p.presence_penalty == 0.0
            && p.frequency_penalty == 0.0
    }

    fn constrain(&self, logits: &mut [f32], mask: Option<&TokenMask>) {
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
        for word in &self.params.bad_words {
            if let Some((last, before)) = word.split_last()
                && before.len() <= self.tail.len()
                && self.tail.range(self.tail.len() - before.len()..).eq(before)
            {
                logits[*last as usize] = f32::NEG_INFINITY;
            }
        }
        if let Some(mask) = mask {
            mask.apply(logits);
        }
        // a grammar at its end leaves nothing else to sample
        if self.made < self.params.min_tokens && mask.is_none_or(|mask| mask.allows_more_than(&self.enders)) {
            for id in &self.enders {
                if let Some(logit) = logits.get_mut(*id as usize) {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// Keeps a token for as long as a bad word may need it.
    fn remember(&mut self, id: u32) {
        let longest = self.params.bad_words.iter().map(|word| word.len() - 1).max().unwrap_or(0);
        if longest > 0 {
            self.tail.push_back(id);
            self.tail.drain(..self.tail.len().saturating_sub(longest));
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sampler(params: SamplingParams) -> Sampler {
        Sampler::new(Arc::new(params), &[0, 1], &[5], 0)
    }

    fn seeded() -> SamplingParams {
        SamplingParams { seed: Some(7), max_tokens: 1000, ..SamplingParams::default() }
    }

    fn greedy() -> SamplingParams {
        SamplingParams { temperature: 0.0, ..seeded() }
    }

    fn draws(params: SamplingParams, logits: &[f32], count: usize) -> Vec<u32> {
        let mut sampler = sampler(params);
        (0..count).map(|_| sampler.sample(logits).unwrap().id).collect()
    }

    #[test]
    fn temperature_zero_takes_the_best_and_the_lowest_id_of_equals() {
        assert_eq!(draws(greedy(), &[0.0, 2.0, 2.0], 3), [1, 1, 1]);
    }

    #[test]
    fn draws_follow_the_distribution() {
        let logits = [1.0_f32.ln(), 2.0_f32.ln(), 5.0_f32.ln()];
        let found = draws(seeded(), &logits, 4000);
        for (id, expected) in [(0, 0.125), (1, 0.25), (2, 0.625)] {
            let share = found.iter().filter(|d| **d == id).count() as f64 / 4000.0;
            assert!((share - expected).abs() < 0.03, "{id}: {share}");
        }
    }

    #[test]
    fn a_seed_and_a_choice_fix_the_draws() {
        let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32).collect();
        assert_eq!(draws(seeded(), &logits, 20), draws(seeded(), &logits, 20));
        let mut other = Sampler::new(Arc::new(seeded()), &[], &[], 1);
        let others: Vec<u32> = (0..20).map(|_| other.sample(&logits).unwrap().id).collect();
        assert_ne!(draws(seeded(), &logits, 20), others);
        let unseeded = || draws(SamplingParams { seed: None, ..seeded() }, &logits, 20);
        assert_ne!(unseeded(), unseeded());
    }

    #[test]
    fn bias_and_allowed_ids_decide_what_can_be_sampled() {
        let logits = [0.0, 1.0, 2.0];
        assert_eq!(draws(SamplingParams { logit_bias: vec![(0, 100.0)], ..greedy() }, &logits, 1), [0]);
        assert_eq!(draws(SamplingParams { allowed_token_ids: Some(vec![0, 1]), ..greedy() }, &logits, 1), [1]);
        assert!(draws(SamplingParams { allowed_token_ids: Some(vec![0, 2]), ..seeded() }, &logits, 50).iter().all(|id| *id != 1));
    }

    #[test]
    fn a_bad_word_is_cut_before_its_last_token_and_no_other() {
        let logits = [0.0, 2.0, 1.0];
        let banned = |bad_words| SamplingParams { bad_words, ..greedy() };
        assert_eq!(draws(banned(vec![vec![1]]), &logits, 3), [2, 2, 2]);
        assert_eq!(draws(banned(vec![vec![1, 1]]), &logits, 5), [1, 2, 1, 2, 1]);
        assert_eq!(draws(banned(vec![vec![1, 1, 1], vec![1, 2]]), &logits, 6), [1, 1, 0, 1, 1, 0]);
    }

    #[test]
    fn nothing_that_ends_the_text_comes_before_min_tokens() {
        let logits = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0];
        let params = SamplingParams { min_tokens: 2, stop_token_ids: vec![4], ..greedy() };
        assert_eq!(draws(params.clone(), &logits, 3), [3, 3, 5]);
        assert_eq!(draws(SamplingParams { ignore_eos: true, ..params }, &logits, 1), [5]);
    }

    #[test]
    fn penalties_are_those_of_their_definitions() {
        let repetition = SamplingParams { repetition_penalty: 2.0, ..greedy() };
        // tokens 0 and 1 stand in the prompt: 4 / 2 and -1 * 2
        assert_eq!(draws(repetition.clone(), &[4.0, -1.0, 2.5, 0.0], 1), [2]);
        assert_eq!(draws(repetition.clone(), &[-9.0, -1.0, -1.5, -9.0], 1), [2]);
        // and then token 2 in the output: 2.5 / 2
        assert_eq!(draws(repetition, &[4.0, -1.0, 2.5, 0.0], 2), [2, 0]);
        // presence: once, however often; the prompt doesn't count
        assert_eq!(draws(SamplingParams { presence_penalty: 1.0, ..greedy() }, &[3.0, 2.5], 4), [0, 1, 0, 0]);
        // frequency: 3.0, 2.5, 2.0, … against 2.2, 1.7, …
        assert_eq!(draws(SamplingParams { frequency_penalty: 0.5, ..greedy() }, &[3.0, 2.2], 4), [0, 0, 1, 0]);
    }

    #[test]
    fn logprobs_are_those_of_the_untouched_logits() {
        let logits = [0.0, 0.0];
        let mut sampler = sampler(SamplingParams { logit_bias: vec![(1, 50.0)], logprobs: Some(1), temperature: 0.5, ..seeded() });
        let logprobs = sampler.sample(&logits).unwrap().logprobs.unwrap();
        assert_eq!(logprobs.token.id, 1);
        assert!((logprobs.token.logprob - 0.5_f32.ln()).abs() < 1e-6);
        assert_eq!(logprobs.top[0].id, 0);
    }

    #[test]
    fn nothing_left_to_sample_is_an_error_and_not_a_panic() {
        assert!(sampler(SamplingParams { allowed_token_ids: Some(vec![5]), min_tokens: 1, ..seeded() }).sample(&[0.0; 6]).is_err());
        assert!(sampler(greedy()).sample(&[f32::NAN; 6]).is_err());
        assert!(sampler(seeded()).sample(&[f32::NAN; 6]).is_err());
        assert_eq!(draws(seeded(), &[0.0, f32::INFINITY], 3), [1, 1, 1]);
        assert_eq!(draws(seeded(), &[f32::NAN, 0.0], 3), [1, 1, 1]);
    }

    /// The set that may be drawn, by sorting everything.
    fn naive_support(logits: &[f32], params: &SamplingParams) -> Vec<u32> {
        let mut sorted: Vec<(u32, f64)> = logits.iter().enumerate().map(|(i, l)| (i as u32, f64::from(*l / params.temperature))).collect();
        sorted.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let best = sorted[0].1;
        sorted.retain(|(_, l)| (l - best).exp() >= f64::from(params.min_p));
        if params.top_k > 0 {
            sorted.truncate(params.top_k);
        }
        let total: f64 = sorted.iter().map(|(_, l)| (l - best).exp()).sum();
        let mut sum = 0.0;
        sorted.retain(|(_, l)| {
            let inside = sum < f64::from(params.top_p) * total;
            sum += (l - best).exp();
            inside
        });
        let mut ids: Vec<u32> = sorted.iter().map(|(id, _)| *id).collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn top_k_top_p_and_min_p_leave_what_their_definitions_leave(
            logits in prop::collection::vec(-20..20_i32, 1..300),
            temperature in prop::sample::select(vec![0.5_f32, 1.0, 1.7]),
            top_k in 0..20_usize,
            top_p in prop::sample::select(vec![0.1_f32, 0.5, 0.77, 0.93, 1.0]),
            min_p in prop::sample::select(vec![0.0_f32, 0.013, 0.17, 0.9]),
            seed: u64,
        ) {
            let logits: Vec<f32> = logits.iter().map(|l| *l as f32 / 5.0).collect();
            let params = SamplingParams { temperature, top_k, top_p, min_p, seed: Some(seed), ..SamplingParams::default() };
            let support = naive_support(&logits, &params);
            let mut found = draws(params, &logits, 200);
            prop_assert!(found.iter().all(|id| support.contains(id)));
            found.sort_unstable();
            found.dedup();
            // whatever has a tenth of the probability comes in 200 draws
            let weight = |id: &u32| f64::from(logits[*id as usize] / temperature).exp();
            let total: f64 = support.iter().map(weight).sum();
            prop_assert!(support.iter().all(|id| weight(id) < 0.1 * total || found.contains(id)));
        }
    }
}
