//! What a GGUF file says of the model.

use super::architecture::Architecture;
use super::tensors::GgufTensor;
use crate::checkpoint::plan::Plan;
use crate::checkpoint::{Contents, FileType, shortest_window, window_note};
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use evop_model::gguf::{PROVENANCE, Value, ZERO_ATTENTION, ZERO_FEED_FORWARD};
use evop_model::{LayerShape, Positions, RopeScaling};

/// The key-value pairs of the model, in the order in which llama.cpp's converter has them.
pub(super) fn entries(
    contents: &Contents<'_>,
    plan: &Plan,
    architecture: &Architecture,
    tensors: &[GgufTensor],
    weights: Option<FileType>,
    notes: &mut Vec<String>,
) -> Result<Vec<(String, Value)>> {
    let config = &plan.config;
    let mut entries: Vec<(String, Value)> = vec![
        ("general.architecture".into(), text(architecture.name)),
        ("general.type".into(), text("model")),
        ("general.name".into(), text(contents.name)),
        ("general.size_label".into(), text(&size_label(tensors.iter().filter(|t| t.is_weight()).map(GgufTensor::elements).sum()))),
    ];
    let mut set = |suffix: &str, value: Value| entries.push((format!("{}.{suffix}", architecture.name), value));
    let context = match shortest_window(config) {
        Some(window) => {
            notes.push(window_note(window, config));
            window
        }
        None => config.max_position_embeddings,
    };
    set("block_count", number(config.num_layers())?);
    set("context_length", number(context)?);
    set("embedding_length", number(config.hidden_size)?);
    set("feed_forward_length", per_layer(architecture, |s| s.ffn)?);
    set("attention.head_count", per_layer(architecture, |s| s.kv_groups * s.group_size)?);
    set("attention.head_count_kv", per_layer(architecture, |s| s.kv_groups)?);
    if let Positions::Rope(rope) = &config.positions {
        set("rope.freq_base", Value::F32(rope.theta as f32));
        for (suffix, value) in rope_scaling(rope.scaling.as_ref(), rope.original_context, notes)? {
            set(suffix, value);
        }
    }
    set("attention.layer_norm_rms_epsilon", Value::F32(config.norm_eps as f32));
    set("attention.key_length", number(config.head_dim)?);
    set("attention.value_length", number(config.head_dim)?);
    set("vocab_size", number(config.vocab_size)?);
    set("rope.dimension_count", number(config.head_dim)?);
    let kind = tensors.iter().find(|t| t.name == "token_embd.weight").map_or(GgmlDType::F32, |t| t.kind);
    entries.push(("general.file_type".into(), Value::U32(file_type(weights, kind))));
    if tensors.iter().any(|t| t.kind.block_size() > 1) {
        entries.push(("general.quantization_version".into(), Value::U32(2)));
    }
    list_zeros(ZERO_ATTENTION, "an attention", &architecture.zero_attention, &mut entries, notes)?;
    list_zeros(ZERO_FEED_FORWARD, "an MLP", &architecture.zero_mlp, &mut entries, notes)?;
    if let Some(provenance) = contents.provenance {
        entries.push((PROVENANCE.into(), text(&provenance.to_string())));
    }
    Ok(entries)
}

fn text(value: &str) -> Value {
    Value::String(value.to_string())
}

fn number(value: usize) -> Result<Value> {
    u32::try_from(value).map(Value::U32).map_err(|_| Error::Format(format!("{value} is beyond GGUF's 32-bit numbers")))
}

/// One number, or one a layer where they may differ (32-bit signed, as llama.cpp's converter writes them).
fn per_layer(architecture: &Architecture, of: impl Fn(&LayerShape) -> usize) -> Result<Value> {
    if architecture.is_uniform() {
        return number(of(&architecture.shapes[0]));
    }
    let signed = |n: usize| i32::try_from(n).map(Value::I32).map_err(|_| Error::Format(format!("{n} is beyond GGUF's 32-bit numbers")));
    architecture.shapes.iter().map(|s| signed(of(s))).collect::<Result<_>>().map(Value::Array)
}

fn rope_scaling(scaling: Option<&RopeScaling>, original_context: usize, notes: &mut Vec<String>) -> Result<Vec<(&'static str, Value)>> {
    let float = |v: f64| Value::F32(v as f32);
    Ok(match scaling {
        // the last two are in `rope_freqs.weight`
        None | Some(RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_)) => Vec::new(),
        Some(RopeScaling::Linear { factor }) => vec![("rope.scaling.type", text("linear")), ("rope.scaling.factor", float(*factor))],
        Some(RopeScaling::Dynamic { .. }) => {
            notes.push("GGUF has no dynamic rotary scaling: it makes no difference within the context length that the file states".into());
            Vec::new()
        }
        Some(RopeScaling::Yarn { factor, attention_factor, .. }) => {
            let mut entries = vec![
                ("rope.scaling.type", text("yarn")),
                ("rope.scaling.factor", float(*factor)),
                ("rope.scaling.original_context_length", number(original_context)?),
            ];
            // llama.cpp multiplies it by what transformers has as a default
            let default = 0.1 * factor.max(1.0).ln() + 1.0;
            if *attention_factor != default {
                entries.push(("rope.scaling.attn_factor", float(attention_factor / default)));
            }
            entries
        }
    })
}

fn list_zeros(key: &str, what: &str, layers: &[usize], entries: &mut Vec<(String, Value)>, notes: &mut Vec<String>) -> Result<()> {
    if layers.is_empty() {
        return Ok(());
    }
    let list = layers.iter().map(|l| number(*l)).collect::<Result<_>>()?;
    entries.push((key.into(), Value::Array(list)));
    let named = layers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let of = if layers.len() == 1 { format!("layer {named} gets") } else { format!("layers {named} get") };
    notes.push(format!("{of} {what} of zeros: llama.cpp can't compute a layer without one there"));
    Ok(())
}

/// llama.cpp's `LLAMA_FTYPE` of what most matrices are.
fn file_type(weights: Option<FileType>, embedding: GgmlDType) -> u32 {
    match (weights, embedding) {
        (Some(FileType::Q8_0), _) => 7,
        (Some(FileType::Q4K), _) => 14,
        (_, GgmlDType::F16) => 1,
        (_, GgmlDType::BF16) => 32,
        _ => 0,
    }
}

/// `135M`, `1.2B`: two digits at least.
fn size_label(parameters: usize) -> String {
    let (scaled, unit) = match parameters as f64 {
        n if n >= 1e12 => (n / 1e12, "T"),
        n if n >= 1e9 => (n / 1e9, "B"),
        n if n >= 1e6 => (n / 1e6, "M"),
        n => (n / 1e3, "K"),
    };
    if scaled < 10.0 { format!("{scaled:.1}{unit}") } else { format!("{scaled:.0}{unit}") }
}

#[cfg(test)]
mod tests {
    use super::size_label;

    #[test]
    fn sizes_are_labelled_as_converters_do() {
        assert_eq!(
            [134_515_008, 1_235_814_400, 8_030_261_248, 2_886_784, 70_553_706_496, 900].map(size_label),
            ["135M", "1.2B", "8.0B", "2.9M", "71B", "0.9K"]
        );
    }
}
