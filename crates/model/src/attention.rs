//! Causal attention of one sequence's new tokens over all its keys and values, on any device.

use crate::Result;
use crate::batch::Batch;
use crate::kernels;
use candle_core::{D, DType, Device, Tensor};

/// The shape of one attention sub-block.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AttentionSpec {
    /// Key/value heads.
    pub kv_groups: usize,
    /// Query heads that share one of them.
    pub group_size: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Multiplies the scores: 1 / sqrt(head_dim).
    pub scale: f32,
    /// Keys further back than this (the query's own counted) are not seen.
    pub window: Option<usize>,
}

impl AttentionSpec {
    /// Query heads.
    pub fn heads(&self) -> usize {
        self.kv_groups * self.group_size
    }
}

/// q [len, heads, d], k and v [past + len, kv_groups, d] -> [len, heads * d].
pub(crate) fn attend(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, past: usize) -> Result<Tensor> {
    match q.device() {
        Device::Cpu if q.dtype() == DType::F32 => kernels::attention::attend_tensors(spec, q, k, v, past),
        #[cfg(feature = "flash-attn")]
        _ if is_flash(q) => flash(spec, q, k, v),
        _ => reference(spec, q, k, v, past),
    }
}

/// All sequences of a pass that have no cached past: k and v are the pass's own.
pub(crate) fn attend_packed(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor> {
    let spans = batch.spans();
    if q.device().is_cpu() && q.dtype() == DType::F32 {
        return kernels::attention::attend_packed(spec, q, k, v, spans);
    }
    #[cfg(feature = "flash-attn")]
    if is_flash(q) {
        return flash_packed(spec, q, k, v, batch);
    }
    let mut outputs = Vec::with_capacity(spans.len());
    let mut start = 0;
    for span in spans {
        let rows = |t: &Tensor| t.narrow(0, start, span.len);
        outputs.push(attend(spec, &rows(q)?, &rows(k)?, &rows(v)?, 0)?);
        start += span.len;
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// Whether candle-flash-attn has kernels for such queries.
#[cfg(feature = "flash-attn")]
pub(crate) fn is_flash(q: &Tensor) -> bool {
    q.device().is_cuda() && matches!(q.dtype(), DType::BF16 | DType::F16)
}

#[cfg(feature = "flash-attn")]
fn flash(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let batched = |t: &Tensor| t.unsqueeze(0);
    let (q4, k4, v4) = (batched(q)?, batched(k)?, batched(v)?);
    // the kernel aligns the last query with the last key, which is what a cached past needs
    let out = match spec.window {
        Some(window) => candle_flash_attn::flash_attn_windowed(&q4, &k4, &v4, spec.scale, Some(window - 1), Some(0))?,
        None => candle_flash_attn::flash_attn(&q4, &k4, &v4, spec.scale, true)?,
    };
    Ok(out.reshape((q.dim(0)?, spec.heads() * spec.head_dim))?)
}

/// All spans in one launch.
#[cfg(feature = "flash-attn")]
fn flash_packed(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor> {
    let (offsets, longest) = (&batch.offsets, batch.spans().iter().map(|s| s.len).max().unwrap_or(0));
    let out = match spec.window {
        Some(window) => candle_flash_attn::flash_attn_varlen_windowed(q, k, v, offsets, offsets, longest, longest, spec.scale, Some(window - 1), Some(0))?,
        None => candle_flash_attn::flash_attn_varlen(q, k, v, offsets, offsets, longest, longest, spec.scale, true)?,
    };
    Ok(out.reshape((q.dim(0)?, spec.heads() * spec.head_dim))?)
}

/// Where the sequences of a pass lie in a pool of blocks, as the kernel that reads it in place takes it. All u32.
#[cfg(feature = "flash-attn")]
#[derive(Debug)]
pub(crate) struct Pages {
    /// [spans, blocks].
    pub table: Tensor,
    /// [spans + 1]: the spans' lengths added up, and the longest of them or more.
    pub queries: (Tensor, usize),
    /// [spans + 1]: the sequences' lengths, cached tokens and new ones, added up, and the longest of them or more.
    pub keys: (Tensor, usize),
}

#[cfg(feature = "flash-attn")]
impl Pages {
    /// `tables[i]` are the blocks of sequence i.
    pub(crate) fn new(tables: &[&[u32]], batch: &Batch, device: &Device) -> Result<Self> {
        let spans = batch.spans();
        let lengths = || spans.iter().map(|span| span.past + span.len);
        let longest = lengths().max().unwrap_or(0);
        let width = longest.div_ceil(crate::BLOCK_TOKENS);
        // (a shorter sequence's row goes on with a block that isn't read)
        let table: Vec<u32> = tables.iter().flat_map(|table| table.iter().copied().chain(std::iter::repeat(0)).take(width)).collect();
        let keys = crate::batch::offsets(lengths());
        Ok(Self {
            table: Tensor::from_vec(table, (spans.len(), width), device)?,
            queries: (batch.offsets.clone(), spans.iter().map(|s| s.len).max().unwrap_or(0)),
            keys: (Tensor::from_vec(keys, spans.len() + 1, device)?, longest),
        })
    }
}

/// All sequences of a pass in one launch; k and v [blocks, 32, kv_groups, d], the new rows among them.
#[cfg(feature = "flash-attn")]
pub(crate) fn attend_pages(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, pages: &Pages) -> Result<Tensor> {
    let left = spec.window.map(|window| window - 1);
    let ((queries, most_queries), (keys, most_keys)) = (&pages.queries, &pages.keys);
    let out = candle_flash_attn::flash_attn_varlen_paged_windowed(
        q,
        k,
        v,
        queries,
        keys,
        &pages.table,
        None,
        *most_queries,
        *most_keys,
        spec.scale,
        left,
        Some(0),
        crate::BLOCK_TOKENS,
        None,
    )?;
    Ok(out.reshape((q.dim(0)?, spec.heads() * spec.head_dim))?)
}

/// Plain tensor operations: any device and dtype, no speed. Softmax in f32.
pub(crate) fn reference(spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, past: usize) -> Result<Tensor> {
    let AttentionSpec { kv_groups, group_size, head_dim, .. } = *spec;
    let (len, keys) = (q.dim(0)?, k.dim(0)?);
    // [kv_groups, len * group_size, d]: the queries of a group share its keys, so nothing is repeated
    let q = q.reshape((len, kv_groups, group_size, head_dim))?.transpose(0, 1)?.contiguous()?.reshape((kv_groups, len * group_size, head_dim))?;
    let k = k.transpose(0, 1)?.contiguous()?;
    let v = v.transpose(0, 1)?.contiguous()?;
    let scores = (q.matmul(&k.t()?)?.to_dtype(DType::F32)? * f64::from(spec.scale))?;
    let mut mask = Vec::with_capacity(len * group_size * keys);
    for query in 0..len {
        let last = past + query;
        let first = spec.window.map_or(0, |w| (last + 1).saturating_sub(w));
        let row = (0..keys).map(|key| if key > last || key < first { f32::NEG_INFINITY } else { 0.0 });
        for _ in 0..group_size {
            mask.extend(row.clone());
        }
    }
    let mask = Tensor::from_vec(mask, (1, len * group_size, keys), q.device())?;
    let weights = candle_nn::ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.to_dtype(v.dtype())?;
    let out = weights.matmul(&v)?.reshape((kv_groups, len, group_size, head_dim))?;
    Ok(out.transpose(0, 1)?.contiguous()?.reshape((len, spec.heads() * head_dim))?)
}
