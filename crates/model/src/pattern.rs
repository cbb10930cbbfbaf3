//! What is kept of a parent model: one gene a sub-block, two a layer.

use crate::config::{Config, LayerShape};
use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// What is kept of one layer. Which groups and channels a number keeps is fixed: the first ones (checkpoints store
/// them in importance order), so a narrower level is a prefix of a wider one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Gene {
    /// Key/value groups kept; 0: the attention sub-block is skipped.
    pub kv_groups: usize,
    /// MLP channels kept; 0: the MLP sub-block is skipped.
    pub ffn: usize,
}

/// A pattern that is known to fit its model: one gene a layer, none wider than the parent.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct Pattern {
    layers: Vec<Gene>,
}

impl Pattern {
    /// Checks genes against a model.
    ///
    /// # Errors
    /// [`Error::Pattern`] when the number of layers differs or a gene keeps more than there is.
    pub fn new(layers: Vec<Gene>, parent: &Config) -> Result<Self> {
        Self::fitting(layers, parent).map_err(Error::Pattern)
    }

    fn fitting(layers: Vec<Gene>, parent: &Config) -> std::result::Result<Self, String> {
        if layers.len() != parent.num_layers() {
            return Err(format!("expected {} layers, found {}", parent.num_layers(), layers.len()));
        }
        for (i, (gene, layer)) in layers.iter().zip(&parent.layers).enumerate() {
            let LayerShape { kv_groups, ffn, .. } = layer.shape;
            if gene.kv_groups > kv_groups || gene.ffn > ffn {
                return Err(format!("layer {i}: expected at most {kv_groups} key/value groups and {ffn} channels, found {} and {}", gene.kv_groups, gene.ffn));
            }
        }
        Ok(Self { layers })
    }

    /// The pattern in a file: a JSON list of genes, such as a run's `pattern.json`.
    ///
    /// # Errors
    /// [`Error::Pattern`] with the file's name, when it can't be read, is no such list or doesn't fit the model.
    pub fn read(file: &Path, parent: &Config) -> Result<Self> {
        let named = |why: &dyn std::fmt::Display| Error::Pattern(format!("{}: {why}", file.display()));
        let text = std::fs::read(file).map_err(|e| named(&e))?;
        let genes = serde_json::from_slice(&text).map_err(|e| named(&format_args!("expected a list of {{\"kv_groups\", \"ffn\"}}, one a layer: {e}")))?;
        Self::fitting(genes, parent).map_err(|e| named(&e))
    }

    /// Everything kept.
    pub fn dense(parent: &Config) -> Self {
        Self { layers: parent.layers.iter().map(|l| Gene { kv_groups: l.shape.kv_groups, ffn: l.shape.ffn }).collect() }
    }

    /// The genes, one a layer.
    pub fn layers(&self) -> &[Gene] {
        &self.layers
    }

    /// Genes that came from `whole`'s own widths: nothing to check.
    ///
    /// Widths above `whole`'s are cut to them, missing layers are kept whole.
    #[must_use]
    pub fn within(genes: &[Gene], whole: &Self) -> Self {
        let gene = |(l, all): (usize, &Gene)| genes.get(l).map_or(*all, |g| Gene { kv_groups: g.kv_groups.min(all.kv_groups), ffn: g.ffn.min(all.ffn) });
        Self { layers: whole.layers.iter().enumerate().map(gene).collect() }
    }

    /// Groups or channels kept of sub-block `s`.
    pub fn width(&self, sub_block: usize) -> usize {
        let gene = self.layers[sub_block / 2];
        if sub_block.is_multiple_of(2) { gene.kv_groups } else { gene.ffn }
    }

    /// Whether sub-block `s` (0: attention of layer 0, 1: its MLP, 2: attention of layer 1, …) is kept at all.
    pub fn keeps(&self, sub_block: usize) -> bool {
        self.width(sub_block) > 0
    }

    /// The same pattern with sub-block `s` skipped.
    #[must_use]
    pub fn without(&self, sub_block: usize) -> Self {
        let mut layers = self.layers.clone();
        if sub_block.is_multiple_of(2) {
            layers[sub_block / 2].kv_groups = 0;
        } else {
            layers[sub_block / 2].ffn = 0;
        }
        Self { layers }
    }
}

impl Config {
    /// The configuration of what `pattern` leaves: a pure function of the two.
    #[must_use]
    pub fn with_pattern(&self, pattern: &Pattern) -> Self {
        let mut config = self.clone();
        for (layer, gene) in config.layers.iter_mut().zip(pattern.layers()) {
            layer.shape.kv_groups = gene.kv_groups;
            layer.shape.ffn = gene.ffn;
            if gene.kv_groups == 0 {
                layer.shape.group_size = 0;
            }
        }
        config
    }
}
