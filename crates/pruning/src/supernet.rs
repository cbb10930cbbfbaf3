//! One model that is all of its patterns: the parent with its units in order of importance, and the repaired output layers of every level.

use crate::Result;
use crate::levels::Levels;
use evop_model::{Decoder, Linear, Pattern, SubBlock};
use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Repaired output layers that stay in memory, in bytes; others are read from the mapped database when they are used.
const CACHED_BYTES: usize = 1 << 30;

/// Sub-blocks at every width of a search space.
#[derive(Debug)]
pub struct Supernet {
    /// The parent, its units in order of importance where there are levels. The same function as the parent.
    decoder: Decoder,
    levels: Option<Levels>,
    cache: Mutex<OutputCache>,
}

#[derive(Debug, Default)]
struct OutputCache {
    layers: HashMap<(usize, usize), Linear>,
    bytes: usize,
}

impl Supernet {
    /// Narrower sub-blocks are prefixes of the parent's, as they stand.
    pub fn raw(decoder: &Decoder) -> Self {
        Self { decoder: decoder.clone(), levels: None, cache: Mutex::default() }
    }

    /// Narrower sub-blocks are the database's levels.
    ///
    /// # Errors
    /// [`crate::Error::Model`] when the device runs out of memory.
    pub fn new(decoder: &Decoder, levels: Levels) -> Result<Self> {
        let reorder = |s: usize| -> Result<Option<SubBlock>> {
            let Some(block) = decoder.sub_block(s) else { return Ok(None) };
            Ok(Some(match levels.order(s) {
                Some(order) => block.reordered(order)?,
                None => block.clone(),
            }))
        };
        let blocks = (0..decoder.last_boundary()).map(reorder).collect::<Result<_>>()?;
        Ok(Self { decoder: decoder.with_sub_blocks(blocks)?, levels: Some(levels), cache: Mutex::default() })
    }

    /// The parent.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The database, if there is one.
    pub fn levels(&self) -> Option<&Levels> {
        self.levels.as_ref()
    }

    /// Sub-block `s` at a width; `None` where it is skipped or absent.
    pub fn sub_block(&self, s: usize, width: usize) -> Result<Option<SubBlock>> {
        let Some(block) = self.decoder.sub_block(s).filter(|_| width > 0) else { return Ok(None) };
        if width == block.width() {
            return Ok(Some(block.clone()));
        }
        Ok(Some(match self.output(s, width)? {
            Some(output) => block.with_output(output)?,
            None => block.narrowed(width)?,
        }))
    }

    /// The repaired output layer of a level, if it has one.
    fn output(&self, s: usize, width: usize) -> Result<Option<Linear>> {
        let Some(levels) = &self.levels else { return Ok(None) };
        if let Some(known) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).layers.get(&(s, width)) {
            return Ok(Some(known.clone()));
        }
        let Some(layer) = levels.output(s, width, &self.decoder)? else { return Ok(None) };
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = layer.weight().elem_count() * layer.weight().dtype().size_in_bytes();
        if cache.bytes + bytes <= CACHED_BYTES {
            cache.bytes += bytes;
            cache.layers.insert((s, width), layer.clone());
        }
        Ok(Some(layer))
    }

    /// The decoder that a pattern stands for.
    pub fn pruned(&self, pattern: &Pattern) -> Result<Decoder> {
        let blocks = (0..self.decoder.last_boundary()).map(|s| self.sub_block(s, pattern.width(s))).collect::<Result<_>>()?;
        Ok(self.decoder.with_sub_blocks(blocks)?)
    }
}
