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
