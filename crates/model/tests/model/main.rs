//! What the crate promises, against reference numbers, against itself under pruning, and on damaged files.
#![allow(clippy::unwrap_used)]

mod bad_input;
mod fixtures;
mod goldens;
mod heterogeneous;
mod patterns;
mod smollm2;
