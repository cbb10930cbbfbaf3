//! Causal grouped-query attention on the CPU, reading keys and values where they lie.

use super::dot::{self, RowMajor};
use super::elementwise::softmax;
use super::{SharedOut, team, unfilled, with_slice};
use crate::Result;
use crate::attention::AttentionSpec;
use crate::batch::Span;
use crate::cache::BLOCK_TOKENS;
use candle_core::Tensor;
use half::f16;
use half::slice::HalfFloatSliceExt;

/// Query positions that one task handles together.
const QUERY_TILE: usize = 16;

/// Numbers of a cache.
#[derive(Clone, Copy)]
pub(crate) enum Numbers<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
}

/// Where the keys or the values of one sequence lie.
#[derive(Clone, Copy)]
pub(crate) enum Lines<'a> {
    /// One after the other: [tokens, kv_groups, d].
    Packed(&'a [f32]),
    /// In blocks: [blocks][groups][32][d], of which the table names the sequence's.
    Blocks { data: Numbers<'a>, table: &'a [u32], groups: usize },
}

impl Lines<'_> {
    /// Calls `f(first position, rows, number)` with the rows of a group at positions `from..to` (absolute), in runs. Rows in f16 are widened run by run into
    /// `wide`, which stays in the first-level cache: from memory they come in half the bytes.
    fn each_run(self, spec: &AttentionSpec, group: usize, from: usize, to: usize, wide: &mut Vec<f32>, mut f: impl FnMut(usize, RowMajor, usize)) {
        let (d, kv_groups) = (spec.head_dim, spec.kv_groups);
        let (data, table, groups) = match self {
            Self::Packed(data) => {
                if from < to {
                    let rows = data[(from * kv_groups + group) * d..][..((to - from - 1) * kv_groups + 1) * d].as_ptr();
                    f(from, RowMajor { data: rows, stride: kv_groups * d }, to - from);
                }
                return;
            }
            Self::Blocks { data, table, groups } => (data, table, groups),
        };
        let mut at = from;
        while at < to {
            let count = (BLOCK_TOKENS - at % BLOCK_TOKENS).min(to - at);
            let first = (table[at / BLOCK_TOKENS] as usize * groups + group) * BLOCK_TOKENS + at % BLOCK_TOKENS;
            let range = first * d..(first + count) * d;
            let rows = match data {
                Numbers::F32(data) => &data[range],
                Numbers::F16(data) => {
                    wide.resize(BLOCK_TOKENS * d, 0.0);
                    data[range].convert_to_f32_slice(&mut wide[..count * d]);
                    &wide[..count * d]
                }
            };
            f(at, RowMajor { data: rows.as_ptr(), stride: d }, count);
            at += count;
        }
    }
}

/// One sequence's keys and values, of span.past + span.len tokens.
pub(crate) struct Sequence<'a> {
    pub k: Lines<'a>,
    pub v: Lines<'a>,
    pub span: Span,
}

/// One sequence, everything in tensors.
pub(crate) fn attend_tensors(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, past: usize) -> Result<Tensor> {
    let span = Span { past, len: q.dim(0)? };
    with_slice(k, |k| with_slice(v, |v| attend(spec, q, &[Sequence { k: Lines::Packed(k), v: Lines::Packed(v), span }])))??
}

/// Sequences without a past whose keys and values are packed like the queries.
pub(crate) fn attend_packed(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span]) -> Result<Tensor> {
    let width = spec.kv_groups * spec.head_dim;
    with_slice(k, |k| {
        with_slice(v, |v| {
            let mut start = 0;
            let sequences: Vec<Sequence<'_>> = spans
                .iter()
                .map(|span| {
                    let range = start * width..(start + span.len) * width;
                    start += span.len;
                    Sequence { k: Lines::Packed(&k[range.clone()]), v: Lines::Packed(&v[range]), span: Span::prompt(span.len) }
                })
                .collect();
            attend(spec, q, &sequences)
        })
    })??
}

/// q [tokens, heads, d] of all sequences packed -> [tokens, heads * d].
pub(crate) fn attend(spec: &AttentionSpec, q: &Tensor, sequences: &[Sequence<'_>]) -> Result<Tensor> {
    let tokens = q.dim(0)?;
    let width = spec.heads() * spec.head_dim;
    let mut out = unfilled(tokens * width);
    let target = SharedOut(out.as_mut_ptr());
    // (sequence, group, first query, packed row of the first query)
    let mut tasks = Vec::new();
    let mut row = 0;
    for (s, sequence) in sequences.iter().enumerate() {
        for first in (0..sequence.span.len).step_by(QUERY_TILE) {
            tasks.extend((0..spec.kv_groups).map(|group| (s, group, first, row + first)));
        }
        row += sequence.span.len;
    }
    with_slice(q, |q| {
        let run = |&(s, group, first, row): &(usize, usize, usize, usize)| {
            let queries = QUERY_TILE.min(sequences[s].span.len - first);
            tile(spec, &q[row * width..(row + queries) * width], &sequences[s], group, first, queries, target, row);
        };
        team::for_each(tasks.len(), |i| run(&tasks[i]));
    })?;
    Ok(Tensor::from_vec(out, (tokens, width), q.device())?)
}

/// `queries` positions from `first`, all heads of one group, into rows `row..` of the output.
#[allow(clippy::too_many_arguments)] // one inner loop, named parts
fn tile(spec: &AttentionSpec, q: &[f32], sequence: &Sequence<'_>, group: usize, first: usize, queries: usize, out: SharedOut, row: usize) {
    let AttentionSpec { group_size, head_dim: d, scale, window, .. } = *spec;
    let width = spec.heads() * d;
    let past = sequence.span.past;
    let last_key = past + first + queries; // exclusive, of the tile's last query
    let first_key = window.map_or(0, |w| (past + first + 1).saturating_sub(w));
    let keys = last_key - first_key;
    let lines = queries * group_size;
    let mut scaled = Vec::with_capacity(lines * d);
    for query in 0..queries {
        let from = query * width + group * group_size * d;
        scaled.extend(q[from..from + group_size * d].iter().map(|x| x * scale));
    }
    let (mut scores, mut wide) = (vec![0f32; lines * keys], Vec::new());
    sequence.k.each_run(spec, group, first_key, last_key, &mut wide, |key, rows, count| {
        // SAFETY: `count` rows of keys, `lines` rows of the scaled queries, and the scores of those keys
        unsafe { dot::block(RowMajor { data: scaled.as_ptr(), stride: d }, lines, rows, count, d, scores.as_mut_ptr().add(key - first_key), keys) };
    });
    let range = |line: usize| {
        let position = past + first + line / group_size;
        (window.map_or(0, |w| (position + 1).saturating_sub(w)) - first_key, position + 1 - first_key)
    };
    let ranges: Vec<(usize, usize)> = (0..lines).map(range).collect();
    for (line, (from, to)) in ranges.iter().enumerate() {
        softmax(&mut scores[line * keys + from..line * keys + to]);
    }
    let head = |line: usize| group * group_size + line % group_size;
    // SAFETY: these (row, head) belong to this task alone
    let out: Vec<*mut f32> = (0..lines).map(|line| unsafe { out.get().add((row + line / group_size) * width + head(line) * d) }).collect();
    // SAFETY: d elements each
    out.iter().for_each(|line| unsafe { line.write_bytes(0, d) });
    sequence.v.each_run(spec, group, first_key, last_key, &mut wide, |key, rows, count| {
        let start = key - first_key;
        let within: Vec<(usize, usize)> =
            ranges.iter().map(|(from, to)| (from.clamp(&start, &(start + count)) - start, to.clamp(&start, &(start + count)) - start)).collect();
        // SAFETY: `count` rows of values, ranges within them, and lines of the output that are this task's
        unsafe { dot::weighted_sums(&scores[start..], keys, &within, rows, &out, d) };
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    fn spec(window: Option<usize>) -> AttentionSpec {
        AttentionSpec { kv_groups: 2, group_size: 3, head_dim: 16, scale: 0.25, window }
    }

    #[test]
    fn the_kernel_equals_plain_tensor_operations() {
        for (window, past, len) in [(None, 0, 1), (None, 0, 37), (Some(5), 0, 40), (None, 19, 7), (Some(8), 50, 3)] {
            let spec = spec(window);
            let q = Tensor::randn(0f32, 1.0, (len, 6, 16), &Device::Cpu).unwrap();
            let k = Tensor::randn(0f32, 1.0, (past + len, 2, 16), &Device::Cpu).unwrap();
            let v = Tensor::randn(0f32, 1.0, (past + len, 2, 16), &Device::Cpu).unwrap();
            let ours = attend_tensors(&spec, &q, &k, &v, past).unwrap().to_vec2::<f32>().unwrap();
            let plain = crate::attention::reference(&spec, &q, &k, &v, past).unwrap().to_vec2::<f32>().unwrap();
            for (a, b) in ours.iter().flatten().zip(plain.iter().flatten()) {
                assert!((a - b).abs() < 1e-5, "window {window:?} past {past} len {len}");
            }
        }
    }

    #[test]
    fn a_query_gets_the_same_bits_in_any_chunk() {
        let spec = spec(None);
        let q = Tensor::randn(0f32, 1.0, (50, 6, 16), &Device::Cpu).unwrap();
        let k = Tensor::randn(0f32, 1.0, (50, 2, 16), &Device::Cpu).unwrap();
        let v = Tensor::randn(0f32, 1.0, (50, 2, 16), &Device::Cpu).unwrap();
        let whole = attend_tensors(&spec, &q, &k, &v, 0).unwrap().to_vec2::<f32>().unwrap();
        for (start, len) in [(0, 1), (7, 20), (49, 1)] {
            let part = |t: &Tensor| t.narrow(0, 0, start + len).unwrap();
            let chunk = attend_tensors(&spec, &q.narrow(0, start, len).unwrap(), &part(&k), &part(&v), start).unwrap().to_vec2::<f32>().unwrap();
            assert_eq!(chunk, whole[start..start + len]);
        }
    }

    #[test]
    fn blocks_give_the_bits_of_rows_that_lie_together() {
        for (window, past, len) in [(None, 0, 70), (None, 100, 1), (Some(40), 90, 3), (None, 31, 2), (Some(5), 64, 1)] {
            let spec = spec(window);
            let (tokens, groups, d) = (past + len, 3, 16);
            let q = Tensor::randn(0f32, 1.0, (len, 6, d), &Device::Cpu).unwrap();
            let [k, v] = [0, 1].map(|_| Tensor::randn(0f32, 1.0, (tokens, 2, d), &Device::Cpu).unwrap());
            let table: Vec<u32> = (0..tokens.div_ceil(BLOCK_TOKENS) as u32).map(|b| (b * 5 + 2) % 7).collect();
            // a pool of three groups whose last one this attention doesn't have
            let blocks = |t: &Tensor| {
                let mut data = vec![f32::NAN; 7 * groups * BLOCK_TOKENS * d];
                for (p, row) in t.reshape((tokens, 2 * d)).unwrap().to_vec2::<f32>().unwrap().iter().enumerate() {
                    for (g, values) in row.chunks(d).enumerate() {
                        let at = ((table[p / BLOCK_TOKENS] as usize * groups + g) * BLOCK_TOKENS + p % BLOCK_TOKENS) * d;
                        data[at..at + d].copy_from_slice(values);
                    }
                }
                data
            };
            let paged = |k, v| {
                let lines = |data| Lines::Blocks { data, table: &table, groups };
                attend(&spec, &q, &[Sequence { k: lines(k), v: lines(v), span: Span { past, len } }]).unwrap().to_vec2::<f32>().unwrap()
            };
            let together = |k: &Tensor, v: &Tensor| attend_tensors(&spec, &q, k, v, past).unwrap().to_vec2::<f32>().unwrap();
            let (keys, values) = (blocks(&k), blocks(&v));
            assert_eq!(paged(Numbers::F32(&keys), Numbers::F32(&values)), together(&k, &v), "{window:?} {past} {len}");
            // in f16: the bits of keys and values that were rounded to it
            let [halves_k, halves_v] = [&keys, &values].map(|data| data.iter().map(|v| f16::from_f32(*v)).collect::<Vec<_>>());
            let rounded = |t: &Tensor| t.to_dtype(candle_core::DType::F16).unwrap().to_dtype(candle_core::DType::F32).unwrap();
            let halves = paged(Numbers::F16(&halves_k), Numbers::F16(&halves_v));
            assert_eq!(halves, together(&rounded(&k), &rounded(&v)), "{window:?} {past} {len}");
            for (a, b) in halves.iter().flatten().zip(together(&k, &v).iter().flatten()) {
                assert!((a - b).abs() < 5e-3, "{window:?} {past} {len}: {a} {b}");
            }
        }
    }
}
