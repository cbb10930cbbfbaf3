//! Tasks of local JSON lines, in the three shapes that the usual sets come in.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::path::Path;

/// What the lines of a task's file look like.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Schema {
    /// `{"query", "choices", "gold"}`: ARC, HellaSwag, PIQA, BoolQ, OpenBookQA and the like. Scored by `acc` and `acc_norm`.
    Choices,
    /// `{"contexts", "continuation", "gold"}`: WinoGrande; one continuation after each of several contexts. Scored by `acc`.
    Contexts,
    /// `{"context", "target"}`: LAMBADA. Scored by greedy `acc` and perplexity.
    Target,
}

impl Schema {
    /// The schema's fields, as errors and help texts show them.
    const ALL: [(Self, &'static str); 3] = [
        (Self::Choices, r#"{"query", "choices", "gold"}"#),
        (Self::Contexts, r#"{"contexts", "continuation", "gold"}"#),
        (Self::Target, r#"{"context", "target"}"#),
    ];

    fn fields(self) -> &'static str {
        Self::ALL.iter().find(|(schema, _)| *schema == self).map_or("", |(_, fields)| fields)
    }

    /// By the field that only this schema has.
    fn detect(line: &Value) -> Option<Self> {
        let has = |field: &str| line.get(field).is_some();
        [("choices", Self::Choices), ("contexts", Self::Contexts), ("target", Self::Target)].into_iter().find(|(field, _)| has(field)).map(|(_, s)| s)
    }
}

/// A text whose log-likelihood after another is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// What is given.
    pub context: String,
    /// What is scored.
    pub continuation: String,
}

/// One question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Item {
    requests: Vec<Request>,
    gold: usize,
}

impl Item {
    /// A request a choice (LAMBADA: the only one).
    pub fn requests(&self) -> &[Request] {
        &self.requests
    }

    /// Which of them is right.
    pub fn gold(&self) -> usize {
        self.gold
    }
}

/// Questions of one kind under a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    name: String,
    schema: Schema,
    items: Vec<Item>,
}

/// The fields of a line; those that no schema has are ignored.
#[derive(Deserialize)]
struct Choices {
    query: String,
    choices: Vec<String>,
    gold: usize,
}

#[derive(Deserialize)]
struct Contexts {
    contexts: Vec<String>,
    continuation: String,
    gold: usize,
}

#[derive(Deserialize)]
struct Target {
    context: String,
    target: String,
}

impl Task {
    /// Parses the JSON lines of `file`, whose name without `.jsonl` and `.gz` becomes the task's. Blank lines are skipped.
    ///
    /// # Errors
    /// [`Error::Task`] that names the file and the line, what was expected and what was found.
    pub fn parse(text: &str, file: &Path) -> Result<Self> {
        let mut found: Option<(Schema, usize)> = None;
        let mut items = Vec::new();
        for (number, line) in text.lines().enumerate().map(|(i, line)| (i + 1, line)).filter(|(_, line)| !line.trim().is_empty()) {
            let wrong = |message: String| Error::Task { task: file.display().to_string(), message: format!("line {number}: {message}") };
            let value: Value = serde_json::from_str(line).map_err(|e| wrong(format!("not JSON: {e}")))?;
            let schema = Schema::detect(&value).ok_or_else(|| wrong(unknown(&value)))?;
            match found {
                Some((first, at)) if first != schema => {
                    return Err(wrong(format!(
                        "expected {}, as in line {at}, found {}: put the two kinds in files of their own",
                        first.fields(),
                        schema.fields()
                    )));
                }
                Some(_) => {}
                None => found = Some((schema, number)),
            }
            items.push(item(schema, value).map_err(|message| wrong(format!("{message}: expected {}", schema.fields())))?);
        }
        let Some((schema, _)) = found else {
            return Err(Error::Task { task: file.display().to_string(), message: "expected JSON lines, a question each; found none".into() });
        };
        Ok(Self { name: name(file), schema, items })
    }

    /// The file's name without its endings.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What kind of questions.
    pub fn schema(&self) -> Schema {
        self.schema
    }

    /// The questions; there is at least one.
    pub fn items(&self) -> &[Item] {
        &self.items
    }

    /// The first `limit` questions.
    ///
    /// # Errors
    /// [`Error::Option`] for a limit of 0.
    pub fn limited(mut self, limit: usize) -> Result<Self> {
        if limit == 0 {
            return Err(Error::option("--limit", "expected at least 1, found 0"));
        }
        self.items.truncate(limit);
        Ok(self)
    }
}

fn name(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    name.strip_suffix(".jsonl").unwrap_or(name).to_string()
}

fn unknown(line: &Value) -> String {
    let expected = Schema::ALL.map(|(_, fields)| fields).join(" or ");
    let found = match line {
        Value::Object(fields) => format!("an object with {:?}", fields.keys().collect::<Vec<_>>()),
        Value::Array(_) => "an array".into(),
        other => other.to_string(),
    };
    format!("expected {expected}, found {found}")
}

fn item(schema: Schema, line: Value) -> std::result::Result<Item, String> {
    let text = |e: serde_json::Error| e.to_string();
    let (requests, gold): (Vec<Request>, usize) = match schema {
        Schema::Choices => {
            let Choices { query, choices, gold } = serde_json::from_value(line).map_err(text)?;
            (choices.into_iter().map(|continuation| Request { context: query.clone(), continuation }).collect(), gold)
        }
        Schema::Contexts => {
            let Contexts { contexts, continuation, gold } = serde_json::from_value(line).map_err(text)?;
            (contexts.into_iter().map(|context| Request { context, continuation: continuation.clone() }).collect(), gold)
        }
        Schema::Target => {
            let Target { context, target } = serde_json::from_value(line).map_err(text)?;
            (vec![Request { context, continuation: target }], 0)
        }
    };
    if schema != Schema::Target && requests.len() < 2 {
        return Err(format!("found {} to choose from, at least 2 are needed", requests.len()));
    }
    if gold >= requests.len() {
        return Err(format!("`gold` is the index of the right one, from 0 to {}, found {gold}", requests.len() - 1));
    }
    if let Some(empty) = requests.iter().position(|r| r.continuation.trim().is_empty()) {
        return Err(format!("the text to score is empty ({} of {})", empty + 1, requests.len()));
    }
    Ok(Item { requests, gold })
}
