//! Search spaces: which widths every sub-block may have, and which of the patterns fit the budgets.

use crate::budget::{Budget, Costs, Drafting, LatencyTable};
use crate::names::named;
use crate::{Error, Result};
use evop_model::{Config, Gene, Pattern};
use rand::Rng;
use rand::seq::{IndexedRandom, IteratorRandom};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// What a gene may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Space {
    /// Whole decoder layers: attention and MLP go together (EvoP).
    Layer,
    /// Attention and MLP sub-blocks on their own.
    Block,
    /// MLP widths in steps; nothing is skipped.
    Width,
    /// Attention whole or not at all, the MLP in steps down to nothing.
    Joint,
    /// As joint, with attention in steps of key/value groups.
    #[serde(rename = "joint+heads")]
    JointHeads,
}

named!(Space, "layer" => Space::Layer, "block" => Space::Block, "width" => Space::Width, "joint" => Space::Joint, "joint+heads" => Space::JointHeads);

/// How finely a model's widths are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Grid {
    /// MLP widths between nothing and all, in eighths unless asked otherwise.
    pub steps: usize,
    /// Widths are multiples of this; `None`: 32 below an FFN of 1,024, 64 below 4,096, 256 from there.
    pub multiple: Option<usize>,
}

impl Default for Grid {
    fn default() -> Self {
        Self { steps: 8, multiple: None }
    }
}

impl Grid {
    /// # Errors
    /// [`Error::Option`] for steps or multiples of 0.
    pub fn check(self) -> Result<()> {
        for (option, value) in [("--width-steps", Some(self.steps)), ("--width-multiple", self.multiple)] {
            if value == Some(0) {
                return Err(Error::option(option, "expected at least 1, found 0"));
            }
        }
        Ok(())
    }

    /// Ascending widths of an MLP of `ffn` channels: 0, the steps, `ffn`.
    pub fn widths(self, ffn: usize) -> Vec<usize> {
        let multiple = self.multiple.unwrap_or(match ffn {
            0..1024 => 32,
            1024..4096 => 64,
            _ => 256,
        });
        // a step a channel gives every multiple there is
        let (steps, multiple) = (self.steps.clamp(1, ffn.max(1)), multiple.max(1));
        let step = |i: usize| (ffn * i).div_ceil(steps.saturating_mul(multiple)).saturating_mul(multiple);
        let mut widths: Vec<usize> = (1..steps).map(step).filter(|w| *w < ffn).collect();
        widths.extend([0, ffn]);
        widths.sort_unstable();
        widths.dedup();
        widths
    }
}

/// One choice of a search: the same option number sets the width of every sub-block of the unit.
#[derive(Debug, Clone)]
struct Unit {
    sub_blocks: Vec<usize>,
    /// Ascending; per option, the width of each sub-block. The last one is the whole parent.
    options: Vec<Vec<usize>>,
}

/// Option numbers, one a unit; the highest number is the whole parent.
pub type Genome = Vec<u8>;

/// Options of a unit that a genome can tell apart, and count.
const MOST_OPTIONS: usize = u8::MAX as usize;

/// The patterns that a search may return: those that fit every budget.
#[derive(Debug, Clone)]
pub struct SearchSpace {
    kind: Space,
    dense: Pattern,
    units: Vec<Unit>,
    costs: Costs,
    widths: Vec<Vec<usize>>,
    latency: Option<LatencyTable>,
    /// Equal widths in all layers that are kept (`--uniform`): the last unit is that width.
    uniform: Option<Vec<usize>>,
}

/// What makes a space.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SpaceOptions {
    /// What a gene may say.
    pub space: Space,
    /// Only patterns whose layers are equal: whole layers removed, one width for all.
    pub uniform: bool,
    /// Steps of the MLP's width.
    pub grid: Grid,
    /// What may be kept.
    pub budgets: Vec<Budget>,
}

impl SearchSpace {
    /// The space over a model.
    ///
    /// # Errors
    /// [`Error::Option`] when there is no budget, no pattern but the empty one fits, or a unit has more options than a genome can name.
    pub fn new(config: &Config, options: &SpaceOptions, latency: Option<&LatencyTable>) -> Result<Self> {
        let dense = Pattern::dense(config);
        if options.budgets.is_empty() {
            return Err(Error::option("--params", "expected a budget: --sparsity, --params, --kv or --latency".to_string()));
        }
        options.grid.check()?;
        let blocks = 2 * config.num_layers();
        let full = |s: usize| dense.width(s);
        let present: Vec<usize> = (0..blocks).filter(|s| full(*s) > 0).collect();
        let whole = |s: usize| vec![vec![0], vec![full(s)]];
        let single = |s: usize, options: Vec<Vec<usize>>| Unit { sub_blocks: vec![s], options };
        let layers = || {
            let of_layer = |l: usize| [2 * l, 2 * l + 1].into_iter().filter(|s| full(*s) > 0).collect::<Vec<_>>();
            (0..config.num_layers())
                .map(of_layer)
                .filter(|blocks| !blocks.is_empty())
                .map(|blocks| Unit { options: vec![vec![0; blocks.len()], blocks.iter().map(|s| full(*s)).collect()], sub_blocks: blocks })
                .collect::<Vec<_>>()
        };
        let steps = |s: usize| options.grid.widths(full(s)).into_iter().map(|w| vec![w]).collect::<Vec<_>>();
        let mut uniform = None;
        let units: Vec<Unit> = match options.space {
            _ if options.uniform => {
                let widths: Vec<usize> = present.iter().filter(|s| !s.is_multiple_of(2)).map(|s| full(*s)).collect();
                if widths.iter().any(|w| *w != widths[0]) {
                    return Err(Error::option("--uniform", "the model's layers differ already: expected one of equal layers".to_string()));
                }
                let widths = options.grid.widths(widths.first().copied().unwrap_or(0));
                uniform = Some(widths[1..].to_vec());
                layers()
            }
            Space::Layer => layers(),
            Space::Block => present.iter().map(|s| single(*s, whole(*s))).collect(),
            Space::Width => present.iter().filter(|s| !s.is_multiple_of(2)).map(|s| single(*s, steps(*s)[1..].to_vec())).collect(),
            Space::Joint => present.iter().map(|s| single(*s, if s.is_multiple_of(2) { whole(*s) } else { steps(*s) })).collect(),
            Space::JointHeads => {
                let groups = |s: usize| (0..=full(s)).map(|g| vec![g]).collect();
                present.iter().map(|s| single(*s, if s.is_multiple_of(2) { groups(*s) } else { steps(*s) })).collect()
            }
        };
        let most = units.iter().map(|u| u.options.len()).chain(uniform.as_ref().map(Vec::len)).max().unwrap_or(0);
        if most > MOST_OPTIONS {
            let message = format!("gives a unit {most} options: expected at most {MOST_OPTIONS}, of fewer steps or a larger --width-multiple");
            return Err(Error::option("--width-steps", message));
        }
        let mut widths: Vec<Vec<usize>> = (0..blocks).map(|s| vec![full(s)]).collect();
        for unit in &units {
            for (i, s) in unit.sub_blocks.iter().enumerate() {
                widths[*s].extend(unit.options.iter().map(|o| o[i]));
                if let Some(uniform) = uniform.as_ref().filter(|_| !s.is_multiple_of(2)) {
                    widths[*s].extend(uniform);
                }
            }
        }
        for of_block in &mut widths {
            of_block.sort_unstable();
            of_block.dedup();
        }
        let costs = Costs::new(config, &widths, &options.budgets, latency)?;
        let space = Self { kind: options.space, dense, units, costs, widths, latency: latency.cloned(), uniform };
        let smallest: Genome = vec![0; space.units()];
        let (b, totals) = (space.costs.budgets(), space.totals(&smallest));
        if !space.costs.fit(&totals) {
            return Err(Error::option(
                "--params",
                format!("the smallest pattern of this space keeps {totals:.3?} of what the budgets {b:?} count: expected a larger budget, or --space joint"),
            ));
        }
        let kept = space.lightest_unit();
        if !space.costs.fit(&space.totals(&kept)) {
            return Err(Error::option("--params", format!("the budgets {b:?} leave no room for a single unit: expected a larger fraction to keep")));
        }
        Ok(space)
    }

    /// The same space with another first budget (1: all of it).
    #[must_use]
    pub fn with_first_budget(&self, keep: f64) -> Self {
        Self { costs: self.costs.with_first_budget(keep), ..self.clone() }
    }

    /// The genome with the least that isn't nothing: the cheapest unit at its lowest option above 0.
    fn lightest_unit(&self) -> Genome {
        let nothing: Genome = vec![0; self.units()];
        let raised = (0..self.units()).map(|u| {
            let mut one = nothing.clone();
            one[u] = 1.min(self.options(u) as u8 - 1);
            one
        });
        raised.min_by(|a, b| self.costs.excess(&self.totals(a)).total_cmp(&self.costs.excess(&self.totals(b)))).unwrap_or(nothing)
    }

    /// Number of choices.
    pub fn units(&self) -> usize {
        self.units.len() + usize::from(self.uniform.is_some())
    }

    /// Number of options of a unit.
    pub fn options(&self, unit: usize) -> usize {
        match (&self.uniform, self.units.get(unit)) {
            (_, Some(unit)) => unit.options.len(),
            (Some(widths), None) => widths.len(),
            (None, None) => 0,
        }
    }

    /// Whether each unit is either there or not.
    pub fn is_binary(&self) -> bool {
        self.uniform.is_none() && self.units.iter().all(|u| u.options.len() == 2)
    }

    /// What a gene may say here.
    pub fn kind(&self) -> Space {
        self.kind
    }

    /// The sub-blocks of a unit (none for a width that all layers share).
    pub fn sub_blocks(&self, unit: usize) -> &[usize] {
        self.units.get(unit).map_or(&[], |u| &u.sub_blocks)
    }

    /// Per sub-block, the widths that some pattern of the space may have, ascending; the parent's own is the last.
    pub fn widths(&self) -> Vec<Vec<usize>> {
        self.widths.clone()
    }

    /// Everything kept.
    pub fn dense(&self) -> &Pattern {
        &self.dense
    }

    /// The genome that keeps everything (it fits no budget).
    pub fn dense_genome(&self) -> Genome {
        (0..self.units()).map(|u| (self.options(u) - 1) as u8).collect()
    }

    /// What things cost.
    pub fn costs(&self) -> &Costs {
        &self.costs
    }

    /// The pattern that a genome stands for.
    pub fn pattern(&self, genome: &[u8]) -> Pattern {
        let mut genes: Vec<Gene> = self.dense.layers().to_vec();
        for (unit, option) in self.units.iter().zip(genome) {
            for (s, width) in unit.sub_blocks.iter().zip(&unit.options[usize::from(*option)]) {
                let width = match &self.uniform {
                    Some(widths) if *width > 0 && !s.is_multiple_of(2) => widths[usize::from(genome[self.units.len()])],
                    _ => *width,
                };
                let gene = &mut genes[s / 2];
                if s.is_multiple_of(2) { gene.kv_groups = width } else { gene.ffn = width }
            }
        }
        Pattern::within(&genes, &self.dense)
    }

    /// The genome of a pattern, if it is one of this space's.
    pub fn genome(&self, pattern: &Pattern) -> Option<Genome> {
        let mut genome: Genome = Vec::with_capacity(self.units());
        for unit in &self.units {
            let widths: Vec<usize> = unit.sub_blocks.iter().map(|s| pattern.width(*s)).collect();
            let is_option = |o: &&Vec<usize>| if self.uniform.is_some() { (o[0] > 0) == (widths[0] > 0) } else { **o == widths };
            genome.push(unit.options.iter().position(|o| is_option(&o))? as u8);
        }
        if let Some(widths) = &self.uniform {
            let kept = (0..2 * pattern.layers().len()).filter(|s| !s.is_multiple_of(2)).map(|s| pattern.width(s)).max()?;
            genome.push(widths.iter().position(|w| *w == kept)? as u8);
        }
        (self.pattern(&genome) == *pattern).then_some(genome)
    }

    /// What a pattern does as a draft, where times were measured for that ([`LatencyTable::drafting`]).
    pub fn drafting(&self, pattern: &Pattern, refused: f64) -> Option<Drafting> {
        self.latency.as_ref()?.drafting(pattern, refused)
    }

    /// What a genome costs under each budget.
    pub fn totals(&self, genome: &[u8]) -> Vec<f64> {
        self.costs.totals(&self.pattern(genome))
    }

    /// Whether a genome is within every budget.
    pub fn fits(&self, genome: &[u8]) -> bool {
        self.costs.fit(&self.totals(genome))
    }

    /// Whether a genome fits and nothing can be added to it.
    pub fn is_maximal(&self, genome: &[u8]) -> bool {
        self.fits(genome) && (0..self.units()).all(|u| self.raised(genome, u).is_none_or(|more| !self.fits(&more)))
    }

    /// One option more of a unit.
    pub fn raised(&self, genome: &[u8], unit: usize) -> Option<Genome> {
        (usize::from(genome[unit]) + 1 < self.options(unit)).then(|| {
            let mut more = genome.to_vec();
            more[unit] += 1;
            more
        })
    }

    /// One option less of a unit.
    pub fn lowered(&self, genome: &[u8], unit: usize) -> Option<Genome> {
        (genome[unit] > 0).then(|| {
            let mut less = genome.to_vec();
            less[unit] -= 1;
            less
        })
    }

    /// Steps random units down until the genome fits, then random ones up while it still does: the result is maximal.
    /// In a space of equal layers that is EvoP's repair to exactly k removed.
    pub fn repair(&self, genome: &mut Genome, rng: &mut ChaCha8Rng) {
        while !self.fits(genome) {
            match (0..self.units()).filter(|u| genome[*u] > 0).choose(rng) {
                Some(unit) => genome[unit] -= 1,
                None => return,
            }
        }
        self.fill(genome, rng);
    }

    /// Steps random units up while the genome fits.
    pub fn fill(&self, genome: &mut Genome, rng: &mut ChaCha8Rng) {
        loop {
            let larger: Vec<Genome> = (0..self.units()).filter_map(|u| self.raised(genome, u)).filter(|more| self.fits(more)).collect();
            match larger.choose(rng) {
                Some(more) => genome.clone_from(more),
                None => return,
            }
        }
    }

    /// A random maximal genome: random options, repaired.
    pub fn random(&self, rng: &mut ChaCha8Rng) -> Genome {
        let mut genome: Genome = (0..self.units()).map(|u| rng.random_range(0..self.options(u)) as u8).collect();
        self.repair(&mut genome, rng);
        genome
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_are_eighths_rounded_up_to_the_multiple() {
        assert_eq!(Grid::default().widths(1536), [0, 192, 384, 576, 768, 960, 1152, 1344, 1536]);
        assert_eq!(Grid::default().widths(384), [0, 64, 96, 160, 192, 256, 288, 352, 384]);
        assert_eq!(Grid { steps: 4, multiple: Some(256) }.widths(11008), [0, 2816, 5632, 8448, 11008]);
        assert_eq!(Grid::default().widths(20), [0, 20]);
        assert_eq!(Grid { steps: usize::MAX, multiple: Some(8) }.widths(20), [0, 8, 16, 20]);
        assert_eq!(Grid { steps: 8, multiple: Some(usize::MAX) }.widths(20), [0, 20]);
    }
}
