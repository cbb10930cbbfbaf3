//! `POST /tokenize` and `POST /detokenize`, in vLLM's form or llama-server's: the form that was asked in is answered in.

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::admission::served_model;
use crate::openai::chat;
use crate::openai::chat_request::Conversation;
use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::served::Served;
use axum::Json;
use axum::extract::State;
use evop_serving::as_text;
use serde_json::{Map, Value, json};
use std::sync::Arc;

/// What is to be tokenized.
enum Input {
    /// vLLM: `prompt`.
    Prompt { text: String, add_special_tokens: bool, return_strings: bool },
    /// vLLM: `messages`.
    Conversation { conversation: Box<Conversation>, return_strings: bool },
    /// llama-server: `content`.
    Content { text: String, add_special: bool, with_pieces: bool },
}

/// Text, or a conversation, to token ids.
pub async fn tokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Value>, ApiError> {
    let (served, input) = parse(&app, &body)?;
    let encoded = |text: &str, add_special_tokens: bool, param: &'static str| {
        let ids = if text.is_empty() && !add_special_tokens { Ok(Vec::new()) } else { served.encode(text, add_special_tokens) };
        ids.map_err(|e| ApiError::invalid(param, format!("{param}: {e}")))
    };
    Ok(Json(match input {
        Input::Prompt { text, add_special_tokens, return_strings } => vllm_form(&served, &encoded(&text, add_special_tokens, "prompt")?, return_strings),
        Input::Conversation { conversation, return_strings } => vllm_form(&served, &chat::tokenize(&served, &conversation).await?, return_strings),
        Input::Content { text, add_special, with_pieces } => llama_form(&served, &encoded(&text, add_special, "content")?, with_pieces),
    }))
}

fn parse(app: &App, body: &Map<String, Value>) -> Result<(Arc<Served>, Input), ApiError> {
    let fields = Fields::new(body);
    let served = served_model(app, &fields)?.served;
    let flag = |name, default| fields.bool(name).map(|b| b.unwrap_or(default));
    let return_strings = flag("return_token_strs", false)?;
    let input = if let Some(text) = fields.string("prompt")? {
        Input::Prompt { text: text.into(), add_special_tokens: flag("add_special_tokens", true)?, return_strings }
    } else if fields.get("messages").is_some() {
        Input::Conversation { conversation: Box::new(Conversation::parse(&fields)?), return_strings }
    } else if let Some(text) = fields.string("content")? {
        // parse_special is always on: special tokens in a text are recognised
        flag("parse_special", true)?;
        Input::Content { text: text.into(), add_special: flag("add_special", false)?, with_pieces: flag("with_pieces", false)? }
    } else {
        return Err(ApiError::invalid("prompt", "expected prompt or messages (vLLM's form), or content (llama-server's)"));
    };
    fields.log_unknown();
    Ok((served, input))
}

fn vllm_form(served: &Served, ids: &[u32], return_strings: bool) -> Value {
    let strings: Option<Vec<String>> = return_strings.then(|| ids.iter().map(|id| served.token(*id, false)).collect());
    json!({"count": ids.len(), "max_model_len": served.max_model_len(), "tokens": ids, "token_strs": strings})
}

/// A piece that is no text by itself is a list of its bytes.
fn llama_form(served: &Served, ids: &[u32], with_pieces: bool) -> Value {
    let piece = |id: &u32| {
        let bytes = served.token_bytes(*id);
        let piece = if std::str::from_utf8(&bytes).is_ok() { Value::from(as_text(bytes)) } else { Value::from(bytes) };
        json!({"id": id, "piece": piece})
    };
    if with_pieces { json!({"tokens": ids.iter().map(piece).collect::<Vec<_>>()}) } else { json!({"tokens": ids}) }
}

/// Token ids to text. The two forms ask alike, so the answer has both.
pub async fn detokenize(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<Value>, ApiError> {
    let fields = Fields::new(&body);
    let served = served_model(&app, &fields)?.served;
    fields.required("tokens")?;
    let ids = fields.token_ids("tokens")?.unwrap_or_default();
    fields.log_unknown();
    if let Some(id) = ids.iter().find(|id| **id as usize >= served.config.vocab_size) {
        return Err(ApiError::invalid("tokens", format!("tokens: token id {id} is beyond the vocabulary of {}", served.config.vocab_size)));
    }
    let text = served.decode(&ids, false).map_err(|e| ApiError::invalid("tokens", format!("tokens: {e}")))?;
    Ok(Json(json!({"prompt": text, "content": text})))
}
