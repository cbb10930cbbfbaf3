//! `options.json`: what a comparison was begun with, so that rows of other options are not taken for its own.

use super::Setting;
use anyhow::{Result, bail};
use evop_pruning::levels::tokens_sha256;
use evop_pruning::storage;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

/// Refuses to go on with a comparison that was begun with other options, and keeps this one's. One of before they were kept is taken to have these.
pub(super) fn check(setting: &Setting<'_>) -> Result<()> {
    let out = &setting.args.out;
    let path = out.join("options.json");
    let mut options = options(setting)?;
    // before there is a row nothing can be mistaken
    if path.exists() && out.join("rows/dense.json").exists() {
        let begun: Map<String, Value> = storage::read_json(&path)?;
        let differences = differences(&begun, &options);
        if !differences.is_empty() {
            bail!("{}: what is there was made with other options: {}: expected the same, or another --out", out.display(), differences.join("; "));
        }
        // texts that were measured before and aren't asked for now are still there
        if let (Some(Value::Object(texts)), Some(Value::Object(before))) = (options.get_mut(TEXTS), begun.get(TEXTS)) {
            let others = before.iter().filter(|(label, _)| !texts.contains_key(*label));
            let others: Vec<(String, Value)> = others.map(|(label, text)| (label.clone(), text.clone())).collect();
            texts.extend(others);
        }
    }
    Ok(storage::write_json(&path, &options)?)
}

/// Texts by their labels: the only option that may grow.
const TEXTS: &str = "eval_text";

/// Everything that decides what a row says, but for what its name says, and for the tasks, whose scores a row tells apart.
fn options(setting: &Setting<'_>) -> Result<Map<String, Value>> {
    let args = setting.args;
    let mut options = Map::new();
    options.insert("model".into(), json!(setting.sha256));
    options.insert("dtype".into(), json!(setting.decoder.weight_type().as_str()));
    options.insert("calibration".into(), setting.corpora.iter().map(|corpus| format!("{} {}", corpus.label, sha256(&corpus.documents))).collect());
    options.insert("embedder".into(), json!(args.tuning.embedder.as_ref().map(|path| std::path::absolute(path).unwrap_or_else(|_| path.clone()))));
    if let Value::Object(tuning) = serde_json::to_value(&args.tuning)? {
        options.extend(tuning);
    }
    options.insert("eval_tokens".into(), json!(args.eval_tokens));
    let texts: Map<String, Value> = setting.texts.iter().map(|text| (text.label.clone(), json!(tokens_sha256(std::iter::once(&text.tokens))))).collect();
    options.insert(TEXTS.into(), Value::Object(texts));
    Ok(options)
}

/// The beginning of the SHA-256 of documents: enough to tell two corpora apart.
fn sha256(documents: &[String]) -> String {
    let mut hash = Sha256::new();
    for document in documents {
        hash.update((document.len() as u64).to_le_bytes());
        hash.update(document);
    }
    hash.finalize().iter().take(8).map(|byte| format!("{byte:02x}")).collect()
}

/// The options that both have, and differently, as the command line spells them.
fn differences(begun: &Map<String, Value>, now: &Map<String, Value>) -> Vec<String> {
    let mut found = Vec::new();
    let shown = |value: &Value| if value.is_null() { "the default".to_string() } else { value.to_string() };
    for (name, before) in begun {
        let Some(now) = now.get(name).filter(|now| *now != before) else { continue };
        let option = name.replace('_', "-");
        match (before, now) {
            (Value::Object(before), Value::Object(now)) => {
                let others = before.iter().filter(|(label, text)| now.get(*label).is_some_and(|now| now != *text));
                found.extend(others.map(|(label, _)| format!("--{option}: another text is called {label:?} now")));
            }
            _ => found.push(format!("--{option}: {} then, {} now", shown(before), shown(now))),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_named_and_what_is_new_is_not() {
        let map = |value: Value| value.as_object().unwrap().clone();
        let begun = map(json!({"sequences": 16, "fitness": null, "key_tokens": 0.5, "gone": 1, "eval_text": {"wiki": "a", "books": "b"}}));
        let same = map(json!({"sequences": 16, "fitness": null, "key_tokens": 0.5, "new": 2, "eval_text": {"wiki": "a", "news": "c"}}));
        assert!(differences(&begun, &same).is_empty(), "{:?}", differences(&begun, &same));
        let other = map(json!({"sequences": 40, "fitness": "nll", "key_tokens": 0.5, "eval_text": {"wiki": "x", "news": "c"}}));
        let expected = ["--sequences: 16 then, 40 now", "--fitness: the default then, \"nll\" now", "--eval-text: another text is called \"wiki\" now"];
        assert_eq!(differences(&begun, &other), expected);
    }
}
