//! `evop compare-devices`: does an accelerator compute what the CPU computes? For `tests/gpu/run.sh`.

use super::model_args::{ModelArgs, bundled_held_out};
use anyhow::{Result, bail};
use clap::Args;
use evop_model::{DType, Decoder, Device, Elastic, FixedCache, Gene, NoCache, Pattern, Span, StepGraphs, Widths};
use serde::Serialize;
use serde_json::json;

/// Options of `evop compare-devices`.
#[derive(Debug, Clone, Args)]
pub struct CompareDevicesArgs {
    #[command(flatten)]
    pub model: ModelArgs,
    /// Tokens of text whose logits are compared.
    #[arg(long, value_name = "TOKENS", default_value_t = 200)]
    pub tokens: usize,
    /// Tokens generated greedily on both.
    #[arg(long, value_name = "TOKENS", default_value_t = 64)]
    pub generated: usize,
}

/// Largest difference of logits that f32 arithmetic in another order explains.
const F32_TOLERANCE: f32 = 2e-2;

/// Prints one JSON line a number type; fails where f32 logits or greedy tokens differ.
pub fn run(args: &CompareDevicesArgs) -> Result<()> {
    let device = args.model.device.open()?;
    if device.is_cpu() {
        bail!("--device: expected cuda or cuda:N, found the CPU: there is nothing to compare with");
    }
    let checkpoint = args.model.checkpoint()?;
    let text: String = bundled_held_out()?.chars().take(args.tokens * 12).collect();
    let mut tokens = checkpoint.encode(&text, false)?;
    tokens.truncate(args.tokens);
    let cpu = checkpoint.decoder(&Device::Cpu, DType::F32)?;
    let (expected, expected_tokens) = (logits(&cpu, &tokens)?, greedy(&cpu, &tokens, args.generated)?);
    let mut failed = Vec::new();
    for dtype in [DType::F32, DType::BF16] {
        let decoder = checkpoint.decoder(&device, dtype)?;
        let (found, found_tokens) = (logits(&decoder, &tokens)?, greedy(&decoder, &tokens, args.generated)?);
        let largest = expected.iter().flatten().zip(found.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let agreeing = expected.iter().zip(&found).filter(|(a, b)| argmax(a) == argmax(b)).count();
        let paged = paged(&decoder, &tokens)?;
        let unlike_paged = found.iter().flatten().zip(paged.iter().flatten()).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
        let agreeing_paged = found.iter().zip(&paged).filter(|(a, b)| argmax(a) == argmax(b)).count();
        let recorded = recorded(&decoder, &tokens)?;
        let equal_tokens = expected_tokens.iter().zip(&found_tokens).take_while(|(a, b)| a == b).count();
        println!(
            "{}",
            json!({ "model": checkpoint.path(), "device": args.model.device.to_string(), "dtype": format!("{dtype:?}"), "largest_logit_difference": largest,
                    "rows": tokens.len(), "rows_with_the_same_argmax": agreeing,
                    "recorded_steps": recorded,
                    "largest_difference_paged": unlike_paged, "rows_with_the_same_argmax_paged": agreeing_paged, "greedy_tokens": args.generated, "greedy_tokens_equal_from_the_start": equal_tokens })
        );
        if dtype == DType::F32 && (largest > F32_TOLERANCE || equal_tokens < args.generated) {
            failed.push(format!("{dtype:?}: logits differ by {largest}, {equal_tokens} of {} greedy tokens agree", args.generated));
        }
        if recorded.as_ref().is_some_and(|r| r.rows_with_the_same_argmax * 10 < r.rows * 9) {
            failed.push(format!("{dtype:?}: recorded steps have other logits than launched ones: {recorded:?}"));
        }
        if agreeing_paged * 10 < tokens.len() * 9 || (dtype == DType::F32 && unlike_paged > F32_TOLERANCE) {
            failed.push(format!(
                "{dtype:?}: out of a paged cache logits differ by {unlike_paged}, and {agreeing_paged} of {} rows have the same argmax",
                tokens.len()
            ));
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("the devices disagree: {}", failed.join("; ")) }
}

fn logits(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let batch = decoder.batch(&[Span::prompt(tokens.len())])?;
    Ok(decoder.logits(&decoder.forward(tokens, &batch, &mut NoCache)?)?.to_vec2()?)
}

/// The same logits out of a cache, which is filled in pieces, beside another sequence.
fn paged(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    const PIECE: usize = 45;
    let other: Vec<u32> = tokens.iter().rev().copied().collect();
    let mut cache = FixedCache::new(decoder.config(), decoder.dtype(), decoder.device(), &[other.len(), tokens.len()])?;
    let mut rows = Vec::with_capacity(tokens.len());
    for past in (0..tokens.len()).step_by(PIECE) {
        let piece = past..tokens.len().min(past + PIECE);
        let batch = decoder.batch(&[Span { past, len: piece.len() }; 2])?;
        let hidden = decoder.forward(&[&other[piece.clone()], &tokens[piece.clone()]].concat(), &batch, &mut cache.of([0, 1]))?;
        rows.extend(decoder.logits(&hidden.narrow(0, piece.len(), piece.len())?)?.to_vec2::<f32>()?);
    }
    Ok(rows)
}

/// Logits of recorded steps beside those of the same steps launched one by one.
#[derive(Debug, Default, Serialize)]
struct Recorded {
    rows: usize,
    rows_with_the_same_argmax: usize,
    largest_logit_difference: f32,
}

/// Three sequences of several lengths, through the whole model and a thinner form, one token a step and three; `None` where steps aren't recorded.
fn recorded(decoder: &Decoder, tokens: &[u32]) -> Result<Option<Recorded>> {
    const STEPS: usize = 12;
    let config = decoder.config();
    let gene = |(l, layer): (usize, &evop_model::LayerConfig)| Gene {
        kv_groups: if l == 1 { 0 } else { layer.shape.kv_groups.div_ceil(if l == 2 { 2 } else { 1 }) },
        ffn: if l == 3 { layer.shape.ffn / 2 } else { layer.shape.ffn },
    };
    let thin = Pattern::new(config.layers.iter().enumerate().map(gene).collect(), config)?;
    let model = Elastic::new(decoder.clone(), &[thin], &Widths::default())?;
    let mut graphs = StepGraphs::new(&model, 16)?;
    if !graphs.are_on() {
        return Ok(None);
    }
    let mut found = Recorded::default();
    for (member, step_tokens) in [(0, 1), (1, 1), (0, 3), (1, 3)] {
        let prompts = [7, 40, 100].map(|length| length.min(tokens.len()));
        let capacities = prompts.map(|prompt| prompt + STEPS * step_tokens);
        let new_cache = || FixedCache::new(config, decoder.dtype(), decoder.device(), &capacities);
        let (mut launched, mut replayed) = (new_cache()?, new_cache()?);
        let spans = prompts.map(Span::prompt);
        let ids: Vec<u32> = prompts.iter().flat_map(|prompt| &tokens[..*prompt]).copied().collect();
        for cache in [&mut launched, &mut replayed] {
            model.forward(&ids, &decoder.batch(&spans)?, &[member; 3], &mut cache.of(0..3))?;
        }
        for step in 0..STEPS {
            let spans = prompts.map(|prompt| Span { past: prompt + step * step_tokens, len: step_tokens });
            let ids: Vec<u32> = (0..3 * step_tokens).map(|i| tokens[(step * 31 + i * 7) % tokens.len()]).collect();
            let hidden = model.forward(&ids, &decoder.batch(&spans)?, &[member; 3], &mut launched.of(0..3))?;
            let expected = decoder.logits(&hidden)?.to_vec2::<f32>()?;
            let Some(logits) = graphs.logits(member, &ids, &spans, &mut replayed.of(0..3))? else { bail!("a step of {} tokens isn't recorded", ids.len()) };
            for (expected, logits) in expected.iter().zip(logits.chunks_exact(config.vocab_size)) {
                found.rows += 1;
                found.rows_with_the_same_argmax += usize::from(argmax(expected) == argmax(logits));
                let differences = expected.iter().zip(logits).map(|(a, b)| if a.is_nan() || b.is_nan() { f32::INFINITY } else { (a - b).abs() });
                found.largest_logit_difference = differences.fold(found.largest_logit_difference, f32::max);
            }
        }
    }
    Ok(Some(found))
}

fn argmax(row: &[f32]) -> Option<usize> {
    row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i)
}

fn greedy(decoder: &Decoder, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let mut cache = FixedCache::new(decoder.config(), decoder.dtype(), decoder.device(), &[prompt.len() + count])?;
    let (mut next, mut past, mut generated) = (prompt.to_vec(), 0, Vec::new());
    while generated.len() < count {
        let batch = decoder.batch(&[Span { past, len: next.len() }])?;
        let hidden = decoder.forward(&next, &batch, &mut cache.of([0]))?;
        let token = decoder.logits(&hidden.narrow(0, next.len() - 1, 1)?)?.flatten_all()?.argmax(0)?.to_scalar::<u32>()?;
        past += next.len();
        next = vec![token];
        generated.push(token);
    }
    Ok(generated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn logits_out_of_a_cache_are_those_without_one() {
        let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/tiny");
        let checkpoint = evop_model::Checkpoint::open(std::path::Path::new(directory)).unwrap();
        let decoder = checkpoint.decoder(&Device::Cpu, DType::F32).unwrap();
        let tokens: Vec<u32> = (40..140).collect();
        assert_eq!(logits(&decoder, &tokens).unwrap(), paged(&decoder, &tokens).unwrap());
    }
}
