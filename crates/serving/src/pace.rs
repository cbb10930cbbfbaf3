//! How many prompt tokens a step may take while answers stream: as many as keep it within a multiple of what it takes without any.
//!
//! A long prompt in whole chunks would make everyone else wait for its tokens (Sarathi-Serve, OSDI 2024, calls that a generation stall). How long a
//! step takes depends on the machine, the model and who else computes, so it is measured as it goes: steps with decoding sequences alone, and what
//! each prompt token adds to that.

use std::time::Duration;

/// Of a new measurement in a smoothed time.
const WEIGHT: f64 = 0.25;
/// A measurement counts as at most so many times the smoothed time, or that part of it: one step that was interrupted says little.
const OUTLIER: f64 = 4.0;
/// After so many steps with prompts one is for decoding alone, so that it is known what that takes.
const PROBE_STEPS: usize = 16;
/// Prompt tokens of a step at least, before rows are made a multiple of 8: about what comes with the reading of the weights. With less a long prompt would hardly get on where every step
/// also reads all of its keys and values.
const LEAST_TOKENS: usize = 16;
/// Rows that products take at once: a step of some more costs as much as one of so many more.
const ROWS_AT_ONCE: usize = 8;
/// Nobody notices a step that is this short.
const SHORT_STEP: Duration = Duration::from_millis(10);

/// What was measured, in seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace {
    /// What a step with decoding sequences may take, in multiples of one without prompts; `None` = anything.
    slowdown: Option<f64>,
    /// A step of decoding sequences alone.
    decode: Option<f64>,
    /// What a prompt token adds.
    prompt_token: Option<f64>,
    /// Steps with decoding sequences and prompts since the last without.
    mixed: usize,
}

impl Pace {
    /// Nothing is known yet.
    pub fn new(slowdown: Option<f64>) -> Self {
        Self { slowdown, decode: None, prompt_token: None, mixed: 0 }
    }

    /// Prompt tokens that may go into the next step with so many `decoding` sequences, where so many have a prompt to be `read`; `most` by other limits. 0 =
    /// this step is to be measured without.
    ///
    /// Where more wait for their first token than stream, prompts may take as many times as long: all of them wait for somebody.
    pub fn prompt_tokens(&self, decoding: usize, read: usize, most: usize) -> usize {
        let Some(slowdown) = self.slowdown else { return most };
        let Some(decode) = self.decode.filter(|_| self.mixed < PROBE_STEPS) else { return 0 };
        let tokens = match self.prompt_token {
            None => LEAST_TOKENS,
            Some(prompt_token) => {
                let room = (decode * slowdown).max(SHORT_STEP.as_secs_f64()) - decode;
                let waiting = (read as f64 / decoding.max(1) as f64).max(1.0);
                ((room * waiting / prompt_token) as usize).max(LEAST_TOKENS)
            }
        };
        let rows = (decoding + tokens) / ROWS_AT_ONCE * ROWS_AT_ONCE;
        rows.saturating_sub(decoding).max(1).min(most)
    }

    /// A step took so long.
    pub fn observe(&mut self, decoding: usize, prompt_tokens: usize, took: Duration) {
        let took = took.as_secs_f64();
        match (decoding, prompt_tokens) {
            (0, 0) => {}
            (0, prompt) => smooth(&mut self.prompt_token, took / prompt as f64),
            (_, 0) => {
                smooth(&mut self.decode, took);
                self.mixed = 0;
            }
            (_, prompt) => {
                let without = self.decode.unwrap_or(0.0);
                smooth(&mut self.prompt_token, (took - without) / prompt as f64);
                self.mixed += 1;
            }
        }
    }
}

fn smooth(smoothed: &mut Option<f64>, measured: f64) {
    let value = match *smoothed {
        Some(old) => old + WEIGHT * (measured.clamp(old / OUTLIER, old * OUTLIER) - old),
        None => measured,
    };
    // (a step with prompts may by chance take less than one without)
    *smoothed = Some(value.max(1e-9));
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    /// Runs steps on a machine where decoding takes `decode` and every prompt token `prompt_token`; how long the last mixed ones took.
    fn run(pace: &mut Pace, decode: Duration, prompt_token: Duration, steps: usize) -> Vec<Duration> {
        let step = |_| {
            let tokens = pace.prompt_tokens(16, 1, 512);
            let took = decode + prompt_token * tokens as u32;
            pace.observe(16, tokens, took);
            took
        };
        (0..steps).map(step).collect()
    }

    #[test]
    fn steps_with_prompts_settle_at_the_multiple_that_was_asked_for() {
        let mut pace = Pace::new(Some(2.0));
        run(&mut pace, 40 * MILLISECOND, 2 * MILLISECOND, 40);
        let took = run(&mut pace, 40 * MILLISECOND, 2 * MILLISECOND, 40);
        assert!(took.iter().all(|t| *t <= 80 * MILLISECOND), "{took:?}");
        assert!(took.iter().filter(|t| **t >= 72 * MILLISECOND).count() > 30, "most steps use what they may: {took:?}");
        // a machine that got faster for prompts alone
        run(&mut pace, 40 * MILLISECOND, MILLISECOND / 2, 40);
        assert!(run(&mut pace, 40 * MILLISECOND, MILLISECOND / 2, 40).iter().all(|t| *t <= 80 * MILLISECOND));
        run(&mut pace, 10 * MILLISECOND, MILLISECOND / 2, 400);
        assert!(run(&mut pace, 10 * MILLISECOND, MILLISECOND / 2, 40).iter().all(|t| *t <= 20 * MILLISECOND), "fewer sequences");
    }

    #[test]
    fn what_decoding_takes_is_measured_before_anything_else_and_again() {
        let mut pace = Pace::new(Some(2.0));
        assert_eq!(pace.prompt_tokens(16, 1, 512), 0);
        pace.observe(1, 0, 30 * MILLISECOND);
        assert_eq!(pace.prompt_tokens(16, 1, 512), LEAST_TOKENS);
        let took = run(&mut pace, 30 * MILLISECOND, MILLISECOND, 100);
        let alone = took.iter().filter(|t| **t == 30 * MILLISECOND).count();
        assert!((5..8).contains(&alone), "{alone} of 100");
    }

    #[test]
    fn the_more_wait_for_each_that_streams_the_more_prompts_may_take() {
        let mut pace = Pace::new(Some(2.0));
        run(&mut pace, 40 * MILLISECOND, MILLISECOND, 40);
        let tokens = |decoding, read| pace.prompt_tokens(decoding, read, 512);
        assert!((32..=40).contains(&tokens(16, 1)) && tokens(16, 16) == tokens(16, 1), "{}", tokens(16, 1));
        assert!((112..=120).contains(&tokens(4, 12)), "{}", tokens(4, 12));
        assert!([(16, 1), (5, 3), (4, 12), (1, 1)].iter().all(|(decoding, read)| (decoding + tokens(*decoding, *read)).is_multiple_of(ROWS_AT_ONCE)));
    }

    #[test]
    fn a_step_that_was_interrupted_changes_little() {
        let mut pace = Pace::new(Some(2.0));
        run(&mut pace, 20 * MILLISECOND, MILLISECOND, 60);
        let before = pace.prompt_tokens(16, 1, 512);
        pace.observe(16, before, Duration::from_secs(9));
        assert!(pace.prompt_tokens(16, 1, 512) >= before / 2, "{} of {before}", pace.prompt_tokens(16, 1, 512));
    }

    #[test]
    fn short_steps_and_slow_prompts_still_get_tokens() {
        let mut pace = Pace::new(Some(2.0));
        run(&mut pace, MILLISECOND / 10, MILLISECOND / 100, 60);
        assert!(pace.prompt_tokens(16, 1, 2_000) > 900, "10 ms are always allowed");
        run(&mut pace, 20 * MILLISECOND, Duration::from_secs(1), 60);
        assert!([0, LEAST_TOKENS].contains(&pace.prompt_tokens(16, 1, 512)));
    }

    #[test]
    fn without_a_bound_prompts_take_what_is_left() {
        let mut pace = Pace::new(None);
        assert_eq!(pace.prompt_tokens(16, 1, 512), 512);
        pace.observe(1, 500, Duration::from_secs(1));
        assert_eq!(pace.prompt_tokens(16, 1, 512), 512);
    }
}
