//! Prefix caching: how much sooner is a prompt answered whose beginning the server has just read for another one?

use super::client::{End, Target};
use super::workload::Workload;
use crate::commands::bench::spread;
use anyhow::{Result, bail};
use indicatif::ProgressBar;
use serde::Serialize;

/// Two requests, one after the other, whose prompts begin alike; milliseconds to the first token.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Pair {
    pub first: f64,
    pub second: f64,
}

/// Runs `rounds` pairs, each with a beginning of its own.
///
/// # Errors
/// A request that isn't answered: there is nothing to measure then.
pub async fn run(target: &Target, workload: &Workload, rounds: u16, bar: &ProgressBar) -> Result<Vec<Pair>> {
    bar.set_length(u64::from(rounds));
    let mut pairs = Vec::new();
    for series in 0..u32::from(rounds) {
        let (first, second) = (ask(target, workload, series, 0).await?, ask(target, workload, series, 1).await?);
        pairs.push(Pair { first, second });
        bar.inc(1);
    }
    Ok(pairs)
}

async fn ask(target: &Target, workload: &Workload, series: u32, number: u64) -> Result<f64> {
    let answer = target.ask(&workload.request(series, number), |_| ()).await;
    match (answer.end, answer.chunks.first()) {
        (End::Complete, Some(first)) => Ok((*first - answer.sent).as_secs_f64() * 1e3),
        (end, _) => bail!("a prompt was not answered with a token: {end:?}"),
    }
}

/// The middle pair's time to first token of the second request, as a part of the first's; of one pair at least.
pub fn median_ratio(pairs: &[Pair]) -> f64 {
    spread(pairs.iter().map(|pair| pair.second / pair.first).collect())[0]
}

/// The pairs as a table.
pub fn print(shared: usize, own: usize, pairs: &[Pair]) {
    println!("two prompts, of {shared} tokens that they share and {own} of each one's own; milliseconds to the first token");
    println!("{:>7}{:>12}{:>12}{:>9}", "round", "first", "second", "ratio");
    for (number, pair) in pairs.iter().enumerate() {
        println!("{:>7}{:>12.1}{:>12.1}{:>9.3}", number + 1, pair.first, pair.second, pair.second / pair.first);
    }
    let median = median_ratio(pairs);
    println!("median ratio: {median:.3}, 1/{:.1}", median.recip());
}
