//! Request bodies as JSON objects, whatever the content type says.

use crate::app::App;
use crate::openai::errors::ApiError;
use axum::body::Bytes;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use serde_json::{Map, Value};
use std::sync::Arc;
use std::time::Duration;

/// A body that is a JSON object; an empty body is an empty object.
#[derive(Debug)]
pub struct JsonBody(pub Map<String, Value>);

impl FromRequest<Arc<App>> for JsonBody {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let patience = Duration::from_secs(app.config.body_timeout);
        let arrived = tokio::time::timeout(patience, Bytes::from_request(request, app)).await.map_err(|_| ApiError::slow_body())?;
        let bytes = arrived.map_err(|rejection| match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ApiError::too_large(app.config.max_body_size.0),
            _ => ApiError::bad_request(format!("the request's body can't be read: {rejection}")),
        })?;
        if bytes.is_empty() {
            return Ok(Self(Map::new()));
        }
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(object)) => Ok(Self(object)),
            Ok(_) => Err(ApiError::bad_request("the request's body must be a JSON object")),
            Err(error) => Err(ApiError::bad_request(format!("the request's body is not valid JSON: {error}"))),
        }
    }
}
