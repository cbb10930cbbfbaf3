//! What the crate promises, against reference numbers, against itself under pruning, and on damaged files.
#![allow(clippy::unwrap_used, clippy::needless_pass_by_value)] // json!(…) is handed over as it is written

mod bad_input;
mod dtypes;
mod fixtures;
mod goldens;
mod heterogeneous;
mod patterns;
mod smollm2;
