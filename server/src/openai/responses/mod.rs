//! `POST /v1/responses`: OpenAI's Responses API without its state. A request becomes a chat, and the chat's answer a list of items.

mod assembly;
mod request;
mod types;

use crate::app::App;
use crate::openai::JsonBody;
use crate::openai::chat;
use crate::openai::errors::{ApiError, Problems};
use crate::openai::fields::Fields;
use crate::openai::schema;
use crate::openai::turn;
use crate::request_id::RequestId;
use assembly::ResponseAssembly;
use axum::extract::State;
use axum::response::Response;
#[cfg(test)]
pub use request::convert;
use std::sync::Arc;

/// Answers with a list of items.
#[utoipa::path(
    post,
    path = "/v1/responses",
    operation_id = "responses",
    tag = "Text",
    request_body = schema::ResponsesRequest,
    responses((status = 200, description = "The response; with `stream`, what happens to it.", content((types::Response = "application/json"), (types::Numbered = "text/event-stream"))), Problems)
)]
pub async fn create(State(app): State<Arc<App>>, request_id: RequestId, JsonBody(body): JsonBody) -> Result<Response, ApiError> {
    let (body, echo) = request::convert(&Fields::new(&body))?;
    let chat = chat::start(&app, &request_id, &body).await.map_err(|error| error.renamed(&request::NAMES))?;
    let assembly = ResponseAssembly::new(&chat, echo);
    turn::respond(chat, assembly).await
}
