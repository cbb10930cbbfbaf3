//! A tokenizer and a chat template as GGUF metadata.
//!
//! Byte-level BPE (`gpt2`) keeps its merges; SentencePiece BPE (`llama`) keeps a score a token, from which the merges follow. What was written
//! is read back as a tokenizer and held against the original before anything else is written.

use crate::checkpoint::Contents;
use crate::{Error, Result};
use evop_model::Tokenizer;
use evop_model::gguf::{Value, pre_tokenizer_name};
use serde::Deserialize;
use std::collections::HashMap;
use std::path::Path;

/// llama.cpp's token types.
const NORMAL: i32 = 1;
const UNKNOWN: i32 = 2;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;
const BYTE: i32 = 6;

/// What of a `tokenizer.json` is needed.
#[derive(Deserialize)]
struct TokenizerJson {
    added_tokens: Vec<AddedToken>,
    model: Model,
}

#[derive(Deserialize)]
struct AddedToken {
    id: u32,
    content: String,
    special: bool,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: serde_json::Value,
    #[serde(default)]
    merges: Vec<Merge>,
    #[serde(default)]
    byte_fallback: bool,
    unk_token: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Text(String),
}

impl Merge {
    fn pair(&self) -> Option<(&str, &str)> {
        match self {
            Self::Pair(left, right) => Some((left, right)),
            Self::Text(text) => text.split_once(' '),
        }
    }
}

/// The key-value pairs.
///
/// # Errors
/// [`Error::Format`] for a tokenizer that llama.cpp doesn't have, or that comes back as another.
pub(super) fn entries(contents: &Contents<'_>, path: &Path, notes: &mut Vec<String>) -> Result<Vec<(String, Value)>> {
    let json = contents.tokenizer.to_string(false).map_err(|e| unexpressible(&e.to_string()))?;
    let json: TokenizerJson = serde_json::from_str(&json).map_err(|e| unexpressible(&format!("its model is not BPE ({e})")))?;
    if json.model.kind.as_deref() != Some("BPE") {
        return Err(unexpressible(&format!("its model is {}, not BPE", json.model.kind.as_deref().unwrap_or("unnamed"))));
    }
    let mut entries = if json.model.byte_fallback { sentence_piece(contents, &json)? } else { byte_level(contents, &json)? };
    special_tokens(contents, &json, &mut entries, notes)?;
    if let Some(template) = contents.chat_template {
        entries.push(("tokenizer.chat_template".into(), Value::String(template.source.clone())));
    }
    check(contents, &entries, path, notes)?;
    Ok(entries)
}

fn unexpressible(why: &str) -> Error {
    Error::Format(format!("the tokenizer can't be put into a GGUF file: {why}; expected --format hf or nemotron-nas"))
}

/// Every row of the embedding has a token, known or not.
fn vocabulary(contents: &Contents<'_>, json: &TokenizerJson) -> Result<(Vec<String>, Vec<i32>)> {
    let rows = contents.config.vocab_size;
    let mut tokens: Vec<String> = (0..rows).map(|id| format!("[PAD{id}]")).collect();
    let mut kinds = vec![UNUSED; rows];
    let own = json.model.vocab.as_object().ok_or_else(|| unexpressible("its vocabulary is no map from tokens to ids"))?;
    let own = own.iter().map(|(token, id)| (token.as_str(), id.as_u64().unwrap_or(u64::MAX), NORMAL));
    let added = json.added_tokens.iter().map(|t| (t.content.as_str(), u64::from(t.id), if t.special { CONTROL } else { USER_DEFINED }));
    for (token, id, kind) in own.chain(added) {
        let at = usize::try_from(id).ok().filter(|at| *at < rows);
        let at = at.ok_or_else(|| unexpressible(&format!("token {token:?} has id {id}, the embedding has {rows} rows")))?;
        (tokens[at], kinds[at]) = (token.to_string(), kind);
    }
    Ok((tokens, kinds))
}

fn byte_level(contents: &Contents<'_>, json: &TokenizerJson) -> Result<Vec<(String, Value)>> {
    let Some(pre) = pre_tokenizer_name(contents.tokenizer) else {
        return Err(unexpressible("llama.cpp has no name (known here) for the way in which it cuts text into words"));
    };
    let (tokens, kinds) = vocabulary(contents, json)?;
    let merges = json.model.merges.iter().map(|m| m.pair().map(|(left, right)| Value::String(format!("{left} {right}"))));
    let merges = merges.collect::<Option<Vec<_>>>().ok_or_else(|| unexpressible("a merge is no pair of tokens"))?;
    Ok(vec![
        ("tokenizer.ggml.model".into(), Value::String("gpt2".into())),
        ("tokenizer.ggml.pre".into(), Value::String(pre.into())),
        ("tokenizer.ggml.tokens".into(), Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.token_type".into(), Value::Array(kinds.into_iter().map(Value::I32).collect())),
        ("tokenizer.ggml.merges".into(), Value::Array(merges)),
    ])
}

fn sentence_piece(contents: &Contents<'_>, json: &TokenizerJson) -> Result<Vec<(String, Value)>> {
    let (tokens, mut kinds) = vocabulary(contents, json)?;
    // the better the score, the earlier two pieces become this one
    let mut ranks: HashMap<String, usize> = HashMap::new();
    for (rank, merge) in json.model.merges.iter().enumerate() {
        let (left, right) = merge.pair().ok_or_else(|| unexpressible("a merge is no pair of tokens"))?;
        ranks.entry(format!("{left}{right}")).or_insert(rank);
    }
    // ranks of pieces, not of pairs: f32 holds whole numbers up to 2^24
    let mut order: Vec<(&String, &usize)> = ranks.iter().collect();
    order.sort_by_key(|(_, rank)| **rank);
    let scores: HashMap<&String, f32> = order.iter().enumerate().map(|(i, (piece, _))| (*piece, -(i as f32))).collect();
    let last = -(order.len() as f32);
    for (token, kind) in tokens.iter().zip(&mut kinds) {
        let is_byte = token.len() == 6 && token.starts_with("<0x") && token.ends_with('>');
        if is_byte && *kind == NORMAL {
            *kind = BYTE;
        } else if json.model.unk_token.as_ref() == Some(token) {
            *kind = UNKNOWN;
        }
    }
    let score = |token: &String, kind: &i32| if *kind == NORMAL { scores.get(token).copied().unwrap_or(last) } else { 0.0 };
    let scores = tokens.iter().zip(&kinds).map(|(t, k)| Value::F32(score(t, k))).collect();
    let prefix = contents.tokenizer.encode_fast("a", false).map_err(|e| unexpressible(&e.to_string()))?;
    let prefix = prefix.get_ids().first().and_then(|id| contents.tokenizer.id_to_token(*id)).is_some_and(|piece| piece.starts_with('▁'));
    Ok(vec![
        ("tokenizer.ggml.model".into(), Value::String("llama".into())),
        ("tokenizer.ggml.pre".into(), Value::String("default".into())),
        ("tokenizer.ggml.add_space_prefix".into(), Value::Bool(prefix)),
        ("tokenizer.ggml.tokens".into(), Value::Array(tokens.into_iter().map(Value::String).collect())),
        ("tokenizer.ggml.scores".into(), Value::Array(scores)),
        ("tokenizer.ggml.token_type".into(), Value::Array(kinds.into_iter().map(Value::I32).collect())),
    ])
}

fn special_tokens(contents: &Contents<'_>, json: &TokenizerJson, entries: &mut Vec<(String, Value)>, notes: &mut Vec<String>) -> Result<()> {
    let companion = contents.companions.iter().find(|(name, _)| name == "tokenizer_config.json");
    let config: serde_json::Value = companion.and_then(|(_, bytes)| serde_json::from_slice(bytes).ok()).unwrap_or_default();
    let named = |field: &str| {
        let text = config.get(field).and_then(|v| v.as_str().or_else(|| v.get("content")?.as_str()))?;
        contents.tokenizer.token_to_id(text)
    };
    let around = contents.tokenizer.encode_fast("", true).map_err(|e| unexpressible(&e.to_string()))?.get_ids().to_vec();
    let bos = around.first().copied().filter(|id| !contents.config.eos_token_ids.contains(id) || around.len() > 1);
    let bos = bos.or_else(|| named("bos_token")).or(contents.config.bos_token_id);
    let mut ends: Vec<u32> = Vec::new();
    for id in named("eos_token").iter().chain(&contents.config.eos_token_ids).chain(&contents.generation.eos_token_ids) {
        if !ends.contains(id) {
            ends.push(*id);
        }
    }
    let (add_bos, add_eos) = match (&around[..], bos, ends.first().copied()) {
        ([], _, _) => (false, false),
        ([first], Some(bos), _) if *first == bos => (true, false),
        ([last], _, Some(eos)) if *last == eos => (false, true),
        ([first, last], Some(bos), Some(eos)) if (*first, *last) == (bos, eos) => (true, true),
        _ => return Err(unexpressible(&format!("it puts the tokens {around:?} around a text, and GGUF knows of one before and one after it"))),
    };
    let unknown = json.model.unk_token.as_ref().and_then(|t| contents.tokenizer.token_to_id(t)).or_else(|| named("unk_token"));
    let ids = [
        ("bos", bos),
        ("eos", ends.first().copied()),
        ("eot", ends.get(1).copied()),
        ("eom", ends.get(2).copied()),
        ("unknown", unknown),
        ("padding", named("pad_token")),
    ];
    for (name, id) in ids {
        if let Some(id) = id {
            entries.push((format!("tokenizer.ggml.{name}_token_id"), Value::U32(id)));
        }
    }
    if ends.len() > 3 {
        notes.push(format!("{} tokens end a generation; GGUF holds the first three", ends.len()));
    }
    entries.push(("tokenizer.ggml.add_bos_token".into(), Value::Bool(add_bos)));
    entries.push(("tokenizer.ggml.add_eos_token".into(), Value::Bool(add_eos)));
    Ok(())
}

/// Texts that tell tokenizers apart.
const PROBES: [&str; 12] = [
    "",
    "a",
    "Hello, world! The old man said that he would not go there again.",
    "don't I'll WE'VE you'd it's 'RE",
    "12345 and 3.14159, 1,000,000 3 33 333 3333",
    "  two leading and   three inner spaces  ",
    "tabs\tand\nnewlines\n\n\nand\r\nreturns \n x",
    "héllo naïve Straße 日本語 привет 🙂👍🏽 នតែពិសេស ²½٣ⅷ",
    "fn main() { println!(\"{}\", x[0] += 1); } // http://example.com/a_b?c=d&e=%20",
    "\u{a0}no-break\u{2003}em\u{200b}zero e\u{301}te\u{301}",
    "....!!!???---======= ''''''```````\"\"\"\"",
    "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
];

/// Reads the metadata as a tokenizer and holds it against the original.
fn check(contents: &Contents<'_>, entries: &[(String, Value)], path: &Path, notes: &mut Vec<String>) -> Result<()> {
    let map: HashMap<String, Value> = entries.iter().cloned().collect();
    let written = evop_model::gguf::tokenizer(&map, path)?;
    let ids = |tokenizer: &Tokenizer, text: &str, special: bool| {
        tokenizer.encode_fast(text, special).map(|e| e.get_ids().to_vec()).map_err(|e| unexpressible(&e.to_string()))
    };
    for text in PROBES {
        for special in [false, true] {
            let (before, after) = (ids(contents.tokenizer, text, special)?, ids(&written, text, special)?);
            if before != after {
                return Err(unexpressible(&format!("{text:?} would become {after:?}, not {before:?}")));
            }
        }
    }
    let special = map.get("tokenizer.ggml.eos_token_id").and_then(|v| if let Value::U32(id) = v { contents.tokenizer.id_to_token(*id) } else { None });
    if let Some(text) = special.map(|token| format!("one{token}two {token} three"))
        && ids(contents.tokenizer, &text, false)? != ids(&written, &text, false)?
    {
        notes.push(format!("text with special tokens in it, such as {text:?}, is tokenised otherwise than by tokenizer.json"));
    }
    Ok(())
}
