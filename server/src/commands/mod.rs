//! One module a subcommand, and what they share.

pub mod bench;
mod child_server;
pub mod compare;
pub mod compare_devices;
pub mod eval;
pub mod export;
pub mod health;
mod http;
pub mod inspect;
mod model_args;
mod model_name;
mod progress;
pub mod prune;
pub mod prune_args;
pub mod quickstart;
pub mod serve;
pub mod vocab;
