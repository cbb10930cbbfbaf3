//! `model.safetensors`, one tensor in memory at a time.

use super::convert::{convert, read};
use super::plan::{Plan, Planned};
use super::{Contents, FileType};
use crate::{Error, Result, storage};
use evop_model::{DType, TensorBytes};
use safetensors::tensor::{Dtype as SafeDtype, View};
use std::borrow::Cow;
use std::cell::RefCell;
use std::path::Path;

/// The name of the file.
pub(super) const FILE: &str = "model.safetensors";

/// The type of a directory's numbers.
///
/// # Errors
/// [`Error::Format`] for types that safetensors doesn't have.
pub(super) fn dtype(weights: Option<FileType>) -> Result<Option<DType>> {
    match weights.map(|w| (w, w.dtype())) {
        None => Ok(None),
        Some((_, Some(dtype))) => Ok(Some(dtype)),
        Some((blocks, None)) => Err(Error::Format(format!("{blocks} is a type of GGUF files: expected f32, f16 or bf16, or --format gguf"))),
    }
}

/// What transformers calls the type that most of the tensors have.
pub(super) fn torch_name(plan: &Plan, dtype: Option<DType>) -> &'static str {
    match dtype.or(plan.tensors.first().map(|t| t.dtype)) {
        Some(DType::BF16) => "bfloat16",
        Some(DType::F16) => "float16",
        _ => "float32",
    }
}

/// Writes the plan's tensors into `directory`, which it makes, and returns the file's size.
pub(super) fn write(contents: &Contents<'_>, plan: &Plan, dtype: Option<DType>, directory: &Path) -> Result<u64> {
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let path = directory.join(FILE);
    let failed = RefCell::new(None);
    let views = plan.tensors.iter().map(|tensor| (&tensor.name, Lazy { contents, tensor, dtype: dtype.unwrap_or(tensor.dtype), failed: &failed }));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    let result = storage::write_with(&path, |part| {
        safetensors::serialize_to_file(views, Some(metadata), part).map_err(|error| match error {
            safetensors::SafeTensorError::IoError(error) => error,
            other => std::io::Error::other(other),
        })?;
        // the file is as long as it should be even then: a failed tensor must not become a checkpoint
        if failed.borrow().is_some() { Err(std::io::Error::other("a tensor can't be read")) } else { Ok(()) }
    });
    if let Some(error) = failed.take() {
        return Err(error);
    }
    result?;
    Ok(std::fs::metadata(&path).map_err(|e| Error::io(&path, e))?.len())
}

/// A tensor that is read when it is written.
struct Lazy<'a> {
    contents: &'a Contents<'a>,
    tensor: &'a Planned,
    dtype: DType,
    /// The first error of any tensor: the serialiser's interface has no place for one.
    failed: &'a RefCell<Option<Error>>,
}

impl View for Lazy<'_> {
    fn dtype(&self) -> SafeDtype {
        match self.dtype {
            DType::BF16 => SafeDtype::BF16,
            DType::F16 => SafeDtype::F16,
            _ => SafeDtype::F32,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.tensor.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        let converted = read(self.contents, self.tensor).map_err(Error::from).and_then(|raw| convert(raw, self.dtype, &self.tensor.name));
        Cow::Owned(converted.map(TensorBytes::into_vec).unwrap_or_else(|error| {
            self.failed.borrow_mut().get_or_insert(error);
            Vec::new()
        }))
    }

    fn data_len(&self) -> usize {
        self.tensor.shape.iter().product::<usize>() * self.dtype.size_in_bytes()
    }
}
