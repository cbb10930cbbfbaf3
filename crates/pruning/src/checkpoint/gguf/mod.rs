//! GGUF version 3, for llama.cpp and what is built on it.
//!
//! Equal layers make a `llama`, `qwen2` or `qwen3` file, layers that differ a `deci` file with one number a layer. Two things `deci` can't say
//! get a sub-block of zeros (llama.cpp's `src/models/deci.cpp`): the first layer needs an attention, because head sizes are taken from it, and
//! an attention needs an MLP in its layer, because the output of a layer without one is its input. Keys of our own name those, so that
//! this project's reader leaves them out again.

mod architecture;
mod file;
mod metadata;
mod tensors;
mod tokenizer;

use super::plan::Plan;
use super::{Contents, FileType, Written};
use crate::{Error, Result, storage};
use architecture::Architecture;
use std::path::Path;

/// Writes the file.
pub(super) fn write(contents: &Contents<'_>, weights: Option<FileType>, path: &Path) -> Result<Written> {
    let plan = Plan::new(contents)?;
    let architecture = Architecture::of(&plan)?;
    let mut notes: Vec<String> = plan.left_out_note().into_iter().collect();
    let tensors = tensors::plan(&plan, &architecture, weights, &mut notes)?;
    let mut entries = metadata::entries(contents, &plan, &architecture, &tensors, weights, &mut notes)?;
    entries.extend(tokenizer::entries(contents, path, &mut notes)?);
    let header = file::Header::new(&entries, &tensors);
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    std::fs::create_dir_all(directory).map_err(|e| Error::io(directory, e))?;
    let path = &directory.join(path.file_name().unwrap_or_default());
    // the storage layer knows of I/O errors alone: others go round it
    let mut failed = None;
    let result = storage::write_with(path, |part| match file::write(part, &header, &tensors, contents) {
        Err(Error::Io { source, .. }) => Err(source),
        Err(other) => {
            let text = std::io::Error::other(other.to_string());
            failed = Some(other);
            Err(text)
        }
        Ok(()) => Ok(()),
    });
    if let Some(error) = failed {
        return Err(error);
    }
    result?;
    Ok(Written { architecture: architecture.name.into(), files: vec![path.to_path_buf()], weight_bytes: header.file_bytes(&tensors), notes })
}
