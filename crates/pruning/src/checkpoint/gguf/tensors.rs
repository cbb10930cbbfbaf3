//! The tensors of a GGUF file: names, order of rows, types, and their bytes.

use super::architecture::Architecture;
use crate::checkpoint::convert::{convert, read};
use crate::checkpoint::plan::{Origin, Plan, Planned};
use crate::checkpoint::{Contents, FileType};
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use evop_model::gguf::{ROPE_FREQS, RowOrder, gguf_name, permute_rows};
use evop_model::{DType, Device, Positions, RawTensor, RopeParameters, RopeScaling, Tensor, TensorBytes, TensorNames};
use rayon::prelude::*;

/// One tensor of the file.
#[derive(Debug)]
pub(super) struct GgufTensor {
    pub name: String,
    pub kind: GgmlDType,
    /// As the source has it, rows first.
    pub shape: Vec<usize>,
    numbers: Numbers,
}

#[derive(Debug)]
enum Numbers {
    /// A tensor of the model, the rows of so many rotary heads to be interleaved.
    Planned(Planned, Option<usize>),
    Values(Vec<f32>),
}

/// Names and types of all tensors, in the file's order.
pub(super) fn plan(plan: &Plan, architecture: &Architecture, weights: Option<FileType>, notes: &mut Vec<String>) -> Result<Vec<GgufTensor>> {
    let names = TensorNames::of(plan.config.architecture);
    let mut types = Types { weights, tied: plan.config.tie_word_embeddings, odd: Vec::new() };
    let mut tensors = Vec::new();
    if let Some(divisors) = rope_divisors(plan) {
        tensors.push(GgufTensor { name: ROPE_FREQS.into(), kind: GgmlDType::F32, shape: vec![divisors.len()], numbers: Numbers::Values(divisors) });
    }
    for planned in plan.tensors.iter().cloned().chain(zero_sub_blocks(plan, architecture, names)) {
        let name = gguf_name(&planned.name).ok_or_else(|| Error::Format(format!("GGUF has no name for tensor `{}`", planned.name)))?;
        let heads = names.in_layer(&planned.name).filter(|_| architecture.interleaved).and_then(|(layer, part)| {
            let shape = architecture.shapes.get(layer)?;
            let (module, _) = part.rsplit_once('.')?;
            match module {
                "self_attn.q_proj" => Some(shape.kv_groups * shape.group_size),
                "self_attn.k_proj" => Some(shape.kv_groups),
                _ => None,
            }
        });
        tensors.push(GgufTensor { kind: types.of(&name, &planned), name, shape: planned.shape.clone(), numbers: Numbers::Planned(planned, heads) });
    }
    notes.extend(types.note());
    Ok(tensors)
}

/// Zeros for the sub-blocks that llama.cpp insists on.
fn zero_sub_blocks(plan: &Plan, architecture: &Architecture, names: TensorNames) -> Vec<Planned> {
    let (hidden, d) = (plan.config.hidden_size, plan.config.head_dim);
    let dtype = plan.tensors.first().map_or(DType::F32, |t| t.dtype);
    let zeros = |name: String, shape: &[usize]| Planned { name, origin: Origin::Zeros, shape: shape.to_vec(), dtype };
    let mut tensors = Vec::new();
    for l in &architecture.zero_attention {
        let (q, kv) = (architecture.shapes[*l].kv_groups * architecture.shapes[*l].group_size * d, architecture.shapes[*l].kv_groups * d);
        tensors.extend([
            zeros(names.attention_norm(*l), &[hidden]),
            zeros(names.q(*l), &[q, hidden]),
            zeros(names.k(*l), &[kv, hidden]),
            zeros(names.v(*l), &[kv, hidden]),
            zeros(names.o(*l), &[hidden, q]),
        ]);
    }
    for l in &architecture.zero_mlp {
        let ffn = architecture.shapes[*l].ffn;
        tensors.extend([
            zeros(names.mlp_norm(*l), &[hidden]),
            zeros(names.gate(*l), &[ffn, hidden]),
            zeros(names.up(*l), &[ffn, hidden]),
            zeros(names.down(*l), &[hidden, ffn]),
        ]);
    }
    tensors
}

/// What each rotary frequency is divided by, where one factor doesn't say it.
fn rope_divisors(plan: &Plan) -> Option<Vec<f32>> {
    let Positions::Rope(rope) = &plan.config.positions else { return None };
    match &rope.scaling {
        Some(RopeScaling::Divisors(divisors)) => Some(divisors.clone()),
        Some(RopeScaling::Llama3 { .. }) => {
            let frequencies = |rope: &RopeParameters| rope.inverse_frequencies(plan.config.head_dim, 1);
            let plain = frequencies(&RopeParameters { scaling: None, ..rope.clone() });
            Some(plain.iter().zip(frequencies(rope)).map(|(plain, scaled)| plain / scaled).collect())
        }
        _ => None,
    }
}

/// Chooses the type of every tensor and remembers those that can't have the one that was asked for.
struct Types {
    weights: Option<FileType>,
    tied: bool,
    /// Tensor, its columns, the type that it got.
    odd: Vec<(String, usize, GgmlDType)>,
}

impl Types {
    fn of(&mut self, name: &str, tensor: &Planned) -> GgmlDType {
        let [_, columns] = tensor.shape[..] else { return GgmlDType::F32 };
        let is_head = name == "output.weight" || (self.tied && name == "token_embd.weight");
        let wanted = match self.weights {
            None => match tensor.dtype {
                DType::F16 => GgmlDType::F16,
                DType::BF16 => GgmlDType::BF16,
                _ => GgmlDType::F32,
            },
            Some(FileType::F32) => GgmlDType::F32,
            Some(FileType::F16) => GgmlDType::F16,
            Some(FileType::Bf16) => GgmlDType::BF16,
            Some(FileType::Q8_0) => GgmlDType::Q8_0,
            // the head decides between tokens: llama.cpp's quantiser gives it more bits, too
            Some(FileType::Q4K) if is_head => GgmlDType::Q6K,
            Some(FileType::Q4K) => GgmlDType::Q4K,
        };
        let fitting = [wanted, GgmlDType::Q8_0, GgmlDType::F16].into_iter().find(|kind| columns.is_multiple_of(kind.block_size()));
        let kind = fitting.unwrap_or(GgmlDType::F16);
        if kind != wanted {
            self.odd.push((name.to_string(), columns, kind));
        }
        kind
    }

    fn note(&self) -> Option<String> {
        let (name, columns, kind) = self.odd.first()?;
        let wanted = self.weights.map_or_else(String::new, |w| w.to_string());
        Some(format!("{} matrices have rows that are no whole number of {wanted} blocks: `{name}` with {columns} columns is {kind:?}", self.odd.len()))
    }
}

impl GgufTensor {
    /// Bytes in the file.
    pub fn bytes(&self) -> u64 {
        let elements: usize = self.shape.iter().product();
        (elements / self.kind.block_size() * self.kind.type_size()) as u64
    }

    /// Elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether the model has it (rather than the format).
    pub fn is_weight(&self) -> bool {
        matches!(&self.numbers, Numbers::Planned(Planned { origin: Origin::Source(_), .. }, _))
    }

    /// The tensor as the file has it.
    pub fn encode<'a>(&'a self, contents: &Contents<'a>) -> Result<TensorBytes<'a>> {
        let (planned, heads) = match &self.numbers {
            Numbers::Values(values) => return Ok(values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()),
            Numbers::Planned(planned, heads) => (planned, heads),
        };
        let mut raw = read(contents, planned)?;
        if let Some(heads) = heads {
            let rows = raw.shape.first().copied().unwrap_or(0);
            raw.bytes = permute_rows(&raw.bytes, rows, *heads, RowOrder::LlamaCpp).into();
        }
        match self.kind {
            GgmlDType::F32 => convert(raw, DType::F32, &planned.name),
            GgmlDType::F16 => convert(raw, DType::F16, &planned.name),
            GgmlDType::BF16 => convert(raw, DType::BF16, &planned.name),
            blocks => quantize(&raw, blocks).map(TensorBytes::from),
        }
    }
}

/// Rows of a matrix in blocks of integers, some rows at a time on every core.
fn quantize(raw: &RawTensor<'_>, kind: GgmlDType) -> Result<Vec<u8>> {
    const ROWS: usize = 256;
    let columns = raw.shape.last().copied().unwrap_or(0);
    let row = columns * raw.dtype.size_in_bytes();
    let some_rows = |bytes: &[u8]| -> Result<Vec<u8>> {
        let part = RawTensor { dtype: raw.dtype, shape: vec![bytes.len() / row, columns], bytes: bytes.into() };
        let values = Tensor::from_vec(part.to_f32(), part.shape, &Device::Cpu)?;
        Ok(QTensor::quantize(&values, kind)?.data()?.into_owned())
    };
    let parts = raw.bytes.par_chunks(ROWS * row).map(some_rows).collect::<Result<Vec<_>>>()?;
    Ok(parts.concat())
}
