//! What a forward pass needs of a key/value cache, and the simple contiguous one.

use crate::attention::{self, AttentionSpec};
use crate::batch::Batch;
use crate::kernels;
use crate::{Config, Result};
use candle_core::{DType, Tensor};

/// Stores the new keys and values of a pass and attends over everything stored.
pub trait KvCache {
    /// `layer` counts decoder layers; q [tokens, heads, d], k and v [tokens, kv_groups, d], all rows in the batch's order.
    /// Returns [tokens, heads * d].
    ///
    /// # Errors
    /// [`crate::Error::Candle`] when memory runs out.
    fn attend(&mut self, layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor>;
}

/// For whole sequences in one pass (evaluation, search): nothing is kept.
#[derive(Debug, Default, Clone, Copy)]
pub struct NoCache;

impl KvCache for NoCache {
    fn attend(&mut self, _layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor> {
        attention::attend_packed(spec, q, k, v, batch)
    }
}

/// Keys or values of one sequence in one layer, [tokens, kv_groups, d].
#[derive(Debug)]
enum Rows {
    Host(Vec<f32>),
    Device(Option<Tensor>),
}

impl Rows {
    fn append(&mut self, new: &Tensor) -> Result<()> {
        match self {
            Self::Host(rows) => kernels::extend_from(rows, new)?,
            Self::Device(rows) => {
                *rows = Some(match rows.take() {
                    Some(old) => Tensor::cat(&[&old, new], 0)?,
                    None => new.clone(),
                });
            }
        }
        Ok(())
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Host(rows) => rows.capacity() * size_of::<f32>(),
            Self::Device(rows) => rows.as_ref().map_or(0, |t| t.elem_count() * t.dtype().size_in_bytes()),
        }
    }
}

/// The cache of one sequence: memory only for attention sub-blocks that exist, and only for their groups.
#[derive(Debug)]
pub struct SequenceCache {
    layers: Vec<Option<(Rows, Rows)>>,
}

impl SequenceCache {
    /// An empty cache for a model of this shape; `capacity_tokens` is reserved on the CPU, so that growing copies nothing.
    pub fn new(config: &Config, dtype: DType, device: &candle_core::Device, capacity_tokens: usize) -> Self {
        let on_host = device.is_cpu() && dtype == DType::F32;
        let layer = |groups: usize| {
            let rows = || if on_host { Rows::Host(Vec::with_capacity(capacity_tokens * groups * config.head_dim)) } else { Rows::Device(None) };
            (groups > 0).then(|| (rows(), rows()))
        };
        Self { layers: config.layers.iter().map(|l| layer(l.shape.kv_groups)).collect() }
    }

    /// Bytes held (on the CPU: reserved).
    pub fn bytes(&self) -> usize {
        self.layers.iter().flatten().map(|(k, v)| k.bytes() + v.bytes()).sum()
    }
}

/// The caches of a batch's sequences, in the batch's order.
#[derive(Debug)]
pub struct BatchCache<'a> {
    sequences: Vec<&'a mut SequenceCache>,
}

impl<'a> BatchCache<'a> {
    /// One cache a span of the batch.
    pub fn new(sequences: Vec<&'a mut SequenceCache>) -> Self {
        Self { sequences }
    }
}

impl KvCache for BatchCache<'_> {
    fn attend(&mut self, layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor> {
        let mut start = 0;
        let mut on_device = Vec::new();
        for (sequence, span) in self.sequences.iter_mut().zip(batch.spans()) {
            let Some((keys, values)) = &mut sequence.layers[layer] else {
                return Err(crate::Error::Input(format!("the cache was made for another shape: it has no attention in layer {layer}")));
            };
            keys.append(&k.narrow(0, start, span.len)?)?;
            values.append(&v.narrow(0, start, span.len)?)?;
            if let (Rows::Device(Some(keys)), Rows::Device(Some(values))) = (&*keys, &*values) {
                on_device.push(attention::attend(spec, &q.narrow(0, start, span.len)?, keys, values, span.past)?);
            }
            start += span.len;
        }
        if !on_device.is_empty() {
            return Ok(Tensor::cat(&on_device, 0)?);
        }
        let mut rows = Vec::with_capacity(self.sequences.len());
        for (sequence, span) in self.sequences.iter().zip(batch.spans()) {
            if let Some((Rows::Host(k), Rows::Host(v))) = &sequence.layers[layer] {
                rows.push(kernels::attention::Rows { k, v, span: *span });
            }
        }
        kernels::attention::attend_rows(spec, q, &rows)
    }
}
