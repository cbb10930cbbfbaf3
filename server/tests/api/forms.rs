//! Thinner forms of the served model: `model@FORM`, and drafting by one of them.

use crate::harness::{Server, command};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// A pattern file in which these attentions and MLPs are gone.
fn pattern(directory: &Path, name: &str, attention: &[usize], mlp: &[usize]) -> PathBuf {
    let gene = |l: usize| json!({"kv_groups": if attention.contains(&l) { 0 } else { 2 }, "ffn": if mlp.contains(&l) { 0 } else { 384 }});
    let file = directory.join(name);
    std::fs::write(&file, Value::from((0..12).map(gene).collect::<Vec<_>>()).to_string()).unwrap();
    file
}

fn complete(server: &Server, model: &str) -> Value {
    server.complete(&json!({"model": model, "prompt": "It was a dark night, and", "max_tokens": 40, "temperature": 0})).ok()
}

/// What `evop serve` says when it doesn't start.
fn fails(arguments: &[&str], directory: &Path) -> String {
    let output = command().args(["serve", "--port", "0", "--admin-addr", "off", "--data-dir"]).arg(directory.join("data")).args(arguments).output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn forms_are_listed_and_answer_under_their_names() {
    let files = tempfile::tempdir().unwrap();
    let thin = format!("25={}", pattern(files.path(), "a.json", &[5], &[3, 7, 8]).display());
    let thinner = format!("fast={}", pattern(files.path(), "b.json", &[2, 5, 8], &[1, 3, 6, 7, 9]).display());
    let server = Server::start(&["--served-model-name", "tiny", "--pattern", &thin, "--pattern", &thinner]);
    let models = server.get("/v1/models").ok();
    let listed: Vec<&Value> = models["data"].as_array().unwrap().iter().collect();
    assert_eq!(listed.iter().map(|m| m["id"].as_str().unwrap()).collect::<Vec<_>>(), ["tiny", "tiny@25", "tiny@fast"]);
    assert_eq!((listed[1]["parent"].as_str(), &listed[0]["parent"]), (Some("tiny"), &Value::Null));
    let parameters = |m: &Value| m["evop"]["parameters"].as_u64().unwrap();
    assert!(parameters(listed[0]) > parameters(listed[1]) && parameters(listed[1]) > parameters(listed[2]));
    assert_eq!(server.get("/v1/models/tiny@25").ok(), *listed[1]);

    let answers = ["tiny", "tiny@25", "tiny@fast"].map(|model| complete(&server, model));
    assert_eq!(answers[2]["model"], "tiny@fast");
    let texts = answers.map(|a| a["choices"][0]["text"].as_str().unwrap().to_string());
    assert!(texts[0] != texts[1] && texts[1] != texts[2]);
    assert_eq!(texts[0], Server::start(&[]).greedy("It was a dark night, and", 40));
    for unknown in ["tiny@50", "other@25", "tiny@"] {
        let refused = server.complete(&json!({"model": unknown, "prompt": "x"}));
        assert_eq!((refused.status, refused.json()["error"]["code"].as_str()), (404, Some("model_not_found")));
    }
}

#[test]
fn forms_that_keep_parts_of_sub_blocks_answer_as_their_runs_checkpoints_do() {
    let directory = tempfile::tempdir().unwrap();
    let at = directory.path();
    let run = |sparsity: &str, levels: &str, seed: &str, out: &str| {
        let small = "prune --preset elastic --space joint+heads --width-steps 4 --sequences 2 --sequence-length 64 --clusters 2 --max-chunks 32 \
                     --statistics-tokens 1024 --held-out-tokens 256 --generations 1 --offspring 4 --certify-up-to 0 --eval-window 64 --progress none";
        let options = ["--sparsity", sparsity, "--levels", levels, "--seed", seed, "--out", out];
        let output = command().current_dir(at).args(small.split_whitespace()).args(options).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        at.join(out)
    };
    let runs = [run("0.25", "levels", "31", "quarter"), run("0.5", "levels", "31", "half")];
    let form = |name: &str, run: &Path| format!("{name}={}", run.join("pattern.json").display());
    let [quarter, half] = [form("25", &runs[0]), form("50", &runs[1])];
    for dtype in ["f32", "q8_0"] {
        let server = Server::start(&["--dtype", dtype, "--pattern", &quarter, "--pattern", &half]);
        for (name, run) in [("evop-tiny@25", &runs[0]), ("evop-tiny@50", &runs[1])] {
            let alone = Server::start(&["--dtype", dtype, "--model", run.to_str().unwrap(), "--served-model-name", name]);
            assert_eq!(complete(&server, name)["choices"][0]["text"], complete(&alone, name)["choices"][0]["text"], "{name} in {dtype}");
        }
    }
    // another sample of text, another order
    let other = form("other", &run("0.5", "levels", "32", "other"));
    let error = fails(&["--pattern", &quarter, "--pattern", &other], at);
    assert!(error.contains("--pattern other: ") && error.contains("search all forms over one level database"), "{error}");
}

#[test]
fn a_form_that_drafts_leaves_the_answer_as_it_is() {
    let files = tempfile::tempdir().unwrap();
    let thin = format!("draft={}", pattern(files.path(), "a.json", &[5], &[3]).display());
    let options = ["--pattern", &thin, "--speculate", "draft", "--speculate-tokens", "3"];
    let [sometimes, always] = [Server::start(&options), Server::start(&[&options[..], &["--speculate-always"]].concat())];
    let plain = Server::start(&[]);
    for prompt in ["It was a dark night, and", "Once upon a time", "The captain"] {
        let expected = plain.greedy(prompt, 60);
        assert_eq!(sometimes.greedy(prompt, 60), expected);
        assert_eq!(always.greedy(prompt, 60), expected);
    }
    let count = |server: &Server, of: &str| server.metric(&format!("vllm:spec_decode_num_{of}_total"));
    let (drafted, right) = (count(&always, "draft_tokens"), count(&always, "accepted_tokens"));
    assert!(drafted > right && right > 0.0 && count(&always, "drafts") > 0.0, "{drafted} drafted, {right} right");
    assert!((1.0..drafted).contains(&count(&sometimes, "draft_tokens")), "they are tried");
}

#[test]
fn under_pressure_requests_without_a_form_get_a_thinner_one_and_the_answer_says_so() {
    let files = tempfile::tempdir().unwrap();
    let thin = format!("25={}", pattern(files.path(), "a.json", &[5], &[3, 7, 8]).display());
    let thinner = format!("50={}", pattern(files.path(), "b.json", &[2, 5, 8], &[1, 3, 6, 7, 9]).display());
    // no first token is there in a microsecond
    let server = Server::start(&["--pattern", &thinner, "--pattern", &thin, "--elastic", "p99_ttft=0.001ms"]);
    let mut answered: Vec<(String, String)> = Vec::new();
    for _ in 0..200 {
        let answer = complete(&server, "evop-tiny");
        let found = (answer["model"].as_str().unwrap().to_string(), answer["system_fingerprint"].as_str().unwrap().to_string());
        if answered.last() != Some(&found) {
            answered.push(found);
        }
        if answered.len() == 3 {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let models: Vec<&str> = answered.iter().map(|(model, _)| model.as_str()).collect();
    assert_eq!(models, ["evop-tiny", "evop-tiny@25", "evop-tiny@50"], "one step after the other, by what they keep");
    assert!(answered[0].1 != answered[1].1 && answered[1].1 != answered[2].1);
    // who names a form gets it, and changes nothing for others
    assert_eq!(complete(&server, "evop-tiny@25")["model"], "evop-tiny@25");
    assert_eq!(server.metric("evop_elastic_level"), 2.0);
    assert_eq!(complete(&server, "evop-tiny@25")["system_fingerprint"].as_str(), Some(answered[1].1.as_str()));
}

#[test]
fn forms_that_cannot_be_are_refused_at_the_start() {
    let files = tempfile::tempdir().unwrap();
    let good = pattern(files.path(), "a.json", &[5], &[3]).display().to_string();
    let part = pattern(files.path(), "part.json", &[5], &[3]);
    std::fs::write(&part, std::fs::read_to_string(&part).unwrap().replacen("384", "192", 1)).unwrap();
    let fails = |arguments: &[&str]| fails(arguments, files.path());
    let named = |name: &str, file: &str| format!("{name}={file}");
    assert!(fails(&["--pattern", &named("a", &good), "--pattern", &named("a", &good)]).contains("two forms have this name"));
    assert!(fails(&["--pattern", &named("a", part.to_str().unwrap())]).contains("no widths.safetensors beside"));
    assert!(fails(&["--pattern", &named("a", "nowhere.json")]).contains("nowhere.json"));
    assert!(fails(&["--speculate", "b", "--pattern", &named("a", &good)]).contains("--speculate b: there is no such form"));
    assert!(fails(&["--elastic", "p99_ttft=1s"]).contains("--elastic: there is no thinner form"));
    assert!(fails(&["--elastic", "fast", "--pattern", &named("a", &good)]).contains("p99_ttft=500ms"));
    assert!(fails(&["--pattern", "no name"]).contains("FORM=FILE"));
}
