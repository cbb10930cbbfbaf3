//! `POST /v1/messages` and `/v1/messages/count_tokens`: Anthropic's Messages API. A request becomes a chat, and the chat's answer a list of blocks.

mod assembly;
pub mod edge;
mod request;
mod types;

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::admission::served_model;
use crate::openai::chat;
use crate::openai::chat_request::Conversation;
use crate::openai::errors::ApiError;
use crate::openai::fields::Fields;
use crate::openai::schema;
use crate::openai::turn;
use crate::request_id::RequestId;
use crate::served::Served;
use assembly::MessageAssembly;
use axum::Json;
use axum::extract::State;
use axum::response::Response;
#[cfg(test)]
pub use request::{convert, convert_prompt};
use serde_json::{Map, Value};
use std::sync::Arc;
pub use types::MessageError;
use types::{MessageProblems, TokenCount};

/// Answers with a list of blocks.
#[utoipa::path(
    post,
    path = "/v1/messages",
    operation_id = "messages",
    tag = "Text",
    request_body = schema::MessagesRequest,
    responses((status = 200, description = "The message; with `stream`, what happens to it.", content((types::Message = "application/json"), (types::MessageEvent = "text/event-stream"))), MessageProblems)
)]
pub async fn create(State(app): State<Arc<App>>, request_id: RequestId, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let body = request::convert(&Fields::new(&body))?;
    let chat = chat::start(&app, &request_id, &body).await.map_err(|error| error.renamed(&request::NAMES))?;
    let assembly = MessageAssembly::new(&chat);
    turn::respond(chat, assembly).await
}

/// Says how many tokens a request's prompt has.
#[utoipa::path(
    post,
    path = "/v1/messages/count_tokens",
    operation_id = "count_tokens",
    tag = "Tokens",
    request_body = schema::CountTokensRequest,
    responses((status = 200, description = "How long the prompt is.", body = TokenCount), MessageProblems)
)]
pub async fn count_tokens(State(app): State<Arc<App>>, JsonBody(body): JsonBody) -> Result<Json<TokenCount>, ApiError> {
    let (served, conversation) = parse(&app, &body).map_err(|error| error.renamed(&request::NAMES))?;
    let tokens = chat::tokenize(&served, &conversation).await.map_err(|error| error.renamed(&request::NAMES))?;
    Ok(Json(TokenCount { input_tokens: tokens.len() }))
}

/// Apart from the handler, because [`Fields`] must not live across an await.
fn parse(app: &App, body: &Map<String, Value>) -> Result<(Arc<Served>, Conversation), ApiError> {
    let body = request::convert_prompt(&Fields::new(body))?;
    let fields = Fields::new(&body);
    Ok((served_model(app, &fields)?.served, Conversation::parse(&fields)?))
}
