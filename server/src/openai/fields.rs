//! Reading request bodies field by field, so that an error names the field and says what was expected.
//!
//! `null` means "not given", as it does for OpenAI. Fields that nobody asks for are ignored, and logged once a request.

use crate::openai::errors::ApiError;
use serde_json::{Map, Value};
use std::cell::RefCell;
use std::collections::HashSet;
use std::ops::RangeInclusive;

type Result<T> = std::result::Result<T, ApiError>;

/// One JSON object of a request.
#[derive(Debug)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    /// What stands before a field's name in errors: empty, or `stream_options.`.
    prefix: String,
    asked: RefCell<HashSet<&'static str>>,
}

impl<'a> Fields<'a> {
    /// The body itself.
    pub fn new(object: &'a Map<String, Value>) -> Self {
        Self { object, prefix: String::new(), asked: RefCell::default() }
    }

    /// An object inside the body, found at `path`.
    pub fn at(object: &'a Map<String, Value>, path: &str) -> Self {
        Self { object, prefix: format!("{path}."), asked: RefCell::default() }
    }

    /// The field's name as errors spell it.
    pub fn path(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// The value, if there is one that isn't null.
    pub fn get(&self, name: &'static str) -> Option<&'a Value> {
        self.asked.borrow_mut().insert(name);
        self.object.get(name).filter(|v| !v.is_null())
    }

    /// An error about the field.
    pub fn wrong(&self, name: &str, expected: &str, found: &Value) -> ApiError {
        wrong_type(&self.path(name), expected, found)
    }

    /// A field that must be there.
    pub fn required(&self, name: &'static str) -> Result<&'a Value> {
        self.get(name).ok_or_else(|| ApiError::invalid(self.path(name), format!("{} is required", self.path(name))))
    }

    /// true or false.
    pub fn bool(&self, name: &'static str) -> Result<Option<bool>> {
        self.get(name).map(|v| v.as_bool().ok_or_else(|| self.wrong(name, "true or false", v))).transpose()
    }

    /// Text.
    pub fn string(&self, name: &'static str) -> Result<Option<&'a str>> {
        self.get(name).map(|v| v.as_str().ok_or_else(|| self.wrong(name, "a string", v))).transpose()
    }

    /// A number, also as an integer.
    pub fn number(&self, name: &'static str) -> Result<Option<f32>> {
        self.get(name).map(|v| v.as_f64().map(|n| n as f32).ok_or_else(|| self.wrong(name, "a number", v))).transpose()
    }

    /// A whole number within a range (`3.0` is one too).
    pub fn integer(&self, name: &'static str, range: RangeInclusive<i64>) -> Result<Option<i64>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match as_integer(value) {
            Some(number) if range.contains(&number) => Ok(Some(number)),
            _ => Err(self.wrong(name, &format!("a whole number {}", described_range(&range)), value)),
        }
    }

    /// A whole number that is a size or a count.
    pub fn count(&self, name: &'static str, range: RangeInclusive<usize>) -> Result<Option<usize>> {
        let bounds = i64::try_from(*range.start()).unwrap_or(i64::MAX)..=i64::try_from(*range.end()).unwrap_or(i64::MAX);
        Ok(self.integer(name, bounds)?.and_then(|n| usize::try_from(n).ok()))
    }

    /// A list of token ids.
    pub fn token_ids(&self, name: &'static str) -> Result<Option<Vec<u32>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let ids = value.as_array().and_then(|list| list.iter().map(as_token_id).collect::<Option<Vec<_>>>());
        ids.map(Some).ok_or_else(|| self.wrong(name, "a list of token ids", value))
    }

    /// A string, or a list of at most `most` of them.
    pub fn strings(&self, name: &'static str, most: usize) -> Result<Vec<String>> {
        let Some(value) = self.get(name) else { return Ok(Vec::new()) };
        let strings = match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) if list.len() <= most => list.iter().map(|v| v.as_str().map(str::to_string)).collect(),
            _ => None,
        };
        strings.ok_or_else(|| self.wrong(name, &format!("a string, or a list of at most {most} strings"), value))
    }

    /// An object, to be read field by field.
    pub fn object(&self, name: &'static str) -> Result<Option<Fields<'a>>> {
        let Some(value) = self.get(name) else { return Ok(None) };
        let object = value.as_object().ok_or_else(|| self.wrong(name, "an object", value))?;
        Ok(Some(Fields { object, prefix: format!("{}{name}.", self.prefix), asked: RefCell::default() }))
    }

    /// Names of the fields that nobody asked for.
    pub fn unknown(&self) -> Vec<&'a str> {
        let asked = self.asked.borrow();
        self.object.iter().filter(|(name, value)| !value.is_null() && !asked.contains(name.as_str())).map(|(name, _)| name.as_str()).collect()
    }

    /// Names of the fields that somebody asked for.
    #[cfg(test)]
    pub fn asked(&self) -> Vec<&'static str> {
        self.asked.borrow().iter().copied().collect()
    }

    /// Says once which fields are ignored. To be called when all others were asked for.
    pub fn log_unknown(&self) {
        let unknown = self.unknown();
        if !unknown.is_empty() {
            tracing::info!(fields = ?unknown, "ignored fields of the request that this server does not know");
        }
    }
}

/// `expected an integer, found "many"`, about the field `path`.
pub fn wrong_type(path: &str, expected: &str, found: &Value) -> ApiError {
    ApiError::invalid(path, format!("{path}: expected {expected}, found {}", described(found)))
}

/// A whole number, also when it is written as `3.0`.
pub fn as_integer(value: &Value) -> Option<i64> {
    value.as_i64().or_else(|| value.as_f64().filter(|f| f.fract() == 0.0 && f.abs() < 9e15).map(|f| f as i64))
}

/// A token id.
pub fn as_token_id(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

fn described(value: &Value) -> String {
    const LONGEST: usize = 60;
    match value {
        Value::Object(_) => "an object".into(),
        Value::Array(list) if list.is_empty() => "an empty list".into(),
        Value::Array(list) => format!("a list of {}", list.len()),
        value => {
            let text = value.to_string();
            if text.chars().count() <= LONGEST { text } else { format!("{}…", text.chars().take(LONGEST).collect::<String>()) }
        }
    }
}

fn described_range(range: &RangeInclusive<i64>) -> String {
    match (*range.start(), *range.end()) {
        (i64::MIN, i64::MAX) => String::new(),
        (least, i64::MAX) => format!("of at least {least}"),
        (i64::MIN, most) => format!("of at most {most}"),
        (least, most) => format!("from {least} to {most}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(value: Value) -> Map<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    fn message(error: &ApiError) -> String {
        error.to_json()["error"]["message"].as_str().unwrap().to_string()
    }

    #[test]
    fn an_error_names_the_field_and_what_was_expected() {
        let body = object(json!({"n": "two", "outer": {"inner": 1}}));
        let fields = Fields::new(&body);
        let error = fields.integer("n", 1..=5).unwrap_err();
        assert_eq!(message(&error), "n: expected a whole number from 1 to 5, found \"two\"");
        let error = fields.object("outer").unwrap().unwrap().bool("inner").unwrap_err();
        assert_eq!(error.to_json()["error"]["param"], "outer.inner");
    }

    #[test]
    fn null_is_as_good_as_nothing() {
        let body = object(json!({"n": null}));
        assert_eq!(Fields::new(&body).integer("n", 1..=5).unwrap(), None);
        assert!(Fields::new(&body).unknown().is_empty());
    }

    #[test]
    fn whole_numbers_may_have_a_point() {
        let body = object(json!({"n": 3.0, "m": 3.5, "huge": 1e300}));
        let fields = Fields::new(&body);
        assert_eq!(fields.integer("n", 0..=i64::MAX).unwrap(), Some(3));
        assert!(fields.integer("m", 0..=i64::MAX).is_err());
        assert!(fields.integer("huge", 0..=i64::MAX).is_err());
    }

    #[test]
    fn what_nobody_asked_for_is_unknown() {
        let body = object(json!({"n": 1, "store": true, "mystery": []}));
        let fields = Fields::new(&body);
        fields.integer("n", 0..=9).unwrap();
        assert_eq!(fields.unknown(), ["store", "mystery"]);
    }

    #[test]
    fn a_list_of_strings_has_a_limit() {
        let body = object(json!({"stop": ["a", "b", "c"], "bad": ["a", 1], "one": "a"}));
        let fields = Fields::new(&body);
        assert_eq!(fields.strings("stop", 3).unwrap(), ["a", "b", "c"]);
        assert!(fields.strings("stop", 2).is_err());
        assert!(fields.strings("bad", 4).is_err());
        assert_eq!(fields.strings("one", 4).unwrap(), ["a"]);
    }
}
