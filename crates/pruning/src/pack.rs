//! Grouping whole sequences so that they are computed together.

use std::ops::Range;

/// Consecutive ranges of sequences whose tokens add up to at most `tokens` (a longer sequence is alone).
pub(crate) fn pack(sequences: &[Vec<u32>], tokens: usize) -> Vec<Range<usize>> {
    let mut packs: Vec<Range<usize>> = Vec::new();
    let mut held = 0;
    for (i, sequence) in sequences.iter().enumerate() {
        match packs.last_mut() {
            Some(last) if held + sequence.len() <= tokens => {
                last.end = i + 1;
                held += sequence.len();
            }
            _ => {
                packs.push(i..i + 1);
                held = sequence.len();
            }
        }
    }
    packs
}

#[cfg(test)]
mod tests {
    #[test]
    fn packs_hold_every_sequence_once_and_no_more_than_asked() {
        let sequences: Vec<Vec<u32>> = [5, 5, 5, 20, 1, 1].iter().map(|n| vec![0; *n]).collect();
        assert_eq!(super::pack(&sequences, 10), [0..2, 2..3, 3..4, 4..6]);
        assert!(super::pack(&[], 10).is_empty());
    }
}
