//! The level database: for every sub-block its units in order of importance, and for every width the repaired output layer.
//!
//! Built once per model and calibration, a file a sub-block, written atomically; what is there already is checked against its
//! checksum and not built again. The search scores these weights, not raw ones; they are mapped, so that memory holds what is in use.

use crate::compensate::{self, Compensation, Regression, Repaired, choose_ridge};
use crate::gram::Gram;
use crate::importance::Importance;
use crate::linalg::{self, Matrix};
use crate::stream::Stream;
use crate::{Error, Result, storage};
use evop_model::{DType, Decoder, Linear, Source, Tensor, TensorNames};
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
}

/// What a database was built from; each has a directory of its own in a store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelKey {
    /// SHA-256 of the model's tensors.
    pub model_sha256: String,
    /// SHA-256 of the statistics' tokens, training and held-out.
    pub tokens_sha256: String,
    /// How.
    pub options: LevelOptions,
    /// Partial widths of every sub-block, ascending.
    pub widths: Vec<Vec<usize>>,
}

impl LevelKey {
    /// The directory's name.
    fn name(&self) -> Result<String> {
        let json = serde_json::to_vec(self).map_err(|e| Error::io(Path::new(KEY), e.into()))?;
        Ok(sha256(&json)[..16].to_string())
    }
}

/// What was chosen for one sub-block, and how well it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LevelReport {
    /// Sub-block.
    pub sub_block: usize,
    /// Units, the most important first.
    pub order: Vec<usize>,
    /// The importance that gave the order.
    pub importance: Importance,
    /// The repair.
    pub compensation: Compensation,
    /// Ridge strength, relative to the mean diagonal of X^T X.
    pub ridge: f64,
    /// Per width: squared error of the sub-block's update on held-out activations, relative to the update's energy; raw and repaired.
    pub errors: BTreeMap<usize, (f64, f64)>,
    /// SHA-256 of the sub-block's file.
    sha256: String,
}

/// Orders and repaired output layers of one model.
#[derive(Debug)]
pub struct Levels {
    directory: PathBuf,
    reports: BTreeMap<usize, LevelReport>,
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
        let mut levels = Self { directory: directory.to_path_buf(), reports: BTreeMap::new(), peak_statistics_bytes: 0 };
        let partial = |s: usize| !key.widths[s].is_empty();
        let last = (0..key.widths.len()).rev().find(|s| partial(*s));
        let (mut train, mut held_out) = (Stream::embed(decoder, train)?, Stream::embed(decoder, held_out)?);
        for s in 0..last.map_or(0, |l| l + 1) {
            on(s, key.widths.len())?;
            let Some(block) = decoder.sub_block(s) else { continue };
            let known = levels.read_report(s)?;
            if !partial(s) || known.is_some() {
                train.advance(decoder, block, s, |_, _| Ok(()))?;
                held_out.advance(decoder, block, s, |_, _| Ok(()))?;
                levels.reports.extend(known.map(|r| (s, r)));
                continue;
            }
            let size = block.output().inputs();
            let mut grams = [Gram::new(size), Gram::new(size)];
            train.advance(decoder, block, s, |x, batch| grams[0].add(x, batch.spans()))?;
            held_out.advance(decoder, block, s, |x, batch| grams[1].add(x, batch.spans()))?;
            let weight = linalg::from_tensor(block.output().weight())?;
            let [train_data, held_out_data] = grams.map(|mut gram| {
                gram.finish();
                Regression::of_layer(gram, &weight)
            });
            levels.peak_statistics_bytes = levels.peak_statistics_bytes.max(2 * Gram::bytes(size) + train.bytes() + held_out.bytes());
            let made = Made::new(&train_data, &held_out_data, &weight, block.unit(), &key.widths[s], key.options)?;
            let names = TensorNames::of(decoder.config().architecture);
            let name = if s.is_multiple_of(2) { names.o(s / 2) } else { names.down(s / 2) };
            let report = levels.write(s, &made, source.dtype(&name)?)?;
            levels.reports.insert(s, report);
        }
        on(key.widths.len(), key.widths.len())?;
        Ok(levels)
    }

    /// What was chosen, a report a sub-block that has partial widths.
    pub fn reports(&self) -> impl Iterator<Item = &LevelReport> {
        self.reports.values()
    }

    /// Units of sub-block `s` in order of importance, if it has partial widths.
    pub fn order(&self, s: usize) -> Option<&[usize]> {
        self.reports.get(&s).map(|r| r.order.as_slice())
    }

    /// The repaired output layer of sub-block `s` at a width, on the decoder's device; `None` where the raw one's prefix is it.
    pub fn output(&self, s: usize, width: usize, decoder: &Decoder) -> Result<Option<Linear>> {
        let Some(report) = self.reports.get(&s).filter(|r| r.compensation != Compensation::None) else { return Ok(None) };
        if !report.errors.contains_key(&width) {
            return Ok(None);
        }
        let path = self.file(s);
        // SAFETY: the file was written by rename and is not changed after
        let tensors = unsafe { candle_core::safetensors::MmapedSafetensors::new(&path)? };
        let load = |name: String| -> Result<Tensor> { Ok(tensors.load(&name, decoder.device())?.to_dtype(decoder.dtype())?) };
        let bias = if report.compensation == Compensation::Bias { Some(load(format!("bias.{width}"))?) } else { None };
        Ok(Some(Linear::new(load(format!("weight.{width}"))?, bias)?))
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
        if made.compensation != Compensation::None {
            for (width, repaired) in &made.levels {
                data.insert(format!("weight.{width}"), (vec![repaired.weight.nrows(), repaired.weight.ncols()], bytes(&linalg::to_f32(&repaired.weight))));
                if let Some(bias) = &repaired.bias {
                    let bias: Vec<f32> = bias.iter().map(|b| *b as f32).collect();
                    data.insert(format!("bias.{width}"), (vec![bias.len()], bytes(&bias)));
                }
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
            ridge: made.ridge,
            errors: made.errors.clone(),
            sha256: sha256(&file),
        };
        storage::write_json(&self.report_file(s), &report)?;
        Ok(report)
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

/// One sub-block's levels.
struct Made {
    importance: Importance,
    compensation: Compensation,
    ridge: f64,
    order: Vec<usize>,
    levels: Vec<(usize, Repaired)>,
    errors: BTreeMap<usize, (f64, f64)>,
}

impl Made {
    fn new(train: &Regression, held_out: &Regression, weight: &Matrix, unit: usize, partial: &[usize], options: LevelOptions) -> Result<Self> {
        let inputs = |order: &[usize], width: usize| order[..width].iter().flat_map(|u| u * unit..(u + 1) * unit).collect::<Vec<_>>();
        let middle = partial[partial.len() / 2];
        let candidates = match options.importance {
            Some(one) => vec![one],
            None => vec![Importance::Wanda, Importance::Flap, Importance::Norm2ssp, Importance::Obs],
        };
        // the order whose levels can be refitted best, judged on held-out activations at up to three widths
        let probes: Vec<usize> = if candidates.len() == 1 { Vec::new() } else { (1..=3).map(|q| partial[(partial.len() - 1) * q / 3]).collect() };
        let judged: Vec<(f64, Importance, Vec<usize>)> = candidates
            .into_par_iter()
            .map(|importance| {
                let order = importance.order(&train.gram, weight, unit)?;
                let mut error = 0.0;
                for width in &probes {
                    let kept = inputs(&order, *width);
                    let repaired = Compensation::Refit.repair(train, weight, &kept, PROBE_RIDGE)?;
                    error += held_out.error(&repaired, &kept);
                }
                Ok((error, importance, order))
            })
            .collect::<Result<_>>()?;
        let best = judged.into_iter().reduce(|best, other| if other.0 < best.0 { other } else { best });
        let Some((_, importance, order)) = best else { return Err(Error::Activations("no importance could be computed".into())) };
        let kept = inputs(&order, middle);
        let (ridge, refit_error) = choose_ridge(train, held_out, weight, &kept)?;
        let compensation = match options.compensation {
            Some(one) => one,
            // a bias would need tensors that the family doesn't have: only on request
            None => {
                let error = |c: Compensation| -> Result<f64> { Ok(held_out.error(&c.repair(train, weight, &kept, ridge)?, &kept)) };
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
        let made: Vec<(usize, Repaired, (f64, f64))> = partial
            .par_iter()
            .map(|width| {
                let kept = inputs(&order, *width);
                let raw = Repaired { weight: compensate::columns(weight, &kept), bias: None };
                let repaired = compensation.repair(train, weight, &kept, ridge)?;
                let errors = (held_out.error(&raw, &kept), held_out.error(&repaired, &kept));
                Ok((*width, repaired, errors))
            })
            .collect::<Result<_>>()?;
        let errors = made.iter().map(|(width, _, errors)| (*width, *errors)).collect();
        Ok(Self { importance, compensation, ridge, order, levels: made.into_iter().map(|(w, r, _)| (w, r)).collect(), errors })
    }
}

/// Ridge strength while importances are compared.
const PROBE_RIDGE: f64 = 1e-2;
