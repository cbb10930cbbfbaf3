//! ShortGPT (arXiv 2403.03853): block influence 1 - E[cos(x_l, x_{l+1})] of every layer, one forward pass, the lowest go.

use super::{Found, Progress, Strategy, drop_in_order, one_shot, whole_layers};
use crate::Result;
use crate::evaluate::Evaluator;
use crate::space::SearchSpace;
use crate::stream::Passage;
use candle_core::{D, DType, Tensor};

pub(super) fn search(evaluator: &mut Evaluator<'_>, space: &SearchSpace, on_round: &mut dyn FnMut(Progress) -> Result<()>) -> Result<Found> {
    let layers = whole_layers(space, Strategy::Shortgpt)?;
    let mut cosines = vec![(0.0, 0usize); layers];
    let mut before_layer = None;
    evaluator.visit(space.dense(), |s, Passage { before, after, .. }| {
        if s.is_multiple_of(2) {
            before_layer = Some((*before).clone());
        } else if let Some(before) = &before_layer {
            let (sum, tokens) = cosine_sum(before, after)?;
            cosines[s / 2].0 += sum;
            cosines[s / 2].1 += tokens;
        }
        Ok(())
    })?;
    let influence: Vec<f64> = cosines.iter().map(|(sum, tokens)| 1.0 - sum / *tokens as f64).collect();
    let mut order: Vec<usize> = (0..layers).collect();
    order.sort_by(|a, b| influence[*a].total_cmp(&influence[*b]));
    one_shot(evaluator, space, &drop_in_order(space, &order), on_round)
}

/// Sum over rows of the cosine between two [tokens, hidden], and the number of rows.
pub(super) fn cosine_sum(before: &Tensor, after: &Tensor) -> Result<(f64, usize)> {
    let (a, b) = (before.to_dtype(DType::F32)?, after.to_dtype(DType::F32)?);
    let dot = (&a * &b)?.sum(D::Minus1)?.to_vec1::<f32>()?;
    let (na, nb) = (a.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?, b.sqr()?.sum(D::Minus1)?.to_vec1::<f32>()?);
    let cosine = |i: usize| f64::from(dot[i]) / (f64::from(na[i]).sqrt() * f64::from(nb[i]).sqrt()).max(1e-12);
    Ok(((0..dot.len()).map(cosine).sum(), dot.len()))
}
