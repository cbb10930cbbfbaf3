//! Numbers in another 16- or 32-bit type.

use super::plan::{Origin, Planned};
use super::{Contents, FileType};
use crate::{Error, Result};
use evop_model::{DType, RawTensor, TensorBytes};
use half::{bf16, f16};

impl FileType {
    /// The type of single numbers; `None` for blocks.
    pub(super) fn dtype(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::Bf16 => Some(DType::BF16),
            Self::Q8_0 | Self::Q4K => None,
        }
    }
}

/// A planned tensor's numbers, in the type that its origin has.
pub(super) fn read<'a>(contents: &Contents<'a>, tensor: &Planned) -> evop_model::Result<RawTensor<'a>> {
    match &tensor.origin {
        Origin::Source(name) => contents.source.raw(name),
        Origin::Zeros => {
            let bytes = vec![0; tensor.shape.iter().product::<usize>() * tensor.dtype.size_in_bytes()];
            Ok(RawTensor { dtype: tensor.dtype, shape: tensor.shape.clone(), bytes: bytes.into() })
        }
    }
}

/// The same numbers as `to`, rounded to the nearest where it has fewer digits.
///
/// # Errors
/// [`Error::Format`] for a number that is beyond the type's range.
pub(super) fn convert<'a>(raw: RawTensor<'a>, to: DType, name: &str) -> Result<TensorBytes<'a>> {
    if raw.dtype == to {
        return Ok(raw.bytes);
    }
    let values = raw.to_f32();
    let bytes: Vec<u8> = match to {
        DType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
        DType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
    };
    if let (DType::F16, Some(at)) = (to, values.iter().position(|v| v.is_finite() && v.abs() >= 65_520.0)) {
        return Err(Error::Format(format!("tensor `{name}`: {} at element {at} is beyond the range of f16: use bf16 or f32", values[at])));
    }
    Ok(bytes.into())
}
