//! Who asks when: a closed loop of clients, or arrivals that don't wait for answers.

use super::client::{Answer, End, Target};
use super::report::{Level, LevelReport};
use super::workload::Workload;
use indicatif::ProgressBar;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Exp};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// When a level ends.
#[derive(Debug, Clone, Copy)]
pub enum Limit {
    /// After so many requests.
    Requests(u64),
    /// When no more requests are begun; those that run are still answered.
    Time(Duration),
}

impl Limit {
    fn allows(self, number: u64, started: Instant) -> bool {
        match self {
            Self::Requests(requests) => number < requests,
            Self::Time(time) => started.elapsed() < time,
        }
    }

    /// What is left to wait.
    fn at_most(self, wait: Duration, started: Instant) -> Duration {
        match self {
            Self::Requests(_) => wait,
            Self::Time(time) => wait.min(time.saturating_sub(started.elapsed())),
        }
    }
}

/// A load.
#[derive(Debug, Clone)]
pub struct Load {
    pub target: Target,
    pub workload: Workload,
    pub limit: Limit,
}

impl Load {
    /// Runs one level; `series` is its number, so that each has its own requests.
    pub async fn run(self: &Arc<Self>, series: u32, level: Level, bar: &ProgressBar) -> LevelReport {
        match self.limit {
            Limit::Requests(requests) => bar.set_length(requests),
            Limit::Time(time) => bar.set_length(time.as_secs()),
        }
        bar.set_position(0);
        let started = Instant::now();
        let (sender, receiver) = unbounded_channel();
        let arrivals = match level {
            Level::Concurrency(clients) => {
                let next = Arc::new(AtomicU64::new(0));
                for _ in 0..clients {
                    tokio::spawn(Arc::clone(self).client(series, Arc::clone(&next), started, sender.clone()));
                }
                None
            }
            Level::Rate(rate) => Some(tokio::spawn(Arc::clone(self).arrivals(series, rate, started, sender.clone()))),
        };
        drop(sender);
        let answers = self.collect(receiver, started, bar).await;
        if let Some(arrivals) = arrivals {
            // it ended before its last answer came
            let _ = arrivals.await;
        }
        let last = answers.iter().map(|a| a.ended).max().unwrap_or(started);
        LevelReport::new(level, last - started, &answers)
    }

    /// One client of a closed loop. It comes back when it is told to.
    async fn client(self: Arc<Self>, series: u32, next: Arc<AtomicU64>, started: Instant, answers: UnboundedSender<Answer>) {
        loop {
            let number = next.fetch_add(1, Relaxed);
            if !self.limit.allows(number, started) {
                return;
            }
            let answer = self.target.ask(&self.workload.request(series, number), |_| ()).await;
            let wait = if let End::Refused(after) = answer.end { self.limit.at_most(after, started) } else { Duration::ZERO };
            if answers.send(answer).is_err() {
                return;
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Requests with exponentially distributed times between them.
    async fn arrivals(self: Arc<Self>, series: u32, rate: f64, started: Instant, answers: UnboundedSender<Answer>) {
        // (the rate was checked where it was given)
        let Ok(gaps) = Exp::new(rate) else { return };
        let mut rng = ChaCha8Rng::seed_from_u64(self.workload.seed.wrapping_add(u64::from(series) + 1));
        let mut at = started;
        let mut number = 0;
        loop {
            at += Duration::from_secs_f64(gaps.sample(&mut rng));
            tokio::time::sleep_until(at.into()).await;
            if !self.limit.allows(number, started) {
                return;
            }
            let (load, answers) = (Arc::clone(&self), answers.clone());
            tokio::spawn(async move {
                // who counts them waits for all
                let _ = answers.send(load.target.ask(&load.workload.request(series, number), |_| ()).await);
            });
            number += 1;
        }
    }

    async fn collect(&self, mut receiver: UnboundedReceiver<Answer>, started: Instant, bar: &ProgressBar) -> Vec<Answer> {
        let mut answers = Vec::new();
        let mut tick = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                answer = receiver.recv() => match answer {
                    Some(answer) => answers.push(answer),
                    None => return answers,
                },
                _ = tick.tick() => {
                    let failed = answers.iter().filter(|a: &&Answer| matches!(a.end, End::Failed(_))).count();
                    bar.set_message(format!("{} answered, {failed} errors", answers.len()));
                    bar.set_position(match self.limit {
                        Limit::Requests(_) => answers.len() as u64,
                        Limit::Time(time) => started.elapsed().min(time).as_secs(),
                    });
                }
            }
        }
    }
}
