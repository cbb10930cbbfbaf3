//! Causal grouped-query attention on the CPU, reading keys and values where they lie.

use super::dot::{self, RowMajor};
use super::elementwise::softmax;
use super::{SharedOut, with_slice};
use crate::Result;
use crate::attention::AttentionSpec;
use crate::batch::Span;
use candle_core::Tensor;
use rayon::prelude::*;

/// Query positions that one task handles together.
const QUERY_TILE: usize = 16;

/// One sequence's keys and values, [span.past + span.len, kv_groups, d] each.
pub(crate) struct Rows<'a> {
    pub k: &'a [f32],
    pub v: &'a [f32],
    pub span: Span,
}

/// One sequence, everything in tensors.
pub(crate) fn attend_tensors(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, past: usize) -> Result<Tensor> {
    let span = Span { past, len: q.dim(0)? };
    with_slice(k, |k| with_slice(v, |v| attend_rows(spec, q, &[Rows { k, v, span }])))??
}

/// Sequences without a past whose keys and values are packed like the queries.
pub(crate) fn attend_packed(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, spans: &[Span]) -> Result<Tensor> {
    let width = spec.kv_groups * spec.head_dim;
    with_slice(k, |k| {
        with_slice(v, |v| {
            let mut start = 0;
            let rows: Vec<Rows<'_>> = spans
                .iter()
                .map(|span| {
                    let range = start * width..(start + span.len) * width;
                    start += span.len;
                    Rows { k: &k[range.clone()], v: &v[range], span: Span::prompt(span.len) }
                })
                .collect();
            attend_rows(spec, q, &rows)
        })
    })??
}

/// q [tokens, heads, d] of all sequences packed -> [tokens, heads * d].
pub(crate) fn attend_rows(spec: &AttentionSpec, q: &Tensor, sequences: &[Rows<'_>]) -> Result<Tensor> {
    let tokens = q.dim(0)?;
    let width = spec.heads() * spec.head_dim;
    let mut out = vec![0f32; tokens * width];
    let target = SharedOut(out.as_mut_ptr());
    // (sequence, group, first query, packed row of the first query)
    let mut tasks = Vec::new();
    let mut row = 0;
    for (s, rows) in sequences.iter().enumerate() {
        for first in (0..rows.span.len).step_by(QUERY_TILE) {
            tasks.extend((0..spec.kv_groups).map(|group| (s, group, first, row + first)));
        }
        row += rows.span.len;
    }
    with_slice(q, |q| {
        let run = |&(s, group, first, row): &(usize, usize, usize, usize)| {
            let queries = QUERY_TILE.min(sequences[s].span.len - first);
            tile(spec, &q[row * width..(row + queries) * width], &sequences[s], group, first, queries, target, row);
        };
        if tasks.len() == 1 { tasks.iter().for_each(run) } else { tasks.par_iter().for_each(run) }
    })?;
    Ok(Tensor::from_vec(out, (tokens, width), q.device())?)
}

/// `queries` positions from `first`, all heads of one group, into rows `row..` of the output.
#[allow(clippy::too_many_arguments)] // one inner loop, named parts
fn tile(spec: &AttentionSpec, q: &[f32], rows: &Rows<'_>, group: usize, first: usize, queries: usize, out: SharedOut, row: usize) {
    let AttentionSpec { kv_groups, group_size, head_dim: d, scale, window } = *spec;
    let width = spec.heads() * d;
    let past = rows.span.past;
    let last_key = past + first + queries; // exclusive, of the tile's last query
    let first_key = window.map_or(0, |w| (past + first + 1).saturating_sub(w));
    let keys = last_key - first_key;
    let lines = queries * group_size;
    let mut scaled = Vec::with_capacity(lines * d);
    for query in 0..queries {
        let from = query * width + group * group_size * d;
        scaled.extend(q[from..from + group_size * d].iter().map(|x| x * scale));
    }
    let at = |m: &[f32], key: usize| RowMajor { data: m[(key * kv_groups + group) * d..].as_ptr(), stride: kv_groups * d };
    let mut scores = vec![0f32; lines * keys];
    // SAFETY: `keys` rows of k from first_key, `lines` rows of the scaled queries, and scores of that size
    unsafe { dot::block(RowMajor { data: scaled.as_ptr(), stride: d }, lines, at(rows.k, first_key), keys, d, scores.as_mut_ptr(), keys) };
    let range = |line: usize| {
        let position = past + first + line / group_size;
        (window.map_or(0, |w| (position + 1).saturating_sub(w)) - first_key, position + 1 - first_key)
    };
    let ranges: Vec<(usize, usize)> = (0..lines).map(range).collect();
    for (line, (from, to)) in ranges.iter().enumerate() {
        softmax(&mut scores[line * keys + from..line * keys + to]);
    }
    let head = |line: usize| group * group_size + line % group_size;
    // SAFETY: these (row, head) belong to this task alone; `keys` rows of v from first_key on
    unsafe {
        let out: Vec<*mut f32> = (0..lines).map(|line| out.get().add((row + line / group_size) * width + head(line) * d)).collect();
        dot::weighted_sums(&scores, keys, &ranges, at(rows.v, first_key), &out, d);
    }
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
}
