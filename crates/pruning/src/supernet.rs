//! One model that is all of its patterns: the parent with its units in order of importance, and the repaired output layers of every level.

use crate::Result;
use crate::levels::{Level, Levels};
use crate::search::scaled;
use evop_model::{Decoder, Linear, Pattern, SubBlock, Tensor};
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
    layers: HashMap<(usize, Level), Linear>,
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

    /// Bytes of repaired output layers in memory, and their bound.
    pub fn cached(&self) -> (usize, usize) {
        (self.cache.lock().unwrap_or_else(PoisonError::into_inner).bytes, CACHED_BYTES)
    }

    /// What a pattern asks of sub-block `s`.
    pub fn level(&self, pattern: &Pattern, s: usize) -> Level {
        let width = pattern.width(s);
        let Some(levels) = self.levels.as_ref().filter(|_| width > 0) else { return Level { width, absorbed: 0 } };
        let present = (s + 1..self.decoder.last_boundary()).filter(|t| self.decoder.sub_block(*t).is_some());
        levels.usable(s, Level { width, absorbed: present.take_while(|t| !pattern.keeps(*t)).count() })
    }

    /// Sub-block `s` at a level; `None` where it is skipped or absent.
    pub fn sub_block(&self, s: usize, level: Level) -> Result<Option<SubBlock>> {
        let Some(block) = self.decoder.sub_block(s).filter(|_| level.width > 0) else { return Ok(None) };
        if level == (Level { width: block.width(), absorbed: 0 }) {
            return Ok(Some(block.clone()));
        }
        Ok(Some(match self.output(s, level)? {
            Some(output) => block.with_output(output)?,
            None => block.narrowed(level.width)?,
        }))
    }

    /// The residual stream after sub-block `s` was skipped.
    pub fn skip(&self, s: usize, hidden: &Tensor) -> Result<Tensor> {
        match self.levels.as_ref().and_then(|l| l.scale(s)) {
            Some(factor) => Ok((hidden * factor)?),
            None => Ok(hidden.clone()),
        }
    }

    /// The repaired output layer of a level, if it has one.
    fn output(&self, s: usize, level: Level) -> Result<Option<Linear>> {
        let Some(levels) = &self.levels else { return Ok(None) };
        if let Some(known) = self.cache.lock().unwrap_or_else(PoisonError::into_inner).layers.get(&(s, level)) {
            return Ok(Some(known.clone()));
        }
        let Some(layer) = levels.output(s, level, &self.decoder)? else { return Ok(None) };
        let mut cache = self.cache.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = layer.weight_bytes();
        if cache.bytes + bytes <= CACHED_BYTES {
            cache.bytes += bytes;
            cache.layers.insert((s, level), layer.clone());
        }
        Ok(Some(layer))
    }

    /// The decoder that a pattern stands for. The scales of skipped sub-blocks go into the output layers after them: the norms don't see the
    /// magnitude of the stream, so it may stay where it is and what is added to it shrink instead.
    pub fn pruned(&self, pattern: &Pattern) -> Result<Decoder> {
        let mut factor = 1.0;
        let mut blocks = Vec::with_capacity(self.decoder.last_boundary());
        for s in 0..self.decoder.last_boundary() {
            let block = self.sub_block(s, self.level(pattern, s))?;
            if !pattern.keeps(s) {
                factor *= self.levels.as_ref().and_then(|l| l.scale(s)).unwrap_or(1.0);
            }
            blocks.push(block.map(|b| scaled(&b, 1.0 / factor)).transpose()?);
        }
        Ok(self.decoder.with_sub_blocks(blocks)?)
    }
}
