//! A parent's tensors as a pattern leaves them: the first key/value groups and channels of every sub-block.

use crate::Result;
use evop_model::{Config, DType, Pattern, RawTensor, Source, TensorBytes, TensorNames};

/// How much of a tensor is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    All,
    Rows(usize),
    Columns(usize),
    Nothing,
}

/// What a pattern leaves of a parent's tensors, under the parent's layer numbers; nothing is copied before it is read.
#[derive(Debug)]
pub struct MaskedSource<'a> {
    parent: &'a dyn Source,
    config: &'a Config,
    pattern: Pattern,
    names: TensorNames,
}

impl<'a> MaskedSource<'a> {
    /// The tensors of `config` in `parent` under `pattern`.
    ///
    /// # Errors
    /// [`evop_model::Error::Pattern`] when the pattern doesn't fit the config.
    pub fn new(parent: &'a dyn Source, config: &'a Config, pattern: &Pattern) -> Result<Self> {
        let pattern = Pattern::new(pattern.layers().to_vec(), config)?;
        Ok(Self { parent, config, pattern, names: TensorNames::of(config.architecture) })
    }

    fn kept(&self, name: &str) -> Kept {
        let Some((layer, part)) = self.names.in_layer(name) else { return Kept::All };
        let (Some(gene), Some(whole)) = (self.pattern.layers().get(layer), self.config.layers.get(layer)) else { return Kept::All };
        let attention = name == self.names.attention_norm(layer) || part.starts_with("self_attn.") || part.starts_with("self_attn_layer_norm.");
        let (kept, all, unit) = match attention {
            true => (gene.kv_groups, whole.shape.kv_groups, self.config.head_dim),
            false => (gene.ffn, whole.shape.ffn, 1),
        };
        if kept == 0 {
            return Kept::Nothing;
        }
        if kept == all {
            return Kept::All;
        }
        let (module, kind) = part.rsplit_once('.').unwrap_or((part, ""));
        match module.rsplit('.').next().unwrap_or(module) {
            "q_proj" => Kept::Rows(kept * whole.shape.group_size * unit),
            "k_proj" | "v_proj" | "gate_proj" | "up_proj" | "fc1" => Kept::Rows(kept * unit),
            "o_proj" | "out_proj" if kind == "weight" => Kept::Columns(kept * whole.shape.group_size * unit),
            "down_proj" | "fc2" if kind == "weight" => Kept::Columns(kept),
            _ => Kept::All,
        }
    }
}

impl Source for MaskedSource<'_> {
    fn names(&self) -> Vec<String> {
        self.parent.names().into_iter().filter(|name| self.kept(name) != Kept::Nothing).collect()
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let mut shape = self.parent.shape(name)?;
        match (self.kept(name), shape.as_mut_slice()) {
            (Kept::Nothing, _) => return None,
            (Kept::Rows(rows), [first, ..]) => *first = rows.min(*first),
            (Kept::Columns(columns), [_, second]) => *second = columns.min(*second),
            _ => {}
        }
        Some(shape)
    }

    fn dtype(&self, name: &str) -> evop_model::Result<DType> {
        self.parent.dtype(name)
    }

    fn raw(&self, name: &str) -> evop_model::Result<RawTensor<'_>> {
        let Some(shape) = self.shape(name) else {
            return Err(self.mismatch(name, "a tensor of that name", "nothing: it is missing from the file"));
        };
        let whole = self.parent.raw(name)?;
        if shape == whole.shape {
            return Ok(whole);
        }
        let size = whole.dtype.size_in_bytes();
        let bytes = match (self.kept(name), whole.shape.as_slice()) {
            (Kept::Columns(_), [rows, columns]) => {
                let kept = shape[1] * size;
                let mut bytes = Vec::with_capacity(rows * kept);
                whole.bytes.chunks_exact(columns * size).for_each(|row| bytes.extend_from_slice(&row[..kept]));
                TensorBytes::from(bytes)
            }
            _ => {
                let kept = shape.iter().product::<usize>() * size;
                let mut bytes = whole.bytes;
                bytes.truncate(kept);
                bytes
            }
        };
        Ok(RawTensor { dtype: whole.dtype, shape, bytes })
    }

    fn mismatch(&self, name: &str, expected: &str, found: &str) -> evop_model::Error {
        self.parent.mismatch(name, expected, found)
    }
}
