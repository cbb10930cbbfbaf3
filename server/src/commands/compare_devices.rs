//! `evop compare-devices`: does an accelerator compute what the CPU computes? For `tests/gpu/run.sh`.

use super::model_args::{ModelArgs, bundled_held_out};
use anyhow::{Result, bail};
use clap::Args;
use evop_model::{DType, Decoder, Device, FixedCache, NoCache, Span};
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
        let argmax = |row: &[f32]| row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1)).map(|(i, _)| i);
        let agreeing = expected.iter().zip(&found).filter(|(a, b)| argmax(a) == argmax(b)).count();
        let equal_tokens = expected_tokens.iter().zip(&found_tokens).take_while(|(a, b)| a == b).count();
        println!(
            "{}",
            json!({ "model": checkpoint.path(), "device": args.model.device.to_string(), "dtype": format!("{dtype:?}"), "largest_logit_difference": largest,
                    "rows": tokens.len(), "rows_with_the_same_argmax": agreeing, "greedy_tokens": args.generated, "greedy_tokens_equal_from_the_start": equal_tokens })
        );
        if dtype == DType::F32 && (largest > F32_TOLERANCE || equal_tokens < args.generated) {
            failed.push(format!("{dtype:?}: logits differ by {largest}, {equal_tokens} of {} greedy tokens agree", args.generated));
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("the devices disagree: {}", failed.join("; ")) }
}

fn logits(decoder: &Decoder, tokens: &[u32]) -> Result<Vec<Vec<f32>>> {
    let batch = decoder.batch(&[Span::prompt(tokens.len())])?;
    Ok(decoder.logits(&decoder.forward(tokens, &batch, &mut NoCache)?)?.to_vec2()?)
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
