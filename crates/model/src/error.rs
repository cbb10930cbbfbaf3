//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What went wrong while reading or running a model; the text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The path holds no checkpoint that can be read.
    #[error("{}: {message}", path.display())]
    NotACheckpoint {
        /// The path that was given.
        path: PathBuf,
        /// What was looked for and what to do.
        message: String,
    },
    /// A field of `config.json` (or of a GGUF's metadata) is missing or has a value that can't be used.
    #[error("{}: {message}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// Which field, what was expected, what was found.
        message: String,
    },
    /// A weights file is damaged.
    #[error("{}: {message}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A tensor is missing, of another shape than the config asks for, of an unsupported type, or not finite.
    #[error("{}: tensor `{tensor}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in that file's convention.
        tensor: String,
        /// What the config asks for.
        expected: String,
        /// What is there.
        found: String,
    },
    /// The tokenizer could not be read or built.
    #[error("{}: {message}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        message: String,
    },
    /// A pattern doesn't fit the model that it is applied to.
    #[error("pattern: {0}")]
    Pattern(String),
    /// The device or number type asked for can't be had.
    #[error("{0}")]
    Device(String),
    /// A call that contradicts the model's limits (positions beyond the context, ids beyond the vocabulary).
    #[error("{0}")]
    Input(String),
    /// An error of the tensor library: out of memory, or a driver error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn config(path: &Path, message: impl Into<String>) -> Self {
        Self::Config { path: path.to_path_buf(), message: message.into() }
    }

    pub(crate) fn corrupt(path: &Path, message: impl Into<String>) -> Self {
        Self::Corrupt { path: path.to_path_buf(), message: message.into() }
    }
}
