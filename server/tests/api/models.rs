//! Which checkpoint a `--model` means.

use crate::harness::{Server, command};
use serde_json::json;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
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

const COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A hub with one model, `org/tiny`, and nothing else. Lives as long as the test process.
fn hub() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(|| {
                // a client that leaves is its own business
                let _ = answer(stream.unwrap());
            });
        }
    });
    format!("http://{address}")
}

fn answer(mut stream: TcpStream) -> std::io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let first = lines.next().unwrap_or(Ok(String::new()))?;
    while lines.next().is_some_and(|line| line.is_ok_and(|l| !l.is_empty())) {}
    let mut words = first.split_whitespace();
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let file_names = || std::fs::read_dir(tiny()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
    let found = if path.starts_with("/api/models/org/tiny/revision") {
        Some(json!({"id": "org/tiny", "sha": COMMIT, "_id": "x"}).to_string().into_bytes())
    } else if path.starts_with("/api/models/org/tiny/tree") {
        let file = |name: String| json!({"type": "file", "oid": name, "size": std::fs::metadata(tiny().join(&name)).unwrap().len(), "path": name});
        Some(file_names().map(file).collect::<serde_json::Value>().to_string().into_bytes())
    } else if path.starts_with("/org/tiny/resolve/") {
        std::fs::read(tiny().join(path.rsplit('/').next().unwrap())).ok()
    } else {
        None
    };
    let (status, body) = found.map_or(("404 Not Found", Vec::new()), |body| ("200 OK", body));
    let etag = path.rsplit('/').next().unwrap_or_default();
    write!(
        stream,
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\netag: \"{etag}\"\r\nx-repo-commit: {COMMIT}\r\n\r\n",
        body.len()
    )?;
    if method == "HEAD" { Ok(()) } else { stream.write_all(&body) }
}

#[test]
fn a_hub_id_is_fetched_once_and_then_found_in_the_cache() {
    let data = tempfile::tempdir().unwrap();
    let (home, hub) = (data.path().to_str().unwrap(), hub());
    let server = Server::start_on(data.path(), &["--model", "org/tiny"], &[("HF_HOME", home), ("HF_ENDPOINT", &hub)]);
    let text = server.greedy("Once upon a time", 20);
    assert_eq!(server.get("/v1/models").ok()["data"][0]["id"], "org/tiny");
    let snapshot = data.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
    assert!(snapshot.join("model.safetensors").exists());
    assert!(!snapshot.join("README.md").exists(), "only what is needed is fetched");
    drop(server);
    let server = Server::start_on(data.path(), &["--model", "org/tiny"], &[("HF_HOME", home), ("HF_HUB_OFFLINE", "1")]);
    assert_eq!(server.greedy("Once upon a time", 20), text);
    let error = fails("org/none", &[("HF_ENDPOINT", &hub)]);
    assert!(error.contains("the hub has no model org/none"), "{error}");
}
