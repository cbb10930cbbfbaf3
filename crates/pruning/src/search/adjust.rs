//! Changes of weights that some strategies make beside the pattern.

use super::merge::{Merge, merge};
use crate::{Error, Result};
use evop_model::{DType, Decoder, Linear, SubBlock, Tensor};
use serde::Serialize;

/// What has to be done to the parent's weights before a pattern is applied to them.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Adjustment {
    /// Per sub-block, the factor of its output layer's weight and bias.
    Scale(Vec<f64>),
    /// Layers that take in a neighbour, one after the other.
    Merge(Vec<Merge>),
}

/// The decoder with the adjustment made: the same shapes. Weights are rounded to the type that they were in: a bf16 checkpoint's, widened to f32
/// here, to bf16, so that what is scored is what a checkpoint of them holds.
///
/// # Errors
/// [`Error::Format`] when the adjustment is for another number of sub-blocks; [`Error::Model`] when the device fails.
pub fn adjust(decoder: &Decoder, adjustment: &Adjustment) -> Result<Decoder> {
    let factors = match adjustment {
        Adjustment::Merge(merges) => return merges.iter().try_fold(decoder.clone(), |decoder, m| merge(&decoder, m)),
        Adjustment::Scale(factors) => factors,
    };
    let (expected, found) = (decoder.last_boundary(), factors.len());
    if expected != found {
        return Err(Error::Format(format!("an adjustment of {found} sub-blocks doesn't fit a model of {expected}")));
    }
    let of = |s: usize, factor: f64| decoder.sub_block(s).map(|block| scaled(block, factor)).transpose();
    let blocks = factors.iter().enumerate().map(|(s, factor)| of(s, *factor)).collect::<Result<_>>()?;
    Ok(decoder.with_sub_blocks(blocks)?)
}

/// A sub-block whose update is multiplied by a factor.
pub(crate) fn scaled(block: &SubBlock, factor: f64) -> Result<SubBlock> {
    if factor == 1.0 {
        return Ok(block.clone());
    }
    let times = |tensor: &Tensor| -> Result<Tensor> { rounded(&(tensor.to_dtype(DType::F32)? * factor)?, tensor) };
    let bias = block.output().bias().map(times).transpose()?;
    Ok(block.with_output(Linear::new(times(&block.output().weight()?)?, bias)?)?)
}

/// `tensor` (f32) rounded to the narrowest type that holds all elements of `like`, in the type that `like` is computed in.
pub(super) fn rounded(tensor: &Tensor, like: &Tensor) -> Result<Tensor> {
    let wide = like.to_dtype(DType::F32)?;
    for narrow in [DType::BF16, DType::F16] {
        let is_held = (&wide - wide.to_dtype(narrow)?.to_dtype(DType::F32)?)?.abs()?.max_all()?.to_scalar::<f32>()? == 0.0;
        if is_held {
            return Ok(tensor.to_dtype(narrow)?.to_dtype(like.dtype())?);
        }
    }
    Ok(tensor.to_dtype(like.dtype())?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_model::Device;

    #[test]
    fn adjusted_weights_stay_in_the_type_that_held_them() {
        let third = Tensor::new(&[1.0f32 / 3.0], &Device::Cpu).unwrap();
        let of = |like: f32| rounded(&third, &Tensor::new(&[like], &Device::Cpu).unwrap()).unwrap().to_vec1::<f32>().unwrap()[0];
        assert_eq!(of(-0.5), half::bf16::from_f32(1.0 / 3.0).to_f32());
        assert_eq!(of(1.0 + 1.0 / 1024.0), half::f16::from_f32(1.0 / 3.0).to_f32());
        assert_eq!(of(1.000_001), 1.0 / 3.0);
    }
}
