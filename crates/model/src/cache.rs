//! What a forward pass needs of a key/value cache, and the paged one: blocks of [`BLOCK_TOKENS`] tokens that belong to whatever sequence holds
//! them, in the manner of Kwon et al. 2023 (arXiv 2309.06180). There is memory only for attention that exists, and only for its groups.

use crate::attention::{self, AttentionSpec};
use crate::batch::{Batch, Place, Span};
use crate::kernels;
use crate::kernels::attention::{Lines, Numbers, Sequence};
use crate::{Config, Error, Result};
use candle_core::{DType, Device, Tensor};
use half::f16;
use half::slice::HalfFloatSliceExt;
use memmap2::MmapMut;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Tokens of a block.
pub const BLOCK_TOKENS: usize = 32;

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

/// Blocks of keys and values, of all layers at once: block `b` is the same tokens in every layer.
#[derive(Debug)]
pub struct KvPool {
    layers: Vec<Option<LayerBlocks>>,
    blocks: usize,
    bytes_per_block: usize,
}

#[derive(Debug)]
struct LayerBlocks {
    groups: usize,
    store: Store,
}

#[derive(Debug)]
enum Store {
    /// [blocks][groups][32][d] each: a group's keys of a block lie together, read in place by our kernel. The system gives memory when it is written.
    Host { k: Pages<f32>, v: Pages<f32> },
    /// The same in half the memory.
    HostHalf { k: Pages<f16>, v: Pages<f16> },
    /// [(blocks + 1) * 32, groups * d] each: a last block belongs to no sequence.
    Device { k: Tensor, v: Tensor },
}

impl KvPool {
    /// `blocks` blocks for a model of this shape, held in `dtype`: what the model computes in, or on the CPU f16.
    ///
    /// # Errors
    /// [`Error::Candle`] or [`Error::Device`] when there is no memory for them.
    pub fn new(config: &Config, dtype: DType, device: &Device, blocks: usize) -> Result<Self> {
        let layer = |groups: usize| -> Result<LayerBlocks> {
            let (rows, width) = (blocks * BLOCK_TOKENS, groups * config.head_dim);
            let store = match dtype {
                DType::F32 if device.is_cpu() => Store::Host { k: Pages::new(rows * width)?, v: Pages::new(rows * width)? },
                DType::F16 if device.is_cpu() => Store::HostHalf { k: Pages::new(rows * width)?, v: Pages::new(rows * width)? },
                _ => {
                    let rows = rows + BLOCK_TOKENS;
                    Store::Device { k: Tensor::zeros((rows, width), dtype, device)?, v: Tensor::zeros((rows, width), dtype, device)? }
                }
            };
            Ok(LayerBlocks { groups, store })
        };
        let layers = config.layers.iter().map(|l| (l.shape.kv_groups > 0).then(|| layer(l.shape.kv_groups)).transpose()).collect::<Result<_>>()?;
        Ok(Self { layers, blocks, bytes_per_block: Self::bytes_per_block(config, dtype) })
    }

    /// Bytes that one block takes in all layers.
    pub fn bytes_per_block(config: &Config, dtype: DType) -> usize {
        BLOCK_TOKENS * config.kv_bytes_per_token(dtype.size_in_bytes())
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        self.blocks * self.bytes_per_block
    }

    /// The cache of a pass over sequences that hold these blocks, in the batch's order: `tables[i][j]` holds tokens 32 j .. 32 (j + 1) of sequence i.
    /// The blocks of the pass's new tokens must belong to one sequence each.
    pub fn paged<'p>(&'p mut self, tables: Vec<&'p [u32]>) -> PagedCache<'p> {
        PagedCache { pool: self, tables, slots: HashMap::new() }
    }
}

/// Numbers that zeroed bytes are zeros of.
///
/// # Safety
/// Zeroed bytes must be a value of the type, and a page's alignment enough for it.
unsafe trait Zeroed {}

// SAFETY: IEEE 754
unsafe impl Zeroed for f32 {}
// SAFETY: IEEE 754
unsafe impl Zeroed for f16 {}

/// Zeros that take memory only when they are written to: pages of their own, since an allocator would write zeros into those that it had before.
#[derive(Debug)]
struct Pages<T> {
    map: MmapMut,
    count: usize,
    of: PhantomData<T>,
}

impl<T: Zeroed> Pages<T> {
    fn new(count: usize) -> Result<Self> {
        let bytes = count.saturating_mul(size_of::<T>());
        let map = MmapMut::map_anon(bytes.max(1)).map_err(|e| Error::Device(format!("{bytes} bytes can't be had: {e}")))?;
        // With huge pages all layers take a new one of two megabytes in the same step, some 85 blocks apart, and everyone waits for their zeros: a third of
        // a second with 30 layers. A refusal changes nothing.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::NoHugePage);
        Ok(Self { map, count, of: PhantomData })
    }
}

impl<T: Zeroed> Deref for Pages<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the map has so many numbers, which are zeros or what was written, and is borrowed with the slice
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.count) }
    }
}

impl<T: Zeroed> DerefMut for Pages<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed for writing
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.count) }
    }
}

/// A [`KvPool`] under the block tables of one batch.
#[derive(Debug)]
pub struct PagedCache<'p> {
    pool: &'p mut KvPool,
    tables: Vec<&'p [u32]>,
    /// Where the rows of a part of the pass lie, by the part's first span and their number; the same in every layer. For [`Store::Device`].
    slots: HashMap<(usize, usize), Slots>,
}

/// Where rows of a part of a pass lie in a [`Store::Device`]. What a layer asks for is made once.
#[derive(Debug)]
struct Slots {
    /// [tokens] u32: of the new rows.
    new: Tensor,
    held: Option<Held>,
}

/// All rows of a part's sequences.
#[derive(Debug)]
enum Held {
    /// Per sequence [past + len] u32, to be gathered.
    Rows(Vec<Tensor>),
    /// For a kernel that reads them in place.
    #[cfg(feature = "flash-attn")]
    Pages(attention::Pages),
}

impl Slots {
    fn new(tables: &[&[u32]], batch: &Batch, device: &Device) -> Result<Self> {
        let new: Vec<u32> = PagedCache::positions(batch).map(|(s, p)| slot(tables[s], p) as u32).collect();
        let new = Tensor::from_vec(new, batch.tokens(), device)?;
        Ok(Self { new, held: None })
    }

    /// Puts the new rows, [tokens, kv_groups, d], to their places in [rows, groups * d]. (A narrower attention leaves a row's last groups unused.)
    fn write(&self, pools: [&Tensor; 2], [k, v]: [&Tensor; 2]) -> Result<()> {
        #[cfg(feature = "cuda")]
        if k.device().is_cuda() {
            return crate::cuda::cache(k, v, &self.new, pools[0], pools[1]);
        }
        for (rows, new) in pools.into_iter().zip([k, v]) {
            let ((tokens, groups, d), pool_width) = (new.dims3()?, rows.dim(1)?);
            let index = self.new.unsqueeze(1)?.broadcast_as((tokens, pool_width))?.contiguous()?;
            let new = new.reshape((tokens, groups * d))?.pad_with_zeros(1, 0, pool_width - groups * d)?.contiguous()?;
            rows.scatter_set(&index, &new, 0)?;
        }
        Ok(())
    }

    fn held(&mut self, tables: &[&[u32]], batch: &Batch, q: &Tensor) -> Result<&Held> {
        let held = match self.held.take() {
            Some(held) => held,
            #[cfg(feature = "flash-attn")]
            None if attention::is_flash(q) => Held::Pages(attention::Pages::new(tables, batch, q.device())?),
            None => Held::Rows(rows(tables, batch, q.device())?),
        };
        Ok(self.held.insert(held))
    }
}

/// Where each sequence's rows lie, [past + len] u32 each.
fn rows(tables: &[&[u32]], batch: &Batch, device: &Device) -> Result<Vec<Tensor>> {
    let of = |(table, span): (&&[u32], &Span)| -> Result<Tensor> {
        let slots: Vec<u32> = (0..span.past + span.len).map(|p| slot(table, p) as u32).collect();
        Ok(Tensor::from_vec(slots, span.past + span.len, device)?)
    };
    tables.iter().zip(batch.spans()).map(of).collect()
}

impl<'p> PagedCache<'p> {
    fn check(&self, layer: usize, spec: &AttentionSpec, batch: &Batch) -> Result<()> {
        self.groups(layer, spec)?;
        self.check_tables(self.tables(batch)?, batch.spans())
    }

    /// How many groups a layer has here, for an attention of no more of them.
    fn groups(&self, layer: usize, spec: &AttentionSpec) -> Result<usize> {
        let groups = self.pool.layers.get(layer).and_then(Option::as_ref).map_or(0, |l| l.groups);
        if groups < spec.kv_groups {
            return Err(Error::Input(format!(
                "the cache was made for another shape: it has no attention in layer {layer} of {} groups, but of {groups}",
                spec.kv_groups
            )));
        }
        Ok(groups)
    }

    fn check_tables(&self, tables: &[&[u32]], spans: &[Span]) -> Result<()> {
        for (table, span) in tables.iter().zip(spans) {
            let needed = (span.past + span.len).div_ceil(BLOCK_TOKENS);
            if table.len() < needed || table.iter().any(|b| *b as usize >= self.pool.blocks) {
                return Err(Error::Input(format!("a sequence of {} tokens needs {needed} blocks of this cache, found {table:?}", span.past + span.len)));
            }
        }
        Ok(())
    }

    /// The tables of a whole pass.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn tables_of(&self, spans: &[Span]) -> Result<&[&'p [u32]]> {
        if self.tables.len() != spans.len() {
            return Err(Error::Input(format!("expected a block table a sequence: {}, found {}", spans.len(), self.tables.len())));
        }
        self.check_tables(&self.tables, spans)?;
        Ok(&self.tables)
    }

    /// A token's place that belongs to no sequence.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn unowned_slot(&self) -> u32 {
        (self.pool.blocks * BLOCK_TOKENS) as u32
    }

    /// A layer's keys and values, [rows, groups * d] each, and its groups.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn layer_on_device(&self, layer: usize, spec: &AttentionSpec) -> Result<(&Tensor, &Tensor, usize)> {
        let groups = self.groups(layer, spec)?;
        match &self.pool.layers[layer] {
            Some(LayerBlocks { store: Store::Device { k, v }, .. }) => Ok((k, v, groups)),
            _ => Err(Error::Input("this cache isn't on a GPU".into())),
        }
    }

    /// All layers' keys and values that there are.
    #[cfg(feature = "flash-attn")]
    pub(crate) fn on_device(&self) -> impl Iterator<Item = (&Tensor, &Tensor)> {
        let layers = self.pool.layers.iter().flatten();
        layers.filter_map(|layer| if let Store::Device { k, v } = &layer.store { Some((k, v)) } else { None })
    }

    /// The tables of the batch's sequences.
    fn tables(&self, batch: &Batch) -> Result<&[&'p [u32]]> {
        let Place { first_span, spans, .. } = batch.place();
        let of = self.tables.get(first_span..first_span + batch.spans().len()).filter(|_| spans == self.tables.len());
        of.ok_or_else(|| Error::Input(format!("expected a block table a sequence: {spans}, found {}", self.tables.len())))
    }

    /// Packed row -> (sequence, position).
    fn positions(batch: &Batch) -> impl Iterator<Item = (usize, usize)> {
        batch.spans().iter().enumerate().flat_map(|(s, span)| (span.past..span.past + span.len).map(move |p| (s, p)))
    }
}

/// Where a token of a sequence lies, counted in tokens.
pub(crate) fn slot(table: &[u32], position: usize) -> usize {
    table[position / BLOCK_TOKENS] as usize * BLOCK_TOKENS + position % BLOCK_TOKENS
}

/// Writes the new keys or values of a pass to their places in [blocks][groups][32][d].
fn write_rows<T>(
    rows: &mut [T],
    new: &Tensor,
    tables: &[&[u32]],
    batch: &Batch,
    groups: usize,
    spec: &AttentionSpec,
    write: impl Fn(&mut [T], &[f32]),
) -> Result<()> {
    let d = spec.head_dim;
    kernels::with_slice(new, |new| {
        for ((s, position), row) in PagedCache::positions(batch).zip(new.chunks_exact(spec.kv_groups * d)) {
            let (block, within) = (tables[s][position / BLOCK_TOKENS] as usize, position % BLOCK_TOKENS);
            for (group, values) in row.chunks_exact(d).enumerate() {
                let at = ((block * groups + group) * BLOCK_TOKENS + within) * d;
                write(&mut rows[at..at + d], values);
            }
        }
    })
}

/// Attention over keys and values in blocks.
fn attend_blocks(spec: &AttentionSpec, q: &Tensor, tables: &[&[u32]], batch: &Batch, groups: usize, [k, v]: [Numbers<'_>; 2]) -> Result<Tensor> {
    let lines = |data, table| Lines::Blocks { data, table, groups };
    let sequences: Vec<Sequence<'_>> =
        tables.iter().zip(batch.spans()).map(|(table, span)| Sequence { k: lines(k, table), v: lines(v, table), span: *span }).collect();
    kernels::attention::attend(spec, q, &sequences)
}

/// Attention over rows of keys and values [rows, groups * d] that are gathered first, `held` for each sequence.
fn attend_rows(spec: &AttentionSpec, q: &Tensor, [k, v]: [&Tensor; 2], groups: usize, held: &[Tensor], batch: &Batch) -> Result<Tensor> {
    let mut outputs = Vec::with_capacity(held.len());
    let mut start = 0;
    for (held, span) in held.iter().zip(batch.spans()) {
        let rows = |of: &Tensor| -> Result<Tensor> {
            let rows = of.index_select(held, 0)?.reshape((span.past + span.len, groups, spec.head_dim))?;
            Ok(rows.narrow(1, 0, spec.kv_groups)?.contiguous()?)
        };
        outputs.push(attention::attend(spec, &q.narrow(0, start, span.len)?, &rows(k)?, &rows(v)?, span.past)?);
        start += span.len;
    }
    Ok(Tensor::cat(&outputs, 0)?)
}

/// Attention over rows of keys and values [rows, groups * d] where they lie.
#[cfg(feature = "flash-attn")]
pub(crate) fn attend_in_place(spec: &AttentionSpec, q: &Tensor, pools: [&Tensor; 2], groups: usize, pages: &attention::Pages) -> Result<Tensor> {
    let blocks = |rows: &Tensor| -> Result<Tensor> {
        let blocks = rows.reshape((rows.dim(0)? / BLOCK_TOKENS, BLOCK_TOKENS, groups, spec.head_dim))?;
        Ok(blocks.narrow(2, 0, spec.kv_groups)?)
    };
    attention::attend_pages(spec, q, &blocks(pools[0])?, &blocks(pools[1])?, pages)
}

impl KvCache for PagedCache<'_> {
    fn attend(&mut self, layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.check(layer, spec, batch)?;
        // (not through a method: the pool is borrowed for writing beside it)
        let first = batch.place().first_span;
        let tables = &self.tables[first..first + batch.spans().len()];
        let Some(LayerBlocks { groups, store }) = &mut self.pool.layers[layer] else { return Err(Error::Input(format!("no attention in layer {layer}"))) };
        let groups = *groups;
        match store {
            Store::Host { k: keys, v: values } => {
                for (rows, new) in [(&mut *keys, k), (&mut *values, v)] {
                    write_rows(rows, new, tables, batch, groups, spec, |to: &mut [f32], new| to.copy_from_slice(new))?;
                }
                attend_blocks(spec, q, tables, batch, groups, [Numbers::F32(keys), Numbers::F32(values)])
            }
            Store::HostHalf { k: keys, v: values } => {
                for (rows, new) in [(&mut *keys, k), (&mut *values, v)] {
                    write_rows(rows, new, tables, batch, groups, spec, |to: &mut [f16], new| to.convert_from_f32_slice(new))?;
                }
                attend_blocks(spec, q, tables, batch, groups, [Numbers::F16(keys), Numbers::F16(values)])
            }
            Store::Device { k: keys, v: values } => {
                let slots = match self.slots.entry((first, batch.spans().len())) {
                    Entry::Occupied(known) => known.into_mut(),
                    Entry::Vacant(unknown) => unknown.insert(Slots::new(tables, batch, q.device())?),
                };
                slots.write([keys, values], [k, v])?;
                match slots.held(tables, batch, q)? {
                    Held::Rows(held) => attend_rows(spec, q, [keys, values], groups, held, batch),
                    #[cfg(feature = "flash-attn")]
                    Held::Pages(pages) => attend_in_place(spec, q, [keys, values], groups, pages),
                }
            }
        }
    }
}

/// A pool shared out among a fixed number of sequences: for tools and tests, which know beforehand how long each becomes.
#[derive(Debug)]
pub struct FixedCache {
    pool: KvPool,
    tables: Vec<Vec<u32>>,
}

impl FixedCache {
    /// Blocks for sequences of so many tokens each.
    ///
    /// # Errors
    /// [`Error::Candle`] when the device has no memory for them.
    pub fn new(config: &Config, dtype: DType, device: &Device, capacities: &[usize]) -> Result<Self> {
        let mut next = 0;
        let tables: Vec<Vec<u32>> = capacities
            .iter()
            .map(|tokens| {
                let first = next;
                next += tokens.div_ceil(BLOCK_TOKENS) as u32;
                (first..next).collect()
            })
            .collect();
        Ok(Self { pool: KvPool::new(config, dtype, device, next as usize)?, tables })
    }

    /// The cache of a pass over these of the sequences, in the batch's order.
    pub fn of(&mut self, sequences: impl IntoIterator<Item = usize>) -> PagedCache<'_> {
        let tables = sequences.into_iter().map(|s| self.tables[s].as_slice()).collect();
        self.pool.paged(tables)
    }

    /// The pool.
    pub fn pool(&self) -> &KvPool {
        &self.pool
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::Span;
    use std::path::Path;

    /// q, k, v [tokens, heads or groups, d] in bf16.
    fn random(tokens: usize, spec: &AttentionSpec) -> [Tensor; 3] {
        [spec.heads(), spec.kv_groups, spec.kv_groups]
            .map(|n| Tensor::randn(0f32, 1.0, (tokens, n, spec.head_dim), &Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap())
    }

    #[test]
    fn the_device_store_gives_what_attention_over_whole_sequences_gives() {
        let config = Config::from_json(include_str!("../../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        // one group of the two that the pool has: the second half of a row stays unused
        for kv_groups in [2, 1] {
            let spec = AttentionSpec { kv_groups, group_size: 2, head_dim: 32, scale: 0.2, window: None };
            let mut cache = FixedCache::new(&config, DType::BF16, &Device::Cpu, &[70, 40]).unwrap();
            assert!(matches!(cache.pool.layers[0].as_ref().unwrap().store, Store::Device { .. }));
            let whole = [random(70, &spec), random(40, &spec)];
            let mut found: [Vec<Tensor>; 2] = Default::default();
            for chunks in [[(0, 50), (0, 7)], [(50, 19), (7, 32)], [(69, 1), (39, 1)]] {
                let spans = chunks.map(|(past, len)| Span { past, len });
                let batch = Batch::new(&config, &spans, &Device::Cpu).unwrap();
                let packed = |i: usize| Tensor::cat(&[0, 1].map(|s: usize| whole[s][i].narrow(0, chunks[s].0, chunks[s].1).unwrap()), 0).unwrap();
                let out = cache.of([0, 1]).attend(0, &spec, &packed(0), &packed(1), &packed(2), &batch).unwrap();
                found[0].push(out.narrow(0, 0, chunks[0].1).unwrap());
                found[1].push(out.narrow(0, chunks[0].1, chunks[1].1).unwrap());
            }
            for (found, [q, k, v]) in found.iter().zip(&whole) {
                let expected = attention::reference(&spec, q, k, v, 0).unwrap();
                let found = Tensor::cat(found, 0).unwrap();
                let difference = (expected - found).unwrap().abs().unwrap().flatten_all().unwrap().max(0).unwrap().to_dtype(DType::F32).unwrap();
                assert!(difference.to_scalar::<f32>().unwrap() < 5e-2);
            }
        }
    }

    #[test]
    fn keys_and_values_in_f16_take_half_the_memory_and_change_little() {
        let config = Config::from_json(include_str!("../../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        let spec = AttentionSpec { kv_groups: 2, group_size: 2, head_dim: 32, scale: 0.2, window: None };
        let wide = |t: Tensor| t.to_dtype(DType::F32).unwrap();
        let whole = random(70, &spec).map(wide);
        let [exact, half] = [DType::F32, DType::F16].map(|dtype| {
            let mut cache = FixedCache::new(&config, dtype, &Device::Cpu, &[70]).unwrap();
            let mut found = Vec::new();
            for (past, len) in [(0, 50), (50, 19), (69, 1)] {
                let batch = Batch::new(&config, &[Span { past, len }], &Device::Cpu).unwrap();
                let [q, k, v] = [0, 1, 2].map(|i: usize| whole[i].narrow(0, past, len).unwrap());
                found.extend(cache.of([0]).attend(0, &spec, &q, &k, &v, &batch).unwrap().to_vec2::<f32>().unwrap().concat());
            }
            (cache.pool().bytes(), found)
        });
        assert_eq!(exact.0, 2 * half.0);
        // (bf16 numbers of this size are f16 numbers, too: nothing is rounded)
        assert_eq!(exact.1, half.1);
        let batch = Batch::new(&config, &[Span { past: 0, len: 70 }], &Device::Cpu).unwrap();
        let [q, k, v] = [0, 1, 2].map(|i: usize| (&whole[i] * 1.001).unwrap());
        let [exact, half] = [DType::F32, DType::F16].map(|dtype| {
            let mut cache = FixedCache::new(&config, dtype, &Device::Cpu, &[70]).unwrap();
            cache.of([0]).attend(0, &spec, &q, &k, &v, &batch).unwrap().to_vec2::<f32>().unwrap().concat()
        });
        assert_ne!(exact, half, "rounded");
        assert!(exact.iter().zip(&half).all(|(a, b)| (a - b).abs() < 4e-3));
    }

    #[test]
    fn a_table_that_is_too_short_or_not_of_this_pool_is_refused() {
        let config = Config::from_json(include_str!("../../../models/tiny/config.json"), Path::new("config.json")).unwrap();
        let spec = AttentionSpec { kv_groups: 2, group_size: 2, head_dim: 32, scale: 0.2, window: None };
        let mut pool = KvPool::new(&config, DType::F32, &Device::Cpu, 3).unwrap();
        let batch = Batch::new(&config, &[Span { past: 30, len: 3 }], &Device::Cpu).unwrap();
        let [q, k, v] = random(3, &spec).map(|t| t.to_dtype(DType::F32).unwrap());
        for (table, expected) in [(vec![0], "needs 2 blocks"), (vec![0, 3], "needs 2 blocks")] {
            let error = pool.paged(vec![&table]).attend(0, &spec, &q, &k, &v, &batch).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        assert!(pool.paged(vec![&[0, 2]]).attend(0, &spec, &q, &k, &v, &batch).is_ok());
        assert!(pool.paged(vec![]).attend(0, &spec, &q, &k, &v, &batch).is_err());
    }
}
