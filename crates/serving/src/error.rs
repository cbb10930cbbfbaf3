//! The error type of this crate's fallible calls, besides the refusals of [`crate::SubmitError`] and [`crate::ChatError`].

/// What went wrong outside a request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An [`crate::EngineConfig`] that can't work; the text names the field.
    #[error("{0}")]
    Config(String),
    /// The engine's thread could not be started.
    #[error("the engine's thread can't be started: {0}")]
    Thread(#[from] std::io::Error),
    /// There is no memory for the keys and values.
    #[error("no memory for the key/value cache: {0}")]
    Cache(evop_model::Error),
    /// The tokenizer could not turn tokens into text.
    #[error("the tokenizer can't decode: {0}")]
    Decode(String),
}
