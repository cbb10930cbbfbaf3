//! Old token ids to new ones, in the tokenizer and in every file that names tokens by id.

use super::bpe::merge_parts;
use serde_json::{Map, Value, json};

/// The new id of every token that is kept; their order stays.
#[derive(Debug)]
pub(super) struct Numbers(Vec<Option<u32>>);

impl Numbers {
    /// Numbers the `kept` ids, in ascending order, from 0.
    pub fn new(kept: &[u32]) -> Self {
        let mut new = vec![None; kept.last().map_or(0, |last| *last as usize + 1)];
        for (number, old) in (0..).zip(kept) {
            new[*old as usize] = Some(number);
        }
        Self(new)
    }

    /// The new id of a token, `None` if it is gone.
    pub fn of(&self, old: u32) -> Option<u32> {
        self.0.get(old as usize).copied().flatten()
    }

    /// The new ids, if all are kept.
    pub fn of_all(&self, old: &[u32]) -> Option<Vec<u32>> {
        old.iter().map(|id| self.of(*id)).collect()
    }

    /// A `tokenizer.json` of the kept tokens: vocabulary, merges whose parts and result are kept, added tokens, post-processor, padding.
    pub fn tokenizer(&self, mut json: Value) -> Value {
        if let Some(vocab) = json.pointer_mut("/model/vocab").and_then(Value::as_object_mut) {
            self.values(vocab);
            let kept: std::collections::HashSet<String> = vocab.keys().cloned().collect();
            if let Some(merges) = json.pointer_mut("/model/merges").and_then(Value::as_array_mut) {
                let survives = |(left, right): (&str, &str)| kept.contains(left) && kept.contains(right) && kept.contains(&format!("{left}{right}"));
                merges.retain(|merge| merge_parts(merge).is_some_and(survives));
            }
        }
        visit_tokenizer_ids(&mut json, &mut |id| self.renumber(id));
        json
    }

    /// Renumbers the values of a map from tokens to ids; tokens that are gone leave it.
    pub fn values(&self, ids: &mut Map<String, Value>) {
        let kept = std::mem::take(ids).into_iter().filter_map(|(token, id)| Some((token, json!(self.of(number(&id)?)?))));
        ids.extend(kept);
    }

    /// Renumbers the keys of `added_tokens_decoder` and the ids of all fields of a configuration file. Returns the ids that name no token: they
    /// are null, or gone from their list.
    pub fn fields(&self, json: &mut Map<String, Value>) -> Vec<String> {
        let mut nothing = Vec::new();
        for (field, value) in id_fields(json) {
            let mut renumbered = |id: &Value| {
                let new = number(id).and_then(|old| self.of(old));
                if new.is_none() {
                    nothing.push(format!("`{field}` {id} names no token: left out"));
                }
                new
            };
            *value = match &*value {
                Value::Array(list) => list.iter().filter_map(renumbered).collect(),
                id => json!(renumbered(id)),
            };
        }
        if let Some(Value::Object(decoder)) = json.get_mut("added_tokens_decoder") {
            let kept = std::mem::take(decoder).into_iter().filter_map(|(id, token)| Some((self.of(id.parse().ok()?)?.to_string(), token)));
            decoder.extend(kept);
        }
        nothing
    }

    fn renumber(&self, id: &mut Value) {
        if let Some(new) = number(id).and_then(|old| self.of(old)) {
            *id = json!(new);
        }
    }
}

/// A token id.
pub(super) fn number(value: &Value) -> Option<u32> {
    value.as_u64().and_then(|id| u32::try_from(id).ok())
}

/// Shows every id of a `tokenizer.json` outside of its model.
pub(super) fn visit_tokenizer_ids(json: &mut Value, visit: &mut dyn FnMut(&mut Value)) {
    for token in json.get_mut("added_tokens").and_then(Value::as_array_mut).into_iter().flatten() {
        token.get_mut("id").into_iter().for_each(&mut *visit);
    }
    json.pointer_mut("/padding/pad_id").into_iter().for_each(&mut *visit);
    if let Some(processor) = json.get_mut("post_processor") {
        visit_processor_ids(processor, visit);
    }
}

/// `TemplateProcessing` has lists of ids, `BertProcessing` and `RobertaProcessing` have pairs (text, id), a `Sequence` has others.
fn visit_processor_ids(processor: &mut Value, visit: &mut dyn FnMut(&mut Value)) {
    for token in processor.get_mut("special_tokens").and_then(Value::as_object_mut).into_iter().flat_map(|tokens| tokens.values_mut()) {
        token.get_mut("ids").and_then(Value::as_array_mut).into_iter().flatten().for_each(&mut *visit);
    }
    for pair in ["/sep/1", "/cls/1"] {
        processor.pointer_mut(pair).into_iter().for_each(&mut *visit);
    }
    for part in processor.get_mut("processors").and_then(Value::as_array_mut).into_iter().flatten() {
        visit_processor_ids(part, visit);
    }
}

/// The fields of a `config.json`, `generation_config.json` or `tokenizer_config.json` that name tokens by id (`eos_token_id`, `suppress_tokens`, …), each
/// a single one or a list.
pub(super) fn id_fields(json: &mut Map<String, Value>) -> impl Iterator<Item = (&String, &mut Value)> {
    let names_ids = |field: &str| field.ends_with("_token_id") || field.ends_with("_token_ids") || field.ends_with("suppress_tokens");
    json.iter_mut().filter(move |(field, value)| names_ids(field) && !value.is_null())
}

/// The texts of all tokens that a `tokenizer_config.json` or `special_tokens_map.json` names (`eos_token`, `additional_special_tokens`, …).
pub(super) fn named_tokens(json: &Map<String, Value>) -> Vec<&str> {
    fn texts<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::String(text) => found.push(text),
            Value::Array(list) => list.iter().for_each(|v| texts(v, found)),
            Value::Object(token) if token.contains_key("content") => texts(&token["content"], found),
            Value::Object(named) => named.values().for_each(|v| texts(v, found)),
            _ => {}
        }
    }
    let mut found = Vec::new();
    for (_, value) in json.iter().filter(|(field, _)| field.ends_with("_token") || field.ends_with("_tokens")) {
        texts(value, &mut found);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(fields) => fields,
            other => panic!("expected an object, found {other}"),
        }
    }

    #[test]
    fn ids_move_up_in_their_order() {
        let numbers = Numbers::new(&[0, 3, 7]);
        assert_eq!([0, 1, 3, 7, 8].map(|id| numbers.of(id)), [Some(0), None, Some(1), Some(2), None]);
        assert_eq!((numbers.of_all(&[7, 0]), numbers.of_all(&[7, 1])), (Some(vec![2, 0]), None));
    }

    #[test]
    fn every_id_of_a_tokenizer_is_renumbered() {
        let json = json!({
            "added_tokens": [{"id": 7, "content": "<s>"}],
            "padding": {"pad_id": 3, "pad_token": "ab"},
            "post_processor": {"type": "Sequence", "processors": [
                {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [7, 3], "tokens": ["<s>", "ab"]}}},
                {"type": "RobertaProcessing", "sep": ["<s>", 7], "cls": ["ab", 3]},
            ]},
            "model": {"vocab": {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 6, "<s>": 7}, "merges": ["a b", ["ab", "c"], ["a", "c"]]},
        });
        let expected = json!({
            "added_tokens": [{"id": 3, "content": "<s>"}],
            "padding": {"pad_id": 2, "pad_token": "ab"},
            "post_processor": {"type": "Sequence", "processors": [
                {"type": "TemplateProcessing", "special_tokens": {"<s>": {"id": "<s>", "ids": [3, 2], "tokens": ["<s>", "ab"]}}},
                {"type": "RobertaProcessing", "sep": ["<s>", 3], "cls": ["ab", 2]},
            ]},
            "model": {"vocab": {"a": 0, "b": 1, "ab": 2, "<s>": 3}, "merges": ["a b"]},
        });
        assert_eq!(Numbers::new(&[0, 1, 3, 7]).tokenizer(json), expected);
    }

    #[test]
    fn fields_that_name_tokens_are_renumbered_and_others_left() {
        let mut json = object(json!({
            "eos_token_id": [7, 5, 3], "bos_token_id": 7, "pad_token_id": -1, "unk_token_id": null, "begin_suppress_tokens": [3], "top_k": 3, "widths": [3, null],
            "added_tokens_decoder": {"3": {"content": "x"}, "5": {"content": "y"}}, "max_new_tokens": 3,
        }));
        let nothing = Numbers::new(&[0, 3, 7]).fields(&mut json);
        let expected = json!({
            "eos_token_id": [2, 1], "bos_token_id": 2, "pad_token_id": null, "unk_token_id": null, "begin_suppress_tokens": [1], "top_k": 3, "widths": [3, null],
            "added_tokens_decoder": {"1": {"content": "x"}}, "max_new_tokens": 3,
        });
        assert_eq!(Value::Object(json), expected);
        assert_eq!(nothing, ["`eos_token_id` 5 names no token: left out", "`pad_token_id` -1 names no token: left out"]);
    }

    #[test]
    fn tokens_are_named_in_several_forms() {
        let json = object(json!({
            "bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": null, "add_bos_token": true,
            "additional_special_tokens": ["<a>", {"content": "<b>"}], "extra_special_tokens": {"image_token": "<i>"}, "chat_template": "x",
        }));
        assert_eq!(named_tokens(&json), ["<s>", "</s>", "<a>", "<b>", "<i>"]);
    }
}
