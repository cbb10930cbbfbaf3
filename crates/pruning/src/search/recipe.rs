//! What each strategy does beside its search: its space, its loss, its channel order and repair, as its paper has them.

use super::Strategy;
use crate::compensate::Compensation;
use crate::importance::Importance;
use crate::objective::FitnessKind;
use crate::space::Space;

/// The choices that belong to a strategy unless one asks for others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recipe {
    /// What a gene may say.
    pub space: Space,
    /// The loss that is minimised.
    pub fitness: FitnessKind,
    /// Channel order; `None`: chosen on held-out activations.
    pub importance: Option<Importance>,
    /// Repair; `None`: chosen on held-out activations.
    pub compensation: Option<Compensation>,
}

impl Strategy {
    /// The strategy's own choices.
    pub fn recipe(self) -> Recipe {
        let depth = |space, fitness| Recipe { space, fitness, importance: None, compensation: None };
        match self {
            Self::Joint => depth(Space::Joint, FitnessKind::Kl),
            Self::Evop | Self::Sleb | Self::Shortgpt | Self::Random | Self::Exhaustive => depth(Space::Layer, FitnessKind::Nll),
        }
    }
}
