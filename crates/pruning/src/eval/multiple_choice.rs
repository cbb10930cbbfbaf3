//! Scores of a task, defined as lm-evaluation-harness 0.4 defines them (`ConfigurableTask.process_results`, `mean_stderr`).

use super::encode::{Encoded, Encoder};
use super::loglikelihood::{Loglikelihood, loglikelihoods};
use super::task::{Item, Schema, Task};
use crate::{Error, Result, storage};
use evop_model::{Decoder, Tokenizer};
use rayon::prelude::*;
use serde::Serialize;
use std::path::Path;

/// A mean over items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// The mean.
    pub value: f64,
    /// Its standard error: sample standard deviation / sqrt(n). None for a single item.
    pub stderr: Option<f64>,
}

/// How a model did on a task.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TaskResult {
    /// The task's name.
    pub task: String,
    /// What its lines look like.
    pub schema: Schema,
    /// Items scored.
    pub n: usize,
    /// Fraction of items whose most likely choice is the right one; for [`Schema::Target`], whose target greedy decoding would give.
    pub acc: Estimate,
    /// The same with log-likelihoods divided by the choice's length in characters. [`Schema::Choices`] only.
    pub acc_norm: Option<Estimate>,
    /// exp of the mean negative log-likelihood of a whole target. [`Schema::Target`] only.
    pub perplexity: Option<f64>,
    /// What guessing would get right: the mean of 1 / choices. None for [`Schema::Target`].
    pub chance: Option<f64>,
    /// The model's context in tokens: what is longer was cut on the left.
    pub max_length: usize,
    /// Items of which something was cut.
    pub truncated: usize,
    /// Every item, in the task's order.
    #[serde(skip)]
    pub items: Vec<ItemResult>,
}

/// How a model did on one item.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ItemResult {
    /// Number of the item in its task, from 0.
    pub index: usize,
    /// Summed log-probability of each choice, in nats.
    pub logprobs: Vec<f64>,
    /// Length of each choice in characters, the space that joins it to the query not counted: what `acc_norm` divides by. [`Schema::Choices`] only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lengths: Option<Vec<usize>>,
    /// Whether greedy decoding would give each choice.
    pub is_greedy: Vec<bool>,
    /// The most likely choice; the first of equals.
    pub prediction: usize,
    /// The most likely choice a character. [`Schema::Choices`] only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prediction_norm: Option<usize>,
    /// The right choice.
    pub gold: usize,
    /// Whether it counts for `acc`.
    pub acc: bool,
    /// Whether it counts for `acc_norm`. [`Schema::Choices`] only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub acc_norm: Option<bool>,
}

/// Runs a task on a decoder, dense, masked or sliced. `progress(done, all)` counts items.
///
/// ```no_run
/// # fn main() -> evop_pruning::Result<()> {
/// use evop_pruning::eval::{Task, multiple_choice};
/// let checkpoint = evop_model::Checkpoint::open("models/tiny".as_ref())?;
/// let decoder = checkpoint.decoder(&evop_model::Device::Cpu, evop_model::DType::F32)?;
/// let task = Task::parse(r#"{"query": "Once upon a", "choices": [" time", " dime"], "gold": 0}"#, "tales.jsonl".as_ref())?;
/// let result = multiple_choice(&decoder, checkpoint.tokenizer(), &task, |_, _| {})?;
/// println!("{} {}", result.task, result.acc.value);
/// # Ok(()) }
/// ```
///
/// # Errors
/// [`Error::Task`] for an item that can't be scored: it has no tokens, too many, or the model gives no number; [`Error::Model`] when the device fails.
pub fn multiple_choice(decoder: &Decoder, tokenizer: &Tokenizer, task: &Task, mut progress: impl FnMut(usize, usize)) -> Result<TaskResult> {
    let encoder = Encoder::new(tokenizer, decoder.config());
    let wrong = |index: usize, message: String| Error::Task { task: task.name().to_string(), message: format!("item {index}: {message}") };
    let encode = |(index, item): (usize, &Item)| {
        item.requests().iter().map(|r| encoder.encode(r)).collect::<std::result::Result<Vec<Encoded>, _>>().map_err(|message| wrong(index, message))
    };
    let encoded: Vec<Vec<Encoded>> = task.items().par_iter().enumerate().map(encode).collect::<Result<_>>()?;
    let scores = loglikelihoods(decoder, &encoded, |done| progress(done, task.items().len()))?;
    if let Some((index, found)) = scores.iter().enumerate().find_map(|(i, s)| s.iter().find(|l| !l.logprob.is_finite()).map(|l| (i, l.logprob))) {
        return Err(wrong(index, format!("the model's log-probability is {found}: its weights are damaged, or they overflow in {:?}", decoder.dtype())));
    }
    let items: Vec<ItemResult> =
        task.items().iter().zip(&scores).enumerate().map(|(index, (item, scores))| item_result(index, item, task.schema(), scores)).collect();
    let mean_of = |f: &dyn Fn(&ItemResult) -> f64| items.iter().map(f).sum::<f64>() / items.len() as f64;
    let target = task.schema() == Schema::Target;
    Ok(TaskResult {
        task: task.name().to_string(),
        schema: task.schema(),
        n: items.len(),
        acc: estimate(items.iter().map(|i| i.acc)),
        acc_norm: (task.schema() == Schema::Choices).then(|| estimate(items.iter().filter_map(|i| i.acc_norm))),
        perplexity: target.then(|| (-mean_of(&|i| i.logprobs[0])).exp()),
        chance: (!target).then(|| mean_of(&|i| 1.0 / i.logprobs.len() as f64)),
        max_length: decoder.config().max_position_embeddings,
        truncated: encoded.iter().filter(|item| item.iter().any(|e| e.truncated)).count(),
        items,
    })
}

/// Writes one JSON line an item: the task's name and the fields of [`ItemResult`].
///
/// # Errors
/// [`Error::Io`] when the file can't be written.
pub fn write_items(path: &Path, results: &[TaskResult]) -> Result<()> {
    #[derive(Serialize)]
    struct Line<'a> {
        task: &'a str,
        #[serde(flatten)]
        item: &'a ItemResult,
    }
    let mut lines = Vec::new();
    for result in results {
        for item in &result.items {
            serde_json::to_writer(&mut lines, &Line { task: &result.task, item }).map_err(|e| Error::io(path, e.into()))?;
            lines.push(b'\n');
        }
    }
    storage::write(path, &lines)
}

fn item_result(index: usize, item: &Item, schema: Schema, scores: &[Loglikelihood]) -> ItemResult {
    let logprobs: Vec<f64> = scores.iter().map(|s| s.logprob).collect();
    let is_greedy: Vec<bool> = scores.iter().map(|s| s.greedy).collect();
    let prediction = argmax(&logprobs);
    let lengths: Option<Vec<usize>> = (schema == Schema::Choices).then(|| item.requests().iter().map(|r| length(&r.continuation)).collect());
    let prediction_norm = lengths.as_ref().map(|lengths| argmax(&logprobs.iter().zip(lengths).map(|(l, n)| l / *n as f64).collect::<Vec<_>>()));
    let gold = item.gold();
    ItemResult {
        index,
        acc: if schema == Schema::Target { is_greedy[gold] } else { prediction == gold },
        acc_norm: prediction_norm.map(|p| p == gold),
        logprobs,
        lengths,
        is_greedy,
        prediction,
        prediction_norm,
        gold,
    }
}

/// Characters of a choice. The harness has the joining space in its template, not in the choice.
fn length(choice: &str) -> usize {
    choice.strip_prefix(' ').unwrap_or(choice).chars().count()
}

/// The first of the largest, as `numpy.argmax`.
fn argmax(values: &[f64]) -> usize {
    let best = values.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (i, v)| if *v > best.1 { (i, *v) } else { best });
    best.0
}

fn estimate(correct: impl Iterator<Item = bool> + Clone) -> Estimate {
    let n = correct.clone().count() as f64;
    let value = correct.filter(|c| *c).count() as f64 / n;
    // the sample variance of zeros and ones
    let stderr = (n > 1.0).then(|| (value * (1.0 - value) / (n - 1.0)).sqrt());
    Estimate { value, stderr }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scored(line: &str, logprobs: &[f64], greedy: &[bool]) -> ItemResult {
        let task = Task::parse(line, "t.jsonl".as_ref()).unwrap();
        let scores: Vec<_> = logprobs.iter().zip(greedy).map(|(l, g)| Loglikelihood { logprob: *l, greedy: *g }).collect();
        item_result(0, &task.items()[0], task.schema(), &scores)
    }

    #[test]
    fn acc_takes_the_sum_and_acc_norm_the_sum_a_character_without_the_joining_space() {
        let line = r#"{"query": "q", "choices": [" été", " a much longer answer", "ab"], "gold": 1}"#;
        let item = scored(line, &[-3.0, -8.0, -4.0], &[false; 3]);
        assert_eq!(item.lengths, Some(vec![3, 20, 2]));
        assert_eq!((item.prediction, item.acc), (0, false));
        assert_eq!((item.prediction_norm, item.acc_norm), (Some(1), Some(true)));
    }

    #[test]
    fn the_first_of_equal_choices_is_taken() {
        let line = r#"{"query": "q", "choices": [" a", " b", " c"], "gold": 1}"#;
        let item = scored(line, &[-3.0, -2.0, -2.0], &[false; 3]);
        assert_eq!((item.prediction, item.prediction_norm), (1, Some(1)));
    }

    #[test]
    fn a_target_counts_when_greedy_decoding_gives_it() {
        let line = r#"{"context": "c", "target": " t"}"#;
        assert!(scored(line, &[-0.1], &[true]).acc);
        let item = scored(line, &[-0.1], &[false]);
        assert_eq!((item.acc, item.acc_norm, item.lengths), (false, None, None));
    }

    #[test]
    fn the_standard_error_is_the_sample_deviation_over_root_n() {
        // of [1, 1, 1, 0]: deviation 0.5, root 2
        let of = |values: &[bool]| estimate(values.iter().copied());
        assert_eq!(of(&[true, true, true, false]), Estimate { value: 0.75, stderr: Some(0.25) });
        assert_eq!(of(&[true]), Estimate { value: 1.0, stderr: None });
        assert_eq!(of(&[false, false]).stderr, Some(0.0));
    }
}
