//! `evop bench search`: what evaluating patterns is made of, beside what the machine multiplies.

use super::matmul::Matmul;
use super::{MeasuredArgs, attention_flops, spread, token};
use anyhow::{Result, bail};
use clap::Args;
use evop_model::{Config, Decoder, NoCache, Span, Tensor};
use serde::Serialize;
use std::hint::black_box;
use std::time::Instant;

/// Options of `evop bench search`.
#[derive(Debug, Clone, Args)]
pub struct SearchArgs {
    #[command(flatten)]
    pub measured: MeasuredArgs,
    /// Sequences that are evaluated together.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub sequences: usize,
    /// Tokens of each.
    #[arg(long, value_name = "TOKENS", default_value_t = 256)]
    pub sequence_length: usize,
    /// Measurements of each; medians count.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub repeats: u16,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// What was measured; each a median, the least and the most of the repeats.
#[derive(Debug, Serialize)]
struct Speeds {
    threads: usize,
    /// The machine's rate: a product of [1024, 2048] and [2048, 2048] in the weights' type, in GFLOP/s.
    matmul_gflops: [f64; 3],
    /// Sub-blocks (attention or MLP) over one sequence, a second.
    block_forwards_per_second: [f64; 3],
    /// Their products and attention, in GFLOP/s.
    block_gflops: [f64; 3],
    /// Medians' ratio.
    block_share_of_matmul: f64,
    /// Scoring a pattern's last residual stream: the head over every position, and the losses; in GFLOP/s.
    head_gflops: [f64; 3],
    head_share_of_matmul: f64,
}

/// Runs the command. `threads` is how many compute.
pub fn run(args: &SearchArgs, threads: usize) -> Result<()> {
    let (sequences, length) = (args.sequences, args.sequence_length);
    let decoder = args.measured.load()?;
    let config = decoder.config();
    if sequences == 0 || length < 2 || length > config.max_position_embeddings {
        bail!(
            "--sequences {sequences} --sequence-length {length}: expected at least one sequence, of 2 tokens to the model's context of {}",
            config.max_position_embeddings
        );
    }
    let tokens: Vec<u32> = (0..sequences * length).map(|i| token(i, config)).collect();
    let batch = decoder.batch(&vec![Span::prompt(length); sequences])?;
    let ids: Vec<u32> = tokens.iter().cycle().skip(1).take(tokens.len()).copied().collect();
    let embedded = decoder.embed(&tokens, &batch)?;
    let product = Matmul::new(&decoder)?;
    let blocks = || -> Result<Tensor> { Ok(decoder.forward_range(embedded.clone(), 0..decoder.last_boundary(), &batch, &mut NoCache)?) };
    let hidden = blocks()?;
    let head = || -> Result<()> {
        black_box(decoder.log_probabilities(&hidden, &ids)?);
        Ok(())
    };
    let (mut matmul, mut passes, mut heads) = (Vec::new(), Vec::new(), Vec::new());
    head()?;
    for _ in 0..args.repeats {
        matmul.push(product.gflops()?);
        passes.push(1.0 / seconds(&decoder, &|| blocks().map(drop))?);
        heads.push((2 * config.vocab_size * config.hidden_size * tokens.len()) as f64 / 1e9 / seconds(&decoder, &head)?);
    }
    let (matmul, passes, heads) = (spread(matmul), spread(passes), spread(heads));
    let block_forwards = (0..decoder.last_boundary()).filter(|s| decoder.sub_block(*s).is_some()).count() * sequences;
    let block_gflops = passes.map(|p| p * block_flops(config, sequences, length) / 1e9);
    let speeds = Speeds {
        threads,
        matmul_gflops: matmul,
        block_forwards_per_second: passes.map(|p| p * block_forwards as f64),
        block_gflops,
        block_share_of_matmul: block_gflops[0] / matmul[0],
        head_gflops: heads,
        head_share_of_matmul: heads[0] / matmul[0],
    };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&speeds)?);
        return Ok(());
    }
    println!("{sequences} sequences of {length} tokens, weights in {}, threads: {}", decoder.weight_type().as_str(), speeds.threads);
    let line = |what: &str, [median, least, most]: [f64; 3], share: Option<f64>| {
        let share = share.map_or(String::new(), |s| format!("{:>8.0}% of the matmul's", 100.0 * s));
        println!("{what:<26}{median:>12.0}{:>22}{share}", format!("{least:.0} - {most:.0}"));
    };
    line("matmul, GFLOP/s", speeds.matmul_gflops, None);
    line("block-forwards a second", speeds.block_forwards_per_second, None);
    line("their GFLOP/s", speeds.block_gflops, Some(speeds.block_share_of_matmul));
    line("head and losses, GFLOP/s", speeds.head_gflops, Some(speeds.head_share_of_matmul));
    Ok(())
}

/// Seconds that some work on the decoder's device takes.
pub fn seconds(decoder: &Decoder, work: &dyn Fn() -> Result<()>) -> Result<f64> {
    decoder.device().synchronize()?;
    let started = Instant::now();
    work()?;
    decoder.device().synchronize()?;
    Ok(started.elapsed().as_secs_f64())
}

/// Floating-point operations of all sub-blocks: two a weight and token, and causal attention.
fn block_flops(config: &Config, sequences: usize, length: usize) -> f64 {
    (sequences * (2 * config.block_parameters() * length + attention_flops(config, length * (length + 1) / 2))) as f64
}
