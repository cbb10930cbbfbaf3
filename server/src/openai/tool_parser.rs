//! Tool calls in a model's text, found while the text arrives: Hermes' and Qwen's `<tool_call>{…}</tool_call>`, and Llama 3's bare
//! `{"name": …, "parameters": {…}}`. Text that may still become a call is held back.

use crate::openai::call_scanner::{CallScanner, Scan};
use crate::openai::reasoning::certain;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// What a piece of text turned out to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Text for the user.
    Content(String),
    /// A call begins.
    Call {
        /// Its number.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, as JSON text.
    Arguments {
        /// The call's number.
        index: usize,
        /// What is new of them.
        text: String,
    },
}

/// Finds the calls of one choice.
#[derive(Debug)]
pub struct ToolParser {
    names: Vec<String>,
    parallel: bool,
    state: State,
    /// Text that was not looked at yet, or can't be told apart yet.
    held: String,
    /// Calls that have begun.
    calls: usize,
    /// There was text since the beginning, or since the last call: what follows is no bare call.
    in_text: bool,
}

#[derive(Debug)]
enum State {
    Text,
    Call(Box<Candidate>),
    /// After a call's object.
    AfterCall {
        tagged: bool,
    },
}

/// What may be a call.
#[derive(Debug, Default)]
struct Candidate {
    tagged: bool,
    scanner: CallScanner,
    /// All of its text, for the case that it is none.
    raw: String,
    /// It is one, and this is its number.
    number: Option<usize>,
}

impl ToolParser {
    /// For these functions; without `parallel` only the first call counts.
    pub fn new(names: Vec<String>, parallel: bool) -> Self {
        Self { names, parallel, state: State::Text, held: String::new(), calls: 0, in_text: false }
    }

    /// Calls so far that count.
    pub fn calls(&self) -> usize {
        if self.parallel { self.calls } else { self.calls.min(1) }
    }

    /// Takes the next piece.
    pub fn push(&mut self, text: &str) -> Vec<Part> {
        self.held.push_str(text);
        let mut parts = Vec::new();
        while self.step(&mut parts) {}
        self.counted(parts)
    }

    /// The text has ended: what was held back and is no call is text.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        let mut rest = std::mem::take(&mut self.held);
        match std::mem::replace(&mut self.state, State::Text) {
            // a further call that was cut off at its beginning is no text either
            State::Call(candidate) if candidate.number.is_none() && self.calls == 0 => rest = candidate.raw + &rest,
            State::Call(_) | State::AfterCall { .. } => rest.clear(),
            State::Text => {}
        }
        if self.calls == 0 || !rest.trim().is_empty() {
            emit(&mut parts, rest);
        }
        self.counted(parts)
    }

    /// Without the calls that don't count.
    fn counted(&self, mut parts: Vec<Part>) -> Vec<Part> {
        if !self.parallel {
            parts.retain(|part| !matches!(part, Part::Call { index, .. } | Part::Arguments { index, .. } if *index > 0));
        }
        parts
    }

    /// One step further; false when more text is needed.
    fn step(&mut self, parts: &mut Vec<Part>) -> bool {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.text(parts),
            State::Call(candidate) => self.call(candidate, parts),
            State::AfterCall { tagged } => self.after_call(tagged),
        }
    }

    fn text(&mut self, parts: &mut Vec<Part>) -> bool {
        if !self.in_text && self.held.trim_start().starts_with('{') {
            self.state = State::Call(Box::default());
            return true;
        }
        if let Some(at) = self.held.find(OPEN) {
            emit(parts, self.held[..at].trim_end().to_string());
            self.held.drain(..at + OPEN.len());
            self.state = State::Call(Box::new(Candidate { tagged: true, raw: OPEN.into(), ..Candidate::default() }));
            return true;
        }
        let certain = certain(&self.held, OPEN);
        if certain > 0 {
            // (whitespace between calls is nobody's)
            let text: String = self.held.drain(..certain).collect();
            emit(parts, if self.calls > 0 && !self.in_text { text.trim_start().into() } else { text });
            self.in_text = true;
        }
        false
    }

    fn call(&mut self, mut candidate: Box<Candidate>, parts: &mut Vec<Part>) -> bool {
        let held = std::mem::take(&mut self.held);
        for (at, c) in held.char_indices() {
            candidate.raw.push(c);
            let scan = candidate.scanner.push(c);
            if self.is_none(&candidate, scan) {
                emit(parts, candidate.raw);
                self.in_text = true;
                self.held = held[at + c.len_utf8()..].into();
                return true;
            }
            self.report(&mut candidate, scan == Scan::Done, parts);
            if scan != Scan::More {
                self.state = State::AfterCall { tagged: candidate.tagged };
                self.held = held[at + c.len_utf8()..].into();
                return true;
            }
        }
        self.state = State::Call(candidate);
        false
    }

    /// Whether it turned out to be no call.
    fn is_none(&self, candidate: &Candidate, scan: Scan) -> bool {
        let CallScanner { name, has_arguments, has_other_keys, .. } = &candidate.scanner;
        if candidate.number.is_some() {
            return false;
        }
        let complete = scan == Scan::Done;
        let unknown = name.as_ref().map_or(complete, |name| !self.names.contains(name));
        match candidate.tagged {
            true => scan == Scan::Malformed || (complete && name.is_none()),
            // any JSON could be one: only what looks like a call in every way is
            false => scan == Scan::Malformed || unknown || *has_other_keys || (complete && !has_arguments),
        }
    }

    /// Says what is new of a call, once it is certain that it is one.
    fn report(&mut self, candidate: &mut Candidate, complete: bool, parts: &mut Vec<Part>) {
        let Some(name) = &candidate.scanner.name else { return };
        if candidate.number.is_none() && (candidate.scanner.has_arguments || complete) {
            parts.push(Part::Call { index: self.calls, name: name.clone() });
            candidate.number = Some(self.calls);
            self.calls += 1;
        }
        let Some(index) = candidate.number else { return };
        let mut text = candidate.scanner.take_arguments();
        if complete && !candidate.scanner.has_arguments {
            text = "{}".into();
        }
        match parts.last_mut() {
            Some(Part::Arguments { text: before, index: i }) if *i == index => before.push_str(&text),
            _ if text.is_empty() => {}
            _ => parts.push(Part::Arguments { index, text }),
        }
    }

    /// Swallows what closes a call.
    fn after_call(&mut self, tagged: bool) -> bool {
        let closing = if tagged { CLOSE } else { ";" };
        let rest = self.held.trim_start();
        if let Some(rest) = rest.strip_prefix(closing) {
            self.held = rest.into();
        } else if closing.starts_with(rest) {
            self.state = State::AfterCall { tagged };
            return false;
        }
        self.in_text = false;
        true
    }
}

fn emit(parts: &mut Vec<Part>, text: String) {
    match parts.last_mut() {
        _ if text.is_empty() => {}
        Some(Part::Content(before)) => before.push_str(&text),
        _ => parts.push(Part::Content(text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parser(parallel: bool) -> ToolParser {
        ToolParser::new(vec!["weather".into(), "time".into()], parallel)
    }

    /// Content, and calls with their arguments, of the text in pieces of so many characters.
    fn parse(mut parser: ToolParser, text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let characters: Vec<char> = text.chars().collect();
        let mut parts: Vec<Part> = characters.chunks(size).flat_map(|piece| parser.push(&piece.iter().collect::<String>())).collect();
        parts.extend(parser.finish());
        let (mut content, mut calls) = (String::new(), Vec::new());
        for part in parts {
            match part {
                Part::Content(text) => content += &text,
                Part::Call { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                Part::Arguments { index, text } => calls[index].1 += &text,
            }
        }
        (content, calls)
    }

    const BERN: &str = r#"{"city": "Bern {\"x\"}"}"#;

    #[test]
    fn calls_are_found_in_any_pieces() {
        let call = |name: &str, arguments: &str| (name.to_string(), arguments.to_string());
        let weather = || call("weather", BERN);
        let cases = [
            (format!("<tool_call>\n{{\"name\": \"weather\", \"arguments\": {BERN}}}\n</tool_call>"), "", vec![weather()]),
            (format!("Let me see.\n<tool_call>{{\"arguments\": {BERN}, \"name\": \"weather\"}}</tool_call>\n"), "Let me see.", vec![weather()]),
            (
                format!(
                    "<tool_call>\n{{\"name\": \"weather\", \"arguments\": {BERN}}}\n</tool_call>\n<tool_call>\n{{\"name\": \"time\"}}\n</tool_call>\nDone."
                ),
                "Done.",
                vec![weather(), call("time", "{}")],
            ),
            (format!("{{\"name\": \"weather\", \"parameters\": {BERN}}}"), "", vec![weather()]),
            (
                format!(" {{\"type\": \"function\", \"name\": \"weather\", \"parameters\": {BERN}}}; {{\"name\": \"time\", \"parameters\": {{}}}}"),
                "",
                vec![weather(), call("time", "{}")],
            ),
            // cut off by max_tokens
            ("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Be".into(), "", vec![call("weather", "{\"city\": \"Be")]),
            (format!("{{\"name\": \"weather\", \"parameters\": {BERN}}};{{\"name\": \"ti"), "", vec![weather()]),
            // tagged calls are calls also of functions that there are not
            ("<tool_call>{\"name\": \"other\", \"arguments\": {}}</tool_call>".into(), "", vec![call("other", "{}")]),
        ];
        for (text, content, calls) in cases {
            for size in 1..=text.len() {
                assert_eq!(parse(parser(true), &text, size), (content.to_string(), calls.clone()), "{text:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn what_is_no_call_is_text_to_the_letter() {
        for text in [
            "Just text.\n",
            "1 <tool_cal\n",
            "{\"name\": \"weather\"}",
            "{\"name\": \"other\", \"parameters\": {}}",
            "{\"name\": \"weather\", \"more\": 1, \"parameters\": {}}",
            "{\"answer\": {\"name\": \"weather\"}}\n",
            "{\"name\": \"wea",
            "{ not json }",
            "x {\"name\": \"weather\", \"parameters\": {}}",
            "<tool_call>\nnonsense</tool_call>",
            "<tool_call>\n{\"name\": ",
            "  ",
        ] {
            for size in 1..=text.len() {
                assert_eq!(parse(parser(true), text, size), (text.to_string(), vec![]), "{text:?} in pieces of {size}");
            }
        }
    }

    #[test]
    fn without_parallel_calls_the_first_one_counts() {
        let two = "<tool_call>{\"name\": \"time\", \"arguments\": {}}</tool_call><tool_call>{\"name\": \"weather\", \"arguments\": {}}</tool_call>";
        for size in 1..two.len() {
            assert_eq!(parse(parser(false), two, size).1, [("time".to_string(), "{}".to_string())]);
        }
    }

    #[test]
    fn text_that_can_be_no_call_is_not_held_back() {
        let mut parser = parser(true);
        assert_eq!(parser.push("Hello <b"), [Part::Content("Hello <b".into())]);
        assert_eq!(parser.push(" <tool"), []);
        assert_eq!(parser.push("s>"), [Part::Content(" <tools>".into())]);
        assert_eq!(parser.push("<tool_call>{\"name\": \"time\", \"arguments\""), []);
        assert_eq!(parser.push(": {\"zone\": "), [Part::Call { index: 0, name: "time".into() }, Part::Arguments { index: 0, text: "{\"zone\": ".into() }]);
    }

    proptest! {
        #[test]
        fn no_text_is_lost_or_made_up_without_calls(text in "[ab {}\":<>\\n]{0,30}", size in 1..5_usize) {
            prop_assert_eq!(parse(parser(true), &text, size), (text, vec![]));
        }
    }
}
