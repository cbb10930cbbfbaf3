//! The server from outside: the built binary, real sockets, the bundled model.

#![allow(clippy::unwrap_used)]

mod admin;
mod auto;
mod bench_serve;
mod chat;
mod compare;
mod completions;
mod dtypes;
mod errors;
mod evaluate;
mod export;
mod forms;
mod harness;
mod interrupted;
mod keys;
mod lifecycle;
mod load;
mod messages;
mod models;
mod openapi;
mod operations;
mod prune;
mod rate_limit;
mod responses;
mod slow_clients;
mod structured;
mod swap;
mod tokenize;
mod tools;
mod traces;
mod vocab;
