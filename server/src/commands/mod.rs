//! One module a subcommand, and what they share.

pub mod compare_devices;
pub mod eval;
pub mod health;
mod http;
pub mod inspect;
mod model_args;
mod progress;
pub mod prune;
pub mod quickstart;
pub mod serve;
