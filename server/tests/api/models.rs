//! Which checkpoint a `--model` means.

use crate::harness::{Server, command};
use std::path::{Path, PathBuf};
use std::process::Output;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny")
}

fn fails(model: &str, variables: &[(&str, &str)]) -> String {
    let data = tempfile::tempdir().unwrap();
    let mut command = command();
    command.args(["serve", "--port", "0", "--admin-addr", "off", "--model", model, "--data-dir"]).arg(data.path());
    let Output { status, stderr, .. } = command.env("HF_HOME", data.path()).envs(variables.iter().copied()).output().unwrap();
    assert_eq!(status.code(), Some(1));
    String::from_utf8(stderr).unwrap()
}

#[test]
fn without_a_network_the_error_says_so_and_what_to_do() {
    let error = fails("org/name", &[("HF_ENDPOINT", "http://127.0.0.1:1")]);
    assert!(error.contains("the Hugging Face hub can't be reached") && error.contains("give the path"), "{error}");
    let error = fails("org/name", &[("HF_HUB_OFFLINE", "1")]);
    assert!(error.contains("not in the local cache") && error.contains("HF_HUB_OFFLINE"), "{error}");
}

#[test]
fn what_is_no_checkpoint_is_refused_with_its_name() {
    assert!(fails("./nowhere", &[]).contains("no such directory: ./nowhere"));
    let empty = tempfile::tempdir().unwrap();
    let error = fails(empty.path().to_str().unwrap(), &[]);
    assert!(error.contains("config.json"), "{error}");
}

#[test]
fn a_hub_id_is_served_from_the_cache_when_there_is_no_network() {
    let data = tempfile::tempdir().unwrap();
    let repository = data.path().join("hub/models--org--tiny");
    let snapshot = repository.join("snapshots/0123456789abcdef0123456789abcdef01234567");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(repository.join("refs")).unwrap();
    std::fs::write(repository.join("refs/main"), "0123456789abcdef0123456789abcdef01234567").unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        std::fs::copy(tiny().join(file), snapshot.join(file)).unwrap();
    }
    let home = data.path().to_str().unwrap();
    for offline in [("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://127.0.0.1:1")] {
        let server = Server::start_on(data.path(), &["--model", "org/tiny"], &[("HF_HOME", home), offline]);
        assert_eq!(server.get("/v1/models/org/tiny").ok()["id"], "org/tiny");
    }
}

#[test]
fn the_bundled_model_and_its_directory_say_the_same() {
    let (bundled, directory) = (Server::start(&[]), Server::start(&["--model", tiny().to_str().unwrap()]));
    assert_eq!(bundled.greedy("Once upon a time", 30), directory.greedy("Once upon a time", 30));
}
