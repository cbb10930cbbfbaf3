//! The chat template that a checkpoint carries; rendering is the server's business.

use serde::Serialize;

/// A Jinja template and the tokens that it may name.
#[derive(Debug, Clone, Serialize)]
pub struct ChatTemplate {
    /// Jinja source.
    pub source: String,
    /// Text of the beginning-of-sequence token, empty if there is none.
    pub bos_token: String,
    /// Text of the end-of-sequence token, empty if there is none.
    pub eos_token: String,
}
