//! `evop bench`: how fast a checkpoint decodes and prefills, beside another one measured in turns with it; how fast a search can run; how a server bears load.

mod matmul;
mod search;
mod serve;

use super::model_args::ModelArgs;
use crate::config::KvDTypeChoice;
use crate::models::ModelSource;
use crate::shape::Shape;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use evop_model::{Config, Decoder, FixedCache, PagedCache, Span, StepGraphs};
use matmul::Matmul;
use rayon::prelude::*;
use serde::Serialize;
use std::time::Instant;

/// Options of `evop bench`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:\n  \
    evop bench decode --model ./pruned --against ./SmolLM2 --batch 1,4,16\n  \
    evop bench prefill --model ./pruned --against ./SmolLM2 --length 512 --dtype bf16\n  \
    evop bench decode --random llama-3.2-1b --dtype q8_0\n  \
    evop bench search --model ./SmolLM2 --dtype bf16 --threads 1")]
pub struct BenchArgs {
    #[command(subcommand)]
    pub what: Bench,
}

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Bench {
    /// New tokens a second, of one sequence and of several at once.
    Decode(DecodeArgs),
    /// Prompt tokens a second.
    Prefill(PrefillArgs),
    /// Block-forwards a second, which a pruning search consists of, and their share of what the machine multiplies.
    Search(search::SearchArgs),
    /// Requests a second and latencies of a server under load, how fair it is, and how it bears clients that misbehave.
    Serve(Box<serve::ServeBenchArgs>),
}

/// What is measured.
#[derive(Debug, Clone, Args)]
pub struct MeasuredArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Random weights in the shape of a known model, instead of a checkpoint.
    #[arg(long, value_name = "SHAPE", conflicts_with = "model", help_heading = "Model")]
    pub random: Option<Shape>,
}

impl MeasuredArgs {
    /// The checkpoint or the random weights, loaded.
    pub fn load(&self) -> Result<Decoder> {
        let checkpoint = match self.random {
            Some(shape) => shape.checkpoint()?,
            None => self.model.checkpoint()?,
        };
        self.model.decoder_to_run(&checkpoint)
    }
}

/// What both have.
#[derive(Debug, Clone, Args)]
pub struct CommonArgs {
    #[command(flatten)]
    pub measured: MeasuredArgs,
    /// Another checkpoint, measured in turns with the first one.
    #[arg(long, value_name = "MODEL")]
    pub against: Option<String>,
    /// What keys and values are held in.
    #[arg(long, value_enum, default_value_t = KvDTypeChoice::Auto)]
    pub kv_dtype: KvDTypeChoice,
    /// Measurements of each; medians count.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub repeats: u16,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `evop bench decode`.
#[derive(Debug, Clone, Args)]
pub struct DecodeArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Sequences that are decoded together, separated by commas.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1])]
    pub batch: Vec<usize>,
    /// Tokens of each sequence's prompt.
    #[arg(long, value_name = "TOKENS", default_value_t = 128)]
    pub prompt: usize,
    /// Tokens that are decoded of each.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub tokens: usize,
    /// Tokens of each sequence in a step: more than 1 is what checking drafts costs. All of them are counted.
    #[arg(long, value_name = "TOKENS", default_value_t = 1)]
    pub step_tokens: usize,
    /// On CUDA, launch kernels one by one instead of replaying recorded steps (CUDA graphs).
    #[arg(long)]
    pub no_cuda_graphs: bool,
}

/// Options of `evop bench prefill`.
#[derive(Debug, Clone, Args)]
pub struct PrefillArgs {
    #[command(flatten)]
    pub common: CommonArgs,
    /// Tokens of the prompt, separated by commas.
    #[arg(long, value_name = "TOKENS", value_delimiter = ',', default_values_t = [512])]
    pub length: Vec<usize>,
}

/// One line of the result.
#[derive(Debug, Clone, Serialize)]
struct Line {
    /// Sequences at once, or tokens of the prompt.
    size: usize,
    /// Tokens a second: median, least and most of the repeats.
    tokens_per_second: [f64; 3],
    /// The same of the other checkpoint.
    against: Option<[f64; 3]>,
    /// Decoding: weights, keys and values read, in GB/s, and their share of what the device reads (a GPU's: reads and writes of a copy).
    gigabytes_per_second: Option<f64>,
    share_of_bandwidth: Option<f64>,
    /// A prompt: products in GFLOP/s, and their share of what this machine multiplies in the weights' type.
    gflops: Option<f64>,
    share_of_matmul: Option<f64>,
    /// The first one's median over the other's.
    speed_up: Option<f64>,
    /// What the bytes promise: the weights, read once a step, and the keys and values (decoding few sequences).
    ideal_by_bytes: Option<f64>,
    /// What the products promise, with weights and of attention (prefill, decoding many sequences).
    ideal_by_flops: Option<f64>,
}

/// Runs the command. `threads` is how many compute.
pub fn run(args: &BenchArgs, threads: usize) -> Result<()> {
    match &args.what {
        Bench::Decode(a) => {
            let least = a.batch.iter().copied().chain([a.prompt, a.tokens, a.step_tokens]).min();
            let work = |d: &Decoder, size| Work::of_step(d, a.common.kv_dtype, size, a.step_tokens, a.prompt + a.tokens / 2);
            let tokens = a.tokens.next_multiple_of(a.step_tokens.max(1));
            speeds(&a.common, "sequences", &a.batch, least, a.prompt + tokens, work, |d, size| {
                let steps = Steps { sequences: size, prompt: a.prompt, tokens, step_tokens: a.step_tokens, cuda_graphs: !a.no_cuda_graphs };
                decode(d, a.common.kv_dtype, &steps)
            })
        }
        Bench::Prefill(a) => {
            let ends = (a.length.iter().copied().min(), a.length.iter().copied().max());
            speeds(&a.common, "prompt", &a.length, ends.0, ends.1.unwrap_or(0), Work::of_prompt, |d, length| prefill(d, a.common.kv_dtype, length))
        }
        Bench::Search(a) => search::run(a, threads),
        Bench::Serve(a) => serve::run(a, threads),
    }
}

/// What a step or a prompt asks of a machine.
struct Work {
    bytes: f64,
    flops: f64,
}

impl Work {
    /// So many tokens of each sequence, of which so many are past: every weight, and the past's keys and values. Divided by a sequence's tokens.
    fn of_step(decoder: &Decoder, kv_dtype: KvDTypeChoice, sequences: usize, tokens: usize, past: usize) -> Self {
        let config = decoder.config();
        let kv_bytes = config.kv_bytes_per_token(kv_dtype.of(decoder.dtype()).size_in_bytes());
        let products = 2 * (config.block_parameters() + head_parameters(config)) + attention_flops(config, past);
        Self { bytes: (decoder.multiplied_bytes() + sequences * past * kv_bytes) as f64 / tokens.max(1) as f64, flops: (sequences * products) as f64 }
    }

    /// All tokens of a prompt, the head for its last one only.
    fn of_prompt(decoder: &Decoder, length: usize) -> Self {
        let config = decoder.config();
        let products = 2 * (length * config.block_parameters() + head_parameters(config)) + attention_flops(config, length * (length + 1) / 2);
        Self { bytes: decoder.multiplied_bytes() as f64, flops: products as f64 }
    }
}

fn head_parameters(config: &Config) -> usize {
    config.vocab_size * config.hidden_size
}

/// Floating-point operations of attention over so many pairs of a query and a key: scores and weighted values.
fn attention_flops(config: &Config, pairs: usize) -> usize {
    let heads: usize = config.layers.iter().map(|l| l.shape.kv_groups * l.shape.group_size).sum();
    4 * heads * config.head_dim * pairs
}

/// Measures every size, in turns with the other checkpoint, and prints the lines. `least` and `longest` are checked against what a model can take.
fn speeds(
    common: &CommonArgs,
    what: &str,
    sizes: &[usize],
    least: Option<usize>,
    longest: usize,
    work: impl Fn(&Decoder, usize) -> Work,
    measure: impl Fn(&Decoder, usize) -> Result<f64>,
) -> Result<()> {
    if least.is_none_or(|n| n == 0) {
        bail!("sizes and lengths: expected at least 1, found 0");
    }
    let decoder = common.measured.load()?;
    let other = common.against.as_deref().map(|name| load_beside(name, &common.measured.model)).transpose()?;
    for config in [Some(decoder.config()), other.as_ref().map(Decoder::config)].into_iter().flatten() {
        if longest > config.max_position_embeddings {
            bail!("{longest} tokens: expected at most the model's context of {}", config.max_position_embeddings);
        }
    }
    let decoding = what == "sequences";
    let product = if decoding { None } else { Some(Matmul::new(&decoder)?) };
    let mut lines = Vec::new();
    for size in sizes {
        // (in turns with what is the bound of it)
        let (mut own, mut others, mut bandwidth, mut matmul) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        measure(&decoder, *size)?; // warms caches up
        for _ in 0..common.repeats {
            own.push(measure(&decoder, *size)?);
            if let Some(other) = &other {
                others.push(measure(other, *size)?);
            }
            if decoding {
                bandwidth.push(if decoder.device().is_cpu() { read_bandwidth() } else { copy_bandwidth(&decoder)? });
            }
            if let Some(product) = &product {
                matmul.push(product.gflops()?);
            }
        }
        let (own, against) = (spread(own), other.as_ref().map(|_| spread(others)));
        let asked = work(&decoder, *size);
        let ideal = |of: &dyn Fn(&Work) -> f64| other.as_ref().map(|other| of(&work(other, *size)) / of(&asked));
        let read = decoding.then(|| own[0] / *size as f64 * asked.bytes);
        let multiplied = (!decoding).then(|| own[0] / *size as f64 * asked.flops / 1e9);
        lines.push(Line {
            size: *size,
            tokens_per_second: own,
            against,
            gigabytes_per_second: read.map(|r| r / 1e9),
            share_of_bandwidth: read.filter(|_| !bandwidth.is_empty()).map(|r| r / spread(bandwidth)[0]),
            gflops: multiplied,
            share_of_matmul: multiplied.map(|m| m / spread(matmul)[0]),
            speed_up: against.map(|a| own[0] / a[0]),
            ideal_by_bytes: ideal(&|work| work.bytes),
            ideal_by_flops: ideal(&|work| work.flops),
        });
    }
    if common.json {
        println!("{}", serde_json::to_string_pretty(&lines)?);
        return Ok(());
    }
    print!("{what:>9}{:>12}{:>20}{:>9}{:>14}", "tokens/s", "from - to", if decoding { "GB/s" } else { "GFLOP/s" }, "of the bound");
    if lines.iter().any(|line| line.against.is_some()) {
        print!("{:>12}{:>20}{:>10}{:>10}{:>10}", "against", "from - to", "speed-up", "by bytes", "by FLOPs");
    }
    println!();
    for line in lines {
        let range = |s: [f64; 3]| format!("{:.1} - {:.1}", s[1], s[2]);
        let done = line.gigabytes_per_second.or(line.gflops).map_or(String::new(), |g| format!("{g:.1}"));
        let share = line.share_of_bandwidth.or(line.share_of_matmul).map_or(String::new(), |s| format!("{:.0}%", 100.0 * s));
        print!("{:>9}{:>12.1}{:>20}{done:>9}{share:>14}", line.size, line.tokens_per_second[0], range(line.tokens_per_second));
        if let (Some(a), Some(s), Some(bytes), Some(flops)) = (line.against, line.speed_up, line.ideal_by_bytes, line.ideal_by_flops) {
            print!("{:>12.1}{:>20}{s:>9.2}x{bytes:>9.2}x{flops:>9.2}x", a[0], range(a));
        }
        println!();
    }
    Ok(())
}

/// Another checkpoint on the same device, in the same type if one was said.
fn load_beside(name: &str, like: &ModelArgs) -> Result<Decoder> {
    let checkpoint = ModelSource::parse(Some(name))?.open(None).with_context(|| format!("--against {name}"))?;
    like.decoder_to_run(&checkpoint)
}

/// Bytes a second that all threads read together out of memory that no cache holds.
fn read_bandwidth() -> f64 {
    /// 512 MB.
    const WORDS: usize = 64 << 20;
    static MEMORY: std::sync::OnceLock<Vec<u64>> = std::sync::OnceLock::new();
    let words = MEMORY.get_or_init(|| (0..WORDS as u64).collect());
    let started = Instant::now();
    let sum = words.par_chunks(1 << 16).map(|part| part.iter().fold(0u64, |sum, word| sum.wrapping_add(*word))).reduce(|| 0, u64::wrapping_add);
    std::hint::black_box(sum);
    (WORDS * size_of::<u64>()) as f64 / started.elapsed().as_secs_f64()
}

/// Bytes a second that a GPU reads and writes when it copies.
fn copy_bandwidth(decoder: &Decoder) -> Result<f64> {
    /// 1 GiB.
    const NUMBERS: usize = 256 << 20;
    /// Copies in a row: one is over before its launch has been paid.
    const COPIES: usize = 8;
    let memory = evop_model::Tensor::zeros(NUMBERS, evop_model::DType::F32, decoder.device())?;
    let copies = || -> Result<()> {
        for _ in 0..COPIES {
            memory.copy()?;
        }
        Ok(())
    };
    copies()?;
    let seconds = search::seconds(decoder, &copies)?;
    Ok((COPIES * 2 * NUMBERS * size_of::<f32>()) as f64 / seconds)
}

/// Median, least and most.
fn spread(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values[values.len() / 2], values[0], values[values.len() - 1]]
}

/// Token `i` of a made-up prompt.
fn token(i: usize, config: &Config) -> u32 {
    ((i * 7919 + 13) % config.vocab_size) as u32
}

/// What is decoded.
#[derive(Debug, Clone, Copy)]
pub struct Steps {
    /// So many at once.
    pub sequences: usize,
    /// Tokens of each that are there before.
    pub prompt: usize,
    /// New tokens of each.
    pub tokens: usize,
    /// So many of each a step; it divides their number.
    pub step_tokens: usize,
    /// Whether steps are replayed, where the device can.
    pub cuda_graphs: bool,
}

/// New tokens a second over all sequences; prompts aren't timed.
pub fn decode(decoder: &Decoder, kv_dtype: KvDTypeChoice, steps: &Steps) -> Result<f64> {
    let Steps { sequences, prompt, tokens, step_tokens, cuda_graphs } = *steps;
    let config = decoder.config();
    let mut cache = FixedCache::new(config, kv_dtype.of(decoder.dtype()), decoder.device(), &vec![prompt + tokens; sequences])?;
    let mut next = Vec::with_capacity(sequences);
    for s in 0..sequences {
        let ids: Vec<u32> = (0..prompt).map(|i| token(i + 31 * s, config)).collect();
        next.extend(step(decoder, &ids, &[Span { past: 0, len: prompt }], cache.of([s]))?);
    }
    let mut graphs = if cuda_graphs { StepGraphs::new(&decoder.clone().into(), sequences * step_tokens)? } else { StepGraphs::default() };
    let mut generate = |next: &[u32], past: usize| -> Result<Vec<u32>> {
        let ids: Vec<u32> = next.iter().flat_map(|id| std::iter::repeat_n(*id, step_tokens)).collect();
        let spans = vec![Span { past, len: step_tokens }; sequences];
        match graphs.logits(0, &ids, &spans, &mut cache.of(0..sequences))? {
            Some(logits) => Ok(logits.chunks_exact(config.vocab_size).skip(step_tokens - 1).step_by(step_tokens).map(most_likely).collect()),
            None => step(decoder, &ids, &spans, cache.of(0..sequences)),
        }
    };
    // (what is done once, at the first step of a size, isn't timed)
    generate(&next, prompt + tokens - step_tokens)?;
    generate(&next, prompt)?;
    let started = Instant::now();
    for past in (prompt..prompt + tokens).step_by(step_tokens) {
        next = generate(&next, past)?;
    }
    Ok((sequences * tokens) as f64 / started.elapsed().as_secs_f64())
}

/// The index of the largest.
fn most_likely(logits: &[f32]) -> u32 {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    logits.iter().position(|logit| *logit == largest).unwrap_or(0) as u32
}

/// Prompt tokens a second of one sequence, to its first new token.
fn prefill(decoder: &Decoder, kv_dtype: KvDTypeChoice, length: usize) -> Result<f64> {
    let config = decoder.config();
    let mut cache = FixedCache::new(config, kv_dtype.of(decoder.dtype()), decoder.device(), &[length])?;
    let ids: Vec<u32> = (0..length).map(|i| token(i, config)).collect();
    // (not timed: a server's pool has been written to before, this cache is new memory)
    step(decoder, &ids, &[Span { past: 0, len: length }], cache.of([0]))?;
    let started = Instant::now();
    step(decoder, &ids, &[Span { past: 0, len: length }], cache.of([0]))?;
    Ok(length as f64 / started.elapsed().as_secs_f64())
}

/// One pass, and the most likely token after each span; what continues a sequence is judged at every token, as drafts are.
fn step(decoder: &Decoder, tokens: &[u32], spans: &[Span], mut cache: PagedCache<'_>) -> Result<Vec<u32>> {
    Ok(decoder.device().with_context(|| -> evop_model::Result<Vec<u32>> {
        let batch = decoder.batch(spans)?;
        let hidden = decoder.forward(tokens, &batch, &mut cache)?;
        let (mut rows, mut last, mut end) = (Vec::new(), Vec::new(), 0);
        for span in spans {
            end += span.len as u32;
            rows.extend(if span.past == 0 { end - 1 } else { end - span.len as u32 }..end);
            last.push(rows.len() - 1);
        }
        let index = evop_model::Tensor::from_slice(&rows, rows.len(), decoder.device())?;
        let likely = decoder.logits(&hidden.index_select(&index, 0)?)?.argmax(1)?.to_vec1::<u32>()?;
        Ok(last.into_iter().map(|row| likely[row]).collect())
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ends() {
        assert_eq!(spread(vec![3.0, 1.0, 2.0]), [2.0, 1.0, 3.0]);
    }
}
