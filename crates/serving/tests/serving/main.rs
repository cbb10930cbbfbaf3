//! The serving crate through its public interface.

#![allow(clippy::unwrap_used)]

mod elastic;
mod engine;
mod structured;
