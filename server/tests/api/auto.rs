//! `model@auto`: a real run over text of two kinds, and prompts of each.

use crate::harness::{Server, command};
use serde_json::{Value, json};
use std::fmt::Write;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const PROSE: &str = "The old man looked at the sea for a long while, and said that he would never go back to the village where he was born.";
const NUMBERS: &str = "x17 = f(12, 40) + 39848; y[2] = 0.8818. x4 = f(190, 2) + 7472; y[80] = 0.1023. x91 = f(5, 611) + 10394; y[7] =";

/// Lines of the second kind.
fn numbers() -> String {
    (0..500u32).fold(String::new(), |mut text, i| {
        let next = |factor: u32, below: u32| i.wrapping_mul(factor).wrapping_add(factor) % below;
        let _ = writeln!(
            text,
            "x{} = f({}, {}) + {}; y[{}] = 0.{}.",
            next(37, 99),
            next(613, 997),
            next(91, 787),
            next(7919, 99_991),
            next(53, 97),
            next(3571, 9973)
        );
        text
    })
}

fn books() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny/calibration.txt.gz");
    let mut text = String::new();
    flate2::read::MultiGzDecoder::new(std::fs::File::open(path).unwrap()).read_to_string(&mut text).unwrap();
    text[2_000..].chars().take(25_000).collect()
}

/// The directory of a run with a cluster of prose and one of numbers; made once, since it takes some seconds.
fn run() -> &'static Path {
    static RUN: OnceLock<PathBuf> = OnceLock::new();
    RUN.get_or_init(|| {
        let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("auto");
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        let (text, out) = (directory.join("two.txt"), directory.join("run"));
        std::fs::write(&text, format!("{}\n\n{}", books(), numbers())).unwrap();
        let options = "--preset elastic --per-cluster --sparsity 0.25 --generations 2 --sequences 4 --sequence-length 64 \
                       --clusters 2 --sentences-per-chunk 4 --statistics-tokens 0 --held-out-tokens 256 --certify-up-to 0 --eval-window 64 --key-tokens 0";
        let mut prune = command();
        prune.arg("prune").args(options.split_whitespace()).arg("--calibration").arg(&text).arg("--eval-text").arg(&text);
        let output = prune.arg("--out").arg(&out).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        out
    })
}

/// What the server reads of the run, copied so that it can be changed.
fn copied(to: &Path) -> PathBuf {
    let copy = to.join("run");
    std::fs::create_dir_all(&copy).unwrap();
    for file in ["run.json", "calibration.json", "clusters.json", "clusters.safetensors", "widths.safetensors"] {
        std::fs::copy(run().join(file), copy.join(file)).unwrap();
    }
    copy
}

fn change(file: &Path, how: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    how(&mut value);
    std::fs::write(file, value.to_string()).unwrap();
}

fn serve(arguments: &[&str]) -> Server {
    Server::start(&[&["--served-model-name", "tiny", "--auto", run().to_str().unwrap()], arguments].concat())
}

#[test]
fn prompts_of_two_kinds_get_two_forms_and_the_answers_that_these_give() {
    let server = serve(&[]);
    let complete = |model: &str, prompt: &Value| server.complete(&json!({"model": model, "prompt": prompt, "max_tokens": 24, "temperature": 0})).ok();
    let chosen: Vec<Value> = [PROSE, NUMBERS].map(|prompt| complete("tiny@auto", &prompt.into())).into();
    let names: Vec<&str> = chosen.iter().map(|answer| answer["model"].as_str().unwrap()).collect();
    assert!(matches!(names.as_slice(), ["tiny@c0", "tiny@c1"] | ["tiny@c1", "tiny@c0"]), "{names:?}");
    for (answer, prompt) in chosen.iter().zip([PROSE, NUMBERS]) {
        let named = complete(answer["model"].as_str().unwrap(), &prompt.into());
        assert_eq!((&named["choices"][0]["text"], &named["system_fingerprint"]), (&answer["choices"][0]["text"], &answer["system_fingerprint"]));
        // a prompt of token ids is the same prompt
        let ids = server.post("/tokenize", &json!({"model": "tiny@auto", "prompt": prompt})).ok()["tokens"].clone();
        assert_eq!(complete("tiny@auto", &ids)["model"], answer["model"]);
    }
    let several = complete("tiny@auto", &json!([NUMBERS, PROSE]));
    assert_eq!((several["model"].as_str(), several["choices"].as_array().unwrap().len()), (Some(names[1]), 2), "the first prompt chooses for all");

    let streamed = server.stream("/v1/completions", &json!({"model": "tiny@auto", "prompt": NUMBERS, "max_tokens": 2}));
    assert!(streamed.iter().all(|chunk| chunk["model"] == names[1]), "{streamed:?}");
    let chat = server.chat(&json!({"model": "tiny@auto", "max_tokens": 2, "messages": [{"role": "user", "content": NUMBERS}]})).ok();
    assert_eq!(chat["model"], names[1]);
    let response = server.post("/v1/responses", &json!({"model": "tiny@auto", "max_output_tokens": 2, "input": PROSE})).ok();
    assert_eq!(response["model"], names[0]);
    let message = json!({"model": "tiny@auto", "max_tokens": 2, "messages": [{"role": "user", "content": PROSE}]});
    assert_eq!(server.post("/v1/messages", &message).ok()["model"], names[0]);
    // counting a prompt's tokens chooses nothing
    server.post("/v1/messages/count_tokens", &message).ok();
    let counted = |name: &str| server.metric(&format!("evop_auto_requests_total{{form=\"{}\"}}", name.trim_start_matches("tiny@")));
    assert_eq!((counted(names[0]), counted(names[1])), (4.0, 5.0));

    let empty = server.complete(&json!({"model": "tiny@auto", "prompt": "", "max_tokens": 1})).ok();
    assert!(empty["model"].as_str().unwrap().starts_with("tiny@c"));
    let beyond = server.complete(&json!({"model": "tiny@auto", "prompt": [1, 99_999], "max_tokens": 1}));
    assert_eq!((beyond.status, beyond.json()["error"]["param"].as_str()), (400, Some("prompt")));
}

#[test]
fn the_name_is_listed_with_the_forms_that_it_chooses_among() {
    let own = run().join("pattern.json");
    let named = |name: &str| format!("{name}={}", own.display());
    let server = serve(&["--pattern", &named("25"), "--elastic", "p99_ttft=0.001ms"]);
    let models = server.get("/v1/models").ok()["data"].clone();
    let ids: Vec<&str> = models.as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["tiny", "tiny@25", "tiny@c0", "tiny@c1", "tiny@auto"]);
    let auto = &models[4];
    assert_eq!((&auto["evop"]["forms"], &auto["parent"]), (&json!(["c0", "c1"]), &json!("tiny")));
    let parameters = |m: &Value| m["evop"]["parameters"].as_u64().unwrap();
    assert_eq!(parameters(auto), parameters(&models[2]).max(parameters(&models[3])));
    assert_eq!(server.get("/v1/models/tiny@auto").ok(), *auto);
    assert!(models[1]["evop"].get("forms").is_none());

    // under pressure, forms for one kind of text are no thinner forms for all, and who names one gets it
    let answered = |model: &str| server.complete(&json!({"model": model, "prompt": PROSE, "max_tokens": 1})).ok()["model"].as_str().unwrap().to_string();
    crate::harness::wait_for("the thinnest form", || answered("tiny") == "tiny@25");
    std::thread::sleep(std::time::Duration::from_millis(1_500));
    assert_eq!(answered("tiny"), "tiny@25");
    assert!(answered("tiny@auto").starts_with("tiny@c"));
    assert_eq!(server.metric("evop_elastic_level"), 1.0);

    let without = Server::start(&["--pattern", &named("auto")]);
    let body = json!({"model": "evop-tiny@auto", "prompt": PROSE, "max_tokens": 1});
    assert_eq!(without.complete(&body).ok()["model"], "evop-tiny@auto", "without --auto a form may have this name");
}

#[test]
fn clusters_of_one_pattern_share_a_form() {
    let files = tempfile::tempdir().unwrap();
    let copy = copied(files.path());
    change(&copy.join("clusters.json"), |clusters| clusters[1]["pattern"] = clusters[0]["pattern"].clone());
    let server = Server::start(&["--auto", copy.to_str().unwrap()]);
    for prompt in [PROSE, NUMBERS] {
        assert_eq!(server.complete(&json!({"model": "evop-tiny@auto", "prompt": prompt, "max_tokens": 1})).ok()["model"], "evop-tiny@c0");
    }
    assert_eq!(server.get("/v1/models/evop-tiny@auto").ok()["evop"]["forms"], json!(["c0"]));
}

#[test]
fn directories_that_cannot_be_voted_by_are_refused_at_the_start() {
    let files = tempfile::tempdir().unwrap();
    let fails = |directory: &Path, arguments: &[&str]| {
        let mut serve = command();
        serve.args(["serve", "--port", "0", "--admin-addr", "off", "--data-dir"]).arg(files.path().join("data")).arg("--auto").arg(directory);
        let output = serve.args(arguments).output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let changed = |name: &str, file: &str, how: &dyn Fn(&mut Value)| {
        let copy = copied(&files.path().join(name));
        change(&copy.join(file), how);
        fails(&copy, &[])
    };
    let nowhere = fails(&files.path().join("nowhere"), &[]);
    assert!(nowhere.contains("--auto") && nowhere.contains("expected a run directory"), "{nowhere}");
    let copy = copied(&files.path().join("common"));
    std::fs::remove_file(copy.join("clusters.json")).unwrap();
    assert!(fails(&copy, &[]).contains("`evop prune --per-cluster` that has ended"));
    let copy = copied(&files.path().join("damaged"));
    std::fs::write(copy.join("clusters.safetensors"), "no").unwrap();
    assert!(fails(&copy, &[]).contains("clusters.safetensors: not a safetensors file"));

    let sentences = changed("sentences", "run.json", &|run| run["options"]["embedder"] = json!("minilm"));
    assert!(sentences.contains("minilm (--embedder)") && sentences.contains("--per-cluster without --embedder"), "{sentences}");
    let elsewhere = changed("elsewhere", "calibration.json", &|c| c["embedder"] = json!("hidden states after layer 3, mean of the first 128 tokens"));
    assert!(elsewhere.contains("after layer 3") && elsewhere.contains("after layer 6"), "{elsewhere}");
    let layers = changed("layers", "clusters.json", &|clusters| drop(clusters[0]["pattern"].as_array_mut().unwrap().pop()));
    assert!(layers.contains("clusters.json, c0") && layers.contains("expected 12 layers, found 11"), "{layers}");
    let copy = copied(&files.path().join("partial"));
    change(&copy.join("clusters.json"), |clusters| clusters[1]["pattern"][0]["ffn"] = json!(48));
    std::fs::remove_file(copy.join("widths.safetensors")).unwrap();
    change(&copy.join("clusters.json"), |clusters| clusters[0]["pattern"] = json!(vec![json!({"kv_groups": 2, "ffn": 384}); 12]));
    let partial = fails(&copy, &[]);
    assert!(partial.contains("clusters.json, c1") && partial.contains("layer 0 keeps a part of its MLP, and no widths.safetensors beside"), "{partial}");

    let own = run().join("pattern.json");
    for name in ["auto", "c1"] {
        let taken = fails(run(), &["--pattern", &format!("{name}={}", own.display())]);
        assert!(taken.contains(&format!("has a form of this name too: choose another for --pattern {name}")), "{taken}");
    }
}
