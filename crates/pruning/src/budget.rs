//! What a pattern costs: parameters, key/value cache bytes, measured milliseconds. All three add up over sub-blocks.

use crate::{Error, Result};
use evop_model::{Config, Pattern};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// What a budget counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Resource {
    /// Parameters of the decoder's blocks (embeddings and head not counted).
    Params,
    /// Key/value cache bytes per token.
    Kv,
    /// Milliseconds of the blocks, from a table measured on this device.
    Latency,
}

/// The most that may be kept of a resource, as a fraction of the dense model's.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// What.
    pub resource: Resource,
    /// How much: above 0, below 1.
    pub keep: f64,
}

impl Budget {
    /// A budget from an option's value.
    ///
    /// # Errors
    /// [`Error::Option`] unless 0 < keep < 1.
    pub fn new(resource: Resource, keep: f64) -> Result<Self> {
        if keep > 0.0 && keep < 1.0 {
            return Ok(Self { resource, keep });
        }
        let option = match resource {
            Resource::Params => "--params",
            Resource::Kv => "--kv",
            Resource::Latency => "--latency",
        };
        Err(Error::option(option, format!("expected the fraction to keep, above 0 and below 1, such as 0.75; found {keep}")))
    }

    /// The budget under which a fraction of the block parameters goes.
    ///
    /// # Errors
    /// [`Error::Option`] unless 0 < sparsity < 1.
    pub fn removing(sparsity: f64) -> Result<Self> {
        if sparsity > 0.0 && sparsity < 1.0 {
            return Ok(Self { resource: Resource::Params, keep: 1.0 - sparsity });
        }
        Err(Error::option("--sparsity", format!("expected a fraction above 0 and below 1, such as 0.25; found {sparsity}")))
    }
}

/// Measured milliseconds of every sub-block at every width in question (width 0 takes none).
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LatencyTable {
    /// What was measured: device, tokens of a pass, repetitions.
    pub description: String,
    /// Per sub-block: width -> milliseconds.
    pub milliseconds: Vec<BTreeMap<usize, f64>>,
    /// Milliseconds of the whole model over one, two, … new tokens of a sequence, where a draft is searched for.
    #[serde(default)]
    pub passes: Vec<f64>,
    /// Milliseconds of embedding, norm and head over one token, likewise.
    #[serde(default)]
    pub head: f64,
}

/// What a pattern does as a draft of the whole model.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drafting {
    /// Tokens to guess before each check.
    pub tokens: usize,
    /// The part of its guesses that the whole model takes.
    pub agreement: f64,
    /// Time of a token, relative to the whole model's alone (1); its inverse is the speed-up.
    pub time: f64,
}

impl LatencyTable {
    /// The best that drafting with a pattern can do when this part of its guesses is refused: of every number of guesses k the time of k draft steps and
    /// a check, over the tokens that come of it, (1 - a^(k+1)) / (1 - a) (Leviathan et al. 2023, arXiv 2211.17192, equation 1). `None` in a table that
    /// wasn't measured for drafts.
    pub fn drafting(&self, pattern: &Pattern, refused: f64) -> Option<Drafting> {
        let (alone, agreement) = (*self.passes.first()?, 1.0 - refused);
        let at = |s: usize, width: usize| self.milliseconds[s].get(&width).copied().unwrap_or(0.0);
        let whole: f64 = self.milliseconds.iter().filter_map(|of| of.last_key_value()).map(|(_, milliseconds)| milliseconds).sum();
        let kept: f64 = (0..self.milliseconds.len()).map(|s| at(s, pattern.width(s))).sum();
        // sub-blocks were measured by themselves, their weights at hand: of a pass they take what isn't the head's, each in proportion
        let draft = self.head + (alone - self.head).max(0.0) * kept / whole.max(f64::MIN_POSITIVE);
        let with = |tokens: usize| {
            let expected: f64 = (0..=tokens).map(|i| agreement.powi(i as i32)).sum();
            Drafting { tokens, agreement, time: (tokens as f64 * draft + self.passes[tokens]) / expected / alone }
        };
        (1..self.passes.len()).map(with).reduce(|best, other| if other.time < best.time { other } else { best })
    }
}

/// Costs of the sub-blocks of one model, and the limits.
#[derive(Debug, Clone)]
pub struct Costs {
    budgets: Vec<Budget>,
    /// Per budget, per sub-block: width -> cost as a fraction of the dense model's total.
    tables: Vec<Vec<BTreeMap<usize, f64>>>,
}

/// Costs are compared with limits up to the rounding of a sum of fractions.
const ROUNDING: f64 = 1e-9;

impl Costs {
    /// Costs of the widths that a search may choose, `widths[s]` for sub-block `s`.
    ///
    /// # Errors
    /// [`Error::Option`] for a latency budget without a table that covers every width, or a resource that the dense model doesn't use.
    pub fn new(config: &Config, widths: &[Vec<usize>], budgets: &[Budget], latency: Option<&LatencyTable>) -> Result<Self> {
        let mut tables = Vec::new();
        for budget in budgets {
            let mut table: Vec<BTreeMap<usize, f64>> = Vec::with_capacity(widths.len());
            for (s, of_block) in widths.iter().enumerate() {
                let cost = |width: usize| match budget.resource {
                    Resource::Params => Ok(parameters(config, s, width) as f64),
                    Resource::Kv => Ok(if s.is_multiple_of(2) { (width * config.head_dim) as f64 } else { 0.0 }),
                    Resource::Latency if width == 0 => Ok(0.0),
                    Resource::Latency => latency
                        .and_then(|t| t.milliseconds.get(s)?.get(&width).copied())
                        .ok_or_else(|| Error::option("--latency", format!("the latency table has no entry for sub-block {s} at width {width}"))),
                };
                table.push(of_block.iter().map(|w| Ok((*w, cost(*w)?))).collect::<Result<_>>()?);
            }
            let whole: f64 = table.iter().filter_map(|t| t.last_key_value()).map(|(_, cost)| cost).sum();
            if whole <= 0.0 {
                return Err(Error::option("--kv", "the model has nothing of this resource to save".to_string()));
            }
            table.iter_mut().flat_map(BTreeMap::values_mut).for_each(|cost| *cost /= whole);
            tables.push(table);
        }
        Ok(Self { budgets: budgets.to_vec(), tables })
    }

    /// The same costs under another first budget.
    #[must_use]
    pub fn with_first_budget(&self, keep: f64) -> Self {
        let mut costs = self.clone();
        if let Some(first) = costs.budgets.first_mut() {
            first.keep = keep;
        }
        costs
    }

    /// The budgets.
    pub fn budgets(&self) -> &[Budget] {
        &self.budgets
    }

    /// Cost of one sub-block at a width under budget `b`, as a fraction of the dense model's total.
    pub fn of(&self, b: usize, s: usize, width: usize) -> f64 {
        self.tables[b][s].get(&width).copied().unwrap_or(f64::INFINITY)
    }

    /// What a pattern costs under each budget, as fractions of the dense model.
    pub fn totals(&self, pattern: &Pattern) -> Vec<f64> {
        let blocks = 2 * pattern.layers().len();
        (0..self.budgets.len()).map(|b| (0..blocks).map(|s| self.of(b, s, pattern.width(s))).sum()).collect()
    }

    /// Whether every total is within its budget.
    pub fn fit(&self, totals: &[f64]) -> bool {
        totals.iter().zip(&self.budgets).all(|(total, budget)| *total <= budget.keep + ROUNDING)
    }

    /// How far the totals are above their budgets, added up: 0 when they fit.
    pub fn excess(&self, totals: &[f64]) -> f64 {
        totals.iter().zip(&self.budgets).map(|(total, budget)| (total - budget.keep - ROUNDING).max(0.0)).sum()
    }
}

/// Parameters of sub-block `s` at a width.
fn parameters(config: &Config, s: usize, width: usize) -> usize {
    let mut narrowed = config.clone();
    let shape = &mut narrowed.layers[s / 2].shape;
    if s.is_multiple_of(2) {
        shape.kv_groups = width;
        narrowed.layer_parameters(s / 2).0
    } else {
        shape.ffn = width;
        narrowed.layer_parameters(s / 2).1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use evop_model::Gene;

    #[test]
    fn a_draft_is_worth_what_it_agrees_and_costs() {
        let config = Config::from_json(
            r#"{"model_type":"llama","vocab_size":8,"hidden_size":8,"intermediate_size":16,"num_hidden_layers":2,"num_attention_heads":2,"max_position_embeddings":16}"#,
            std::path::Path::new("config.json"),
        )
        .unwrap();
        let of_block = |s: usize| if s.is_multiple_of(2) { BTreeMap::from([(2, 1.0)]) } else { BTreeMap::from([(8, 0.5), (16, 1.0)]) };
        let table = LatencyTable { description: String::new(), milliseconds: (0..4).map(of_block).collect(), passes: vec![9.0, 9.0, 9.9], head: 1.0 };
        let pattern = Pattern::new(vec![Gene { kv_groups: 0, ffn: 8 }, Gene { kv_groups: 2, ffn: 8 }], &config).unwrap();
        // half of the sub-blocks' 8 ms, and the head
        let always = table.drafting(&pattern, 0.0).unwrap();
        assert_eq!((always.tokens, always.agreement), (2, 1.0));
        assert!((always.time - (2.0 * 5.0 + 9.9) / 3.0 / 9.0).abs() < 1e-12);
        let half = table.drafting(&pattern, 0.5).unwrap();
        assert_eq!(half.tokens, 1);
        assert!((half.time - (5.0 + 9.0) / 1.5 / 9.0).abs() < 1e-12);
        assert_eq!(LatencyTable { passes: Vec::new(), ..table }.drafting(&pattern, 0.5), None);
    }
}
