//! The same MLP width in every layer, the widest that fits; attention stays whole. What the channels are and how they are repaired is the
//! level database's: well chosen and refitted it is the baseline of width pruning (`uniform`), by magnitude alone the control (`magnitude`).

use super::widths::{SubBlockUnit, mlp_widths, with_mlp_width};
use super::{Found, Progress, Strategy, one_shot};
use crate::evaluate::Evaluator;
use crate::space::SearchSpace;
use crate::{Error, Result};

pub(super) fn search(
    evaluator: &mut Evaluator<'_>,
    space: &SearchSpace,
    strategy: Strategy,
    on_round: &mut dyn FnMut(Progress) -> Result<()>,
) -> Result<Found> {
    let units = SubBlockUnit::all(space, strategy)?;
    let dense = space.dense_genome();
    match mlp_widths(&units).into_iter().map(|width| with_mlp_width(&units, &dense, width)).find(|genome| space.fits(genome)) {
        Some(genome) => one_shot(evaluator, space, &genome, on_round),
        None => Err(Error::option("--params", format!("{strategy} keeps all of attention and some of every MLP: the budgets leave no room for that"))),
    }
}
