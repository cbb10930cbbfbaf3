//! `<think>…</think>` at the beginning of a model's text, taken apart from the answer while the text arrives.

use evop_serving::Thinking;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Splits one choice's text. Whitespace around the reasoning and before the answer belongs to neither.
#[derive(Debug, Clone)]
pub struct ReasoningSplitter {
    state: State,
    /// Text that can't be told apart yet.
    held: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A `<think>` may still come.
    Undecided,
    /// Inside, before any text of it.
    Opened,
    /// Inside.
    Reasoning,
    /// After it, before any text of the answer.
    Closed,
    /// The rest is the answer.
    Answer,
}

/// What a piece of text turned out to be.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// Reasoning.
    pub reasoning: String,
    /// The answer.
    pub answer: String,
}

impl ReasoningSplitter {
    /// For a text of which this is known.
    pub fn new(thinking: Thinking) -> Self {
        let state = match thinking {
            Thinking::Never => State::Answer,
            Thinking::Possible => State::Undecided,
            Thinking::Begun => State::Opened,
        };
        Self { state, held: String::new() }
    }

    /// What comes next is still reasoning, or what ends it.
    pub fn is_inside(&self) -> bool {
        matches!(self.state, State::Opened | State::Reasoning)
    }

    /// Takes the next piece.
    pub fn push(&mut self, text: &str) -> Split {
        self.held.push_str(text);
        let mut split = Split::default();
        while self.step(&mut split) {}
        split
    }

    /// The text has ended: whatever was held back is what it looked like.
    pub fn finish(&mut self) -> Split {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::Opened | State::Reasoning => Split { reasoning: held.trim_end().into(), answer: String::new() },
            State::Closed => Split::default(),
            State::Undecided | State::Answer => Split { reasoning: String::new(), answer: held },
        }
    }

    /// One step further; false when more text is needed.
    fn step(&mut self, split: &mut Split) -> bool {
        match self.state {
            State::Undecided => {
                let begun = self.held.trim_start();
                if let Some(rest) = begun.strip_prefix(OPEN) {
                    (self.held, self.state) = (rest.to_string(), State::Opened);
                } else if OPEN.starts_with(begun) {
                    return false;
                } else {
                    self.state = State::Answer;
                }
                true
            }
            State::Opened | State::Closed => {
                self.held.drain(..self.held.len() - self.held.trim_start().len());
                if self.held.is_empty() {
                    return false;
                }
                self.state = if self.state == State::Opened { State::Reasoning } else { State::Answer };
                true
            }
            State::Reasoning => {
                if let Some(at) = self.held.find(CLOSE) {
                    split.reasoning.push_str(self.held[..at].trim_end());
                    self.held.drain(..at + CLOSE.len());
                    self.state = State::Closed;
                    return true;
                }
                let certain = certain(&self.held, CLOSE);
                split.reasoning.extend(self.held.drain(..certain));
                false
            }
            State::Answer => {
                split.answer.push_str(&std::mem::take(&mut self.held));
                false
            }
        }
    }
}

/// Bytes of a text that come before whatever the marker, and whitespace before it, could begin with.
pub fn certain(text: &str, marker: &str) -> usize {
    let partial = (0..=marker.len().min(text.len())).rev().find(|n| marker.is_char_boundary(*n) && text.ends_with(&marker[..*n]));
    text[..text.len() - partial.unwrap_or(0)].trim_end().len()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text in pieces of so many characters.
    fn split(thinking: Thinking, text: &str, size: usize) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(thinking);
        let characters: Vec<char> = text.chars().collect();
        let mut splits: Vec<Split> = characters.chunks(size).map(|piece| splitter.push(&piece.iter().collect::<String>())).collect();
        splits.push(splitter.finish());
        splits.into_iter().fold(Default::default(), |(r, a), split| (r + &split.reasoning, a + &split.answer))
    }

    #[test]
    fn reasoning_and_answer_are_the_same_in_any_pieces() {
        let cases = [
            (Thinking::Possible, "<think>\nIs 1 < 2?\n\n</think>\n\nYes  <b>\n", "Is 1 < 2?", "Yes  <b>\n"),
            (Thinking::Possible, "\n<think></think>x", "", "x"),
            (Thinking::Possible, " <thing> is no thought", "", " <thing> is no thought"),
            (Thinking::Possible, "<thi", "", "<thi"),
            (Thinking::Begun, "\nwell </thin </think> so</think>", "well </thin", "so</think>"),
            (Thinking::Begun, "never  ending </thi", "never  ending </thi", ""),
            (Thinking::Never, "<think>a</think>", "", "<think>a</think>"),
        ];
        for (thinking, text, reasoning, answer) in cases {
            for size in 1..=text.len() {
                assert_eq!(split(thinking, text, size), (reasoning.into(), answer.into()), "{text:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn nothing_is_held_back_without_need() {
        let mut splitter = ReasoningSplitter::new(Thinking::Begun);
        assert_eq!(splitter.push("so, a < b").reasoning, "so, a < b");
        assert_eq!(splitter.push(" and </t").reasoning, " and");
        assert_eq!(splitter.push("his>").reasoning, " </this>");
    }
}
