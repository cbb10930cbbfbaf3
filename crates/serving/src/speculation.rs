//! How many tokens to draft. A thinner form of the model guesses what comes next, the whole model checks all guesses in one pass (Leviathan et al. 2023,
//! arXiv 2211.17192): what comes out is what it would have made alone, so the only question is what is fastest.
//!
//! That depends on the machine, the batch and the text, so it is measured: of every number of drafts the tokens a second that it has brought lately, for
//! each size of batch. The best is used; now and then a neighbour of it is tried, so that a change is noticed.

use std::collections::HashMap;
use std::time::Duration;

/// Steps in which every number of drafts is tried before one is preferred.
const TRIALS: u32 = 3;
/// One step in so many tries a neighbour of the best.
const TRY_EVERY: u64 = 64;
/// What a new measurement counts against the ones before it.
const NEWEST: f64 = 0.1;
/// Drafting has to be so much faster than going without, or it isn't worth the noise of measuring.
const WORTH: f64 = 1.02;

/// Who drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// The member of the [`evop_model::Elastic`] model that guesses.
    pub member: usize,
    /// Tokens that it guesses at most before the whole model checks them.
    pub most: usize,
}

/// Chooses the number of drafts for the next step.
#[derive(Debug)]
pub(crate) struct Drafting {
    most: usize,
    /// By sequences in the batch, to the next power of two: of every number of drafts.
    rates: HashMap<usize, Vec<Rate>>,
    steps: u64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Rate {
    tokens_a_second: f64,
    seen: u32,
}

impl Drafting {
    pub fn new(most: usize) -> Self {
        Self { most, rates: HashMap::new(), steps: 0 }
    }

    /// Drafts a sequence for a step of so many sequences that all decode.
    pub fn choose(&mut self, sequences: usize) -> usize {
        self.steps += 1;
        let rates = self.rates.entry(sequences.next_power_of_two()).or_insert_with(|| vec![Rate::default(); self.most + 1]);
        if let Some(untried) = rates.iter().position(|rate| rate.seen < TRIALS) {
            return untried;
        }
        let by_rate = |a: &usize, b: &usize| rates[*a].tokens_a_second.total_cmp(&rates[*b].tokens_a_second);
        let fastest = (1..rates.len()).max_by(by_rate).filter(|k| rates[*k].tokens_a_second > WORTH * rates[0].tokens_a_second);
        let best = fastest.unwrap_or(0);
        if !self.steps.is_multiple_of(TRY_EVERY) {
            return best;
        }
        // in turns: one fewer, one more, none
        match self.steps / TRY_EVERY % 3 {
            0 => best.saturating_sub(1),
            1 => (best + 1).min(self.most),
            _ => 0,
        }
    }

    /// What came of it.
    pub fn observe(&mut self, sequences: usize, drafts: usize, tokens: usize, elapsed: Duration) {
        let Some(rate) = self.rates.get_mut(&sequences.next_power_of_two()).and_then(|rates| rates.get_mut(drafts)) else { return };
        let now = tokens as f64 / sequences as f64 / elapsed.as_secs_f64().max(1e-9);
        rate.tokens_a_second = if rate.seen == 0 { now } else { (1.0 - NEWEST) * rate.tokens_a_second + NEWEST * now };
        rate.seen = rate.seen.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    /// Tokens a second against going without, over so many steps of one sequence. Drafts are right with probability `agreement` each; one costs `cost` of
    /// a step of the whole model, checking one more token `check`.
    fn speed_up(agreement: f64, cost: f64, check: f64, steps: usize) -> f64 {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut drafting = Drafting::new(6);
        let (mut tokens, mut time) = (0, 0.0);
        for _ in 0..steps {
            let drafts = drafting.choose(1);
            let made = 1 + (0..drafts).take_while(|_| rng.random_bool(agreement)).count();
            let elapsed = (1.0 + drafts as f64 * (cost + check)) * rng.random_range(0.9..1.1);
            drafting.observe(1, drafts, made, Duration::from_secs_f64(elapsed));
            (tokens, time) = (tokens + made, time + elapsed);
        }
        tokens as f64 / time
    }

    #[test]
    fn a_good_cheap_draft_is_used_to_its_best() {
        // k = 4: (1 - 0.8^5) / 0.2 = 3.36 tokens for 1.6 steps
        assert!(speed_up(0.8, 0.1, 0.05, 3_000) > 1.9);
    }

    #[test]
    fn a_bad_or_dear_draft_costs_next_to_nothing() {
        for (agreement, cost, check) in [(0.3, 0.5, 0.2), (0.8, 1.0, 0.5), (0.0, 0.1, 0.0)] {
            let found = speed_up(agreement, cost, check, 5_000);
            assert!(found > 0.97, "{found} at {agreement}, {cost}, {check}");
        }
    }

    #[test]
    fn batches_of_another_size_are_measured_anew() {
        let mut drafting = Drafting::new(2);
        for drafts in [0, 0, 0, 1, 1, 1, 2, 2, 2] {
            assert_eq!(drafting.choose(1), drafts);
            drafting.observe(1, drafts, 1 + drafts, Duration::from_millis(10));
        }
        assert_eq!(drafting.choose(1), 2);
        assert_eq!(drafting.choose(5), 0);
    }
}
