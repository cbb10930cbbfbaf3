//! How many tokens to draft. A thinner form of the model guesses what comes next, the whole model checks all guesses in one pass (Leviathan et al. 2023,
//! arXiv 2211.17192): what comes out is what it would have made alone, so the only question is what is fastest.
//!
//! That depends on the machine, the batch and the text, so it is measured: how often a guess is right lately, whatever the number of guesses was; and
//! how much longer a step takes with each number of guesses than without, for each size of batch. Steps are compared with those just before them, since
//! all of them get longer with the sequences. Together that says how many tokens a second each number would bring (equation 1 there). The best is used;
//! now and then a neighbour of it is tried, so that a change is noticed.

use std::collections::HashMap;
use std::time::Duration;

/// A number of guesses is kept for so many steps, …
const BURST: u32 = 8;
/// … for fewer when it is tried out. The first one isn't timed: a step takes longer after one of another kind.
const TRIAL: u32 = 4;
/// One burst in so many tries something else than the best: every other time to do without.
const TRY_EVERY: u64 = 16;
/// Latest comparisons of which the median counts.
const LATEST: usize = 8;
/// Guesses after which one is as good as forgotten.
const REMEMBERED: f64 = 256.0;
/// Drafting has to be so much faster than going without, or it isn't worth the noise of measuring; …
const WORTH: f64 = 1.05;
/// … and by so much more over the number of comparisons, while they are few.
const DOUBT: f64 = 0.1;

/// Who drafts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculation {
    /// The member of the [`evop_model::Elastic`] model that guesses.
    pub member: usize,
    /// Tokens that it guesses at most before the whole model checks them.
    pub most: usize,
    /// It guesses that many each time, whatever is fastest.
    pub always: bool,
}

/// Chooses the number of drafts for the next step.
#[derive(Debug)]
pub(crate) struct Drafting {
    most: usize,
    always: bool,
    /// Guesses that were right, of those that were looked at (the ones after a wrong guess aren't), both fading.
    right: f64,
    judged: f64,
    /// By sequences in the batch, to the next power of two.
    batches: HashMap<usize, OfBatch>,
}

/// What is known of batches of one size.
#[derive(Debug)]
struct OfBatch {
    /// Of every number of drafts.
    costs: Vec<Cost>,
    /// The number that is kept for so many steps more.
    burst: (usize, u32),
    /// The last step was of another kind.
    changed: bool,
    /// Seconds of the burst's steps.
    times: Vec<f64>,
    /// Drafts and seconds of a step of the burst before.
    before: Option<(usize, f64)>,
    bursts: u64,
}

/// How many times as long as without drafts a step took, the latest comparisons.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    latest: [f64; LATEST],
    seen: u32,
}

impl Cost {
    fn add(&mut self, ratio: f64) {
        self.latest[self.seen as usize % LATEST] = ratio;
        self.seen = self.seen.wrapping_add(1).max(1);
    }

    /// Comparisons that it is the median of.
    fn count(&self) -> usize {
        LATEST.min(self.seen as usize)
    }

    /// `None` before the first one.
    fn median(&self) -> Option<f64> {
        median(&self.latest[..self.count()])
    }
}

/// The lower one of two.
fn median(values: &[f64]) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len().saturating_sub(1) / 2).copied()
}

/// What came of the drafts of one step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Judged {
    /// Guesses that were right.
    pub right: usize,
    /// Those, and of each sequence the first wrong one.
    pub looked_at: usize,
}

impl Drafting {
    /// Half of the first few guesses are taken for right.
    pub fn new(Speculation { most, always, .. }: Speculation) -> Self {
        Self { most, always, right: 1.0, judged: 2.0, batches: HashMap::new() }
    }

    /// Drafts a sequence for a step of so many sequences that all decode.
    pub fn choose(&mut self, sequences: usize) -> usize {
        if self.always {
            return self.most;
        }
        let agreement = self.right / self.judged;
        let of = self.batches.entry(sequences.next_power_of_two()).or_insert_with(|| OfBatch::new(self.most));
        if of.burst.1 == 0 {
            of.compare();
            let next = of.next(agreement);
            of.changed = next.0 != of.burst.0 || of.bursts == 0;
            of.burst = next;
        }
        of.burst.1 -= 1;
        of.burst.0
    }

    /// What came of it, and how long the step took.
    pub fn observe(&mut self, sequences: usize, drafts: usize, judged: Judged, elapsed: Duration) {
        let fade = (1.0 - 1.0 / REMEMBERED).powi(i32::try_from(judged.looked_at).unwrap_or(i32::MAX));
        self.right = self.right * fade + judged.right as f64;
        self.judged = self.judged * fade + judged.looked_at as f64;
        let Some(of) = self.batches.get_mut(&sequences.next_power_of_two()) else { return };
        if !std::mem::take(&mut of.changed) && drafts == of.burst.0 {
            of.times.push(elapsed.as_secs_f64().max(1e-9));
        }
    }
}

impl OfBatch {
    fn new(most: usize) -> Self {
        let mut costs = vec![Cost::default(); most + 1];
        costs[0].add(1.0);
        Self { costs, burst: (0, 0), changed: true, times: Vec::new(), before: None, bursts: 0 }
    }

    /// The burst is over: lays it beside the one before.
    fn compare(&mut self) {
        let Some(time) = median(&std::mem::take(&mut self.times)) else { return };
        let drafts = self.burst.0;
        match self.before.replace((drafts, time)) {
            Some((before, then)) if drafts == 0 && before > 0 => self.costs[before].add(then / time),
            Some((before, then)) if drafts != before => {
                let cost = cost(&self.costs, before) * time / then;
                self.costs[drafts].add(cost);
            }
            _ => {}
        }
    }

    /// The next number of drafts, and the steps that it is kept for.
    fn next(&mut self, agreement: f64) -> (usize, u32) {
        let most = self.costs.len() - 1;
        if self.before.is_none() {
            return (0, BURST);
        }
        if self.costs[1].seen == 0 {
            return (1, TRIAL);
        }
        let best = self.best(agreement);
        // many at once are dear to try, and tried only where the costs so far promise something
        if best > 1 && self.costs[most].seen == 0 {
            return (most, TRIAL);
        }
        self.bursts += 1;
        if !self.bursts.is_multiple_of(TRY_EVERY) {
            return (best, BURST);
        }
        let other = match self.bursts / TRY_EVERY % 4 {
            0 => best.saturating_sub(1),
            2 => (best + 1).min(most),
            _ => 0,
        };
        (other, TRIAL)
    }

    /// The number of drafts that brings most tokens a second, if that is worth it.
    fn best(&self, agreement: f64) -> usize {
        let (mut expected, mut guessed) = (1.0, 1.0);
        let mut best = (0, 1.0);
        for k in 1..self.costs.len() {
            guessed *= agreement;
            expected += guessed;
            let worth = WORTH + DOUBT / self.costs[k].count().max(1) as f64;
            let rate = expected / cost(&self.costs, k) / worth;
            if rate > best.1 {
                best = (k, rate);
            }
        }
        best.0
    }
}

/// What a step with `k` drafts costs; of a number that wasn't tried yet, on the line through its neighbours that were, or beyond all of them through the
/// last two.
fn cost(costs: &[Cost], k: usize) -> f64 {
    let at = |k: usize| costs[k].median().map(|ratio| (k, ratio));
    let mut below = (0..=k).rev().filter_map(at);
    let Some((first, least)) = below.next() else { return f64::INFINITY };
    if first == k {
        return least;
    }
    if let Some((above, most)) = (k..costs.len()).find_map(at) {
        return least + (k - first) as f64 / (above - first) as f64 * (most - least);
    }
    below.next().map_or(f64::INFINITY, |(second, fewer)| least + (k - first) as f64 / (first - second) as f64 * (least - fewer).max(0.0))
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
        let mut drafting = Drafting::new(Speculation { member: 1, most: 6, always: false });
        let (mut tokens, mut time) = (0, 0.0);
        for _ in 0..steps {
            let drafts = drafting.choose(1);
            let right = (0..drafts).take_while(|_| rng.random_bool(agreement)).count();
            let elapsed = (1.0 + drafts as f64 * (cost + check)) * rng.random_range(0.9..1.1);
            drafting.observe(1, drafts, Judged { right, looked_at: drafts.min(right + 1) }, Duration::from_secs_f64(elapsed));
            (tokens, time) = (tokens + 1 + right, time + elapsed);
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
            assert!(found > 0.98, "{found} at {agreement}, {cost}, {check}");
            // (what trying costs an answer of 100 tokens, the first one)
            let first = speed_up(agreement, cost, check, 100);
            assert!(first > 0.95, "{first} at {agreement}, {cost}, {check}");
        }
    }

    #[test]
    fn batches_of_another_size_are_timed_anew_and_the_first_step_of_a_kind_is_not_timed() {
        let mut drafting = Drafting::new(Speculation { member: 1, most: 3, always: false });
        let mut before = 0;
        for drafts in [[0; 8].as_slice(), &[1; 4], &[3; 4]].concat() {
            assert_eq!(drafting.choose(1), drafts);
            let slow = if drafts == before { 10 } else { 1_000 };
            drafting.observe(1, drafts, Judged { right: drafts, looked_at: drafts }, Duration::from_millis(slow));
            before = drafts;
        }
        assert_eq!(drafting.batches[&1].costs[1].median(), Some(1.0));
        assert_eq!(drafting.choose(1), 3);
        assert_eq!(drafting.choose(5), 0);
    }

    #[test]
    fn that_steps_get_longer_with_the_sequences_is_nothing_that_drafts_cost() {
        // twice as long at the end of an answer of 100 tokens as at its beginning; the next one begins anew
        let mut drafting = Drafting::new(Speculation { member: 1, most: 1, always: false });
        let mut drafted = 0;
        for step in 0..4_000 {
            let drafts = drafting.choose(1);
            // 0.6 of the guesses are right: 1.6 tokens for 1.7 steps
            let right = usize::from(drafts == 1 && step % 5 < 3);
            let elapsed = (1.0 + 0.01 * f64::from(step % 100)) * if drafts == 1 { 1.7 } else { 1.0 };
            drafting.observe(1, drafts, Judged { right, looked_at: drafts }, Duration::from_secs_f64(elapsed));
            drafted += drafts;
        }
        assert!(drafted < 100, "{drafted}");
    }

    #[test]
    fn a_number_of_drafts_that_was_not_tried_lies_between_others() {
        let at = |ratio: f64| {
            let mut cost = Cost::default();
            // the median: neither the highest nor the lowest
            [9.0 * ratio, ratio, 0.5 * ratio].into_iter().filter(|r| *r > 0.0).for_each(|r| cost.add(r));
            cost
        };
        let costs = [at(1.0), at(2.0), at(0.0), at(0.0), at(3.5)];
        assert_eq!([1, 2, 3, 4].map(|k| cost(&costs, k)), [2.0, 2.5, 3.0, 3.5]);
        assert_eq!(cost(&costs[..3], 2), 3.0);
        assert_eq!(cost(&[at(2.0), at(1.0), at(0.0)], 2), 1.0, "more drafts don't make a step shorter");
        assert_eq!(cost(&costs[2..4], 1), f64::INFINITY);
    }
}
