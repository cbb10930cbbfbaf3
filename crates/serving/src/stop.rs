//! Stop strings in a stream of text.

/// Finds stop strings across pieces of text and holds back whatever could still become one.
///
/// The first stop string to be complete ends the text; of several that end together, the longest.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    include_in_output: bool,
    /// Text that was pushed and not yet given out: a suffix that a stop string could begin with.
    held: String,
    done: bool,
}

/// What [`StopMatcher::push`] lets through.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stopped {
    /// Text that can be given out.
    pub text: String,
    /// Which stop string ended the text, by its place in the list.
    pub matched: Option<usize>,
}

impl StopMatcher {
    /// Empty stop strings are ignored; `include_in_output` lets the stop string itself through.
    pub fn new(stops: Vec<String>, include_in_output: bool) -> Self {
        Self { stops, include_in_output, held: String::new(), done: false }
    }

    /// Takes the next piece of text. After a match, everything else is swallowed.
    pub fn push(&mut self, text: &str) -> Stopped {
        if self.done {
            return Stopped::default();
        }
        self.held.push_str(text);
        let first = self.stops.iter().enumerate().filter(|(_, s)| !s.is_empty()).filter_map(|(i, stop)| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, i))
        });
        if let Some((end, start, index)) = first.min() {
            self.done = true;
            let keep = if self.include_in_output { end } else { start };
            self.held.truncate(keep);
            return Stopped { text: std::mem::take(&mut self.held), matched: Some(index) };
        }
        let begins_stop = |tail: &str| self.stops.iter().any(|stop| stop.starts_with(tail));
        let safe = self.held.char_indices().map(|(i, _)| i).find(|i| begins_stop(&self.held[*i..])).unwrap_or(self.held.len());
        let held = self.held.split_off(safe);
        Stopped { text: std::mem::replace(&mut self.held, held), matched: None }
    }

    /// The text ended without a stop string: what was still held back.
    pub fn finish(&mut self) -> String {
        self.done = true;
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Looks at every prefix of the whole text for one that ends with a stop string.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, Option<usize>) {
        let ends = (0..=text.len()).filter(|end| text.is_char_boundary(*end));
        for end in ends {
            let ending = stops.iter().enumerate().filter(|(_, s)| !s.is_empty() && text[..end].ends_with(s.as_str()));
            if let Some((index, stop)) = ending.max_by_key(|(i, s)| (s.len(), std::cmp::Reverse(*i))) {
                return (text[..if include { end } else { end - stop.len() }].to_string(), Some(index));
            }
        }
        (text.to_string(), None)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn pieces_give_what_the_whole_text_gives_and_nothing_too_early(
            pieces in prop::collection::vec("[abé]{0,4}", 0..8),
            stops in prop::collection::vec("[abé]{0,4}", 0..4),
            include: bool,
        ) {
            let text = pieces.concat();
            let (expected, index) = naive(&text, &stops, include);
            let mut matcher = StopMatcher::new(stops, include);
            let (mut out, mut matched) = (String::new(), None);
            for piece in &pieces {
                let stopped = matcher.push(piece);
                out += &stopped.text;
                matched = matched.or(stopped.matched);
                prop_assert!(expected.starts_with(&out), "gave out {out:?} of {expected:?}");
            }
            out += &matcher.finish();
            prop_assert_eq!(out, expected);
            prop_assert_eq!(matched, index);
        }

        #[test]
        fn no_more_is_held_back_than_could_become_a_stop_string(pieces in prop::collection::vec("[ab]{0,4}", 0..8), stop in "[ab]{1,4}") {
            let mut matcher = StopMatcher::new(vec![stop.clone()], false);
            let (mut out, mut seen) = (String::new(), String::new());
            for piece in &pieces {
                seen += piece;
                let stopped = matcher.push(piece);
                out += &stopped.text;
                if stopped.matched.is_some() {
                    break;
                }
                prop_assert!(stop.starts_with(&seen[out.len()..]));
            }
        }
    }

    #[test]
    fn a_stop_string_across_pieces_never_leaks() {
        let mut matcher = StopMatcher::new(vec!["\n\nHuman:".into()], false);
        assert_eq!(matcher.push("Yes.\n"), Stopped { text: "Yes.".into(), matched: None });
        assert_eq!(matcher.push("\nHum"), Stopped::default());
        assert_eq!(matcher.push("an: and"), Stopped { text: String::new(), matched: Some(0) });
        assert_eq!(matcher.push("more"), Stopped::default());
        assert_eq!(matcher.finish(), "");
    }
}
