//! A weights file whose matrices come with their rows or columns in another order.

use crate::held::Held;
use crate::source::{RawTensor, Source, Stored, TensorBytes};
use crate::{Error, Result};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;

/// Another source, with rows or columns of some tensors in another order. Blocks whose columns change places are quantised anew, in the same type.
#[derive(Debug)]
pub struct OrderedSource<'a> {
    source: &'a dyn Source,
    /// New place -> old place.
    orders: HashMap<String, Order>,
}

#[derive(Debug)]
enum Order {
    Rows(Vec<u32>),
    Columns(Vec<u32>),
}

impl<'a> OrderedSource<'a> {
    /// Everything where it is.
    pub(crate) fn new(source: &'a dyn Source) -> Self {
        Self { source, orders: HashMap::new() }
    }

    /// Row `order[i]` of `name` becomes row i.
    pub(crate) fn rows(&mut self, name: String, order: Vec<u32>) {
        self.orders.insert(name, Order::Rows(order));
    }

    /// Column `order[i]` of `name` becomes column i.
    pub(crate) fn columns(&mut self, name: String, order: Vec<u32>) {
        self.orders.insert(name, Order::Columns(order));
    }

    fn in_order<'b>(&self, name: &str, shape: &[usize], bytes: TensorBytes<'b>) -> TensorBytes<'b> {
        let (order, pieces) = match self.orders.get(name) {
            None => return bytes,
            Some(Order::Rows(order)) => (order, 1),
            Some(Order::Columns(order)) => (order, shape.first().copied().unwrap_or(1)),
        };
        // (a tensor of another shape than the order's is refused when it is loaded)
        let extent = if pieces == 1 { shape.first() } else { shape.last() };
        if extent != Some(&order.len()) || bytes.is_empty() {
            return bytes;
        }
        let part = bytes.len() / (pieces * order.len());
        let mut ordered = Vec::with_capacity(bytes.len());
        for piece in bytes.chunks_exact(order.len() * part) {
            for from in order {
                ordered.extend_from_slice(&piece[*from as usize * part..][..part]);
            }
        }
        ordered.into()
    }
}

impl Source for OrderedSource<'_> {
    fn names(&self) -> Vec<String> {
        self.source.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.source.shape(name)
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let RawTensor { dtype, shape, bytes } = self.source.raw(name)?;
        let bytes = self.in_order(name, &shape, bytes);
        Ok(RawTensor { dtype, shape, bytes })
    }

    fn dtype(&self, name: &str) -> Result<DType> {
        self.source.dtype(name)
    }

    fn block_type(&self, name: &str) -> Result<Option<Held>> {
        self.source.block_type(name)
    }

    fn blocks(&self, name: &str) -> Result<TensorBytes<'_>> {
        let shape = self.shape(name).unwrap_or_default();
        if !matches!(self.orders.get(name), Some(Order::Columns(_))) {
            return Ok(self.in_order(name, &shape, self.source.blocks(name)?));
        }
        let ggml = match self.block_type(name)? {
            Some(Held::Blocks(of)) => of.ggml(),
            _ => GgmlDType::Q8_0,
        };
        let values = Tensor::from_vec(self.raw(name)?.to_f32(), shape, &Device::Cpu)?;
        Ok(QTensor::quantize(&values, ggml)?.data()?.into_owned().into())
    }

    fn keeps_types(&self) -> bool {
        self.source.keeps_types()
    }

    fn stored(&self, name: &str) -> Result<Stored> {
        self.source.stored(name)
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> Error {
        self.source.mismatch(name, expected, found)
    }
}
