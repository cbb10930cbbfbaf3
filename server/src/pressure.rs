//! Load-adaptive sparsity (`--elastic`): while first tokens take longer than the goal, new requests that name no form get a thinner one.
//!
//! A level is how many forms thinner than the whole model. It rises by one where the goal is missed, and falls by one after a calm time at half the goal;
//! what was measured before a change says nothing of the time after it, and is forgotten.

use std::collections::{BTreeMap, VecDeque};
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a first token's time counts.
const WINDOW: Duration = Duration::from_secs(10);
/// Least time between two steps up: what the last one did must show first.
const PATIENCE: Duration = Duration::from_secs(1);
/// Least time from any step to a step down.
const CALM: Duration = Duration::from_secs(5);

/// What `--elastic` says: this percentile of the times to a first token shall be below the limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Goal {
    /// A share of requests, 0..=1.
    pub percentile: f64,
    /// The longest that they shall wait.
    pub limit: Duration,
}

impl FromStr for Goal {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let read = || {
            let (name, time) = text.split_once('=')?;
            let percentile: f64 = name.strip_prefix('p')?.strip_suffix("_ttft")?.parse().ok()?;
            let (number, unit) = match time.strip_suffix("ms") {
                Some(number) => (number, 1e-3),
                None => (time.strip_suffix('s')?, 1.0),
            };
            let seconds = number.trim().parse::<f64>().ok()? * unit;
            let limit = Duration::try_from_secs_f64(seconds).ok().filter(|limit| !limit.is_zero())?;
            (percentile > 0.0 && percentile <= 100.0).then_some(Self { percentile: percentile / 100.0, limit })
        };
        read().ok_or_else(|| format!("expected a percentile of the time to the first token and its limit, such as p99_ttft=500ms, found {text:?}"))
    }
}

/// How long first tokens take, and what follows from it.
#[derive(Debug)]
pub struct Pressure {
    goal: Goal,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    level: usize,
    changed: Instant,
    /// Since when each request waits for its first token.
    waiting: BTreeMap<u64, Instant>,
    next: u64,
    /// When a first token came, and how long it took.
    times: VecDeque<(Instant, Duration)>,
}

impl Pressure {
    /// Nothing measured yet.
    pub fn new(goal: Goal) -> Self {
        let state = State { level: 0, changed: Instant::now(), waiting: BTreeMap::new(), next: 0, times: VecDeque::new() };
        Self { goal, state: Mutex::new(state) }
    }

    /// How many forms thinner than the whole model the next request's is, at most `forms`.
    pub fn level(&self, forms: usize) -> usize {
        self.level_at(Instant::now(), forms)
    }

    fn level_at(&self, now: Instant, forms: usize) -> usize {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let since = now.saturating_duration_since(state.changed);
        let time = state.percentile(now, self.goal.percentile);
        let level = match time {
            Some(time) if time > self.goal.limit && since >= PATIENCE => state.level + 1,
            Some(time) if time > self.goal.limit / 2 => state.level,
            _ if since >= CALM => state.level.saturating_sub(1),
            _ => state.level,
        };
        let level = level.min(forms);
        if level != state.level {
            tracing::info!(level, first_token = ?time, goal = ?self.goal.limit, "new requests get another form of the model");
            (state.level, state.changed) = (level, now);
            state.times.clear();
        }
        level
    }

    /// A request waits for its first token from now on, until this is told of it or dropped.
    pub fn wait(self: &Arc<Self>, arrived: Instant) -> Wait {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.next += 1;
        let ticket = state.next;
        state.waiting.insert(ticket, arrived);
        Wait { pressure: Arc::clone(self), ticket }
    }

    fn end(&self, ticket: u64, came: Option<Instant>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(arrived), Some(came)) = (state.waiting.remove(&ticket), came) {
            state.times.push_back((came, came.saturating_duration_since(arrived)));
            // (nobody asks for the level while all requests name a form)
            state.forget(came);
        }
    }
}

impl State {
    /// Drops the times that count no more.
    fn forget(&mut self, now: Instant) {
        while self.times.front().is_some_and(|(came, _)| now.saturating_duration_since(*came) > WINDOW) {
            self.times.pop_front();
        }
    }

    /// Of the times of late, those that are still growing included; `None` if there are none.
    fn percentile(&mut self, now: Instant, percentile: f64) -> Option<Duration> {
        self.forget(now);
        let growing = self.waiting.values().map(|arrived| now.saturating_duration_since(*arrived));
        let mut times: Vec<Duration> = self.times.iter().map(|(_, time)| *time).chain(growing).collect();
        times.sort_unstable();
        let rank = (times.len() as f64 * percentile).ceil() as usize;
        times.get(rank.saturating_sub(1)).copied()
    }
}

/// One request that waits for its first token.
#[derive(Debug)]
pub struct Wait {
    pressure: Arc<Pressure>,
    ticket: u64,
}

impl Wait {
    /// The token came: the engine made it at that moment.
    pub fn came(self, at: Instant) {
        self.pressure.end(self.ticket, Some(at));
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        self.pressure.end(self.ticket, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seconds(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn a_goal_is_a_percentile_and_a_limit() {
        assert_eq!("p99_ttft=500ms".parse(), Ok(Goal { percentile: 0.99, limit: seconds(0.5) }));
        assert_eq!("p50_ttft=1.5s".parse(), Ok(Goal { percentile: 0.5, limit: seconds(1.5) }));
        for wrong in ["", "p99_ttft", "p99_ttft=500", "p0_ttft=1s", "p101_ttft=1s", "ttft=1s", "p99_ttft=0ms", "p99_ttft=-1s", "p99_itl=1s"] {
            assert!(wrong.parse::<Goal>().is_err_and(|e| e.contains("p99_ttft=500ms")), "{wrong:?}");
        }
    }

    #[test]
    fn the_level_rises_while_the_goal_is_missed_and_falls_after_a_calm_time() {
        let pressure = Arc::new(Pressure::new(Goal { percentile: 0.9, limit: seconds(1.0) }));
        let start = pressure.state.lock().unwrap().changed;
        let at = |time: f64| pressure.level_at(start + seconds(time), 2);
        let first_token = |came: f64, took: f64| pressure.state.lock().unwrap().times.push_back((start + seconds(came), seconds(took)));
        assert_eq!(at(0.5), 0);
        first_token(1.0, 1.2);
        assert_eq!(at(0.9), 0, "too early to tell");
        assert_eq!(at(1.1), 1);
        assert_eq!(at(3.0), 1, "what came before the change counts no more");
        let waits = pressure.wait(start + seconds(2.0));
        assert_eq!(at(2.9), 1);
        assert_eq!(at(3.1), 2, "one that still waits counts with the time so far");
        assert_eq!(at(9.0), 2, "there is no thinner form");
        drop(waits);
        first_token(9.0, 0.7);
        assert_eq!(at(9.5), 2, "below the goal, but not by half");
        assert_eq!(at(19.5), 1, "nothing in the last ten seconds");
        assert_eq!(at(22.0), 1);
        assert_eq!(at(25.0), 0);
        assert_eq!(at(40.0), 0);
    }

    #[test]
    fn a_request_that_is_given_up_leaves_no_time() {
        let pressure = Arc::new(Pressure::new(Goal { percentile: 0.9, limit: seconds(1.0) }));
        let start = Instant::now();
        drop(pressure.wait(start));
        pressure.wait(start).came(start + seconds(0.5));
        let state = pressure.state.lock().unwrap();
        assert_eq!((state.waiting.len(), state.times.front()), (0, Some(&(start + seconds(0.5), seconds(0.5)))));
    }

    #[test]
    fn old_times_are_dropped_even_if_nobody_asks_for_the_level() {
        let pressure = Arc::new(Pressure::new(Goal { percentile: 0.9, limit: seconds(1.0) }));
        let start = Instant::now();
        (0..100).for_each(|i| pressure.wait(start).came(start + seconds(f64::from(i))));
        assert_eq!(pressure.state.lock().unwrap().times.len(), 11);
    }
}
