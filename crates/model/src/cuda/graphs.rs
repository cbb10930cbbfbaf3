//! CUDA graphs of generating steps. A graph is launched over memory that stays where it is, so a step's inputs are copied to fixed places first, and its
//! logits come from a fixed place. Steps are padded to a few sizes: rows that are nobody's go to the pool's last block and are attended by no sequence.

use crate::attention::{AttentionSpec, Pages};
use crate::batch::{self, Batch};
use crate::cache::attend_in_place;
use crate::{BLOCK_TOKENS, Decoder, Elastic, Error, KvCache, PagedCache, Positions, Result, Span};
use candle_core::cuda_backend::cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};
use candle_core::cuda_backend::cudarc::driver::{CudaGraph, CudaStream, DeviceRepr, PinnedHostSlice};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::{CudaDevice, CudaStorage, DType, InplaceOp1, Layout, Storage, Tensor};
use std::collections::HashMap;
use std::sync::Arc;

/// Steps of more rows are long enough to be launched as they come.
const MOST_ROWS: usize = 256;
/// Tokens of a sequence that a graph takes: one, and drafts to be checked. (A tile of the attention kernel holds more, so one graph serves all.)
const MOST_TOKENS: usize = 8;
/// Block tables have this width, or 4, 16, … times as much.
const LEAST_BLOCKS: usize = 8;
/// Graphs that are kept; one more, and all are recorded anew.
const MOST_GRAPHS: usize = 64;
/// Recordings that may fail: others use the GPU too, and what they do can spoil one.
const MOST_FAILURES: usize = 3;

/// What a graph was recorded for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Size {
    member: usize,
    /// Tokens of all sequences, and sequences.
    rows: usize,
    /// Blocks of one sequence, at most.
    blocks: usize,
}

impl Size {
    /// The smallest for so many rows, and sequences of so many tokens.
    fn of(member: usize, rows: usize, longest: usize) -> Self {
        let mut blocks = LEAST_BLOCKS;
        while blocks * BLOCK_TOKENS < longest {
            blocks *= 4;
        }
        Self { member, rows: if rows <= 8 { rows.next_power_of_two() } else { rows.next_multiple_of(8) }, blocks }
    }

    /// Where the inputs of a step lie, one behind the other: tokens, slots, positions, where the spans' rows begin, where the sequences' keys begin, blocks.
    fn ids(&self) -> [usize; 6] {
        [self.rows, self.rows, self.rows, self.rows + 1, self.rows + 1, self.rows * self.blocks]
    }
}

/// The graphs, and the places that they read and write.
pub(crate) struct Graphs {
    /// (dropped before what they use)
    recorded: HashMap<Size, CudaGraph>,
    model: Elastic,
    device: CudaDevice,
    most_rows: usize,
    /// [`Size::ids`], u32.
    ids: Tensor,
    /// Cosines, then sines, f32.
    angles: Tensor,
    /// [most_rows, vocab] f32.
    logits: Tensor,
    host: PinnedHostSlice<f32>,
    /// The pool that the recorded ones write to, which they keep.
    pool: Vec<(Tensor, Tensor)>,
    failures: usize,
}

// SAFETY: a graph and page-locked memory may be used from any thread, one at a time
unsafe impl Send for Graphs {}

impl std::fmt::Debug for Graphs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Graphs").field("recorded", &self.recorded.keys()).finish_non_exhaustive()
    }
}

impl Graphs {
    /// `None` where attention has no kernel that reads blocks in place.
    pub fn new(model: &Elastic, rows: usize) -> Result<Option<Self>> {
        let decoder = model.parent();
        let config = decoder.config();
        if !decoder.device().is_cuda() || !matches!(decoder.dtype(), DType::BF16 | DType::F16) {
            return Ok(None);
        }
        let device = decoder.device().as_cuda_device()?.clone();
        let largest = Size::of(0, rows.clamp(1, MOST_ROWS), config.max_position_embeddings);
        let (most_rows, ids) = (largest.rows, largest.ids().iter().sum::<usize>());
        let logits = most_rows * config.vocab_size;
        // SAFETY: it is read after it was written: by the copy of a step's logits
        let host = unsafe { device.cuda_stream().context().alloc_pinned_with_flags(logits, 0) }.w()?;
        Ok(Some(Self {
            recorded: HashMap::new(),
            ids: Tensor::zeros(ids, DType::U32, decoder.device())?,
            angles: Tensor::zeros(most_rows * config.head_dim, DType::F32, decoder.device())?,
            logits: Tensor::zeros((most_rows, config.vocab_size), DType::F32, decoder.device())?,
            host,
            model: model.clone(),
            device,
            most_rows,
            pool: Vec::new(),
            failures: 0,
        }))
    }

    pub fn logits(&mut self, member: usize, tokens: &[u32], spans: &[Span], cache: &mut PagedCache<'_>) -> Result<Option<&[f32]>> {
        let longest = spans.iter().map(|s| s.past + s.len).max().unwrap_or(0);
        let size = Size::of(member, tokens.len(), longest);
        let fits = size.rows <= self.most_rows && size.ids().iter().sum::<usize>() <= self.ids.elem_count();
        if !fits || self.failures >= MOST_FAILURES || spans.iter().any(|s| s.len > MOST_TOKENS) {
            return Ok(None);
        }
        self.copy_inputs(&size, tokens, spans, cache)?;
        if !cache.on_device().map(|(k, _)| k.id()).eq(self.pool.iter().map(|(k, _)| k.id())) {
            self.recorded.clear();
            self.pool = cache.on_device().map(|(k, v)| (k.clone(), v.clone())).collect();
        }
        match self.recorded.get(&size) {
            Some(graph) => graph.launch().w()?,
            // (which leaves the step's logits where a replay does)
            None => self.record(size, tokens.len(), cache)?,
        }
        self.read_logits(tokens.len()).map(Some)
    }

    fn member(&self, size: &Size) -> Result<&Decoder> {
        self.model.member(size.member).ok_or_else(|| Error::Input(format!("member {} of {}", size.member, self.model.len())))
    }

    /// Puts what a step is about to where its graph reads it.
    fn copy_inputs(&self, size: &Size, tokens: &[u32], spans: &[Span], cache: &PagedCache<'_>) -> Result<()> {
        let decoder = self.member(size)?;
        let config = decoder.config();
        decoder.check_tokens(tokens, spans.iter().map(|s| s.len).sum())?;
        let tables = cache.tables_of(spans)?;
        let mut ids = Vec::with_capacity(size.ids().iter().sum());
        let mut add = |values: &mut dyn Iterator<Item = u32>, count: usize, padding: u32| {
            let end = ids.len() + count;
            ids.extend(values.take(count));
            ids.resize(end, padding);
        };
        let positions = || spans.iter().zip(tables).flat_map(|(span, table)| (span.past..span.past + span.len).map(move |p| (p, *table)));
        let learned = match config.positions {
            Positions::Learned { offset } => offset,
            Positions::Rope(_) => 0,
        };
        add(&mut tokens.iter().copied(), size.rows, 0);
        add(&mut positions().map(|(p, table)| crate::cache::slot(table, p) as u32), size.rows, cache.unowned_slot());
        add(&mut positions().map(|(p, _)| (p + learned) as u32), size.rows, learned as u32);
        for lengths in [|s: &Span| s.len, |s: &Span| s.past + s.len] {
            let offsets = batch::offsets(spans.iter().map(lengths));
            let end = offsets.last().copied().unwrap_or(0);
            add(&mut offsets.into_iter(), size.rows + 1, end);
        }
        for table in tables {
            add(&mut table.iter().copied(), size.blocks, 0);
        }
        self.ids.inplace_op1(&Copy(&ids))?;
        if let Positions::Rope(parameters) = &config.positions {
            let (mut angles, sin) = batch::angles(parameters, config.head_dim, spans);
            angles.resize(size.rows * config.head_dim / 2, 0.0);
            angles.extend(sin);
            self.angles.inplace_op1(&Copy(&angles))?;
        }
        Ok(())
    }

    /// Launches the pass of a size over its inputs, whose first `rows` are those of a step, and records it; what can't be recorded is launched all the same.
    fn record(&mut self, size: Size, rows: usize, cache: &mut PagedCache<'_>) -> Result<()> {
        // (kernels and workspaces are loaded at their first use, which can't be recorded; and launches' parameters stay on the device from here on)
        let kept = self.device.enable_cuda_graph_htod_cache();
        self.pass(&size, cache)?;
        drop(kept);
        let launched = self.read_logits(rows)?.to_vec();
        let why = match self.capture(&size, cache).and_then(|graph| Ok(graph.launch().w().map(|()| graph)?)) {
            Ok(graph) => {
                if self.read_logits(rows)?.iter().zip(&launched).all(|(replayed, launched)| replayed.to_bits() == launched.to_bits()) {
                    tracing::debug!(?size, "recorded a step");
                    if self.recorded.len() >= MOST_GRAPHS {
                        self.recorded.clear();
                    }
                    self.recorded.insert(size, graph);
                    return Ok(());
                }
                "its logits differ from those of the same step launched".to_string()
            }
            Err(why) => why.to_string(),
        };
        self.failures += 1;
        let off = self.failures >= MOST_FAILURES;
        tracing::warn!(?size, why, off, "a step couldn't be recorded as a CUDA graph: it is launched kernel by kernel, which is slower");
        self.pass(&size, cache)
    }

    fn capture(&self, size: &Size, cache: &mut PagedCache<'_>) -> Result<CudaGraph> {
        let _alone = crate::device::recording();
        let _kept = self.device.enable_cuda_graph_htod_cache();
        let capture = Capture::begin(self.device.cuda_stream())?;
        self.pass(size, cache)?;
        capture.end()
    }

    /// The logits of a step's rows, one row after the other.
    fn read_logits(&mut self, rows: usize) -> Result<&[f32]> {
        let (read, stream) = (rows * self.logits.dim(1)?, self.device.cuda_stream());
        let (storage, _) = self.logits.storage_and_layout();
        let Storage::Cuda(storage) = &*storage else { return Err(Error::Device("the logits left the device".into())) };
        // (as many numbers are copied as the destination has)
        let host = &mut self.host.as_mut_slice().w()?[..read];
        stream.memcpy_dtoh(&storage.as_cuda_slice::<f32>()?.slice(..read), host).w()?;
        stream.synchronize().w()?;
        Ok(host)
    }

    /// The pass: out of the fixed inputs, into the fixed logits.
    fn pass(&self, size: &Size, cache: &mut PagedCache<'_>) -> Result<()> {
        let decoder = self.member(size)?;
        let mut first = 0;
        let mut parts = Vec::with_capacity(6);
        for count in size.ids() {
            parts.push(self.ids.narrow(0, first, count)?);
            first += count;
        }
        let half = decoder.config().head_dim / 2;
        let angles = |first: usize| -> Result<Tensor> { Ok(self.angles.narrow(0, first * size.rows * half, size.rows * half)?.reshape((1, size.rows, half))?) };
        let rope = match decoder.config().positions {
            Positions::Rope(_) => Some((angles(0)?, angles(1)?)),
            Positions::Learned { .. } => None,
        };
        let (queries, keys) = (parts[3].clone(), parts[4].clone());
        let batch = Batch::of_rows(size.rows, rope, parts[2].clone(), queries.clone());
        let pages = Pages { table: parts[5].reshape((size.rows, size.blocks))?, queries: (queries, MOST_TOKENS), keys: (keys, size.blocks * BLOCK_TOKENS) };
        let mut places = Places { cache, slots: parts[1].clone(), pages };
        let hidden = decoder.embed_ids(&parts[0], &batch)?;
        let hidden = decoder.forward_range(hidden, 0..decoder.last_boundary(), &batch, &mut places)?;
        Ok(self.logits.slice_set(&decoder.logits(&hidden)?, 0, 0)?)
    }
}

/// A stream that records what is launched on it; it ends with this, whatever happened.
struct Capture {
    stream: Arc<CudaStream>,
    ended: bool,
}

impl Capture {
    fn begin(stream: Arc<CudaStream>) -> Result<Self> {
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).w()?;
        Ok(Self { stream, ended: false })
    }

    fn stop(&mut self) -> candle_core::Result<Option<CudaGraph>> {
        self.ended = true;
        self.stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH).w()
    }

    fn end(mut self) -> Result<CudaGraph> {
        self.stop()?.ok_or_else(|| Error::Device("nothing was recorded".into()))
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        if !self.ended {
            let _ = self.stop();
        }
    }
}

/// A paged cache whose tables and slots are on the device already.
struct Places<'c, 'p> {
    cache: &'c PagedCache<'p>,
    slots: Tensor,
    pages: Pages,
}

impl KvCache for Places<'_, '_> {
    fn attend(&mut self, layer: usize, spec: &AttentionSpec, q: &Tensor, k: &Tensor, v: &Tensor, _batch: &Batch) -> Result<Tensor> {
        let (keys, values, groups) = self.cache.layer_on_device(layer, spec)?;
        super::cache(k, v, &self.slots, keys, values)?;
        attend_in_place(spec, q, [keys, values], groups, &self.pages)
    }
}

/// Copies numbers of the host to the beginning of a tensor.
struct Copy<'h, T>(&'h [T]);

impl<T: CudaDType + DeviceRepr + 'static> InplaceOp1 for Copy<'_, T> {
    fn name(&self) -> &'static str {
        "copy"
    }

    fn cpu_fwd(&self, _: &mut candle_core::CpuStorage, _: &Layout) -> candle_core::Result<()> {
        candle_core::bail!("for tensors on a GPU only")
    }

    fn cuda_fwd(&self, to: &mut CudaStorage, _: &Layout) -> candle_core::Result<()> {
        let device = to.device.clone();
        let mut to = to.as_cuda_slice_mut::<T>()?.slice_mut(..self.0.len());
        device.memcpy_htod(self.0, &mut to)
    }
}
