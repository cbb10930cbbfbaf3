//! What a model, dense or pruned, is worth: perplexity of a text, and multiple choice as lm-evaluation-harness scores it.

mod encode;
mod loglikelihood;
mod multiple_choice;
mod perplexity;
mod shared_prefix;
mod task;

pub use multiple_choice::{Estimate, ItemResult, TaskResult, multiple_choice, write_items};
pub use perplexity::{Perplexity, join_rows, perplexity};
pub use task::{Item, Request, Schema, Task};
