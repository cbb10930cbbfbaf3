//! 2SSP (arXiv 2501.17771): two stages. MLPs lose the channels of least mean activation norm, the same number in every layer (section 3.1);
//! then whole attentions go greedily, each time the one whose removal leaves the lowest loss on one sample (section 3.2). No repair.

use super::widths::{SubBlockUnit, mlp_widths, with_mlp_width};
use super::{Best, Found, Progress, Strategy, without};
use crate::budget::Resource;
use crate::evaluate::Evaluator;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};
use evop_model::{Config, Pattern};

/// How the sparsity is divided between the stages.
const ALPHA: f64 = 1.5;

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let units = SubBlockUnit::all(space, Strategy::Twossp)?;
    let mut attentions: Vec<usize> = (0..units.len()).filter(|u| !units[*u].is_mlp()).collect();
    let config = evaluator.supernet().decoder().config();
    let planned = attentions_to_remove(attentions.len(), sparsity(space), mlp_to_attention(config));
    // stage 1: attentions cost the same, so any of them stand for those that will go; more go where the planned ones aren't enough
    let widths = mlp_widths(&units);
    let plan = (planned..=attentions.len()).find_map(|removed| {
        let mut genome = space.dense_genome();
        attentions[..removed].iter().for_each(|u| genome[*u] = 0);
        widths.iter().position(|width| space.fits(&with_mlp_width(&units, &genome, *width))).map(|at| (removed, at))
    });
    let Some((removed, mut at)) = plan else {
        return Err(Error::option("--params", "twossp keeps some of every MLP: the budgets leave no room for that"));
    };
    let mut genome = with_mlp_width(&units, &space.dense_genome(), widths[at]);
    // stage 2
    let mut best = Best::new();
    for _ in 0..removed {
        let less: Vec<Genome> = attentions.iter().map(|u| without(&genome, *u)).collect();
        let patterns: Vec<Pattern> = less.iter().map(|g| space.pattern(g)).collect();
        evaluator.anchor(&[space.pattern(&genome)]);
        let fitness = evaluator.evaluate_first(&patterns, 1)?;
        best.restart();
        best.offer(&patterns, &fitness);
        best.end_round(removed + 1, evaluator, on_round)?;
        let Some(chosen) = best.found.first().and_then(|(pattern, _)| patterns.iter().position(|p| p == pattern)) else { break };
        genome.clone_from(&less[chosen]);
        attentions.remove(chosen);
    }
    // (attentions that differ in cost may have left too much)
    while !space.fits(&genome) && at + 1 < widths.len() {
        at += 1;
        genome = with_mlp_width(&units, &genome, widths[at]);
    }
    if !space.fits(&genome) {
        return Err(Error::option("--params", "twossp keeps some of every MLP: the budgets leave no room for that"));
    }
    let patterns = [space.pattern(&genome)];
    let fitness = evaluator.evaluate(&patterns)?;
    best.restart();
    best.offer(&patterns, &fitness);
    best.end_round(removed + 1, evaluator, on_round)?;
    best.finish()
}

/// The fraction that goes: of the block parameters, or of what the first budget counts.
fn sparsity(space: &SearchSpace) -> f64 {
    let budgets = space.costs().budgets();
    1.0 - budgets.iter().find(|b| b.resource == Resource::Params).unwrap_or(&budgets[0]).keep
}

/// |FFN| / |ATT|: parameters of the MLPs by those of the attentions.
fn mlp_to_attention(config: &Config) -> f64 {
    let (attention, mlp) = (0..config.num_layers()).map(|l| config.layer_parameters(l)).fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1));
    mlp as f64 / attention.max(1) as f64
}

/// round(L s^((|FFN| / |ATT|) / alpha)) (2SSP, section 3.3).
fn attentions_to_remove(attentions: usize, sparsity: f64, mlp_to_attention: f64) -> usize {
    let count = (attentions as f64 * sparsity.powf(mlp_to_attention / ALPHA)).round();
    (count as usize).min(attentions)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quarter_of_llama_2_7b_takes_five_attentions() {
        let (mlp, attention) = (3.0 * 4096.0 * 11008.0, 4.0 * 4096.0 * 4096.0);
        assert_eq!(attentions_to_remove(32, 0.25, mlp / attention), 5);
        assert_eq!(attentions_to_remove(32, 0.5, mlp / attention), 13);
    }
}
