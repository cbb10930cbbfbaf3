//! The level database: for every sub-block its units in order of importance, and for every width the repaired output layer.
//!
//! Built once per model and calibration, a file a sub-block, written atomically; what is there already is checked against its
//! checksum and not built again. The search scores these weights, not raw ones; they are mapped, so that memory holds what is in use.

use crate::compensate::{self, Compensation, Regression, Repaired, SkipCompensation, choose_ridge};
use crate::gram::{Cross, Gram};
use crate::importance::Importance;
use crate::linalg::{self, Matrix};
use crate::stream::{Passage, Stream};
use crate::{Error, Result, storage};
use evop_model::{DType, Decoder, Device, Linear, NoCache, Source, SubBlock, Tensor, TensorNames, Widths};
use rayon::prelude::*;
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// How levels are made. `None`: what errs least on held-out activations, chosen for every sub-block on its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct LevelOptions {
    /// The order in which units go.
    pub importance: Option<Importance>,
    /// The repair of what stays.
    pub compensation: Option<Compensation>,
    /// How skipped sub-blocks are made up for.
    pub skips: Option<SkipCompensation>,
}

/// What a sub-block is asked to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Level {
    /// Groups or channels kept; 0: skipped.
    pub width: usize,
    /// Skipped sub-blocks right after it whose updates its output layer gives too.
    pub absorbed: usize,
}

/// Skipped sub-blocks in a row that one output layer stands in for at most: a whole layer.
const MOST_ABSORBED: usize = 2;

/// What a database was built from; each has a directory of its own in a store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelKey {
    /// SHA-256 of the model's tensors.
    pub model_sha256: String,
    /// What its matrices were held in: f32 or bf16.
    pub dtype: String,
    /// SHA-256 of the statistics' tokens, training and held-out.
    pub tokens_sha256: String,
    /// How.
    pub options: LevelOptions,
    /// Partial widths of every sub-block, ascending.
    pub widths: Vec<Vec<usize>>,
    /// Whether some pattern skips a sub-block.
    pub skippable: Vec<bool>,
}

impl LevelKey {
    /// The directory's name.
    fn name(&self) -> Result<String> {
        let json = serde_json::to_vec(self).map_err(|e| Error::io(Path::new(KEY), e.into()))?;
        Ok(sha256(&json)[..16].to_string())
    }

    /// The sub-blocks after `s` whose updates its output layer may have to give: the next ones that can be skipped in a row.
    fn followers(&self, decoder: &Decoder, s: usize) -> Vec<usize> {
        if !matches!(self.options.skips, None | Some(SkipCompensation::Linear)) || !decoder.config().pre_norm {
            return Vec::new();
        }
        let present = (s + 1..decoder.last_boundary()).filter(|t| decoder.sub_block(*t).is_some());
        present.take_while(|t| self.skippable[*t]).take(MOST_ABSORBED).collect()
    }

    /// Whether the scale that stands in for `s` is asked for.
    fn wants_scale(&self, decoder: &Decoder, s: usize) -> bool {
        matches!(self.options.skips, None | Some(SkipCompensation::Scale)) && decoder.config().pre_norm && self.skippable[s]
    }
}

/// What was chosen for one sub-block, and how well it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelReport {
    /// Sub-block.
    pub sub_block: usize,
    /// Units, the most important first; empty where they keep their places.
    pub order: Vec<usize>,
    /// The importance that gave the order.
    pub importance: Importance,
    /// The repair of partial widths.
    pub compensation: Compensation,
    /// Every output layer but the parent's own.
    pub levels: Vec<LevelError>,
    /// The scale that can stand in for the whole sub-block.
    pub scale: Option<Scale>,
    /// SHA-256 of the sub-block's file.
    sha256: String,
}

/// How well one level does on held-out activations: squared errors relative to the energy of the update that it should give.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LevelError {
    /// Which.
    pub level: Level,
    /// Ridge strength, relative to the mean diagonal of X^T X.
    pub ridge: f64,
    /// Without this repair: the raw weights, or those that absorb nothing.
    pub raw: f64,
    /// With it.
    pub repaired: f64,
    /// What is missing of the absorbed updates, relative to their own energy (1: all).
    pub missing: Option<f64>,
}

impl LevelError {
    /// Whether the repair is used: one that absorbs updates is only where it errs less than leaving them out.
    fn is_used(&self) -> bool {
        self.level.absorbed == 0 || self.repaired < self.raw
    }
}

/// The factor of the residual stream that stands in for a skipped sub-block.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Scale {
    /// The mean over channels of ||after||_1 / ||before||_1.
    pub factor: f64,
    /// What is missing of the update, relative to its energy, on held-out activations.
    pub missing: f64,
}

/// Orders and repaired output layers of one model.
#[derive(Debug)]
pub struct Levels {
    directory: PathBuf,
    reports: BTreeMap<usize, LevelReport>,
    skips: SkipCompensation,
    /// Bytes of statistics and of the residual stream while it was built.
    pub peak_statistics_bytes: usize,
}

/// Progress: sub-blocks done of all.
pub type OnSubBlock<'a> = dyn FnMut(usize, usize) -> Result<()> + 'a;

const KEY: &str = "levels.json";

impl Levels {
    /// Builds the database, or what is missing of it, in its directory of `store`. Repaired weights are rounded to the type that `source` has the parent's
    /// in, so that what is scored is what a checkpoint holds.
    ///
    /// # Errors
    /// [`Error::RunDirectory`] for a damaged file; [`Error::Activations`] when activations are not finite;
    /// [`Error::Io`] for a full disk.
    pub fn build(
        decoder: &Decoder,
        source: &dyn Source,
        train: &[Vec<u32>],
        held_out: &[Vec<u32>],
        key: &LevelKey,
        store: &Path,
        on: &mut OnSubBlock<'_>,
    ) -> Result<Self> {
        let directory = &store.join(key.name()?);
        std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
        if !directory.join(KEY).exists() {
            storage::write_json(&directory.join(KEY), key)?;
        }
        let none = SkipCompensation::None;
        let mut levels = Self { directory: directory.to_path_buf(), reports: BTreeMap::new(), skips: none, peak_statistics_bytes: 0 };
        let wanted = |s: usize| !key.widths[s].is_empty() || !key.followers(decoder, s).is_empty() || key.wants_scale(decoder, s);
        for s in (0..key.widths.len()).filter(|s| wanted(*s)) {
            levels.reports.extend(levels.read_report(s)?.map(|report| (s, report)));
        }
        // what is there already needs no activations after the last sub-block that isn't
        let missing = |levels: &Self, s: usize| wanted(s) && decoder.sub_block(s).is_some() && !levels.reports.contains_key(&s);
        let end = (0..key.widths.len()).rev().find(|s| missing(&levels, *s)).map_or(0, |last| last + 1);
        let (mut train, mut held_out) = (Stream::embed(decoder, train)?, Stream::embed(decoder, held_out)?);
        for s in 0..end {
            on(s, key.widths.len())?;
            let Some(block) = decoder.sub_block(s) else { continue };
            if !missing(&levels, s) {
                train.advance(decoder, block, s, |_| Ok(()))?;
                held_out.advance(decoder, block, s, |_| Ok(()))?;
                continue;
            }
            let followers = key.followers(decoder, s);
            let seen = Statistics::watch(&mut train, decoder, block, s, &followers)?;
            let unseen = Statistics::watch(&mut held_out, decoder, block, s, &followers)?;
            levels.peak_statistics_bytes = levels.peak_statistics_bytes.max(train.bytes() + held_out.bytes() + 2 * seen.bytes());
            let weight = linalg::from_tensor(&block.output().weight()?)?;
            let scale = key.wants_scale(decoder, s).then(|| unseen.scale(seen.factor()));
            let [train_data, held_out_data] = [seen, unseen].map(|of| Regression::of_layer(of.gram, &weight, &of.following));
            let made = Made { scale, ..Made::new(&train_data, &held_out_data, &weight, block.unit(), &key.widths[s], key.options)? };
            let names = TensorNames::of(decoder.config().architecture);
            let name = if s.is_multiple_of(2) { names.o(s / 2) } else { names.down(s / 2) };
            let report = levels.write(s, &made, source.dtype(&name)?)?;
            levels.reports.insert(s, report);
        }
        levels.skips = key.options.skips.unwrap_or_else(|| levels.choose_skips(decoder));
        on(key.widths.len(), key.widths.len())?;
        Ok(levels)
    }

    /// What leaves the least of the skipped updates missing on held-out activations, all sub-blocks taken together.
    fn choose_skips(&self, decoder: &Decoder) -> SkipCompensation {
        let mut missing = [0.0, 0.0, 0.0];
        for (s, report) in &self.reports {
            let Some(scale) = &report.scale else { continue };
            let before = (0..*s).rev().find(|p| decoder.sub_block(*p).is_some());
            let width = |p: usize| decoder.sub_block(p).map_or(0, SubBlock::width);
            let linear = before.and_then(|p| self.level(p, Level { width: width(p), absorbed: 1 })).and_then(|l| l.missing);
            missing[0] += 1.0;
            missing[1] += scale.missing;
            missing[2] += linear.unwrap_or(1.0);
        }
        let of = [SkipCompensation::None, SkipCompensation::Scale, SkipCompensation::Linear];
        (0..3).reduce(|best, other| if missing[other] < missing[best] { other } else { best }).map_or(SkipCompensation::None, |i| of[i])
    }

    /// What was chosen, a report a sub-block that has levels.
    pub fn reports(&self) -> impl Iterator<Item = &LevelReport> {
        self.reports.values()
    }

    /// How skipped sub-blocks are made up for.
    pub fn skips(&self) -> SkipCompensation {
        self.skips
    }

    /// Units of sub-block `s` in order of importance, if it has partial widths.
    pub fn order(&self, s: usize) -> Option<&[usize]> {
        self.reports.get(&s).map(|r| r.order.as_slice()).filter(|o| !o.is_empty())
    }

    /// The factor of the residual stream that stands in for sub-block `s` where it is skipped.
    pub fn scale(&self, s: usize) -> Option<f64> {
        self.reports.get(&s).filter(|_| self.skips == SkipCompensation::Scale).and_then(|r| r.scale).map(|scale| scale.factor)
    }

    /// The level of sub-block `s` that is used where `wanted` is asked for: one that absorbs less if absorbing as much as that didn't help.
    pub fn usable(&self, s: usize, wanted: Level) -> Level {
        let most = if self.skips == SkipCompensation::Linear { wanted.absorbed.min(MOST_ABSORBED) } else { 0 };
        let absorbed = (1..=most).rev().find(|absorbed| self.level(s, Level { absorbed: *absorbed, ..wanted }).is_some_and(LevelError::is_used));
        Level { absorbed: absorbed.unwrap_or(0), ..wanted }
    }

    fn level(&self, s: usize, level: Level) -> Option<&LevelError> {
        self.reports.get(&s)?.levels.iter().find(|l| l.level == level)
    }

    /// The repaired output layer of a usable level of sub-block `s`, on the decoder's device; `None` where the raw one's prefix is it.
    pub fn output(&self, s: usize, level: Level, decoder: &Decoder) -> Result<Option<Linear>> {
        let Some(report) = self.reports.get(&s).filter(|r| level.absorbed > 0 || r.compensation != Compensation::None) else { return Ok(None) };
        if self.level(s, level).is_none() {
            return Ok(None);
        }
        let path = self.file(s);
        // SAFETY: the file was written by rename and is not changed after
        let tensors = unsafe { candle_core::safetensors::MmapedSafetensors::new(&path)? };
        let load = |name: String, dtype: DType| -> Result<Tensor> { Ok(tensors.load(&name, decoder.device())?.to_dtype(dtype)?) };
        let has_bias = report.compensation == Compensation::Bias && level.absorbed == 0;
        let bias = if has_bias { Some(load(format!("bias.{}", level.width), decoder.dtype())?) } else { None };
        Ok(Some(Linear::new(load(format!("weight.{}.{}", level.width, level.absorbed), decoder.weight_type().plain()?)?, bias)?))
    }

    /// Orders and biases of the partial widths, where nothing else stands between them and the parent's weights: the repairs are none or biases, and skipped
    /// sub-blocks are not made up for.
    ///
    /// # Errors
    /// [`Error::Model`] for a file that can't be read.
    pub fn over_one_copy(&self, decoder: &Decoder) -> Result<Option<Widths>> {
        let raw = |report: &LevelReport| matches!(report.compensation, Compensation::None | Compensation::Bias);
        if self.skips != SkipCompensation::None || !self.reports.values().all(raw) {
            return Ok(None);
        }
        let mut widths = Widths::default();
        for (s, report) in self.reports.iter().filter(|(_, report)| report.levels.iter().any(|level| level.level.absorbed == 0)) {
            let mut biases = Vec::new();
            if report.compensation == Compensation::Bias {
                let tensors = candle_core::safetensors::load(self.file(*s), &Device::Cpu)?;
                for level in report.levels.iter().filter(|level| level.level.absorbed == 0) {
                    if let Some(bias) = tensors.get(&format!("bias.{}", level.level.width)) {
                        biases.push((level.level.width, bias.to_dtype(DType::F32)?.to_vec1()?));
                    }
                }
            }
            let in_place = 0..decoder.sub_block(*s).map_or(0, SubBlock::width);
            widths.insert(*s, if report.order.is_empty() { in_place.collect() } else { report.order.clone() }, biases);
        }
        Ok(Some(widths))
    }

    fn file(&self, s: usize) -> PathBuf {
        self.directory.join(format!("{s:04}.safetensors"))
    }

    fn report_file(&self, s: usize) -> PathBuf {
        self.directory.join(format!("{s:04}.json"))
    }

    /// The report of a sub-block whose file is whole; a damaged one is an error, a missing one is built.
    fn read_report(&self, s: usize) -> Result<Option<LevelReport>> {
        if !self.report_file(s).exists() {
            return Ok(None);
        }
        let report: LevelReport = storage::read_json(&self.report_file(s))?;
        let path = self.file(s);
        let found = sha256(&std::fs::read(&path).map_err(|e| Error::io(&path, e))?);
        if found != report.sha256 {
            let message =
                format!("the level file is damaged: expected SHA-256 {}, found {found}; delete it and its .json to have it built again", report.sha256);
            return Err(Error::RunDirectory { path, message });
        }
        Ok(Some(report))
    }

    fn write(&self, s: usize, made: &Made, stored: DType) -> Result<LevelReport> {
        let (dtype, round): (Dtype, fn(&f32) -> Vec<u8>) = match stored {
            DType::BF16 => (Dtype::BF16, |v| half::bf16::from_f32(*v).to_le_bytes().to_vec()),
            DType::F16 => (Dtype::F16, |v| half::f16::from_f32(*v).to_le_bytes().to_vec()),
            _ => (Dtype::F32, |v| v.to_le_bytes().to_vec()),
        };
        let bytes = |values: &[f32]| values.iter().flat_map(round).collect::<Vec<u8>>();
        let mut data: BTreeMap<String, (Vec<usize>, Vec<u8>)> = BTreeMap::new();
        for (error, repaired) in &made.levels {
            let Level { width, absorbed } = error.level;
            if !error.is_used() || (absorbed == 0 && made.compensation == Compensation::None) {
                continue;
            }
            data.insert(
                format!("weight.{width}.{absorbed}"),
                (vec![repaired.weight.nrows(), repaired.weight.ncols()], bytes(&linalg::to_f32(&repaired.weight))),
            );
            if let Some(bias) = &repaired.bias {
                let bias: Vec<f32> = bias.iter().map(|b| *b as f32).collect();
                data.insert(format!("bias.{width}"), (vec![bias.len()], bytes(&bias)));
            }
        }
        let path = self.file(s);
        let as_io = |e: safetensors::SafeTensorError| Error::io(&path, std::io::Error::other(e));
        let views: HashMap<&String, TensorView<'_>> =
            data.iter().map(|(name, (shape, bytes))| Ok((name, TensorView::new(dtype, shape.clone(), bytes).map_err(as_io)?))).collect::<Result<_>>()?;
        let file = safetensors::serialize(views, None).map_err(as_io)?;
        storage::write(&path, &file)?;
        let report = LevelReport {
            sub_block: s,
            order: made.order.clone(),
            importance: made.importance,
            compensation: made.compensation,
            levels: made.levels.iter().map(|(error, _)| *error).collect(),
            scale: made.scale,
            sha256: sha256(&file),
        };
        storage::write_json(&self.report_file(s), &report)?;
        Ok(report)
    }
}

/// An error about activations with the place where they are.
fn named(error: Error, s: usize, what: &str) -> Error {
    match error {
        Error::Activations(why) => {
            let name = if s.is_multiple_of(2) { "o_proj" } else { "down_proj" };
            Error::Activations(format!("layer {}, {what} of {name}: {why}; the weights or the calibration text are damaged", s / 2))
        }
        other => other,
    }
}

/// SHA-256 of sequences of tokens.
pub fn tokens_sha256<'a>(sequences: impl Iterator<Item = &'a Vec<u32>>) -> String {
    let mut hash = Sha256::new();
    for sequence in sequences {
        hash.update((sequence.len() as u64).to_le_bytes());
        sequence.iter().for_each(|t| hash.update(t.to_le_bytes()));
    }
    hex(&hash.finalize())
}

fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// What is seen of one sub-block's activations.
struct Statistics {
    gram: Gram,
    /// Of its output layer's inputs with the summed updates of one, two, … sub-blocks after it.
    following: Vec<Cross>,
    /// Per channel of the residual stream, the sums of absolute values before and after the sub-block.
    magnitudes: [Vec<f64>; 2],
    /// Sums of before . before, before . update and update . update.
    moments: [f64; 3],
}

impl Statistics {
    fn new(inputs: usize, outputs: usize, followers: usize) -> Self {
        let following = vec![Cross::new(inputs, outputs); followers];
        Self { gram: Gram::new(inputs), following, magnitudes: [vec![0.0; outputs], vec![0.0; outputs]], moments: [0.0; 3] }
    }

    /// Runs `block` in the place of sub-block `s` over a stream and looks at it.
    fn watch(stream: &mut Stream, decoder: &Decoder, block: &SubBlock, s: usize, followers: &[usize]) -> Result<Self> {
        let mut statistics = Self::new(block.output().inputs(), block.output().outputs(), followers.len());
        stream.advance(decoder, block, s, |passage| statistics.add(decoder, passage, s, followers))?;
        statistics.gram.finish();
        Ok(statistics)
    }

    fn add(&mut self, decoder: &Decoder, passage: &Passage<'_>, s: usize, followers: &[usize]) -> Result<()> {
        self.gram.add(passage.inputs, passage.batch.spans()).map_err(|e| named(e, s, "inputs"))?;
        let mut after = passage.after.clone();
        for (cross, s) in self.following.iter_mut().zip(followers) {
            after = decoder.device().with_context(|| decoder.forward_range(after, *s..s + 1, passage.batch, &mut NoCache))?;
            cross.add(passage.inputs, &(&after - passage.after)?).map_err(|e| named(e, *s, "outputs"))?;
        }
        if passage.before.device().is_cpu() { self.add_streams_on_host(passage) } else { self.add_streams_on_device(passage) }
    }

    fn add_streams_on_host(&mut self, passage: &Passage<'_>) -> Result<()> {
        let rows = |t: &Tensor| -> Result<Vec<Vec<f32>>> { Ok(t.to_dtype(DType::F32)?.to_vec2::<f32>()?) };
        for (before, after) in rows(passage.before)?.iter().zip(&rows(passage.after)?) {
            for (channel, (b, a)) in before.iter().zip(after).enumerate() {
                let (b, a) = (f64::from(*b), f64::from(*a));
                self.magnitudes[0][channel] += b.abs();
                self.magnitudes[1][channel] += a.abs();
                for (sum, term) in self.moments.iter_mut().zip([b * b, b * (a - b), (a - b) * (a - b)]) {
                    *sum += term;
                }
            }
        }
        Ok(())
    }

    fn add_streams_on_device(&mut self, passage: &Passage<'_>) -> Result<()> {
        let (before, after) = (passage.before.to_dtype(DType::F64)?, passage.after.to_dtype(DType::F64)?);
        for (sums, stream) in self.magnitudes.iter_mut().zip([&before, &after]) {
            let terms = stream.abs()?.sum(0)?.to_vec1::<f64>()?;
            sums.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
        }
        let update = (&after - &before)?;
        for (sum, (a, b)) in self.moments.iter_mut().zip([(&before, &before), (&before, &update), (&update, &update)]) {
            *sum += (a * b)?.sum_all()?.to_scalar::<f64>()?;
        }
        Ok(())
    }

    /// Prune&Comp's alpha.
    fn factor(&self) -> f64 {
        let [before, after] = &self.magnitudes;
        before.iter().zip(after).map(|(b, a)| a / b.max(f64::MIN_POSITIVE)).sum::<f64>() / before.len().max(1) as f64
    }

    /// How well a factor stands in for the update on these tokens: |update - (factor - 1) before|^2 relative to |update|^2.
    fn scale(&self, factor: f64) -> Scale {
        let ([square, cross, energy], by) = (self.moments, factor - 1.0);
        Scale { factor, missing: (energy - 2.0 * by * cross + by * by * square) / energy.max(f64::MIN_POSITIVE) }
    }

    fn bytes(&self) -> usize {
        let size = self.gram.size();
        Gram::bytes(size) + self.following.iter().map(|c| Cross::bytes(size, c.sums.len())).sum::<usize>()
    }
}

/// One sub-block's levels.
struct Made {
    importance: Importance,
    compensation: Compensation,
    order: Vec<usize>,
    levels: Vec<(LevelError, Repaired)>,
    scale: Option<Scale>,
}

impl Made {
    fn new(train: &Regression, held_out: &Regression, weight: &Matrix, unit: usize, partial: &[usize], options: LevelOptions) -> Result<Self> {
        let units = weight.ncols() / unit;
        let inputs = |order: &[usize], width: usize| order[..width].iter().flat_map(|u| u * unit..(u + 1) * unit).collect::<Vec<_>>();
        let identity: Vec<usize> = (0..units).collect();
        let (importance, order) = if partial.is_empty() {
            (options.importance.unwrap_or(Importance::Wanda), identity.clone())
        } else {
            choose_order(train, held_out, weight, unit, partial, options.importance)?
        };
        let middle = partial.get(partial.len() / 2).copied().unwrap_or(units);
        let kept = inputs(&order, middle);
        let (ridge, refit_error) = choose_ridge(train, held_out, 0, weight, &kept)?;
        let compensation = match options.compensation {
            Some(one) => one,
            None if partial.is_empty() => Compensation::None,
            // a bias would need tensors that the family doesn't have: only on request
            None => {
                let error = |c: Compensation| -> Result<f64> { Ok(held_out.error(0, &c.repair(train, weight, &kept, ridge)?, &kept)) };
                let (none, rotate) = (error(Compensation::None)?, error(Compensation::Rotate)?);
                if refit_error <= none.min(rotate) {
                    Compensation::Refit
                } else if rotate <= none {
                    Compensation::Rotate
                } else {
                    Compensation::None
                }
            }
        };
        let absorbing: Vec<(usize, f64)> = (1..train.targets.len())
            .into_par_iter()
            .map(|target| Ok((target, choose_ridge(train, held_out, target, weight, &kept)?.0)))
            .collect::<Result<_>>()?;
        let at_width = |width: usize| -> Result<Vec<(LevelError, Repaired)>> {
            let kept = inputs(&order, width);
            let raw = Repaired { weight: compensate::columns(weight, &kept), bias: None };
            let whole = width == units;
            let own = if whole { raw.clone() } else { compensation.repair(train, weight, &kept, ridge)? };
            let mut levels = Vec::new();
            for (target, ridge) in &absorbing {
                let refitted = Repaired { weight: train.ridge(*target, &kept, &raw.weight, *ridge)?, bias: None };
                let repaired = held_out.error(*target, &refitted, &kept);
                let of = &held_out.targets[*target];
                levels.push((
                    LevelError {
                        level: Level { width, absorbed: *target },
                        ridge: *ridge,
                        raw: held_out.error(*target, &own, &kept),
                        repaired,
                        missing: whole.then(|| repaired * of.energy / of.added.max(f64::MIN_POSITIVE)),
                    },
                    refitted,
                ));
            }
            if !whole {
                let (raw, repaired) = (held_out.error(0, &raw, &kept), held_out.error(0, &own, &kept));
                levels.push((LevelError { level: Level { width, absorbed: 0 }, ridge, raw, repaired, missing: None }, own));
            }
            Ok(levels)
        };
        let widths: Vec<usize> = partial.iter().copied().chain(std::iter::once(units)).collect();
        let levels: Vec<Vec<(LevelError, Repaired)>> = widths.into_par_iter().map(at_width).collect::<Result<_>>()?;
        let order = if order == identity { Vec::new() } else { order };
        Ok(Self { importance, compensation, order, levels: levels.into_iter().flatten().collect(), scale: None })
    }
}

/// The order whose levels can be refitted best, judged on held-out activations at up to three widths.
fn choose_order(
    train: &Regression,
    held_out: &Regression,
    weight: &Matrix,
    unit: usize,
    partial: &[usize],
    fixed: Option<Importance>,
) -> Result<(Importance, Vec<usize>)> {
    let candidates = match fixed {
        Some(one) => vec![one],
        None => vec![Importance::Wanda, Importance::Flap, Importance::Norm2ssp, Importance::Obs],
    };
    let probes: Vec<usize> = if candidates.len() == 1 { Vec::new() } else { (1..=3).map(|q| partial[(partial.len() - 1) * q / 3]).collect() };
    let judged: Vec<(f64, Importance, Vec<usize>)> = candidates
        .into_par_iter()
        .map(|importance| {
            let order = importance.order(&train.gram, weight, unit)?;
            let mut error = 0.0;
            for width in &probes {
                let kept: Vec<usize> = order[..*width].iter().flat_map(|u| u * unit..(u + 1) * unit).collect();
                let repaired = Compensation::Refit.repair(train, weight, &kept, PROBE_RIDGE)?;
                error += held_out.error(0, &repaired, &kept);
            }
            Ok((error, importance, order))
        })
        .collect::<Result<_>>()?;
    let best = judged.into_iter().reduce(|best, other| if other.0 < best.0 { other } else { best });
    best.map(|(_, importance, order)| (importance, order)).ok_or_else(|| Error::Activations("no importance could be computed".into()))
}

/// Ridge strength while importances are compared.
const PROBE_RIDGE: f64 = 1e-2;
