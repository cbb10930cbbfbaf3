//! What a load test found: rates, latencies, errors.

use super::client::{Answer, End};
use serde::Serialize;
use std::collections::BTreeMap;
use std::time::Duration;

/// Median, 95th and 99th percentile, in milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    pub p50: f64,
    pub p95: f64,
    pub p99: f64,
}

impl Percentiles {
    /// Of these times, by nearest rank; `None` of none.
    pub fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        let last = times.len().checked_sub(1)?;
        let at = |percent: usize| times[((times.len() * percent).div_ceil(100)).saturating_sub(1).min(last)].as_secs_f64() * 1e3;
        Some(Self { p50: at(50), p95: at(95), p99: at(99) })
    }
}

/// What one level of load gave.
#[derive(Debug, Clone, Serialize)]
pub struct LevelReport {
    /// Clients that each ask again when they are answered (closed loop).
    pub concurrency: Option<usize>,
    /// Requests that arrive a second, whatever is answered (open loop).
    pub rate: Option<f64>,
    /// From the first request to the last end.
    pub seconds: f64,
    /// Requests with all of their answer.
    pub complete: usize,
    pub requests_per_second: f64,
    /// Of all answers, also those that nobody read to the end.
    pub output_tokens_per_second: f64,
    /// From sending a request to the first chunk with text, in milliseconds, as all latencies.
    pub time_to_first_token: Option<Percentiles>,
    /// Between two chunks of an answer.
    pub inter_token_latency: Option<Percentiles>,
    /// From sending a request to the end of its answer.
    pub end_to_end: Option<Percentiles>,
    /// Answered 429 with `Retry-After`.
    pub refused: usize,
    /// Clients that hung up, left half a body, or read slowly, as planned.
    pub hung_up: usize,
    pub half_bodies: usize,
    pub slow_readers: usize,
    /// Everything else that ended a request, by kind.
    pub errors: BTreeMap<String, usize>,
}

/// What is asked of the server at a level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Level {
    /// So many clients, each with one request at a time.
    Concurrency(usize),
    /// So many arrivals a second, as a Poisson process.
    Rate(f64),
}

impl LevelReport {
    /// Counts and sorts. Slow readers' times are left out: they are their own doing.
    pub fn new(level: Level, elapsed: Duration, answers: &[Answer]) -> Self {
        let seconds = elapsed.as_secs_f64();
        let count = |of: fn(&End) -> bool| answers.iter().filter(|a| of(&a.end)).count();
        let complete = count(|end| *end == End::Complete);
        let timed = || answers.iter().filter(|a| !a.slow);
        let gaps = timed().flat_map(|a| a.chunks.windows(2).map(|pair| pair[1] - pair[0])).collect();
        let mut errors = BTreeMap::new();
        for answer in answers {
            if let End::Failed(kind) = &answer.end {
                *errors.entry(kind.clone()).or_default() += 1;
            }
        }
        let (concurrency, rate) = match level {
            Level::Concurrency(clients) => (Some(clients), None),
            Level::Rate(rate) => (None, Some(rate)),
        };
        Self {
            concurrency,
            rate,
            seconds,
            complete,
            requests_per_second: complete as f64 / seconds,
            output_tokens_per_second: answers.iter().map(|a| a.output_tokens).sum::<usize>() as f64 / seconds,
            time_to_first_token: Percentiles::of(timed().filter_map(|a| Some(*a.chunks.first()? - a.sent)).collect()),
            inter_token_latency: Percentiles::of(gaps),
            end_to_end: Percentiles::of(timed().filter(|a| a.end == End::Complete).map(|a| a.ended - a.sent).collect()),
            refused: count(|end| matches!(end, End::Refused(_))),
            hung_up: count(|end| *end == End::HungUp),
            half_bodies: count(|end| *end == End::HalfSent),
            slow_readers: answers.iter().filter(|a| a.slow).count(),
            errors,
        }
    }

    /// The table's head.
    pub fn print_head() {
        println!("{:>42}{:>27}{:>27}{:>27}", "", "first token, ms", "between tokens, ms", "whole answer, ms");
        let three = || print_columns(&["p50", "p95", "p99"].map(String::from));
        print!("{:>12}{:>10}{:>10}{:>10}", "load", "complete", "req/s", "tokens/s");
        (0..3).for_each(|_| three());
        println!("{:>9}{:>8}", "refused", "errors");
    }

    /// One line of the table, and one for each kind of error.
    pub fn print(&self) {
        let load = match (self.concurrency, self.rate) {
            (Some(clients), _) => format!("{clients} clients"),
            (None, rate) => format!("{:.2}/s", rate.unwrap_or_default()),
        };
        print!("{load:>12}{:>10}{:>10.2}{:>10.1}", self.complete, self.requests_per_second, self.output_tokens_per_second);
        for times in [self.time_to_first_token, self.inter_token_latency, self.end_to_end] {
            print_columns(&times.map_or_else(|| ["-", "-", "-"].map(String::from), |t| [t.p50, t.p95, t.p99].map(|ms| format!("{ms:.1}"))));
        }
        println!("{:>9}{:>8}", self.refused, self.errors.values().sum::<usize>());
        let planned = [(self.hung_up, "hung up"), (self.half_bodies, "left half a body"), (self.slow_readers, "read slowly")];
        let planned: Vec<String> = planned.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
        if !planned.is_empty() {
            println!("{:>12}{}", "", planned.join(", "));
        }
        for (kind, count) in &self.errors {
            println!("{:>12}{count} x {kind}", "");
        }
    }
}

fn print_columns(columns: &[String; 3]) {
    columns.iter().for_each(|column| print!("{column:>9}"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    #[test]
    fn percentiles_are_nearest_ranks() {
        let hundred = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(Percentiles::of(hundred), Some(Percentiles { p50: 50.0, p95: 95.0, p99: 99.0 }));
        assert_eq!(Percentiles::of(vec![Duration::from_millis(3)]), Some(Percentiles { p50: 3.0, p95: 3.0, p99: 3.0 }));
        assert_eq!(Percentiles::of(Vec::new()), None);
    }

    #[test]
    fn planned_ends_and_refusals_are_no_errors() {
        let sent = Instant::now();
        let at = |ms| sent + Duration::from_millis(ms);
        let answer = |end, slow| Answer { sent, end, ended: at(60), chunks: vec![at(10), at(30)], output_tokens: 2, prompt_tokens: 1, slow };
        let refused = Answer { chunks: Vec::new(), output_tokens: 0, ..answer(End::Refused(Duration::from_secs(1)), false) };
        let failed = Answer { chunks: Vec::new(), output_tokens: 0, ..answer(End::Failed("status 500".into()), false) };
        let answers = [answer(End::Complete, false), answer(End::Complete, true), answer(End::HungUp, false), answer(End::HalfSent, false), refused, failed];
        let report = LevelReport::new(Level::Concurrency(4), Duration::from_secs(2), &answers);
        assert_eq!((report.complete, report.refused, report.hung_up, report.half_bodies, report.slow_readers), (2, 1, 1, 1, 1));
        assert_eq!(report.errors, BTreeMap::from([("status 500".to_string(), 1)]));
        assert_eq!((report.requests_per_second, report.output_tokens_per_second), (1.0, 4.0));
        assert_eq!(report.time_to_first_token.unwrap().p99, 10.0);
        assert_eq!(report.inter_token_latency.unwrap().p50, 20.0);
        assert_eq!(report.end_to_end.unwrap().p50, 60.0);
    }
}
