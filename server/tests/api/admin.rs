//! The admin API, as far as no job has to run for it.

use crate::harness::{Server, command, request};
use serde_json::{Value, json};

#[test]
fn a_prune_request_that_can_not_work_is_refused_by_field() {
    let server = Server::start(&[]);
    for (field, body) in [
        ("model", json!({"model": "nothing"})),
        ("model", json!({"model": 5})),
        ("options", json!({"options": []})),
        ("options.mystery", json!({"options": {"mystery": 1}})),
        ("options.out", json!({"options": {"out": "/tmp/x"}})),
        ("options.resume", json!({"options": {"resume": "/tmp/x"}})),
        ("options.model", json!({"options": {"model": "/etc"}})),
        ("options.generations", json!({"options": {"generations": "many"}})),
        ("options.space", json!({"options": {"space": "everything"}})),
        ("calibration", json!({"calibration": {}})),
        ("calibration", json!({"calibration": {"path": "/x", "inline": "y"}})),
        ("calibration.path", json!({"calibration": {"path": "/no/such/file"}})),
        ("calibration.inline", json!({"calibration": {"inline": "  "}})),
        ("activate", json!({"activate": "yes"})),
    ] {
        let answer = server.admin("POST", "/admin/v1/prune", Some(&body));
        assert_eq!(answer.status, 400 + 4 * u16::from(body == json!({"model": "nothing"})), "{}", answer.body);
        assert_eq!(answer.json()["error"]["param"], field, "{}", answer.body);
    }
    assert_eq!(server.admin("GET", "/admin/v1/jobs", None).ok(), json!({"jobs": []}));
}

#[test]
fn jobs_that_are_not_there_are_a_404() {
    let server = Server::start(&[]);
    for (method, path) in [("GET", "/admin/v1/jobs/x"), ("DELETE", "/admin/v1/jobs/x"), ("GET", "/admin/v1/jobs/x/events")] {
        assert_eq!(server.admin(method, path, None).status, 404);
    }
}

#[test]
fn the_base_model_is_listed_and_active() {
    let server = Server::start(&[]);
    let models = server.admin("GET", "/admin/v1/models", None).ok();
    assert_eq!(models["models"].as_array().unwrap().len(), 1);
    let base = &models["models"][0];
    assert_eq!((&base["id"], &base["active"]), (&json!("base"), &json!(true)));
    assert_eq!(base["checkpoint"]["pattern"].as_array().unwrap().len(), 12);
    let engine = server.admin("GET", "/admin/v1/engine", None).ok();
    assert_eq!(engine["engine"]["limits"]["max_model_len"], 1024);
    assert_eq!(engine["ready"], true);
}

#[test]
fn a_data_directory_that_can_not_be_written_is_an_error_of_the_job_not_of_serving() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    // a file where the directory should be: fails for root too
    std::fs::write(data.path().join("jobs"), "").unwrap();
    let answer = server.admin("POST", "/admin/v1/prune", Some(&json!({})));
    assert_eq!(answer.status, 507, "{}", answer.body);
    assert!(answer.json()["error"]["message"].as_str().unwrap().contains("job.json"), "{}", answer.body);
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 1})).status, 200);
}

#[test]
fn the_admin_port_has_the_probes_too() {
    let server = Server::start(&[]);
    assert_eq!(request(&server.admin, "GET", "/health", &[], None).status, 200);
}

#[test]
fn an_idempotency_key_goes_with_what_is_calibrated_on() {
    let server = Server::start(&[]);
    let files = tempfile::tempdir().unwrap();
    let [one, other] = ["one.txt", "other.txt"].map(|name| {
        let path = files.path().join(name);
        std::fs::write(&path, "The same text.").unwrap();
        json!({"path": path})
    });
    let [text, another] = ["A text.", "Another text."].map(|text| json!({"inline": text}));
    // (such a job fails at once)
    let post = |key: &str, calibration: &Value| {
        let body = json!({"options": {"sparsity": 7.5}, "calibration": calibration}).to_string();
        request(&server.admin, "POST", "/admin/v1/prune", &[("idempotency-key", key)], Some(&body))
    };
    for (key, first, different) in [("paths", &one, [&other, &text, &Value::Null]), ("texts", &text, [&another, &one, &Value::Null])] {
        let (made, again) = (post(key, first), post(key, first));
        assert_eq!((made.status, again.status), (202, 202), "{} {}", made.body, again.body);
        assert_eq!(made.json()["job"]["id"], again.json()["job"]["id"]);
        for calibration in different {
            let answer = post(key, calibration);
            assert_eq!(answer.status, 409, "{key}, {calibration}: {}", answer.body);
        }
    }
    assert_eq!(server.admin("GET", "/admin/v1/jobs", None).ok()["jobs"].as_array().unwrap().len(), 2);
}

#[test]
fn limits_without_measure_are_refused_before_anything_starts() {
    for (option, value) in
        [("--request-timeout", "18446744073709551615"), ("--max-queue", "18446744073709551615"), ("--max-concurrent", "18446744073709551615")]
    {
        let output = command().args(["serve", option, value]).output().unwrap();
        let message = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{message}");
        assert!(message.contains(option) && message.contains("1000000"), "{message}");
    }
}
