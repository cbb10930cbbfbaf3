//! A parent's tensors with the embedding's and the head's rows of the kept tokens.

use evop_model::{DType, RawTensor, Source, TensorNames};

/// The parent's tensors; of the embedding and the head, [vocab, hidden], some rows in the order of their new ids. Nothing is copied before it is read.
#[derive(Debug)]
pub(super) struct KeptRows<'a> {
    pub parent: &'a dyn Source,
    pub names: TensorNames,
    /// The parent's row of every new one.
    pub rows: &'a [u32],
}

impl KeptRows<'_> {
    fn is_cut(&self, name: &str) -> bool {
        name == self.names.embedding() || name == self.names.head()
    }
}

impl Source for KeptRows<'_> {
    fn names(&self) -> Vec<String> {
        self.parent.names()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let mut shape = self.parent.shape(name)?;
        if self.is_cut(name)
            && let Some(rows) = shape.first_mut()
        {
            *rows = self.rows.len();
        }
        Some(shape)
    }

    fn dtype(&self, name: &str) -> evop_model::Result<DType> {
        self.parent.dtype(name)
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        let whole = self.parent.raw(name)?;
        if !self.is_cut(name) {
            return Ok(whole);
        }
        let row_bytes = whole.shape.iter().skip(1).product::<usize>() * whole.dtype.size_in_bytes();
        let mut bytes = Vec::with_capacity(self.rows.len() * row_bytes);
        for row in self.rows {
            let start = *row as usize * row_bytes;
            let Some(row) = whole.bytes.get(start..start + row_bytes) else {
                return Err(self.mismatch(name, &format!("a row of token {row}"), &format!("shape {:?}", whole.shape)));
            };
            bytes.extend_from_slice(row);
        }
        let shape = [&[self.rows.len()], whole.shape.get(1..).unwrap_or_default()].concat();
        Ok(RawTensor { dtype: whole.dtype, shape, bytes: bytes.into() })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> evop_model::Error {
        self.parent.mismatch(name, expected, found)
    }
}
