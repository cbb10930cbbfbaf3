//! What is served at one moment: a model, its engine, and the text on both ends.

use crate::auto::{AUTO, Auto};
use evop_model::{Config, GenerationConfig, Tokenizer};
use evop_serving::{ChatRenderer, EngineHandle, Grammar, GrammarCompiler, GrammarSource, Thinking, TokenText};
use std::collections::HashSet;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::{Arc, OnceLock};

/// A thinner form of a model: `model@NAME`.
#[derive(Debug, Clone)]
pub struct Form {
    /// What stands after the `@`.
    pub name: String,
    /// What it computes.
    pub config: Config,
}

/// Which form of a model a name asks for.
#[derive(Debug, Clone)]
pub enum Wanted {
    /// This one, as the engine numbers them.
    Member(usize),
    /// The one that this chooses for the prompt.
    Auto(Arc<Auto>),
}

/// One loaded model. Requests hold it while they run; the engine ends, and the memory is freed, when the last of them is done.
#[derive(Debug)]
pub struct Served {
    /// `base`, or the id of the job that made the checkpoint.
    pub id: String,
    /// Where the checkpoint came from: a path, a hub id, or the bundled model's name.
    pub root: String,
    /// What it was pruned from, if it was.
    pub parent: Option<String>,
    /// Seconds since 1970 at which it was loaded.
    pub created: u64,
    /// The model's configuration.
    pub config: Config,
    /// Sampling that the model suggests.
    pub generation: GenerationConfig,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Single tokens as text.
    pub token_text: TokenText,
    /// Tokens that text usually leaves out.
    pub special_tokens: HashSet<u32>,
    /// Thinner forms of the model over the same weights, in the engine's order.
    pub forms: Vec<Form>,
    /// Chooses one of the last forms by the prompt (`--auto`).
    pub auto: Option<Arc<Auto>>,
    /// The chat template, or why there is none.
    pub chat: Result<ChatRenderer, String>,
    /// Tokens that end a sequence, as the engine has them.
    pub eos_token_ids: Vec<u32>,
    /// It writes `<think>…</think>` before its answers.
    pub thinks: bool,
    /// Made of the vocabulary when it is first asked for, or why it can't be.
    pub grammars: OnceLock<Result<GrammarCompiler, String>>,
    /// What makes the tokens.
    pub engine: EngineHandle,
    /// The weights were loaded in the order that the forms' widths ask for, which rounds sums otherwise.
    pub ordered: bool,
    /// What the weights are held in.
    pub weights: &'static str,
    /// Of an element of the key/value cache.
    pub kv_element_bytes: usize,
}

impl Served {
    /// Tokens of prompt and answer together.
    pub fn max_model_len(&self) -> usize {
        self.engine.config().max_model_len
    }

    /// The engine's number of a form; without a name the whole model's.
    pub fn member(&self, form: Option<&str>) -> Option<usize> {
        form.map_or(Some(0), |form| self.forms.iter().position(|f| f.name == form).map(|i| i + 1))
    }

    /// What stands for a form in a name, or, without a form, the whole model.
    pub fn asked(&self, form: Option<&str>) -> Option<Wanted> {
        match (form, &self.auto) {
            (Some(AUTO), Some(auto)) => Some(Wanted::Auto(Arc::clone(auto))),
            _ => self.member(form).map(Wanted::Member),
        }
    }

    /// The forms that `--auto` chooses among, in their order.
    pub fn chosen_by_prompt(&self) -> &[Form] {
        let first = self.auto.as_ref().map_or(self.forms.len(), |auto| auto.first() - 1);
        &self.forms[first..]
    }

    /// The forms that `--elastic` steps through: those that are for any text.
    pub fn for_any_text(&self) -> &[Form] {
        &self.forms[..self.forms.len() - self.chosen_by_prompt().len()]
    }

    /// What a member of the engine computes.
    pub fn member_config(&self, member: usize) -> &Config {
        member.checked_sub(1).and_then(|form| self.forms.get(form)).map_or(&self.config, |form| &form.config)
    }

    /// The form that is so many steps thinner than the whole model, by what it keeps.
    pub fn thinner(&self, level: usize) -> Option<&Form> {
        let mut forms: Vec<&Form> = self.for_any_text().iter().collect();
        forms.sort_by_key(|form| std::cmp::Reverse(form.config.parameters()));
        forms.get(level.checked_sub(1)?.min(forms.len().saturating_sub(1))).copied()
    }

    /// OpenAI's `system_fingerprint`: changes when the answers to the same seed may change. `name` is who answers, with its form.
    pub fn fingerprint(&self, name: &str) -> String {
        let mut hasher = DefaultHasher::new();
        let member = name.rsplit_once('@').and_then(|(_, form)| self.member(Some(form)));
        (env!("CARGO_PKG_VERSION"), &self.id, &self.root, self.ordered, self.weights, self.kv_element_bytes, member).hash(&mut hasher);
        format!("fp_{:010x}", hasher.finish() & 0xff_ffff_ffff)
    }

    /// Token ids of a text. An empty text becomes the token that begins (or ends) a document, so that there is something to go on.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, String> {
        let encoding = self.tokenizer.encode_fast(text, add_special_tokens).map_err(|e| e.to_string())?;
        let ids = encoding.get_ids().to_vec();
        if ids.is_empty() {
            return Ok(self.config.bos_token_id.or(self.config.eos_token_ids.first().copied()).into_iter().collect());
        }
        Ok(ids)
    }

    /// The token sequences that spell a word: within a word, and after a space where that is another one.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn spellings(&self, word: &str) -> Result<Vec<Vec<u32>>, String> {
        let word = word.trim_start();
        let mut spellings = Vec::new();
        for text in [word.to_string(), format!(" {word}")] {
            let ids = self.tokenizer.encode_fast(text.as_str(), false).map_err(|e| e.to_string())?.get_ids().to_vec();
            if !ids.is_empty() && !spellings.contains(&ids) {
                spellings.push(ids);
            }
        }
        Ok(spellings)
    }

    /// Text of token ids.
    ///
    /// # Errors
    /// What the tokenizer says.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, String> {
        self.tokenizer.decode(ids, skip_special_tokens).map_err(|e| e.to_string())
    }

    /// A grammar for one request. Blocks for as long as that takes.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(&self, source: &GrammarSource, thinking: Thinking) -> Result<Grammar, String> {
        let compiler =
            self.grammars.get_or_init(|| GrammarCompiler::new(&self.tokenizer, &self.eos_token_ids, self.config.vocab_size).map_err(|e| e.to_string()));
        compiler.as_ref().map_err(Clone::clone)?.compile(source, thinking).map_err(|e| e.to_string())
    }

    /// Whether an answer to this prompt begins with reasoning.
    pub fn thinking(&self, prompt: &str) -> Thinking {
        match prompt.trim_end() {
            _ if !self.thinks => Thinking::Never,
            end if end.ends_with("<think>") => Thinking::Begun,
            end if end.ends_with("</think>") => Thinking::Never,
            _ => Thinking::Possible,
        }
    }

    /// Whether one of the texts that reasoning and calls are found by is a special token, which answers usually leave out.
    pub fn marks_by_special_tokens(&self) -> bool {
        evop_serving::MARKERS.iter().any(|marker| self.tokenizer.token_to_id(marker).is_some_and(|id| self.is_special(id)))
    }

    /// A single token as text, or as `token_id:N`.
    pub fn token(&self, id: u32, as_id: bool) -> String {
        if as_id { format!("token_id:{id}") } else { self.token_text.text(&self.tokenizer, id) }
    }

    /// Whether a token is one of the tokenizer's special tokens.
    pub fn is_special(&self, id: u32) -> bool {
        self.special_tokens.contains(&id)
    }

    /// A single token's bytes.
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.token_text.bytes(&self.tokenizer, id)
    }
}
