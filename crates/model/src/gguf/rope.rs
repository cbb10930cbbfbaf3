//! `rope_freqs.weight`: one divisor a rotary frequency. What Llama 3.1's formula made is told from it again.

use crate::rope::{RopeParameters, RopeScaling};
use std::f64::consts::PI;

/// The parameters of Llama 3.1's scaling that give these divisors, [head_dim / 2]; `None` when none do.
///
/// Divisors are 1 for short wavelengths, `factor` for long ones, and 1 / ((1 - s) / factor + s) between, where s rises linearly with the frequency.
/// `low_freq_factor` is taken to be 1, as everybody has it: only two of the three remaining parameters are independent.
pub(super) fn llama3_scaling(divisors: &[f32], theta: f64) -> Option<RopeParameters> {
    let factor = f64::from(divisors.iter().copied().fold(f32::NAN, f32::max));
    let unscaled = RopeParameters { theta, original_context: 1, scaling: None };
    let frequencies = unscaled.inverse_frequencies(2 * divisors.len(), 1);
    // (frequency, s) of the ramp's ends
    let ramp = frequencies.iter().zip(divisors).map(|(f, d)| (f64::from(*f), f64::from(*d))).filter(|(_, d)| *d > 1.0 && *d < factor);
    let mut points = ramp.map(|(f, d)| (f, (1.0 / d - 1.0 / factor) / (1.0 - 1.0 / factor)));
    let (first, last) = (points.next()?, points.next_back()?);
    let slope = (first.1 - last.1) / (first.0 - last.0);
    let high_freq_factor = near(1.0 + 1.0 / (slope * first.0 - first.1));
    let original_context = near(slope * 2.0 * PI * (high_freq_factor - 1.0)) as usize;
    let scaling = RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor };
    let found = RopeParameters { theta, original_context, scaling: Some(scaling) };
    let scaled = found.inverse_frequencies(2 * divisors.len(), 1);
    let fits = |((f, s), d): ((&f32, &f32), &f32)| (f / s / d - 1.0).abs() < 1e-5;
    frequencies.iter().zip(&scaled).zip(divisors).all(fits).then_some(found)
}

/// The value, or the whole number that it is within the precision of f32 divisors.
fn near(value: f64) -> f64 {
    if (value / value.round() - 1.0).abs() < 1e-3 { value.round() } else { value }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_is_told_from_its_divisors() {
        for (factor, original_context, head_dim, theta) in [(8.0, 8192, 128, 500_000.0), (32.0, 8192, 64, 500_000.0), (4.0, 512, 64, 10_000.0)] {
            let scaling = Some(RopeScaling::Llama3 { factor, low_freq_factor: 1.0, high_freq_factor: 4.0 });
            let scaled = RopeParameters { theta, original_context, scaling };
            let plain = RopeParameters { theta, original_context: 1, scaling: None };
            let divisors: Vec<f32> = plain.inverse_frequencies(head_dim, 1).iter().zip(scaled.inverse_frequencies(head_dim, 1)).map(|(f, s)| f / s).collect();
            assert_eq!(llama3_scaling(&divisors, theta), Some(scaled));
        }
    }

    #[test]
    fn other_divisors_stay_what_they_are() {
        assert_eq!(llama3_scaling(&[2.0; 16], 10_000.0), None);
        assert_eq!(llama3_scaling(&[1.0, 1.5, 1.1, 3.0, 2.0, 4.0, 4.0, 1.0], 10_000.0), None);
        assert_eq!(llama3_scaling(&[], 10_000.0), None);
        assert_eq!(llama3_scaling(&[f32::NAN, 1.0, 2.0, 8.0], 10_000.0), None);
    }
}
