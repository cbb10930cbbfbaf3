//! The widths behind option numbers, for strategies that think in heads and channels.

use super::Strategy;
use crate::space::{Genome, SearchSpace};
use crate::{Error, Result};

/// A unit that is one sub-block.
pub(super) struct SubBlockUnit {
    /// Its sub-block.
    pub sub_block: usize,
    /// Per option, groups or channels kept; ascending.
    pub widths: Vec<usize>,
}

impl SubBlockUnit {
    /// All units of a space, in order.
    ///
    /// # Errors
    /// [`Error::Option`] for a space whose units are whole layers, or share a width (`--uniform`).
    pub fn all(space: &SearchSpace, strategy: Strategy) -> Result<Vec<Self>> {
        let dense = space.dense_genome();
        let unit = |u: usize| match space.sub_blocks(u) {
            [sub_block] => {
                let width = |option: usize| {
                    let mut genome: Genome = dense.clone();
                    genome[u] = option as u8;
                    space.pattern(&genome).width(*sub_block)
                };
                Ok(Self { sub_block: *sub_block, widths: (0..space.options(u)).map(width).collect() })
            }
            _ => Err(Error::option(
                "--space",
                format!("{strategy} chooses heads and channels of single sub-blocks: expected block, width, joint or joint+heads, without --uniform"),
            )),
        };
        (0..space.units()).map(unit).collect()
    }

    /// Whether it is an MLP.
    pub fn is_mlp(&self) -> bool {
        !self.sub_block.is_multiple_of(2)
    }

    /// The option of the widest width up to `width`; the narrowest that isn't nothing where all are wider.
    pub fn at_most(&self, width: usize) -> u8 {
        let first = usize::from(self.widths[0] == 0);
        self.widths.iter().rposition(|w| *w > 0 && *w <= width).unwrap_or(first) as u8
    }

    /// The option of the nearest width, of two equally near ones the wider; only nothing is rounded to nothing.
    pub fn nearest(&self, width: usize) -> u8 {
        if width == 0 {
            return 0;
        }
        let distance = |option: usize| self.widths[option].abs_diff(width);
        let first = usize::from(self.widths[0] == 0);
        (first..self.widths.len()).reduce(|best, other| if distance(other) <= distance(best) { other } else { best }).unwrap_or(first) as u8
    }
}

/// The genome with every MLP at the widest width up to `width`, all else as in `genome`.
pub(super) fn with_mlp_width(units: &[SubBlockUnit], genome: &[u8], width: usize) -> Genome {
    units.iter().zip(genome).map(|(unit, option)| if unit.is_mlp() { unit.at_most(width) } else { *option }).collect()
}

/// All widths but nothing that MLPs of the space may have, the widest first.
pub(super) fn mlp_widths(units: &[SubBlockUnit]) -> Vec<usize> {
    let mut widths: Vec<usize> = units.iter().filter(|u| u.is_mlp()).flat_map(|u| u.widths.iter().copied()).filter(|w| *w > 0).collect();
    widths.sort_unstable_by(|a, b| b.cmp(a));
    widths.dedup();
    widths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn widths_round_to_the_nearest_option_and_never_to_nothing() {
        let unit = SubBlockUnit { sub_block: 1, widths: vec![0, 64, 128, 384] };
        assert_eq!([0, 1, 95, 96, 200, 300].map(|w| unit.nearest(w)), [0, 1, 1, 2, 2, 3]);
        assert_eq!([1, 64, 127, 383, 400].map(|w| unit.at_most(w)), [1, 1, 1, 2, 3]);
        let width = SubBlockUnit { sub_block: 1, widths: vec![64, 384] };
        assert_eq!((width.nearest(1), width.at_most(1), width.at_most(384)), (0, 0, 1));
    }
}
