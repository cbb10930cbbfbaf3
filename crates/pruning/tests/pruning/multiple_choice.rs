//! Multiple choice against lm-evaluation-harness (tests/clients/lm_eval_tasks.py), on the bundled set, and on lines that are wrong.

use crate::setting::{book, root, tiny};
use evop_pruning::eval::{Estimate, Schema, Task, TaskResult, multiple_choice, write_items};
use serde_json::Value;
use std::path::Path;

fn bundled() -> Task {
    Task::parse(&book("continuations.jsonl.gz", usize::MAX), Path::new("continuations.jsonl.gz")).unwrap()
}

fn run(task: &Task) -> TaskResult {
    let (checkpoint, decoder) = tiny();
    multiple_choice(&decoder, checkpoint.tokenizer(), task, |_, _| {}).unwrap()
}

fn parse(lines: &str) -> evop_pruning::Result<Task> {
    Task::parse(lines, Path::new("sets/quiz.jsonl.gz"))
}

#[test]
fn every_task_of_lm_evaluation_harness_is_reproduced_item_by_item() {
    let text = std::fs::read_to_string(root().join("tests/goldens/lm_eval.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let tasks = golden["tasks"].as_object().unwrap();
    assert_eq!(tasks.len(), 5);
    for (file, expected) in tasks {
        let lines: String = expected["lines"].as_array().unwrap().iter().map(|line| format!("{line}\n")).collect();
        let found = run(&Task::parse(&lines, Path::new(file)).unwrap());
        assert_eq!(found.n, expected["items"].as_array().unwrap().len());
        for (item, expected) in found.items.iter().zip(expected["items"].as_array().unwrap()) {
            let expected_logprobs: Vec<f64> = expected["logprobs"].as_array().unwrap().iter().map(|l| l.as_f64().unwrap()).collect();
            assert_eq!(item.logprobs.len(), expected_logprobs.len());
            for (a, b) in item.logprobs.iter().zip(&expected_logprobs) {
                assert!((a - b).abs() < 1e-3, "{file}, item {}: {:?}, the harness {expected_logprobs:?}", item.index, item.logprobs);
            }
            assert_eq!(serde_json::to_value(&item.is_greedy).unwrap(), expected["is_greedy"], "{file}, item {}", item.index);
            assert_eq!(f64::from(u8::from(item.acc)), expected["acc"].as_f64().unwrap(), "{file}, item {}", item.index);
            assert_eq!(item.acc_norm.map(|a| f64::from(u8::from(a))), expected["acc_norm"].as_f64(), "{file}, item {}", item.index);
        }
        let close = |found: Option<f64>, name: &str| match (found, expected[name].as_f64()) {
            (Some(found), Some(expected)) => {
                assert!((found / expected - 1.0).abs() < 1e-4 || found == expected, "{file}: {name} {found}, the harness {expected}")
            }
            (found, expected) => assert_eq!(found, expected, "{file}: {name}"),
        };
        close(Some(found.acc.value), "acc");
        close(found.acc.stderr, "acc_stderr");
        close(found.acc_norm.map(|e| e.value), "acc_norm");
        close(found.acc_norm.and_then(|e| e.stderr), "acc_norm_stderr");
        close(found.perplexity, "perplexity");
    }
}

#[test]
fn the_bundled_model_is_well_above_chance_on_the_bundled_questions() {
    let result = run(&bundled().limited(150).unwrap());
    assert_eq!((result.task.as_str(), result.schema, result.n, result.chance), ("continuations", Schema::Choices, 150, Some(0.25)));
    let Estimate { value, stderr } = result.acc;
    assert!(value > 0.45 && value - 4.0 * stderr.unwrap() > 0.25, "{result:?}");
}

#[test]
fn every_bundled_question_is_answered_by_the_held_out_books() {
    let text = book("held-out.txt.gz", usize::MAX);
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let task = bundled();
    let mut golds = [0; 4];
    for item in task.items() {
        let texts: Vec<String> = item.requests().iter().map(|r| format!("{}{}", r.context, r.continuation)).collect();
        assert_eq!(texts.len(), 4);
        for (i, whole) in texts.iter().enumerate() {
            assert!(text.contains(&item.requests()[i].continuation), "{whole}");
            assert_eq!(text.contains(whole.as_str()), i == item.gold(), "{whole}");
        }
        golds[item.gold()] += 1;
    }
    assert!(task.items().len() == 400 && golds.iter().all(|n| *n > 70), "{golds:?}");
}

#[test]
fn a_beginning_shared_by_the_choices_changes_no_bit_of_them() {
    let task = bundled().limited(6).unwrap();
    let shared = run(&task);
    for (item, found) in task.items().iter().zip(&shared.items) {
        let alone = item.requests().iter().map(|r| serde_json::json!({"context": r.context, "target": r.continuation}).to_string() + "\n");
        let alone = run(&parse(&alone.collect::<String>()).unwrap());
        assert_eq!(found.logprobs, alone.items.iter().map(|i| i.logprobs[0]).collect::<Vec<_>>());
    }
}

#[test]
fn a_pruned_model_is_scored_as_the_model_that_it_is() {
    let (checkpoint, decoder) = tiny();
    let mut genes = evop_model::Pattern::dense(checkpoint.config()).layers().to_vec();
    for gene in &mut genes[2..10] {
        (gene.kv_groups, gene.ffn) = (0, 0);
    }
    let masked = decoder.masked(&evop_model::Pattern::new(genes, checkpoint.config()).unwrap()).unwrap();
    let task = bundled().limited(60).unwrap();
    let pruned = multiple_choice(&masked, checkpoint.tokenizer(), &task, |_, _| {}).unwrap();
    let gold = |result: &TaskResult| result.items.iter().map(|i| i.logprobs[i.gold]).sum::<f64>();
    assert!(gold(&pruned) < gold(&run(&task)) - 60.0, "without eight of twelve layers the true words are far less likely");
}

#[test]
fn progress_ends_with_the_last_item_and_the_first_items_are_the_same_under_a_limit() {
    let (checkpoint, decoder) = tiny();
    let mut seen = Vec::new();
    let task = bundled().limited(40).unwrap();
    let all = multiple_choice(&decoder, checkpoint.tokenizer(), &task, |done, all| seen.push((done, all))).unwrap();
    assert!(seen.len() > 1 && seen.is_sorted() && seen.last() == Some(&(40, 40)), "{seen:?}");
    assert_eq!(run(&task.limited(3).unwrap()).items, all.items[..3]);
    assert!(bundled().limited(0).is_err());
}

#[test]
fn what_is_longer_than_the_context_is_cut_on_the_left_and_counted() {
    let words = book("held-out.txt.gz", 8_000);
    let line = |context: &str| serde_json::json!({"context": context, "target": " and so on"}).to_string();
    let result = run(&parse(&format!("{}\n{}\n", line(&words), line("It went on"))).unwrap());
    assert_eq!((result.n, result.truncated, result.max_length), (2, 1, 1024));
}

#[test]
fn items_are_written_a_line_each() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("items.jsonl");
    let targets = run(&parse(r#"{"context": "Once upon a", "target": " time"}"#).unwrap());
    write_items(&path, &[run(&bundled().limited(2).unwrap()), targets]).unwrap();
    let lines: Vec<Value> = std::fs::read_to_string(&path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names: Vec<&str> = lines.iter().map(|l| l["task"].as_str().unwrap()).collect();
    assert_eq!(names, ["continuations", "continuations", "quiz"]);
    assert_eq!((&lines[1]["index"], lines[1]["logprobs"].as_array().unwrap().len(), lines[1]["lengths"].as_array().unwrap().len()), (&Value::from(1), 4, 4));
    assert_eq!((lines[2]["acc"].is_boolean(), lines[2].get("acc_norm")), (true, None));
    let error = write_items(Path::new("/nonexistent/items.jsonl"), &[]).unwrap_err().to_string();
    assert!(error.contains("/nonexistent/items.jsonl"), "{error}");
}

#[test]
fn lines_that_are_no_questions_are_refused_with_file_line_and_what_was_expected() {
    let good = r#"{"query": "q", "choices": [" a", " b"], "gold": 1}"#;
    let cases: [(String, &[&str]); 11] = [
        (String::new(), &["expected JSON lines", "none"]),
        ("\n \n".into(), &["none"]),
        (format!("{good}\n\nnonsense"), &["line 3", "not JSON"]),
        (format!("{good}\n{{\"context\": \"c\", \"target\": \"t\"}}"), &["line 2", "as in line 1", "\"choices\"", "found {\"context\"", "files of their own"]),
        ("[1]".into(), &["line 1", "expected {\"query\"", "found an array"]),
        (r#"{"question": "q", "answer": "a"}"#.into(), &["line 1", "expected {\"query\"", "question", "answer"]),
        (r#"{"query": "q", "choices": [" a", " b"]}"#.into(), &["line 1", "missing field `gold`", "expected {\"query\""]),
        (r#"{"query": "q", "choices": [" a", " b"], "gold": 2}"#.into(), &["line 1", "`gold`", "from 0 to 1", "found 2"]),
        (r#"{"query": "q", "choices": [" a", " b"], "gold": "A"}"#.into(), &["line 1", "string \"A\"", "usize"]),
        (r#"{"query": "q", "choices": [" a"], "gold": 0}"#.into(), &["line 1", "found 1", "at least 2"]),
        (r#"{"query": "q", "choices": [" a", " "], "gold": 0}"#.into(), &["line 1", "empty", "2 of 2"]),
    ];
    for (lines, texts) in cases {
        let error = parse(&lines).unwrap_err().to_string();
        assert!(error.starts_with("sets/quiz.jsonl.gz: "), "{error}");
        for text in texts {
            assert!(error.contains(text), "expected {text:?} in {error:?}");
        }
    }
    assert_eq!(parse(&format!("\n{good}\n\n")).unwrap().items().len(), 1, "blank lines and further fields are no harm");
}

#[test]
fn items_that_no_model_can_score_are_refused_with_their_number() {
    let (checkpoint, decoder) = tiny();
    let refused = |line: Value| {
        let task = parse(&format!("{{\"context\": \"c\", \"target\": \" t\"}}\n{line}")).unwrap();
        multiple_choice(&decoder, checkpoint.tokenizer(), &task, |_, _| {}).unwrap_err().to_string()
    };
    let error = refused(serde_json::json!({"context": "  \n", "target": "t"}));
    assert!(error.contains("quiz: item 1") && error.contains("context has no tokens"), "{error}");
    let error = refused(serde_json::json!({"context": "c", "target": " and on".repeat(2_000)}));
    assert!(error.contains("quiz: item 1") && error.contains("the model's context 1024"), "{error}");
}
