//! Rotary position embeddings (RoFormer, arXiv 2104.09864) and the ways in which configs stretch them.

use crate::config::Fields;
use crate::{Error, Result};
use serde_json::{Map, Value};
use std::f64::consts::PI;
use std::path::Path;

/// How the rotary frequencies are changed for contexts longer than the original.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Positions divided by `factor`.
    Linear {
        /// Stretch of the context.
        factor: f64,
    },
    /// NTK-aware base that grows with the sequence once it is longer than the original context.
    Dynamic {
        /// Stretch of the context.
        factor: f64,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a ramp between.
    Llama3 {
        /// Stretch of the context.
        factor: f64,
        /// Wavelengths above original / this are divided.
        low_freq_factor: f64,
        /// Wavelengths below original / this are kept.
        high_freq_factor: f64,
    },
    /// YaRN (arXiv 2309.00071).
    Yarn {
        /// Stretch of the context.
        factor: f64,
        /// Rotations above which a dimension is kept.
        beta_fast: f64,
        /// Rotations below which a dimension is interpolated.
        beta_slow: f64,
        /// Round the ramp's ends to whole dimensions.
        truncate: bool,
        /// Multiplies cos and sin.
        attention_factor: f64,
    },
    /// One divisor a frequency, as GGUF files carry them (`rope_freqs.weight`).
    Divisors(Vec<f32>),
}

/// Base, original context and scaling.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeParameters {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Context that the model was first trained on, in tokens.
    pub original_context: usize,
    /// `None`: as trained.
    pub scaling: Option<RopeScaling>,
}

impl RopeParameters {
    /// Reads `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`.
    pub(crate) fn from_config(json: &Map<String, Value>, max_position_embeddings: usize, path: &Path) -> Result<Self> {
        let top = Fields { json, path };
        let object = |name: &str| match top.get(name) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { json: map, path })),
            Some(_) => Err(top.wrong(name, "an object")),
        };
        // where both are given, the old spelling wins, as in transformers
        let scaling = match object("rope_scaling")?.filter(|f| !f.json.is_empty()) {
            Some(fields) => Some(fields),
            None => object("rope_parameters")?,
        };
        let mut theta = top.f64_or("rope_theta", 10_000.0)?;
        let mut original_context = max_position_embeddings;
        let Some(fields) = scaling else { return Ok(Self { theta, original_context, scaling: None }) };
        theta = fields.f64_or("rope_theta", theta)?;
        let kind = match fields.get("rope_type") {
            Some(_) => fields.str_or("rope_type", "default")?,
            None => fields.str_or("type", "default")?,
        };
        let original = match top.optional_usize("original_max_position_embeddings")? {
            Some(original) => original,
            None => fields.usize_or("original_max_position_embeddings", max_position_embeddings)?,
        };
        let stretch = max_position_embeddings as f64 / original.max(1) as f64;
        let factor = || fields.f64_or("factor", f64::NAN).and_then(|f| if f >= 1.0 { Ok(f) } else { Err(fields.wrong("factor", "a number of at least 1")) });
        let scaling = match kind {
            "default" => None,
            "linear" => Some(RopeScaling::Linear { factor: factor()? }),
            "dynamic" => Some(RopeScaling::Dynamic { factor: factor()? }),
            "llama3" => {
                original_context = original;
                let (low, high) = (fields.f64_or("low_freq_factor", 1.0)?, fields.f64_or("high_freq_factor", 4.0)?);
                Some(RopeScaling::Llama3 { factor: factor()?, low_freq_factor: low, high_freq_factor: high })
            }
            "yarn" => {
                original_context = original;
                let factor = if fields.get("factor").is_some() { factor()? } else { stretch };
                let mscale = |scale: f64, m: f64| if scale <= 1.0 { 1.0 } else { 0.1 * m * scale.ln() + 1.0 };
                let (m, m_all) = (fields.f64_or("mscale", 0.0)?, fields.f64_or("mscale_all_dim", 0.0)?);
                let default = if m != 0.0 && m_all != 0.0 { mscale(factor, m) / mscale(factor, m_all) } else { mscale(factor, 1.0) };
                Some(RopeScaling::Yarn {
                    factor,
                    beta_fast: fields.f64_or("beta_fast", 32.0)?,
                    beta_slow: fields.f64_or("beta_slow", 1.0)?,
                    truncate: fields.bool_or("truncate", true)?,
                    attention_factor: fields.f64_or("attention_factor", default)?,
                })
            }
            other => {
                return Err(Error::config(path, format!("rope type: expected default, linear, dynamic, llama3 or yarn, found {other:?}")));
            }
        };
        Ok(Self { theta, original_context, scaling })
    }

    /// Whether the frequencies depend on how long the sequence is.
    pub(crate) fn depends_on_length(&self) -> bool {
        matches!(self.scaling, Some(RopeScaling::Dynamic { .. }))
    }

    /// The `head_dim / 2` inverse frequencies for a sequence of `length` tokens.
    pub fn inverse_frequencies(&self, head_dim: usize, length: usize) -> Vec<f32> {
        let series = |theta: f64| (0..head_dim / 2).map(move |i| 1.0 / theta.powf(2.0 * i as f64 / head_dim as f64));
        let original = self.original_context as f64;
        let frequencies: Vec<f64> = match &self.scaling {
            None => series(self.theta).collect(),
            Some(RopeScaling::Linear { factor }) => series(self.theta).map(|f| f / factor).collect(),
            Some(RopeScaling::Dynamic { factor }) => {
                let stretch = factor * (length as f64).max(original) / original - (factor - 1.0);
                series(self.theta * stretch.powf(head_dim as f64 / (head_dim as f64 - 2.0))).collect()
            }
            Some(RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor }) => series(self.theta)
                .map(|f| {
                    let wavelength = 2.0 * PI / f;
                    if wavelength < original / high_freq_factor {
                        f
                    } else if wavelength > original / low_freq_factor {
                        f / factor
                    } else {
                        let kept = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                        (1.0 - kept) * f / factor + kept * f
                    }
                })
                .collect(),
            Some(RopeScaling::Yarn { factor, beta_fast, beta_slow, truncate, .. }) => {
                let dimension = |rotations: f64| head_dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * self.theta.ln());
                let (mut low, mut high) = (dimension(*beta_fast), dimension(*beta_slow));
                if *truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                if low == high {
                    high += 0.001;
                }
                series(self.theta)
                    .enumerate()
                    .map(|(i, f)| {
                        let interpolated = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                        f / factor * interpolated + f * (1.0 - interpolated)
                    })
                    .collect()
            }
            Some(RopeScaling::Divisors(divisors)) => series(self.theta).zip(divisors).map(|(f, d)| f / f64::from(*d)).collect(),
        };
        frequencies.into_iter().map(|f| f as f32).collect()
    }

    /// What cos and sin are multiplied by.
    pub(crate) fn attention_factor(&self) -> f64 {
        match self.scaling {
            Some(RopeScaling::Yarn { attention_factor, .. }) => attention_factor,
            _ => 1.0,
        }
    }
}
