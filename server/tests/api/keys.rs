//! Keys of the public and of the admin API.

use crate::harness::{Server, command, request};
use std::io::Read;
use std::process::Stdio;

#[test]
fn a_known_key_is_needed_where_keys_are_set() {
    let data = tempfile::tempdir().unwrap();
    let file = data.path().join("keys");
    std::fs::write(&file, "# two of them\nfrom-file\n").unwrap();
    let server = Server::start_on(data.path(), &["--api-keys-file", file.to_str().unwrap()], &[("EVOP_API_KEYS", "from-env,other")]);
    let get = |path: &str, key: Option<&str>| {
        let authorization = key.map(|k| format!("Bearer {k}"));
        let headers: Vec<(&str, &str)> = authorization.iter().map(|a| ("authorization", a.as_str())).collect();
        request(&server.public, "GET", path, &headers, None)
    };
    for key in ["from-file", "from-env", "other"] {
        assert_eq!(get("/v1/models", Some(key)).status, 200);
    }
    for key in [None, Some("wrong"), Some(""), Some("from-env,other"), Some("# two of them")] {
        let answer = get("/v1/models", key);
        assert_eq!(answer.status, 401);
        assert_eq!(answer.json()["error"]["code"], "invalid_api_key");
        assert_eq!(answer.header("www-authenticate"), Some("Bearer"));
    }
    for path in ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"] {
        assert_eq!(request(&server.public, "POST", path, &[], Some("{}")).status, 401);
    }
    for open in ["/health", "/live", "/ready", "/version", "/metrics"] {
        assert_eq!(get(open, None).status, 200, "{open}");
    }
    let log = server.log();
    assert!(!log.contains("from-file") && !log.contains("from-env"), "a key was logged");
}

#[test]
fn the_admin_key_is_another_key() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[("EVOP_ADMIN_KEY", "admin-secret"), ("EVOP_API_KEYS", "public-secret")]);
    let ask = |address: &str, path: &str, key: &str| request(address, "GET", path, &[("authorization", &format!("Bearer {key}"))], None).status;
    assert_eq!(ask(&server.admin, "/admin/v1/jobs", "admin-secret"), 200);
    assert_eq!(ask(&server.admin, "/admin/v1/jobs", "public-secret"), 401);
    assert_eq!(ask(&server.public, "/v1/models", "admin-secret"), 401);
}

#[test]
fn an_admin_api_without_a_key_does_not_answer_web_pages() {
    let server = Server::start(&[]);
    let from = |headers: &[(&str, &str)]| request(&server.admin, "POST", "/admin/v1/prune", headers, Some("{\"options\": {\"mystery\": 1}}")).status;
    assert_eq!(from(&[("origin", "http://evil.example")]), 403);
    assert_eq!(from(&[]), 400);
}

#[test]
fn an_open_admin_api_is_not_put_on_the_network() {
    let data = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let mut process = command();
        process.args(["serve", "--port", "0", "--data-dir"]).arg(data.path()).args(arguments).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = process.spawn().unwrap();
        let mut log = String::new();
        process.stderr.take().unwrap().read_to_string(&mut log).unwrap();
        (process.wait().unwrap().success(), log)
    };
    let (ok, log) = run(&["--admin-addr", "0.0.0.0:0"]);
    assert!(!ok && log.contains("EVOP_ADMIN_KEY"), "{log}");
    let (ok, log) = run(&["--admin-addr", "127.0.0.1:0", "--api-keys-file", "/no/such/file"]);
    assert!(!ok && log.contains("/no/such/file"), "{log}");
    let (ok, log) = run(&["--admin-addr", "127.0.0.1:0", "--model", "/no/such/model"]);
    assert!(!ok && log.contains("no such directory: /no/such/model"), "{log}");
    let (ok, log) = run(&["--admin-addr", "127.0.0.1:0", "--max-model-len", "5000"]);
    assert!(!ok && log.contains("--max-model-len 5000"), "{log}");
}
