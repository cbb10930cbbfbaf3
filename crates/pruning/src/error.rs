//! The one error type of this crate.

use std::path::{Path, PathBuf};

/// What stopped a pruning run or an evaluation; the text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model can't be read or run.
    #[error(transparent)]
    Model(#[from] evop_model::Error),
    /// A file or directory can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// An option has a value that can't be used.
    #[error("{option}: {message}")]
    Option {
        /// The option, as the command line spells it.
        option: &'static str,
        /// What was expected and what was found.
        message: String,
    },
    /// The corpus can't be calibrated on.
    #[error("calibration corpus: {0}")]
    Corpus(String),
    /// An evaluation task can't be read or scored.
    #[error("{task}: {message}")]
    Task {
        /// The task, or its file.
        task: String,
        /// Which line or item, what was expected and what was found.
        message: String,
    },
    /// Activations, or what was computed from them, are no numbers to work with.
    #[error("activations: {0}")]
    Activations(String),
    /// A checkpoint format can't express a model.
    #[error("{0}")]
    Format(String),
    /// A run directory holds something else than expected.
    #[error("{}: {message}", path.display())]
    RunDirectory {
        /// The directory or file.
        path: PathBuf,
        /// What is wrong and what to do.
        message: String,
    },
    /// The loss of a pattern isn't a number, even for the dense model.
    #[error("the dense model's loss on the calibration text is {0}: its weights or the text are damaged")]
    NotFinite(f64),
    /// The run was asked to stop; what was evaluated is kept.
    #[error("interrupted: go on with `evop prune --resume {}`", .0.display())]
    Interrupted(PathBuf),
}

/// Shorthand for results of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn option(option: &'static str, message: impl Into<String>) -> Self {
        Self::Option { option, message: message.into() }
    }
}

impl From<candle_core::Error> for Error {
    fn from(error: candle_core::Error) -> Self {
        Self::Model(error.into())
    }
}
