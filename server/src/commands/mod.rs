//! One module a subcommand.

pub mod health;
pub mod serve;
