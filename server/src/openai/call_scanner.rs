//! The JSON object of a tool call, read character by character: its name, and its arguments as they arrive.

use serde_json::Value;

/// Reads `{"name": …, "arguments" | "parameters": {…}}`, keys in any order.
#[derive(Debug, Default)]
pub struct CallScanner {
    raw: String,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// The key at depth 1 whose value comes next or is being read.
    key: Option<String>,
    /// Where that value begins.
    value: Option<usize>,
    /// Where the string that is being read begins.
    string: usize,
    /// The function's name, once it is complete.
    pub name: Option<String>,
    /// There are arguments, if only their beginning.
    pub has_arguments: bool,
    /// There is a key that calls don't have.
    pub has_other_keys: bool,
    /// Arguments that were not taken yet.
    arguments: String,
}

/// What a character did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scan {
    /// There is more to come.
    More,
    /// The object is complete.
    Done,
    /// That is no object.
    Malformed,
}

impl CallScanner {
    /// The next character.
    pub fn push(&mut self, c: char) -> Scan {
        let at = self.raw.len();
        self.raw.push(c);
        let inside = self.is_in_arguments_object();
        let scan = if self.in_string { self.in_string(c) } else { self.outside_strings(c, at) };
        if inside || self.is_in_arguments_object() {
            self.arguments.push(c);
        }
        scan
    }

    /// Arguments that have arrived since this was last asked.
    pub fn take_arguments(&mut self) -> String {
        std::mem::take(&mut self.arguments)
    }

    fn is_in_arguments_object(&self) -> bool {
        self.is_argument_value() && self.value.is_some_and(|at| self.raw[at..].starts_with('{'))
    }

    fn is_argument_value(&self) -> bool {
        matches!(self.key.as_deref(), Some("arguments" | "parameters"))
    }

    fn in_string(&mut self, c: char) -> Scan {
        match c {
            _ if self.escaped => self.escaped = false,
            '\\' => self.escaped = true,
            '"' => {
                self.in_string = false;
                if self.depth == 1 && self.key.is_none() {
                    let Ok(key) = serde_json::from_str::<String>(&self.raw[self.string..]) else { return Scan::Malformed };
                    self.has_other_keys |= !["name", "arguments", "parameters", "type", "id"].contains(&key.as_str());
                    self.key = Some(key);
                } else if self.depth == 1 {
                    return self.end_value(self.raw.len());
                }
            }
            _ => {}
        }
        Scan::More
    }

    fn outside_strings(&mut self, c: char, at: usize) -> Scan {
        match c {
            c if c.is_whitespace() => {}
            '{' if self.depth == 0 => self.depth = 1,
            _ if self.depth == 0 => return Scan::Malformed,
            '"' => {
                (self.in_string, self.string) = (true, at);
                if self.depth == 1 && self.key.is_some() && !self.begin_value(at) {
                    return Scan::Malformed;
                }
            }
            '{' | '[' => {
                if self.depth == 1 && !self.begin_value(at) {
                    return Scan::Malformed;
                }
                self.depth += 1;
            }
            '}' | ']' => {
                self.depth -= 1;
                match self.depth {
                    0 => return if self.end_value(at) == Scan::Malformed { Scan::Malformed } else { Scan::Done },
                    1 => return self.end_value(at + 1),
                    _ => {}
                }
            }
            ':' if self.depth == 1 => return if self.key.is_some() && self.value.is_none() { Scan::More } else { Scan::Malformed },
            ',' if self.depth == 1 => {
                let scan = self.end_value(at);
                self.key = None;
                return scan;
            }
            _ if self.depth == 1 && self.value.is_none() && !self.begin_value(at) => return Scan::Malformed,
            _ => {}
        }
        Scan::More
    }

    fn begin_value(&mut self, at: usize) -> bool {
        let fits = self.key.is_some() && self.value.is_none();
        self.value = Some(at);
        self.has_arguments |= self.is_argument_value();
        fits
    }

    /// The value that ends before `end`, if one was being read.
    fn end_value(&mut self, end: usize) -> Scan {
        let Some(begin) = self.value.take() else { return Scan::More };
        let (Some(key), raw) = (&self.key, &self.raw[begin..end]) else { return Scan::Malformed };
        match (key.as_str(), serde_json::from_str(raw)) {
            ("name", Ok(Value::String(name))) => self.name = Some(name),
            ("name", _) | (_, Err(_)) => return Scan::Malformed,
            // (an object has arrived already)
            ("arguments" | "parameters", Ok(Value::Object(_))) => {}
            // some models write the arguments as text of JSON
            ("arguments" | "parameters", Ok(Value::String(text))) => self.arguments = text,
            ("arguments" | "parameters", Ok(Value::Null)) => self.has_arguments = false,
            ("arguments" | "parameters", Ok(_)) => return Scan::Malformed,
            _ => {}
        }
        Scan::More
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan(text: &str) -> (Scan, CallScanner, String) {
        let mut scanner = CallScanner::default();
        let mut last = Scan::More;
        let mut arguments = String::new();
        for c in text.chars() {
            last = scanner.push(c);
            arguments += &scanner.take_arguments();
            if last != Scan::More {
                break;
            }
        }
        (last, scanner, arguments)
    }

    #[test]
    fn name_and_arguments_are_found_in_any_order() {
        for text in [
            r#"{"name": "f", "arguments": {"a": "}\"{", "b": [1, {"c": 2}]}}"#,
            r#"{"parameters": {"a": "}\"{", "b": [1, {"c": 2}]}, "name": "f"}"#,
            r#" { "type":"function","name":"f","arguments":"{\"a\": \"}\\\"{\", \"b\": [1, {\"c\": 2}]}" }"#,
        ] {
            let (end, scanner, arguments) = scan(text);
            assert_eq!((end, scanner.name.as_deref(), scanner.has_other_keys), (Scan::Done, Some("f"), false), "{text}");
            assert_eq!(arguments, r#"{"a": "}\"{", "b": [1, {"c": 2}]}"#);
        }
    }

    #[test]
    fn arguments_arrive_before_they_are_complete() {
        let (end, scanner, arguments) = scan(r#"{"name": "f", "arguments": {"city": "Ber"#);
        assert_eq!((end, scanner.name.as_deref(), arguments.as_str()), (Scan::More, Some("f"), r#"{"city": "Ber"#));
    }

    #[test]
    fn what_is_no_call_is_noticed() {
        assert!(scan(r#"{"name": "f", "arguments": {}, "more": 1}"#).1.has_other_keys);
        assert!(!scan(r#"{"name": "f"}"#).1.has_arguments);
        for text in ["x", "[1]", r#"{"name": 7}"#, r#"{"name": "f" "arguments": {}}"#, r#"{{}}"#, r#"{"arguments": 7}"#, r#"{"name": nonsense}"#] {
            assert_eq!(scan(text).0, Scan::Malformed, "{text}");
        }
    }
}
