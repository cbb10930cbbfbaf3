//! Fairness: chats stream, and a long prompt arrives. How much slower do they get while it is read?
//!
//! Chats get slower with every token of theirs, whoever else is there. So the same tokens, by their places in the answers, are timed again in a round to which
//! nobody comes.

use super::client::{Answer, End, Target};
use super::report::Percentiles;
use super::workload::Workload;
use crate::commands::bench::spread;
use anyhow::{Result, bail};
use indicatif::ProgressBar;
use serde::Serialize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Chunks that every chat has to have before it counts: its own prompt and the others' are read by then.
const SETTLED_CHUNKS: usize = 8;
/// Chunks of every chat that make up the time before the intruder.
const BEFORE_CHUNKS: usize = 48;

/// The scenario.
#[derive(Debug, Clone)]
pub struct Scenario {
    pub target: Target,
    /// Of the chats.
    pub chats: Workload,
    pub count: usize,
    /// Of the intruder.
    pub intruder: Workload,
    pub rounds: usize,
}

/// One arrival.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Round {
    /// Between the chats' tokens before the long prompt arrived, in milliseconds.
    pub before: Percentiles,
    /// And from then to its first token.
    pub during: Percentiles,
    /// Between the same tokens of chats to which nobody came.
    pub undisturbed: Percentiles,
    /// The 99th percentile during, over the undisturbed one.
    pub ratio_p99: f64,
    /// The long prompt's time to first token among the chats, in milliseconds.
    pub first_token: f64,
    /// The same with nobody else there.
    pub first_token_alone: f64,
}

/// When one chat's chunks came.
type Arrivals = Arc<Mutex<Vec<Instant>>>;

fn locked(arrivals: &Arrivals) -> MutexGuard<'_, Vec<Instant>> {
    arrivals.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Scenario {
    /// Runs all rounds.
    ///
    /// # Errors
    /// A chat or an intruder that isn't answered: there is nothing to measure then.
    pub async fn run(&self, bar: &ProgressBar) -> Result<Vec<Round>> {
        bar.set_length(self.rounds as u64);
        let mut rounds = Vec::new();
        for number in 0..self.rounds {
            bar.set_position(number as u64);
            rounds.push(self.round(number).await?);
        }
        Ok(rounds)
    }

    async fn round(&self, number: usize) -> Result<Round> {
        let series = 3 * number as u32;
        let alone = self.intrude(series, 0).await?;
        let mut chats = self.chat(series + 1);
        chats.all_have(SETTLED_CHUNKS).await?;
        let settled = chats.lengths();
        let most = settled.iter().max().copied().unwrap_or(0);
        chats.all_have(most + BEFORE_CHUNKS).await?;
        let intruder = self.intrude(series, 1).await?;
        let first = intruder.chunks.first().copied().unwrap_or(intruder.ended);
        let (came, read) = (chats.lengths_at(intruder.sent), chats.lengths_at(first));
        let before = Percentiles::of(chats.gaps(&settled, &came));
        let during = Percentiles::of(chats.gaps(&came, &read));
        // whoever still streams hangs up
        drop(chats);
        let mut control = self.chat(series + 2);
        control.all_have(read.iter().max().copied().unwrap_or(0)).await?;
        let undisturbed = Percentiles::of(control.gaps(&came, &read));
        let (Some(before), Some(during), Some(undisturbed)) = (before, during, undisturbed) else {
            bail!("no chat got a token while the long prompt was read");
        };
        let ratio_p99 = during.p99 / undisturbed.p99;
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let first_of = |answer: &Answer| milliseconds(answer.chunks.first().copied().unwrap_or(answer.ended) - answer.sent);
        Ok(Round { before, during, undisturbed, ratio_p99, first_token: first_of(&intruder), first_token_alone: first_of(&alone) })
    }

    /// All chats begin.
    fn chat(&self, series: u32) -> Chats {
        let arrivals: Vec<Arrivals> = (0..self.count).map(|_| Arrivals::default()).collect();
        let mut streaming = JoinSet::new();
        for (chat, arrivals) in arrivals.iter().cloned().enumerate() {
            let (target, plan) = (self.target.clone(), self.chats.request(series, chat as u64));
            streaming.spawn(async move { target.ask(&plan, |at| locked(&arrivals).push(at)).await });
        }
        Chats { arrivals, streaming }
    }

    async fn intrude(&self, series: u32, number: u64) -> Result<Answer> {
        let answer = self.target.ask(&self.intruder.request(series, number), |_| ()).await;
        match &answer.end {
            End::Complete => Ok(answer),
            end => bail!("the long prompt was not answered: {end:?}"),
        }
    }
}

/// Chats that stream. They hang up when this is dropped.
struct Chats {
    arrivals: Vec<Arrivals>,
    streaming: JoinSet<Answer>,
}

impl Chats {
    /// Waits until every chat has so many chunks.
    async fn all_have(&mut self, chunks: usize) -> Result<()> {
        loop {
            if self.lengths().iter().all(|length| *length >= chunks) {
                return Ok(());
            }
            if let Some(ended) = self.streaming.try_join_next() {
                bail!("a chat ended before or while the long prompt was read ({:?}): give chats more tokens (--chat-tokens)", ended?.end);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// How many chunks each has.
    fn lengths(&self) -> Vec<usize> {
        self.arrivals.iter().map(|a| locked(a).len()).collect()
    }

    /// How many chunks each had by then.
    fn lengths_at(&self, time: Instant) -> Vec<usize> {
        self.arrivals.iter().map(|a| locked(a).partition_point(|at| *at <= time)).collect()
    }

    /// Times between chunks, of each chat those up to its chunk numbers `from..to`.
    fn gaps(&self, from: &[usize], to: &[usize]) -> Vec<Duration> {
        let of = |((arrivals, from), to): ((&Arrivals, &usize), &usize)| -> Vec<Duration> {
            let arrivals = locked(arrivals);
            (1.max(*from)..*to).map(|i| arrivals[i] - arrivals[i - 1]).collect()
        };
        self.arrivals.iter().zip(from).zip(to).flat_map(of).collect()
    }
}

/// The rounds as a table.
pub fn print(chats: usize, intruder_tokens: usize, rounds: &[Round]) {
    println!("{chats} chats stream, a prompt of {intruder_tokens} tokens arrives; milliseconds between tokens");
    println!(
        "{:>7}{:>12}{:>8}{:>12}{:>8}{:>13}{:>8}{:>12}{:>17}{:>8}",
        "round", "before p50", "p99", "during p50", "p99", "without p50", "p99", "p99 ratio", "its first token", "alone"
    );
    for (number, r) in rounds.iter().enumerate() {
        println!(
            "{:>7}{:>12.1}{:>8.1}{:>12.1}{:>8.1}{:>13.1}{:>8.1}{:>11.2}x{:>17.0}{:>8.0}",
            number + 1,
            r.before.p50,
            r.before.p99,
            r.during.p50,
            r.during.p99,
            r.undisturbed.p50,
            r.undisturbed.p99,
            r.ratio_p99,
            r.first_token,
            r.first_token_alone
        );
    }
    println!("median ratio of the 99th percentiles: {:.2}x", median_ratio(rounds));
}

/// The middle round's, of one at least.
pub fn median_ratio(rounds: &[Round]) -> f64 {
    spread(rounds.iter().map(|r| r.ratio_p99).collect())[0]
}
