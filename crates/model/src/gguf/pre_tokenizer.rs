//! llama.cpp's names (`tokenizer.ggml.pre`) of the ways in which byte-level BPE cuts text into words.

use serde_json::Value;
use tokenizers::normalizers::{NormalizerWrapper, unicode::NFC};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{SplitDelimiterBehavior, Tokenizer};

/// How one name cuts.
pub(super) struct PreTokenizer {
    pub words: PreTokenizerWrapper,
    pub normalizer: Option<NormalizerWrapper>,
    /// Look whole words up before merging.
    pub ignore_merges: bool,
}

/// The first names of every kind, in the order in which a tokenizer is held against them.
const NAMES: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "smaug-bpe", "qwen2", "tekken"];

/// All names that [`named`] knows, for errors.
pub(super) const KNOWN: &str = "gpt-2, smollm, starcoder, refact, command-r, llama-bpe, smaug-bpe, lfm2, qwen2, deepseek-r1-qwen or tekken";

/// The pipeline that llama.cpp has under a name; `None` for a name that isn't known here.
pub(super) fn named(name: &str) -> tokenizers::Result<Option<PreTokenizer>> {
    let split = |regex: String| -> tokenizers::Result<PreTokenizerWrapper> {
        let split = Split::new(SplitPattern::Regex(regex), SplitDelimiterBehavior::Isolated, false)?;
        Ok(Sequence::new(vec![split.into(), ByteLevel::new(false, true, false).into()]).into())
    };
    let (words, normalizer, ignore_merges): (PreTokenizerWrapper, Option<NormalizerWrapper>, bool) = match name {
        "gpt-2" | "gpt2" => (ByteLevel::new(false, true, true).into(), None, false),
        "smollm" | "starcoder" | "refact" | "command-r" => {
            let parts = vec![Digits::new(true).into(), ByteLevel::new(false, true, true).into()];
            (Sequence::new(parts).into(), None, false)
        }
        "llama-bpe" | "llama3" | "llama-v3" => (split(contraction_split("{1,3}"))?, None, true),
        "smaug-bpe" | "lfm2" => (split(contraction_split("{1,3}"))?, None, false),
        "qwen2" | "deepseek-r1-qwen" => (split(contraction_split(""))?, Some(NFC.into()), false),
        "tekken" => (split(TEKKEN.to_string())?, None, true),
        _ => return Ok(None),
    };
    Ok(Some(PreTokenizer { words, normalizer, ignore_merges }))
}

/// Llama 3's and Qwen 2's splits differ in how many digits go together.
fn contraction_split(digits: &str) -> String {
    format!(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
}

/// Mistral Nemo's.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// llama.cpp's name of how a byte-level BPE tokenizer cuts text; `None` if it has none that is known here.
pub fn name_of(tokenizer: &Tokenizer) -> Option<&'static str> {
    let pipeline = |words: Value, normalizer: Value, ignore_merges: bool| (plain(words), normalizer, ignore_merges);
    let json = |part: serde_json::Result<Value>| part.unwrap_or(Value::Null);
    let ignore_merges = match tokenizer.get_model() {
        tokenizers::ModelWrapper::BPE(bpe) => bpe.ignore_merges,
        _ => return None,
    };
    let own = pipeline(json(serde_json::to_value(tokenizer.get_pre_tokenizer())), json(serde_json::to_value(tokenizer.get_normalizer())), ignore_merges);
    NAMES.into_iter().find(|name| {
        let Ok(Some(known)) = named(name) else { return false };
        own == pipeline(json(serde_json::to_value(&known.words)), json(serde_json::to_value(&known.normalizer)), known.ignore_merges)
    })
}

/// Without what doesn't change where words end.
fn plain(mut words: Value) -> Value {
    match &mut words {
        Value::Object(fields) => {
            fields.remove("trim_offsets");
            if let Some(Value::Array(parts)) = fields.get_mut("pretokenizers") {
                for part in parts.iter_mut() {
                    *part = plain(part.take());
                }
                // a sequence of one is that one
                if parts.len() == 1 {
                    return parts.remove(0);
                }
            }
            words
        }
        _ => words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokenizers::models::bpe::BPE;

    #[test]
    fn every_name_is_found_again_and_other_cuts_are_not() {
        for name in NAMES {
            let known = named(name).unwrap().unwrap();
            let mut tokenizer = Tokenizer::new(BPE::builder().ignore_merges(known.ignore_merges).build().unwrap());
            tokenizer.with_pre_tokenizer(Some(known.words));
            tokenizer.with_normalizer(known.normalizer).unwrap();
            assert_eq!(name_of(&tokenizer), Some(name));
            tokenizer.with_pre_tokenizer(Some(ByteLevel::new(true, true, true)));
            assert_eq!(name_of(&tokenizer), None);
        }
    }
}
