//! A pattern as two rows of text.

/// The eighths of a block.
const EIGHTHS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// One character a sub-block, attentions above and MLPs below: `█` all of it, a lower block for a part, `·` nothing.
///
/// Takes (whole, kept) of every sub-block, attention and MLP of a layer in turn. A part is never drawn as all or nothing.
///
/// ```
/// use evop_pruning::picture::widths;
/// let layers = [(4, 4), (1536, 1536), (4, 0), (1536, 768), (4, 3), (1536, 0), (4, 1), (1536, 1500)];
/// assert_eq!(widths(&layers), "attention █·▆▂\nMLP       █▄·▇");
/// ```
pub fn widths(sub_blocks: &[(usize, usize)]) -> String {
    let row = |first: usize| sub_blocks.iter().skip(first).step_by(2).map(|(whole, kept)| glyph(*kept, *whole)).collect::<String>();
    format!("attention {}\nMLP       {}", row(0), row(1))
}

fn glyph(kept: usize, whole: usize) -> char {
    match (kept, whole) {
        (0, _) => '·',
        (kept, whole) if kept >= whole => '█',
        // to the nearest eighth, but neither nothing nor all
        (kept, whole) => EIGHTHS[((kept * 16 / whole).div_ceil(2)).clamp(1, 7) - 1],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_drawn_to_the_nearest_eighth() {
        let drawn: String = (0..=16).map(|n| glyph(n, 16)).collect();
        assert_eq!(drawn, "·▁▁▂▂▃▃▄▄▅▅▆▆▇▇▇█");
        assert_eq!(glyph(1, 1000), '▁');
        assert_eq!(glyph(999, 1000), '▇');
        assert_eq!(glyph(5, 4), '█');
    }
}
