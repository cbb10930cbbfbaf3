//! Output that must be like something: a JSON schema, a regular expression, one of some texts, a Lark grammar. llguidance says which tokens may come
//! next; the sampler draws from those.

use crate::Error;
use crate::token_text::TokenText;
use evop_model::Tokenizer;
use llguidance::api::{GrammarWithLexer, ParserLimits, TopLevelGrammar};
use llguidance::{Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, PoisonError};
use toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};

/// Between the parts of a JSON text: nothing, a space, or a new line with its indentation. Small models that may write any whitespace write nothing else.
const BOUNDED_WHITESPACE: &str = r" |\r?\n[ \t]{0,40}";
/// What reasoning and tool calls stand between; text to grammars, although a vocabulary may call these tokens special.
pub const MARKERS: [&str; 4] = ["<think>", "</think>", "<tool_call>", "</tool_call>"];
/// A grammar's text is no longer, and compiled on a stack of that many bytes: rules that refer to rules are followed by recursion.
const MAX_SOURCE_BYTES: usize = 256 << 10;
const COMPILER_STACK_BYTES: usize = 256 << 20;
/// Bounds one grammar's memory, at about 2 kB a state.
const MAX_LEXER_STATES: usize = 30_000;

/// What the output must be like.
#[derive(Debug, Clone, PartialEq)]
pub enum GrammarSource {
    /// JSON that a schema accepts.
    Json {
        /// A JSON schema (draft 2020-12, with the keywords that llguidance knows).
        schema: Value,
        /// Between the parts of the JSON text.
        whitespace: Whitespace,
    },
    /// A regular expression over the whole text, in the syntax of the `regex` crate.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's dialect of Lark, from its rule `start`.
    Lark(String),
}

/// What may stand between the parts of a JSON text.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Whitespace {
    /// Nothing, a space, or a new line and indentation.
    #[default]
    Bounded,
    /// Nothing.
    None,
    /// A space after every colon and comma: as Python's `json.dumps` writes it, and chat templates with it.
    OneLine,
    /// What this regular expression matches, or nothing.
    Pattern(String),
}

/// Whether `<think>…</think>` stands before the output that is constrained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Thinking {
    /// It doesn't.
    #[default]
    Never,
    /// The model may begin with it.
    Possible,
    /// The prompt ends inside it.
    Begun,
}

/// Why a grammar can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GrammarError(String);

impl GrammarError {
    /// What llguidance says; it quotes the grammar, however long that is.
    fn of(error: &impl std::fmt::Display) -> Self {
        const LONGEST: usize = 400;
        let text = format!("{error:#}");
        let cut = text.char_indices().nth(LONGEST).map(|(at, _)| at);
        Self(cut.map_or_else(|| text.trim_end().to_string(), |at| format!("{}…", &text[..at])))
    }
}

/// Compiles grammars for one vocabulary.
pub struct GrammarCompiler {
    factory: ParserFactory,
}

impl std::fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GrammarCompiler").field("vocab_size", &self.factory.tok_env().tok_trie().vocab_size()).finish()
    }
}

impl GrammarCompiler {
    /// For a model of so many tokens and these ends of sequence, the same as the engine's.
    ///
    /// # Errors
    /// [`Error::Config`] without an end of sequence, or if the vocabulary can't be read.
    pub fn new(tokenizer: &Tokenizer, eos_token_ids: &[u32], vocab_size: usize) -> Result<Self, Error> {
        let eos: Vec<u32> = eos_token_ids.iter().copied().filter(|id| (*id as usize) < vocab_size).collect();
        let Some(first) = eos.first() else {
            return Err(Error::Config("a grammar needs an end of sequence, and this model's config names none".into()));
        };
        let info = TokRxInfo::new(u32::try_from(vocab_size).map_err(|e| Error::Config(e.to_string()))?, *first);
        let trie = TokTrie::from(&info, &spelled(tokenizer, &eos, vocab_size)).with_eos_tokens(&eos);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&environment).map_err(|e| Error::Config(format!("the vocabulary can't be read for grammars: {e:#}")))?;
        factory.quiet();
        *factory.limits_mut() = ParserLimits { max_lexer_states: MAX_LEXER_STATES, verbose_errors: false, ..ParserLimits::default() };
        Ok(Self { factory })
    }

    /// Compiles a grammar; it takes milliseconds to seconds.
    ///
    /// # Errors
    /// What is wrong with the grammar, or that it is too large.
    pub fn compile(&self, source: &GrammarSource, thinking: Thinking) -> Result<Grammar, GrammarError> {
        let bytes = source.bytes();
        if bytes > MAX_SOURCE_BYTES {
            return Err(GrammarError(format!("it is too long: expected at most {MAX_SOURCE_BYTES} bytes, found {bytes}")));
        }
        std::thread::scope(|scope| {
            let compile = || self.compile_here(source, thinking);
            let thread = std::thread::Builder::new().name("evop-grammar".into()).stack_size(COMPILER_STACK_BYTES).spawn_scoped(scope, compile);
            let thread = thread.map_err(|e| GrammarError(format!("no thread can be had for it: {e}")))?;
            thread.join().unwrap_or_else(|_| Err(GrammarError("the compiler failed".into())))
        })
    }

    fn compile_here(&self, source: &GrammarSource, thinking: Thinking) -> Result<Grammar, GrammarError> {
        let answer = lexed(source)?;
        let grammars = match thinking {
            Thinking::Never => vec![answer],
            Thinking::Possible | Thinking::Begun => {
                let start = if thinking == Thinking::Begun { "rest gap? @answer" } else { "\"<think>\" rest gap? @answer | @answer" };
                let around = format!("start: {start}\nrest[suffix=\"</think>\"]: /(?s:.*)/\ngap: /[ \\n]{{1,4}}/");
                vec![GrammarWithLexer::from_lark(around), GrammarWithLexer { name: Some("answer".into()), ..answer }]
            }
        };
        let parser = self.factory.create_parser(TopLevelGrammar { grammars, max_tokens: None });
        let mut matcher = Matcher::new(Ok(parser.map_err(|e| GrammarError::of(&e))?));
        // what fails at once should fail before anything runs
        match matcher.compute_mask_or_eos() {
            Ok(mask) if mask.is_zero() => Err(GrammarError("no token of this model can begin such a text".into())),
            Ok(_) => Ok(Grammar(Arc::new(Mutex::new(matcher)))),
            Err(error) => Err(GrammarError::of(&error)),
        }
    }
}

/// The bytes of every token; special ones are marked, so that no text is mistaken for them.
fn spelled(tokenizer: &Tokenizer, eos: &[u32], vocab_size: usize) -> Vec<Vec<u8>> {
    let text = TokenText::of(tokenizer);
    let mut words: Vec<Vec<u8>> = (0..vocab_size as u32).map(|id| text.bytes(tokenizer, id)).collect();
    let special = tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, token)| token.special && !MARKERS.contains(&token.content.as_str()));
    for id in special.map(|(id, _)| id).chain(eos.iter().copied()) {
        if let Some(word) = words.get_mut(id as usize).filter(|word| word.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER)) {
            word.insert(0, TokTrie::SPECIAL_TOKEN_MARKER);
        }
    }
    words
}

fn lexed(source: &GrammarSource) -> Result<GrammarWithLexer, GrammarError> {
    Ok(match source {
        GrammarSource::Json { schema, whitespace } => GrammarWithLexer::from_json_schema(with_whitespace(schema, whitespace)),
        GrammarSource::Regex(regex) => GrammarWithLexer::from_regex(regex),
        GrammarSource::Choice(texts) if texts.is_empty() => return Err(GrammarError("expected at least one choice, found none".into())),
        GrammarSource::Choice(texts) => {
            let texts: Vec<String> = texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
            // (a terminal, so that any number of texts is one automaton)
            GrammarWithLexer::from_lark(format!("start: CHOICE\nCHOICE: {}", texts.join(" | ")))
        }
        GrammarSource::Lark(lark) => GrammarWithLexer::from_lark(lark.clone()),
    })
}

/// The schema with llguidance's own key for whitespace; one that the schema brings goes first.
fn with_whitespace(schema: &Value, whitespace: &Whitespace) -> Value {
    let mut schema = schema.clone();
    if let Value::Object(object) = &mut schema {
        object.entry("x-guidance").or_insert_with(|| match whitespace {
            Whitespace::Bounded => json!({"whitespace_pattern": BOUNDED_WHITESPACE}),
            Whitespace::None => json!({"whitespace_flexible": false}),
            Whitespace::OneLine => json!({"whitespace_flexible": false, "item_separator": ", ", "key_separator": ": "}),
            Whitespace::Pattern(pattern) => json!({"whitespace_pattern": pattern}),
        });
    }
    schema
}

impl GrammarSource {
    /// Length of its text.
    fn bytes(&self) -> usize {
        match self {
            Self::Json { schema, .. } => schema.to_string().len(),
            Self::Regex(text) | Self::Lark(text) => text.len(),
            Self::Choice(texts) => texts.iter().map(|text| text.len() + 3).sum(),
        }
    }

    /// A JSON schema as it can stand in a Lark grammar: `%json {…}`.
    pub fn json_in_lark(schema: &Value, whitespace: &Whitespace) -> String {
        format!("%json {}", with_whitespace(schema, whitespace))
    }
}

/// A compiled grammar; cheap to clone, and every choice begins it anew.
#[derive(Clone)]
pub struct Grammar(Arc<Mutex<Matcher>>);

impl std::fmt::Debug for Grammar {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Grammar")
    }
}

impl PartialEq for Grammar {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// One output's place in its grammar.
pub(crate) struct GrammarState(Matcher);

impl std::fmt::Debug for GrammarState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("GrammarState")
    }
}

impl GrammarState {
    /// Before the first token.
    pub fn begin(grammar: &Grammar) -> Self {
        Self(grammar.0.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// The tokens that may come next, ends of sequence among them where the text may end.
    pub fn allowed(&mut self) -> Result<TokenMask, String> {
        self.0.compute_mask_or_eos().map(TokenMask).map_err(|e| format!("the grammar can't be followed further: {e:#}"))
    }

    /// Takes the next token; whether nothing can come after it.
    pub fn advance(&mut self, id: u32) -> Result<bool, String> {
        self.0.consume_token(id).map_err(|e| format!("the grammar can't be followed further: {e:#}"))?;
        Ok(self.0.is_stopped())
    }
}

/// A set of tokens.
pub(crate) struct TokenMask(SimpleVob);

impl TokenMask {
    /// Leaves only the set's tokens possible.
    pub fn apply(&self, logits: &mut [f32]) {
        for (logits, bits) in logits.chunks_mut(32).zip(self.0.as_slice().iter().copied().chain(std::iter::repeat(0))) {
            for (bit, logit) in logits.iter_mut().enumerate() {
                if bits & (1 << bit) == 0 {
                    *logit = f32::NEG_INFINITY;
                }
            }
        }
    }

    /// There is a token in the set that is none of these.
    pub fn allows_more_than(&self, ids: &[u32]) -> bool {
        let mut others = self.0.clone();
        let known = others.len();
        ids.iter().filter(|id| (**id as usize) < known).for_each(|id| others.disallow_token(*id));
        !others.is_zero()
    }
}

#[cfg(test)]
#[path = "grammar_tests.rs"]
mod tests;
