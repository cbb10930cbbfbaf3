//! The layout of a GGUF file: counts, key-value pairs, a table of tensors, and their bytes on multiples of 32.

use super::tensors::GgufTensor;
use crate::checkpoint::Contents;
use crate::{Error, Result};
use candle_core::quantized::GgmlDType;
use evop_model::gguf::Value;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;
/// The number of the type of strings.
const STRING: u32 = 8;

/// Everything before the tensors' bytes.
pub(super) struct Header {
    bytes: Vec<u8>,
}

impl Header {
    pub fn new(entries: &[(String, Value)], tensors: &[GgufTensor]) -> Self {
        let mut header = Self { bytes: MAGIC.to_vec() };
        header.put(&VERSION.to_le_bytes());
        header.put(&(tensors.len() as u64).to_le_bytes());
        header.put(&(entries.len() as u64).to_le_bytes());
        for (key, value) in entries {
            header.string(key);
            header.put(&type_of(value).to_le_bytes());
            header.value(value);
        }
        let mut offset = 0;
        for tensor in tensors {
            header.string(&tensor.name);
            header.put(&(tensor.shape.len() as u32).to_le_bytes());
            // ggml's first dimension is the one whose elements lie side by side
            tensor.shape.iter().rev().for_each(|n| header.put(&(*n as u64).to_le_bytes()));
            header.put(&ggml_type(tensor.kind).to_le_bytes());
            header.put(&u64::to_le_bytes(offset));
            offset += tensor.bytes().next_multiple_of(ALIGNMENT);
        }
        let padded = header.bytes.len().next_multiple_of(ALIGNMENT as usize);
        header.bytes.resize(padded, 0);
        header
    }

    /// The size of the file that has these tensors.
    pub fn file_bytes(&self, tensors: &[GgufTensor]) -> u64 {
        self.bytes.len() as u64 + tensors.iter().map(|t| t.bytes().next_multiple_of(ALIGNMENT)).sum::<u64>()
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    fn string(&mut self, text: &str) {
        self.put(&(text.len() as u64).to_le_bytes());
        self.put(text.as_bytes());
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::U8(v) => self.put(&v.to_le_bytes()),
            Value::I8(v) => self.put(&v.to_le_bytes()),
            Value::U16(v) => self.put(&v.to_le_bytes()),
            Value::I16(v) => self.put(&v.to_le_bytes()),
            Value::U32(v) => self.put(&v.to_le_bytes()),
            Value::I32(v) => self.put(&v.to_le_bytes()),
            Value::F32(v) => self.put(&v.to_le_bytes()),
            Value::Bool(v) => self.put(&[u8::from(*v)]),
            Value::String(v) => self.string(v),
            Value::Array(list) => {
                // the only list that may be empty is one of strings: a vocabulary without merges
                self.put(&list.first().map_or(STRING, type_of).to_le_bytes());
                self.put(&(list.len() as u64).to_le_bytes());
                list.iter().for_each(|v| self.value(v));
            }
            Value::U64(v) => self.put(&v.to_le_bytes()),
            Value::I64(v) => self.put(&v.to_le_bytes()),
            Value::F64(v) => self.put(&v.to_le_bytes()),
        }
    }
}

/// Writes the file, one tensor in memory at a time.
pub(super) fn write(path: &Path, header: &Header, tensors: &[GgufTensor], contents: &Contents<'_>) -> Result<()> {
    let io = |e| Error::io(path, e);
    let mut file = BufWriter::new(File::create(path).map_err(io)?);
    file.write_all(&header.bytes).map_err(io)?;
    for tensor in tensors {
        let bytes = tensor.encode(contents)?;
        file.write_all(&bytes).map_err(io)?;
        let padding = tensor.bytes().next_multiple_of(ALIGNMENT) - bytes.len() as u64;
        file.write_all(&vec![0; padding as usize]).map_err(io)?;
    }
    file.flush().map_err(io)
}

fn type_of(value: &Value) -> u32 {
    match value {
        Value::U8(_) => 0,
        Value::I8(_) => 1,
        Value::U16(_) => 2,
        Value::I16(_) => 3,
        Value::U32(_) => 4,
        Value::I32(_) => 5,
        Value::F32(_) => 6,
        Value::Bool(_) => 7,
        Value::String(_) => STRING,
        Value::Array(_) => 9,
        Value::U64(_) => 10,
        Value::I64(_) => 11,
        Value::F64(_) => 12,
    }
}

/// ggml's number of a type.
fn ggml_type(kind: GgmlDType) -> u32 {
    match kind {
        GgmlDType::F32 => 0,
        GgmlDType::F16 => 1,
        GgmlDType::Q4_0 => 2,
        GgmlDType::Q4_1 => 3,
        GgmlDType::Q5_0 => 6,
        GgmlDType::Q5_1 => 7,
        GgmlDType::Q8_0 => 8,
        GgmlDType::Q8_1 => 9,
        GgmlDType::Q2K => 10,
        GgmlDType::Q3K => 11,
        GgmlDType::Q4K => 12,
        GgmlDType::Q5K => 13,
        GgmlDType::Q6K => 14,
        GgmlDType::Q8K => 15,
        GgmlDType::BF16 => 30,
    }
}
