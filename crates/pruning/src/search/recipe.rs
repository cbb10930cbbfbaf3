//! What each strategy does beside its search: its space, its loss, its channel order and repair, as its paper has them.

use super::Strategy;
use crate::compensate::{Compensation, SkipCompensation};
use crate::importance::Importance;
use crate::objective::FitnessKind;
use crate::space::Space;

/// The choices that belong to a strategy unless one asks for others.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Recipe {
    /// What a gene may say.
    pub space: Space,
    /// The loss that is minimised.
    pub fitness: FitnessKind,
    /// The part of it that key tokens make up.
    pub key_tokens: f64,
    /// Channel order; `None`: chosen on held-out activations.
    pub importance: Option<Importance>,
    /// Repair; `None`: chosen on held-out activations.
    pub compensation: Option<Compensation>,
    /// How skipped sub-blocks are made up for; `None`: chosen on held-out activations.
    pub skips: Option<SkipCompensation>,
}

/// What key tokens make up of the loss of this project's own searches.
const KEY_TOKENS: f64 = 0.5;

impl Strategy {
    /// The strategy's own choices.
    pub fn recipe(self) -> Recipe {
        let plain = Some(SkipCompensation::None);
        let chosen = |space, fitness| Recipe { space, fitness, key_tokens: 0.0, importance: None, compensation: None, skips: plain };
        let fixed = |space, importance, compensation| Recipe {
            space,
            fitness: FitnessKind::Nll,
            key_tokens: 0.0,
            importance,
            compensation: Some(compensation),
            skips: plain,
        };
        match self {
            // `uniform` skips nothing, but shares the level database of `joint`
            Self::Joint | Self::RandomJoint | Self::Uniform | Self::Pareto | Self::Pattern => {
                Recipe { key_tokens: KEY_TOKENS, skips: None, ..chosen(Space::Joint, FitnessKind::Kl) }
            }
            Self::Evop | Self::Sleb | Self::Shortgpt | Self::Random | Self::Exhaustive => chosen(Space::Layer, FitnessKind::Nll),
            Self::Crash | Self::PruneComp | Self::Flatten | Self::SurrogateShapley => chosen(Space::Layer, FitnessKind::Nll),
            Self::Evopress | Self::Finercut => chosen(Space::Block, FitnessKind::Kl),
            Self::Blockpruner => chosen(Space::Block, FitnessKind::Nll),
            Self::Flap => fixed(Space::JointHeads, Some(Importance::Flap), Compensation::Bias),
            Self::Twossp => fixed(Space::Joint, Some(Importance::Norm2ssp), Compensation::None),
            Self::PolicyGradient => fixed(Space::JointHeads, Some(Importance::Wanda), Compensation::None),
            Self::Magnitude => fixed(Space::Width, Some(Importance::Magnitude), Compensation::None),
        }
    }
}
