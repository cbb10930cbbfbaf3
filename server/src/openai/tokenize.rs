//! `POST /tokenize` and `POST /detokenize`, in vLLM's form or llama-server's: the form that was asked in is answered in.

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::admission::{TOKEN_BYTES, encode, served_model, tokenizing};
use crate::openai::chat;
use crate::openai::chat_request::Conversation;
use crate::openai::errors::{ApiError, Problems};
use crate::openai::fields::Fields;
use crate::openai::schema;
use crate::served::Served;
use axum::Json;
use axum::extract::State;
use evop_serving::as_text;
use serde::Serialize;
use serde_json::{Map, Value};
use std::sync::Arc;
use utoipa::ToSchema;

/// Token ids, in the form that was asked in.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Tokenized {
    /// vLLM's.
    Vllm {
        /// Tokens.
        count: usize,
        /// Tokens of prompt and answer together.
        max_model_len: usize,
        /// Their ids.
        tokens: Vec<u32>,
        /// Each as text, if asked for.
        token_strs: Option<Vec<String>>,
    },
    /// llama-server's.
    Llama(LlamaTokens),
}

/// Token ids as llama-server writes them, and nothing else.
#[derive(Debug, Serialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LlamaTokens {
    /// Ids, or ids with their pieces.
    tokens: Vec<LlamaToken>,
}

/// A token as llama-server writes it.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum LlamaToken {
    /// Its id.
    Id(u32),
    /// With its text.
    WithPiece {
        /// Its id.
        id: u32,
        /// Its text.
        piece: Piece,
    },
}

/// A token's text.
#[derive(Debug, Serialize, ToSchema)]
#[serde(untagged)]
pub enum Piece {
    /// A text.
    Text(String),
    /// The bytes of a piece that is no text by itself.
    Bytes(Vec<u8>),
}

/// The text of token ids. The two forms ask alike, so the answer has both.
#[derive(Debug, Serialize, ToSchema)]
pub struct Detokenized {
    /// vLLM's name of the text.
    prompt: String,
    /// llama-server's.
    content: String,
}

/// What is to be tokenized.
#[derive(Debug)]
pub enum Input {
    /// vLLM: `prompt`.
    Prompt { text: String, add_special_tokens: bool, return_strings: bool },
    /// vLLM: `messages`.
    Conversation { conversation: Box<Conversation>, return_strings: bool },
    /// llama-server: `content`.
    Content { text: String, add_special: bool, with_pieces: bool },
}

/// Text, or a conversation, to token ids.
#[utoipa::path(
    post,
    path = "/tokenize",
    operation_id = "tokenize",
    tag = "Tokens",
    request_body = schema::TokenizeRequest,
    responses((status = 200, description = "The tokens, in the form that was asked in.", body = Tokenized), Problems)
)]
pub async fn tokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Tokenized>, ApiError> {
    let (served, input) = parse(&app, &body)?;
    let encoded = async |text: String, add_special_tokens: bool, param: &'static str| {
        if text.is_empty() && !add_special_tokens { Ok(Vec::new()) } else { encode(&served, text, add_special_tokens, param).await }
    };
    Ok(Json(match input {
        Input::Prompt { text, add_special_tokens, return_strings } => vllm_form(&served, encoded(text, add_special_tokens, "prompt").await?, return_strings),
        Input::Conversation { conversation, return_strings } => vllm_form(&served, chat::tokenize(&served, &conversation).await?, return_strings),
        Input::Content { text, add_special, with_pieces } => llama_form(&served, encoded(text, add_special, "content").await?, with_pieces),
    }))
}

fn parse(app: &App, body: &Map<String, Value>) -> Result<(Arc<Served>, Input), ApiError> {
    let fields = Fields::new(body);
    let served = served_model(app, &fields)?.served;
    let input = Input::parse(&fields)?;
    fields.log_unknown();
    Ok((served, input))
}

impl Input {
    /// Reads the body; `model` has been read before.
    ///
    /// # Errors
    /// 400 that names the field.
    pub fn parse(fields: &Fields<'_>) -> Result<Self, ApiError> {
        let flag = |name, default| fields.bool(name).map(|b| b.unwrap_or(default));
        let return_strings = flag("return_token_strs", false)?;
        if let Some(text) = fields.string("prompt")? {
            Ok(Self::Prompt { text: text.into(), add_special_tokens: flag("add_special_tokens", true)?, return_strings })
        } else if fields.get("messages").is_some() {
            Ok(Self::Conversation { conversation: Box::new(Conversation::parse(fields)?), return_strings })
        } else if let Some(text) = fields.string("content")? {
            // parse_special is always on: special tokens in a text are recognised
            flag("parse_special", true)?;
            Ok(Self::Content { text: text.into(), add_special: flag("add_special", false)?, with_pieces: flag("with_pieces", false)? })
        } else {
            Err(ApiError::invalid("prompt", "expected prompt or messages (vLLM's form), or content (llama-server's)"))
        }
    }
}

fn vllm_form(served: &Served, tokens: Vec<u32>, return_strings: bool) -> Tokenized {
    let token_strs = return_strings.then(|| tokens.iter().map(|id| served.token(*id, false)).collect());
    Tokenized::Vllm { count: tokens.len(), max_model_len: served.max_model_len(), tokens, token_strs }
}

/// A piece that is no text by itself is a list of its bytes.
fn llama_form(served: &Served, ids: Vec<u32>, with_pieces: bool) -> Tokenized {
    let token = |id: u32| {
        if !with_pieces {
            return LlamaToken::Id(id);
        }
        let bytes = served.token_bytes(id);
        let piece = if std::str::from_utf8(&bytes).is_ok() { Piece::Text(as_text(bytes)) } else { Piece::Bytes(bytes) };
        LlamaToken::WithPiece { id, piece }
    };
    Tokenized::Llama(LlamaTokens { tokens: ids.into_iter().map(token).collect() })
}

/// Token ids to text.
#[utoipa::path(
    post,
    path = "/detokenize",
    operation_id = "detokenize",
    tag = "Tokens",
    request_body = schema::DetokenizeRequest,
    responses((status = 200, description = "The text, under both forms' names.", body = Detokenized), Problems)
)]
pub async fn detokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Detokenized>, ApiError> {
    let fields = Fields::new(&body);
    let served = served_model(&app, &fields)?.served;
    fields.required("tokens")?;
    let ids = fields.token_ids("tokens")?.unwrap_or_default();
    fields.log_unknown();
    if let Some(id) = ids.iter().find(|id| **id as usize >= served.config.vocab_size) {
        return Err(ApiError::invalid("tokens", format!("tokens: token id {id} is beyond the vocabulary of {}", served.config.vocab_size)));
    }
    let text = tokenizing(ids.len() * TOKEN_BYTES, "tokens", move || served.decode(&ids, false)).await?;
    Ok(Json(Detokenized { prompt: text.clone(), content: text }))
}
