//! Who holds which block of the key/value pool, and which blocks hold what another request may need again: automatic prefix caching.
//!
//! A full block is known by its tokens and by the block before it, so a lookup compares tokens, never hashes alone. Blocks that nobody holds keep
//! their content until the room is needed; the one unused for longest goes first, a chain from its end.

use evop_model::BLOCK_TOKENS;
use std::collections::{BTreeMap, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::LazyLock;

/// What a block's content is known by.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Name {
    /// The content of the block before it; [`start`] for a first block.
    before: u64,
    tokens: [u32; BLOCK_TOKENS],
}

/// What comes before a sequence's first block, by the form of the model that computes it and the request's salt: what one form leaves is of no use to
/// another, and what was asked under one salt is not to be told by its speed under another.
pub(crate) fn start(member: usize, salt: Option<&str>) -> u64 {
    /// Keys that nobody outside knows, so that nobody can look for two salts of one hash.
    static SALTS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    salt.map_or(member as u64, |salt| SALTS.hash_one((member, salt)) | SALTED)
}

/// Contents are numbered from here on.
const CONTENTS: u64 = 1 << 32;
/// What comes before the first block of a salted sequence is from here on.
const SALTED: u64 = 1 << 63;

/// The blocks of one pool.
#[derive(Debug)]
pub(crate) struct Blocks {
    /// Sequences that hold each block.
    holders: Vec<u32>,
    /// What each block is known by, and the number of its content.
    names: Vec<Option<(Name, u64)>>,
    known: HashMap<Name, u32>,
    /// Blocks that nobody holds, without a known content.
    blank: Vec<u32>,
    /// Blocks that nobody holds, with one, by when they were last used.
    unheld: BTreeMap<u64, u32>,
    last_use: Vec<u64>,
    clock: u64,
    contents: u64,
}

impl Blocks {
    pub fn new(count: usize) -> Self {
        Self {
            holders: vec![0; count],
            names: vec![None; count],
            known: HashMap::new(),
            blank: (0..count as u32).rev().collect(),
            unheld: BTreeMap::new(),
            last_use: vec![0; count],
            clock: 0,
            contents: CONTENTS,
        }
    }

    /// All of them.
    pub fn count(&self) -> usize {
        self.holders.len()
    }

    /// Those that nobody holds.
    pub fn available(&self) -> usize {
        self.blank.len() + self.unheld.len()
    }

    /// Those that somebody holds.
    pub fn held(&self) -> usize {
        self.count() - self.available()
    }

    /// A block for one sequence alone; `None` when all are held.
    pub fn take(&mut self) -> Option<u32> {
        let block = match self.blank.pop() {
            Some(block) => block,
            None => {
                let (_, block) = self.unheld.pop_first()?;
                if let Some((name, _)) = self.names[block as usize].take() {
                    self.known.remove(&name);
                }
                block
            }
        };
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// The known blocks at the beginning of `tokens` after `before` (see [`start`]), held from now on, with the number of the last one's content.
    pub fn find(&mut self, mut before: u64, tokens: &[u32]) -> (Vec<u32>, u64) {
        let mut found = Vec::new();
        for tokens in tokens.as_chunks::<BLOCK_TOKENS>().0 {
            let Some(block) = self.known.get(&Name { before, tokens: *tokens }).copied() else { break };
            let Some((_, content)) = &self.names[block as usize] else { break };
            before = *content;
            found.push(block);
        }
        for block in &found {
            if self.holders[*block as usize] == 0 {
                self.unheld.remove(&self.last_use[*block as usize]);
            }
            self.holders[*block as usize] += 1;
        }
        (found, before)
    }

    /// Makes a held block that has just become full known, after the content `before`. Returns the number of its content: of the same tokens it is the
    /// same whichever block holds them.
    pub fn name(&mut self, block: u32, before: u64, tokens: &[u32; BLOCK_TOKENS]) -> u64 {
        let name = Name { before, tokens: *tokens };
        if let Some((_, content)) = self.known.get(&name).and_then(|b| self.names[*b as usize].as_ref()) {
            return *content;
        }
        self.contents += 1;
        self.known.insert(name.clone(), block);
        self.names[block as usize] = Some((name, self.contents));
        self.contents
    }

    /// Gives a sequence's blocks back, in the order that they were held in.
    pub fn release(&mut self, blocks: &[u32]) {
        // from the end: a chain is of use only from its start
        for block in blocks.iter().rev() {
            let at = *block as usize;
            self.holders[at] -= 1;
            if self.holders[at] > 0 {
                continue;
            }
            if self.names[at].is_some() {
                self.clock += 1;
                self.last_use[at] = self.clock;
                self.unheld.insert(self.clock, *block);
            } else {
                self.blank.push(*block);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(seed: u32, blocks: usize) -> Vec<u32> {
        (0..(blocks * BLOCK_TOKENS) as u32).map(|i| i * 7 + seed).collect()
    }

    /// As a sequence that computes all of these tokens holds and names them.
    fn compute(blocks: &mut Blocks, tokens: &[u32]) -> Vec<u32> {
        let (mut table, mut before) = blocks.find(start(0, None), tokens);
        for tokens in &tokens.as_chunks::<BLOCK_TOKENS>().0[table.len()..] {
            table.push(blocks.take().unwrap());
            before = blocks.name(*table.last().unwrap(), before, tokens);
        }
        table
    }

    #[test]
    fn a_prefix_is_found_while_it_is_held_and_after() {
        let mut blocks = Blocks::new(8);
        let (first, other) = (tokens(1, 3), [tokens(1, 2), tokens(9, 2)].concat());
        let table = compute(&mut blocks, &first);
        assert_eq!(blocks.find(start(0, None), &other).0, table[..2], "two blocks are the same");
        assert_eq!((blocks.held(), blocks.available()), (3, 5));
        blocks.release(&table[..2]);
        blocks.release(&table);
        assert_eq!(blocks.held(), 0);
        assert_eq!(blocks.find(start(0, None), &first[..70]).0, table[..2], "a block that is not full is not known");
        assert!(blocks.find(start(1, None), &first).0.is_empty(), "another form of the model computes other keys and values");
        assert!(blocks.find(start(0, Some("a")), &first).0.is_empty(), "nor does a salt find what was computed without it");
        assert!(start(0, Some("a")) == start(0, Some("a")) && start(0, Some("a")) != start(0, Some("b")) && start(0, Some("a")) != start(1, Some("a")));
        // the same tokens after something else are something else
        assert!(blocks.find(start(0, None), &tokens(1, 3)[BLOCK_TOKENS..]).0.is_empty());
    }

    #[test]
    fn what_was_unused_for_longest_goes_first_and_a_chain_from_its_end() {
        let mut blocks = Blocks::new(4);
        let (a, b) = (tokens(1, 2), tokens(5, 2));
        let of_a = compute(&mut blocks, &a);
        blocks.release(&of_a);
        let of_b = compute(&mut blocks, &b);
        blocks.release(&of_b);
        assert_eq!(blocks.take(), Some(of_a[1]));
        assert_eq!(blocks.find(start(0, None), &a).0, of_a[..1]);
        assert_eq!(blocks.take(), Some(of_b[1]), "the first block of a is held");
        assert_eq!(blocks.take(), Some(of_b[0]));
        assert_eq!(blocks.take(), None);
        assert!(blocks.find(start(0, None), &b).0.is_empty());
    }

    #[test]
    fn two_that_compute_the_same_at_once_have_the_same_content() {
        let mut blocks = Blocks::new(6);
        let text: [u32; BLOCK_TOKENS] = std::array::from_fn(|i| i as u32);
        let (one, two) = (blocks.take().unwrap(), blocks.take().unwrap());
        let content = blocks.name(one, start(0, None), &text);
        assert_eq!(blocks.name(two, start(0, None), &text), content);
        blocks.release(&[two]);
        assert_eq!(blocks.held(), 1);
        blocks.release(&[one]);
        assert_eq!(blocks.find(start(0, None), &text).0, [one]);
    }
}
