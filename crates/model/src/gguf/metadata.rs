//! Typed access to a GGUF's key-value pairs, with errors that name the key.

use super::Value;
use crate::{Error, Result};
use std::collections::HashMap;
use std::path::Path;

pub(super) struct Metadata<'a> {
    pub values: &'a HashMap<String, Value>,
    pub path: &'a Path,
}

impl Metadata<'_> {
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.values.get(key)
    }

    pub fn missing(&self, key: &str, expected: &str) -> Error {
        Error::config(self.path, format!("`{key}`: expected {expected}, found {:?}", self.get(key).map(short)))
    }

    pub fn unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.get(key) {
            None => Ok(None),
            Some(value) => whole(value).map(Some).ok_or_else(|| self.missing(key, "a whole number")),
        }
    }

    /// One number a layer: a list of them, or one that is every layer's.
    pub fn per_layer(&self, key: &str, layers: usize) -> Result<Option<Vec<usize>>> {
        let numbers = match self.get(key) {
            None => return Ok(None),
            Some(Value::Array(list)) if list.len() == layers => list.iter().map(whole).collect::<Option<Vec<u64>>>(),
            Some(Value::Array(_)) => return Err(self.missing(key, &format!("a list of {layers} numbers, one a layer"))),
            Some(value) => whole(value).map(|n| vec![n; layers]),
        };
        // bounded so that products of two sizes can't overflow
        let numbers = numbers.and_then(|list| list.into_iter().map(|n| usize::try_from(n).ok().filter(|n| *n < 1 << 28)).collect());
        numbers.map(Some).ok_or_else(|| self.missing(key, "a whole number, or a list of them"))
    }

    /// Layers that a list names; none where there is no list.
    pub fn layers(&self, key: &str) -> Result<Vec<usize>> {
        let numbers = self.list(key)?.unwrap_or_default().iter().map(|v| whole(v).and_then(|n| usize::try_from(n).ok())).collect::<Option<Vec<_>>>();
        numbers.ok_or_else(|| self.missing(key, "a list of layers"))
    }

    pub fn float(&self, key: &str) -> Result<Option<f64>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::F32(v)) => Ok(Some(f64::from(*v))),
            Some(Value::F64(v)) => Ok(Some(*v)),
            Some(_) => Err(self.missing(key, "a number")),
        }
    }

    pub fn text(&self, key: &str) -> Result<Option<&str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(self.missing(key, "a string")),
        }
    }

    pub fn list(&self, key: &str) -> Result<Option<&[Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) => Ok(Some(list)),
            Some(_) => Err(self.missing(key, "a list")),
        }
    }

    pub fn flag(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.missing(key, "true or false")),
        }
    }
}

fn whole(value: &Value) -> Option<u64> {
    match value {
        Value::U8(v) => Some(u64::from(*v)),
        Value::U16(v) => Some(u64::from(*v)),
        Value::U32(v) => Some(u64::from(*v)),
        Value::U64(v) => Some(*v),
        Value::I32(v) => u64::try_from(*v).ok(),
        Value::I64(v) => u64::try_from(*v).ok(),
        _ => None,
    }
}

fn short(value: &Value) -> String {
    let text = format!("{value:?}");
    text.chars().take(80).collect()
}
