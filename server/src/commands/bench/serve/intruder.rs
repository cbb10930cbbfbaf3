//! Fairness: chats stream, and a long prompt arrives. How much slower do they get while it is read?
//!
//! Chats get slower with every token of theirs, whoever else is there. So the time of the reading is held against the times before and after it.

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
/// Chunks of every chat that make up the time before the intruder, and the time after it.
const AROUND_CHUNKS: usize = 48;

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
    /// And after it.
    pub after: Percentiles,
    /// The 99th percentile during, over the mean of those before and after.
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
        let series = 2 * number as u32;
        let alone = self.intrude(series, 0).await?;
        let arrivals: Vec<Arrivals> = (0..self.count).map(|_| Arrivals::default()).collect();
        let mut chats = JoinSet::new();
        for (chat, arrivals) in arrivals.iter().cloned().enumerate() {
            let (target, plan) = (self.target.clone(), self.chats.request(series + 1, chat as u64));
            chats.spawn(async move { target.ask(&plan, |at| locked(&arrivals).push(at)).await });
        }
        until_all_have(&mut chats, &arrivals, SETTLED_CHUNKS).await?;
        let settled = Instant::now();
        let had = arrivals.iter().map(|a| locked(a).len()).max().unwrap_or(0);
        until_all_have(&mut chats, &arrivals, had + AROUND_CHUNKS).await?;
        let intruder = self.intrude(series, 1).await?;
        let had = arrivals.iter().map(|a| locked(a).len()).max().unwrap_or(0);
        until_all_have(&mut chats, &arrivals, had + AROUND_CHUNKS).await?;
        // whoever still streams hangs up
        drop(chats);
        let first = intruder.chunks.first().copied().unwrap_or(intruder.ended);
        let gaps = |from: Instant, to: Instant| {
            let arrivals: Vec<Vec<Instant>> = arrivals.iter().map(|a| locked(a).clone()).collect();
            let gaps = arrivals.iter().flat_map(|a| a.windows(2).filter(|pair| pair[1] > from && pair[1] <= to).map(|pair| pair[1] - pair[0]));
            Percentiles::of(gaps.collect())
        };
        let (Some(before), Some(during), Some(after)) = (gaps(settled, intruder.sent), gaps(intruder.sent, first), gaps(intruder.ended, Instant::now())) else {
            bail!("no chat got a token while the long prompt was read");
        };
        let ratio_p99 = during.p99 / f64::midpoint(before.p99, after.p99);
        let milliseconds = |time: Duration| time.as_secs_f64() * 1e3;
        let first_of = |answer: &Answer| milliseconds(answer.chunks.first().copied().unwrap_or(answer.ended) - answer.sent);
        Ok(Round { before, during, after, ratio_p99, first_token: first_of(&intruder), first_token_alone: first_of(&alone) })
    }

    async fn intrude(&self, series: u32, number: u64) -> Result<Answer> {
        let answer = self.target.ask(&self.intruder.request(series, number), |_| ()).await;
        match &answer.end {
            End::Complete => Ok(answer),
            end => bail!("the long prompt was not answered: {end:?}"),
        }
    }
}

/// Waits until every chat has so many chunks.
async fn until_all_have(chats: &mut JoinSet<Answer>, arrivals: &[Arrivals], chunks: usize) -> Result<()> {
    loop {
        if arrivals.iter().all(|a| locked(a).len() >= chunks) {
            return Ok(());
        }
        if let Some(ended) = chats.try_join_next() {
            bail!("a chat ended before, while or soon after the long prompt was read ({:?}): give chats more tokens (--chat-tokens)", ended?.end);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The rounds as a table.
pub fn print(chats: usize, intruder_tokens: usize, rounds: &[Round]) {
    println!("{chats} chats stream, a prompt of {intruder_tokens} tokens arrives; milliseconds between tokens");
    println!(
        "{:>7}{:>12}{:>8}{:>12}{:>8}{:>12}{:>8}{:>12}{:>17}{:>8}",
        "round", "before p50", "p99", "during p50", "p99", "after p50", "p99", "p99 ratio", "its first token", "alone"
    );
    for (number, r) in rounds.iter().enumerate() {
        println!(
            "{:>7}{:>12.1}{:>8.1}{:>12.1}{:>8.1}{:>12.1}{:>8.1}{:>11.2}x{:>17.0}{:>8.0}",
            number + 1,
            r.before.p50,
            r.before.p99,
            r.during.p50,
            r.during.p99,
            r.after.p50,
            r.after.p99,
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
