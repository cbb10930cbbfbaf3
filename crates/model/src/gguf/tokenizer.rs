//! A tokenizer rebuilt from a GGUF's metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

use super::Value;
use super::metadata::Metadata;
use super::pre_tokenizer;
use crate::{Error, Result};
use serde_json::json;
use std::collections::HashMap;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as DecoderSequence;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as NormalizerSequence};
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, DecoderWrapper, Tokenizer};

/// llama.cpp's token types.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

struct Vocabulary {
    tokens: Vec<String>,
    kinds: Vec<u64>,
    scores: Vec<f64>,
}

/// Builds the tokenizer that the file's metadata describes.
pub(crate) fn build(metadata: &Metadata<'_>) -> Result<Tokenizer> {
    let wrong = |message: String| Error::Tokenizer { path: metadata.path.to_path_buf(), message };
    let failed = |e: tokenizers::Error| wrong(e.to_string());
    let vocabulary = vocabulary(metadata)?;
    let model = metadata.text("tokenizer.ggml.model")?.unwrap_or_default();
    let ids: HashMap<String, u32> = vocabulary.tokens.iter().enumerate().map(|(i, t)| (t.clone(), i as u32)).collect();
    let mut tokenizer = match model {
        "gpt2" => byte_level(metadata, ids)?,
        "llama" => sentence_piece(metadata, &vocabulary, ids)?,
        other => return Err(wrong(format!("`tokenizer.ggml.model`: expected gpt2 or llama, found {other:?}"))),
    };
    let added = |kind: u64, special: bool| -> Vec<AddedToken> {
        let of_kind = vocabulary.tokens.iter().zip(&vocabulary.kinds).filter(|(_, k)| **k == kind);
        of_kind.map(|(t, _)| AddedToken::from(t.clone(), special).normalized(false)).collect()
    };
    tokenizer.add_special_tokens(added(CONTROL, true)).map_err(failed)?;
    tokenizer.add_tokens(added(USER_DEFINED, false)).map_err(failed)?;

    let token_at = |key: &str| -> Result<Option<(String, u32)>> {
        let Some(id) = metadata.unsigned(key)? else { return Ok(None) };
        let token =
            vocabulary.tokens.get(id as usize).ok_or_else(|| wrong(format!("`{key}`: {id} is beyond the vocabulary of {}", vocabulary.tokens.len())))?;
        Ok(Some((token.clone(), id as u32)))
    };
    let wants = |key: &str, default: bool| -> Result<bool> { Ok(metadata.flag(key)?.unwrap_or(default)) };
    let bos = token_at("tokenizer.ggml.bos_token_id")?;
    let eos = token_at("tokenizer.ggml.eos_token_id")?;
    let bos = if wants("tokenizer.ggml.add_bos_token", model == "llama")? { bos } else { None };
    let eos = if wants("tokenizer.ggml.add_eos_token", false)? { eos } else { None };
    if bos.is_some() || eos.is_some() {
        let around = |sequence: &str| -> Vec<String> {
            let part = |t: &Option<(String, u32)>| t.as_ref().map(|(text, _)| text.clone());
            [part(&bos), Some(sequence.to_string()), part(&eos)].into_iter().flatten().collect()
        };
        let template = TemplateProcessing::builder()
            .try_single(around("$A"))
            .and_then(|t| t.try_pair([around("$A"), around("$B")].concat()))
            .map_err(wrong)?
            .special_tokens([bos, eos].into_iter().flatten().collect::<Vec<_>>())
            .build()
            .map_err(|e| wrong(e.to_string()))?;
        tokenizer.with_post_processor(Some(template));
    }
    Ok(tokenizer)
}

fn vocabulary(metadata: &Metadata<'_>) -> Result<Vocabulary> {
    let strings = |key: &str| -> Result<Vec<String>> {
        let list = metadata.list(key)?.ok_or_else(|| metadata.missing(key, "a list of strings"))?;
        list.iter().map(|v| if let Value::String(s) = v { Ok(s.clone()) } else { Err(metadata.missing(key, "a list of strings")) }).collect()
    };
    let tokens = strings("tokenizer.ggml.tokens")?;
    let kinds = match metadata.list("tokenizer.ggml.token_type")? {
        None => vec![1; tokens.len()],
        Some(list) => list
            .iter()
            .map(|v| match v {
                Value::I32(k) => *k as u64,
                Value::U32(k) => u64::from(*k),
                _ => 1,
            })
            .collect(),
    };
    let scores = match metadata.list("tokenizer.ggml.scores")? {
        None => Vec::new(),
        Some(list) => list.iter().map(|v| if let Value::F32(s) = v { f64::from(*s) } else { 0.0 }).collect(),
    };
    Ok(Vocabulary { tokens, kinds, scores })
}

fn byte_level(metadata: &Metadata<'_>, ids: HashMap<String, u32>) -> Result<Tokenizer> {
    let wrong = |message: String| Error::Tokenizer { path: metadata.path.to_path_buf(), message };
    let failed = |e: tokenizers::Error| wrong(e.to_string());
    let key = "tokenizer.ggml.merges";
    let list = metadata.list(key)?.ok_or_else(|| metadata.missing(key, "a list of strings"))?;
    let mut merges = Vec::with_capacity(list.len());
    for value in list {
        let pair = if let Value::String(s) = value { s.split_once(' ') } else { None };
        let (left, right) = pair.ok_or_else(|| metadata.missing(key, "pairs of tokens with a space between"))?;
        merges.push((left.to_string(), right.to_string()));
    }
    let pre = metadata.text("tokenizer.ggml.pre")?;
    let cut = pre_tokenizer::named(pre.unwrap_or_default()).map_err(failed)?.ok_or_else(|| {
        wrong(format!(
            "`tokenizer.ggml.pre`: expected {}, found {pre:?}; a file without it was made by an old converter: convert the model again",
            pre_tokenizer::KNOWN
        ))
    })?;
    let bpe = BPE::builder()
        .vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges)
        .ignore_merges(cut.ignore_merges)
        .build()
        .map_err(failed)?;
    let mut tokenizer = Tokenizer::new(bpe);
    tokenizer.with_pre_tokenizer(Some(cut.words));
    tokenizer.with_normalizer(cut.normalizer).map_err(failed)?;
    tokenizer.with_decoder(Some(ByteLevelDecoder::default()));
    Ok(tokenizer)
}

fn sentence_piece(metadata: &Metadata<'_>, vocabulary: &Vocabulary, ids: HashMap<String, u32>) -> Result<Tokenizer> {
    let failed = |e: tokenizers::Error| Error::Tokenizer { path: metadata.path.to_path_buf(), message: e.to_string() };
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return Err(metadata.missing("tokenizer.ggml.scores", &format!("{} numbers", vocabulary.tokens.len())));
    }
    let unknown = metadata.unsigned("tokenizer.ggml.unknown_token_id")?.unwrap_or(0);
    let unknown = vocabulary.tokens.get(unknown as usize).cloned();
    let merges = merges_by_score(vocabulary, &ids);
    let mut bpe = BPE::builder().vocab_and_merges(ids.into_iter().collect::<tokenizers::models::bpe::Vocab>(), merges).byte_fallback(true).fuse_unk(true);
    if let Some(unknown) = unknown {
        bpe = bpe.unk_token(unknown);
    }
    let mut tokenizer = Tokenizer::new(bpe.build().map_err(failed)?);
    let prefix = metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("▁".to_string()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(failed)?.into());
    tokenizer.with_normalizer(Some(NormalizerSequence::new(normalizers))).map_err(failed)?;
    let mut decoders: Vec<DecoderWrapper> = vec![Replace::new("▁", " ").map_err(failed)?.into(), ByteFallback::default().into(), Fuse::default().into()];
    if prefix {
        decoders.push(Strip::new(' ', 1, 0).into());
    }
    tokenizer.with_decoder(Some(DecoderSequence::new(decoders)));
    Ok(tokenizer)
}

/// SentencePiece BPE stores no merges: every split of a piece into two known pieces is one, the best-scored piece first.
fn merges_by_score(vocabulary: &Vocabulary, ids: &HashMap<String, u32>) -> Vec<(String, String)> {
    let mut merges: Vec<(f64, usize, usize, String, String)> = Vec::new();
    for (piece, score) in vocabulary.tokens.iter().zip(&vocabulary.scores) {
        let mut splits: Vec<(u32, u32, String, String)> = piece
            .char_indices()
            .skip(1)
            .filter_map(|(at, _)| {
                let (left, right) = piece.split_at(at);
                Some((*ids.get(left)?, *ids.get(right)?, left.to_string(), right.to_string()))
            })
            .collect();
        splits.sort_by_key(|(left, right, _, _)| (*left, *right));
        merges.extend(splits.into_iter().map(|(_, _, l, r)| (*score, l.chars().count(), r.chars().count(), l, r)));
    }
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)).then(b.2.cmp(&a.2)));
    merges.into_iter().map(|(_, _, _, l, r)| (l, r)).collect()
}

/// What a `tokenizer_config.json` beside the model would say.
pub(crate) fn tokenizer_config(metadata: &Metadata<'_>) -> Result<serde_json::Value> {
    let tokens = metadata.list("tokenizer.ggml.tokens")?.unwrap_or_default();
    let token = |key: &str| -> Result<Option<String>> {
        let id = metadata.unsigned(key)?;
        Ok(id.and_then(|id| tokens.get(id as usize)).and_then(|v| if let Value::String(s) = v { Some(s.clone()) } else { None }))
    };
    Ok(json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": false,
        "bos_token": token("tokenizer.ggml.bos_token_id")?,
        "eos_token": token("tokenizer.ggml.eos_token_id")?,
        "pad_token": token("tokenizer.ggml.padding_token_id")?,
        "chat_template": metadata.text("tokenizer.chat_template")?,
    }))
}

/// End-of-sequence, end-of-turn and end-of-message tokens all end a generation.
pub(crate) fn generation_config(metadata: &Metadata<'_>) -> Result<serde_json::Value> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        ids.extend(metadata.unsigned(key)?.filter(|id| !ids.contains(id)));
    }
    Ok(json!({ "eos_token_id": ids }))
}

/// Files to write beside a checkpoint that is derived from this one.
pub(crate) fn files(tokenizer: &Tokenizer, metadata: &Metadata<'_>) -> Result<Vec<(String, Vec<u8>)>> {
    let text = tokenizer.to_string(true).map_err(|e| Error::Tokenizer { path: metadata.path.to_path_buf(), message: e.to_string() })?;
    let pretty = |v: serde_json::Value| format!("{v:#}").into_bytes();
    Ok(vec![
        ("tokenizer.json".to_string(), text.into_bytes()),
        ("tokenizer_config.json".to_string(), pretty(tokenizer_config(metadata)?)),
        ("generation_config.json".to_string(), pretty(generation_config(metadata)?)),
    ])
}
