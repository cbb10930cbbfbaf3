//! Weights from safetensors: one file, or several behind an index.

use crate::source::{RawTensor, Source, TensorBytes};
use crate::{Error, Result};
use candle_core::DType;
use safetensors::SafeTensors;
use safetensors::tensor::Metadata;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A file's bytes: mapped from disk, or part of the binary.
#[derive(Debug)]
pub(crate) enum Bytes {
    Mapped(memmap2::Mmap),
    Embedded(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

impl Bytes {
    /// Maps a file read-only.
    pub(crate) fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        // SAFETY: the map is read-only and private to this process; a checkpoint that is rewritten in place while it is
        // open is outside what mmap can protect against, and our own writers replace files by rename.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(|e| Error::io(path, e))?;
        Ok(Self::Mapped(map))
    }

    /// A tensor's part of the file.
    pub(crate) fn tensor(&self, at: Range<usize>) -> TensorBytes<'_> {
        match self {
            Self::Mapped(map) => TensorBytes::mapped(map, at),
            Self::Embedded(bytes) => TensorBytes::from(&bytes[at]),
        }
    }
}

#[derive(Debug)]
struct Shard {
    path: PathBuf,
    bytes: Bytes,
    metadata: Metadata,
    /// Where the tensors' data starts in `bytes`.
    data: usize,
}

/// All shards of a checkpoint.
#[derive(Debug)]
pub(crate) struct SafetensorsSource {
    shards: Vec<Shard>,
    /// Tensor name -> shard.
    index: BTreeMap<String, usize>,
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

impl SafetensorsSource {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` lists.
    pub fn open(directory: &Path) -> Result<Self> {
        let index = directory.join(INDEX);
        if directory.join(SINGLE).exists() {
            let path = directory.join(SINGLE);
            let bytes = Bytes::map(&path)?;
            return Self::from_files(vec![(path, bytes)]);
        }
        if !index.exists() {
            return Err(Error::NotACheckpoint {
                path: directory.to_path_buf(),
                message: format!("expected {SINGLE} or {INDEX} (only safetensors weights are read; convert .bin files with transformers' save_pretrained)"),
            });
        }
        let text = std::fs::read_to_string(&index).map_err(|e| Error::io(&index, e))?;
        let json: serde_json::Value = serde_json::from_str(&text).map_err(|e| Error::corrupt(&index, format!("not valid JSON: {e}")))?;
        let map = json.get("weight_map").and_then(|m| m.as_object()).ok_or_else(|| Error::corrupt(&index, "expected an object `weight_map`"))?;
        let files: HashSet<&str> = map.values().filter_map(|f| f.as_str()).collect();
        if files.is_empty() {
            return Err(Error::corrupt(&index, "`weight_map` names no file"));
        }
        let mut files: Vec<_> = files.into_iter().collect();
        files.sort_unstable();
        let mut shards = Vec::new();
        for name in files {
            if Path::new(name).components().count() != 1 {
                return Err(Error::corrupt(&index, format!("`weight_map` names {name:?}: expected a file of this directory")));
            }
            let path = directory.join(name);
            let bytes = Bytes::map(&path)?;
            shards.push((path, bytes));
        }
        let source = Self::from_files(shards)?;
        if let Some(missing) = map.keys().find(|name| !source.index.contains_key(*name)) {
            return Err(Error::corrupt(&index, format!("`weight_map` lists `{missing}`, which none of the shards holds")));
        }
        Ok(source)
    }

    pub fn from_files(files: Vec<(PathBuf, Bytes)>) -> Result<Self> {
        let mut shards = Vec::new();
        let mut index = BTreeMap::new();
        for (path, bytes) in files {
            let damaged =
                |e| Error::corrupt(&path, format!("not a whole safetensors file ({} bytes): {e}; it may be cut short: download or copy it again", bytes.len()));
            // deserialize checks that header and data add up to the file's length; read_metadata alone does not
            SafeTensors::deserialize(&bytes).map_err(damaged)?;
            let (header, metadata) = SafeTensors::read_metadata(&bytes).map_err(damaged)?;
            for name in metadata.tensors().keys() {
                index.insert(name.clone(), shards.len());
            }
            shards.push(Shard { path, data: 8 + header, bytes, metadata });
        }
        Ok(Self { shards, index })
    }
}

impl Source for SafetensorsSource {
    fn names(&self) -> Vec<String> {
        self.index.keys().cloned().collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let shard = &self.shards[*self.index.get(name)?];
        shard.metadata.info(name).map(|info| info.shape.clone())
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let missing = || self.mismatch(name, "a tensor of that name", "nothing: it is missing from the file");
        let shard = &self.shards[*self.index.get(name).ok_or_else(missing)?];
        let info = shard.metadata.info(name).ok_or_else(missing)?;
        let dtype = match info.dtype {
            safetensors::Dtype::F32 => DType::F32,
            safetensors::Dtype::F16 => DType::F16,
            safetensors::Dtype::BF16 => DType::BF16,
            other => return Err(self.mismatch(name, "type F32, F16 or BF16", &format!("type {other:?}"))),
        };
        let (start, end) = info.data_offsets;
        Ok(RawTensor { dtype, shape: info.shape.clone(), bytes: shard.bytes.tensor(shard.data + start..shard.data + end) })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        let shard = self.index.get(name).copied().unwrap_or(0);
        Error::Tensor {
            path: self.shards.get(shard).map(|s| s.path.clone()).unwrap_or_default(),
            tensor: name.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kilobytes of a file that this process has in memory.
    #[cfg(target_os = "linux")]
    fn resident(file: &Path) -> usize {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let of_file = maps.lines().skip_while(|line| !line.ends_with(file.to_str().unwrap()));
        let kilobytes = of_file.into_iter().find_map(|line| line.strip_prefix("Rss:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
        kilobytes.unwrap()
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pages_of_a_file_go_with_the_tensor_that_was_read_and_come_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("numbers");
        let numbers: Vec<u8> = (0..1u32 << 20).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &numbers).unwrap();
        let bytes = Bytes::map(&path).unwrap();
        for _ in 0..2 {
            let tensor = bytes.tensor(4_000..1_000_000);
            assert!(tensor[..] == numbers[4_000..1_000_000]);
            assert!(resident(&path) > 900);
            drop(tensor);
            assert!(resident(&path) < 100);
        }
        assert!(bytes.tensor(4_000..1_000_000).into_vec() == numbers[4_000..1_000_000]);
        assert!(resident(&path) < 100);
        let mut tensor = bytes.tensor(8..100);
        tensor.truncate(3);
        assert_eq!(tensor.into_vec(), [8, 9, 10]);
    }
}
