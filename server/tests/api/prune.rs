//! Prune jobs from request to served model, through kills and restarts.

use crate::harness::{Server, request, wait_for};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// A search that takes a second or two.
fn small() -> Value {
    json!({"preset": "paper", "sequences": 2, "sequence_length": 64, "population": 6, "generations": 3, "certify_up_to": 0, "eval_window": 64})
}

/// One that doesn't end by itself in the time of a test.
fn long() -> Value {
    json!({"preset": "paper", "sequences": 2, "sequence_length": 64, "population": 40, "generations": 100_000, "certify_up_to": 0, "eval_window": 64})
}

fn submit(server: &Server, body: &Value) -> String {
    let answer = server.admin("POST", "/admin/v1/prune", Some(body));
    assert_eq!(answer.status, 202, "{}", answer.body);
    let id = answer.json()["job"]["id"].as_str().unwrap().to_string();
    assert_eq!(answer.header("location"), Some(format!("/admin/v1/jobs/{id}").as_str()));
    id
}

fn job(server: &Server, id: &str) -> Value {
    server.admin("GET", &format!("/admin/v1/jobs/{id}"), None).ok()
}

fn wait_until(server: &Server, id: &str, state: &str) -> Value {
    let mut last = Value::Null;
    wait_for(&format!("job {id} to be {state}"), || {
        last = job(server, id);
        assert!(state == "failed" || last["state"] != "failed", "{last}");
        last["state"] == state
    });
    last
}

fn wait_until_searching(server: &Server, id: &str) {
    wait_for("the search to be under way", || {
        let job = job(server, id);
        assert_ne!(job["state"], "failed", "{job}");
        job["state"] == "running" && job["progress"]["phase"] == "search" && job["progress"]["generation"].as_u64() > Some(0)
    });
}

/// Processes that run this job.
fn processes(data: &Path) -> usize {
    let run = data.display().to_string();
    let listed = String::from_utf8(Command::new("ps").args(["-eo", "stat,args"]).output().unwrap().stdout).unwrap();
    listed.lines().filter(|line| line.contains(" prune ") && line.contains(&run) && !line.starts_with('Z')).count()
}

#[test]
fn a_job_makes_a_model_that_is_served_and_stays_so_after_a_restart() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let dense = server.greedy("Once upon a time", 20);
    let id = submit(&server, &json!({"options": small(), "activate": true}));

    let events = request(&server.admin, "GET", &format!("/admin/v1/jobs/{id}/events"), &[], None).body;
    let last: Value = serde_json::from_str(events.trim().rsplit("data: ").next().unwrap()).unwrap();
    assert_eq!(last["state"], "done", "{last}");
    assert!(events.contains("event: progress") && events.contains("event: state"), "{events}");
    assert!(events.contains("\"best_loss\""), "{events}");

    let finished = job(&server, &id);
    assert_eq!((&finished["error"], &finished["activation_error"], &finished["attempts"]), (&Value::Null, &Value::Null, &json!(1)));
    let models = server.admin("GET", "/admin/v1/models", None).ok()["models"].clone();
    assert_eq!((&models[0]["active"], &models[1]["id"], &models[1]["active"]), (&json!(false), &json!(id), &json!(true)));
    assert!(models[1]["checkpoint"]["parameters"].as_u64() < models[0]["checkpoint"]["parameters"].as_u64());
    assert!(models[1]["checkpoint"]["provenance"].is_object());
    assert_eq!(models[1]["parent"], "base");

    let public = server.get("/v1/models").ok()["data"][0].clone();
    assert_eq!((&public["id"], &public["parent"], &public["evop"]["id"]), (&json!("evop-tiny"), &json!("base"), &json!(id)));
    let pruned = server.greedy("Once upon a time", 20);
    assert_ne!(pruned, dense);
    assert_eq!(server.complete(&json!({"model": id, "prompt": "Once upon a time", "max_tokens": 20, "temperature": 0})).ok()["choices"][0]["text"], pruned);

    drop(server);
    let server = Server::start_on(data.path(), &[], &[]);
    assert_eq!(server.greedy("Once upon a time", 20), pruned, "the model that was current serves after a restart");
    server.admin("POST", "/admin/v1/models/base/activate", None).ok();
    assert_eq!(server.greedy("Once upon a time", 20), dense);
    server.admin("POST", &format!("/admin/v1/models/{id}/activate"), None).ok();
    assert_eq!(server.greedy("Once upon a time", 20), pruned);

    drop(server);
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/tiny");
    let server = Server::start_on(data.path(), &["--model", other.to_str().unwrap()], &[]);
    assert_eq!(server.greedy("Once upon a time", 20), dense, "another base model is served itself");
}

#[test]
fn a_text_in_the_request_is_what_is_calibrated_on() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let text = "The quick brown fox jumps over the lazy dog. It was not amused by that at all. ".repeat(400);
    let id = submit(&server, &json!({"options": small(), "calibration": {"inline": text}}));
    wait_until(&server, &id, "done");
    assert_eq!(std::fs::read_to_string(data.path().join("jobs").join(&id).join("calibration.txt")).unwrap(), text);
    let run: Value = serde_json::from_slice(&std::fs::read(data.path().join("jobs").join(&id).join("run/run.json")).unwrap()).unwrap();
    assert!(run["calibration"][0].as_str().unwrap().ends_with("calibration.txt"), "{run}");
    assert_eq!(server.get("/v1/models").ok()["data"][0]["evop"]["id"], "base", "not activated unless asked");
}

#[test]
fn one_job_runs_the_next_waits_and_both_can_be_cancelled() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let first = submit(&server, &json!({"options": long()}));
    let second = submit(&server, &json!({"options": small()}));
    let third = submit(&server, &json!({"options": small()}));
    wait_until_searching(&server, &first);
    assert_eq!(processes(data.path()), 1);
    assert_eq!(job(&server, &second)["state"], "queued");
    let cancelled = server.admin("DELETE", &format!("/admin/v1/jobs/{third}"), None).ok();
    assert_eq!(cancelled["state"], "cancelled");
    assert_eq!(server.complete(&json!({"prompt": "a", "max_tokens": 5})).status, 200, "serving goes on beside it");
    let cancelled = server.admin("DELETE", &format!("/admin/v1/jobs/{first}"), None).ok();
    assert_eq!(cancelled["state"], "cancelled", "{cancelled}");
    assert!(data.path().join("jobs").join(&first).join("run/run.json").exists(), "its files are kept");
    wait_until(&server, &second, "done");
    assert_eq!(job(&server, &third)["state"], "cancelled");
    assert_eq!(server.admin("DELETE", &format!("/admin/v1/jobs/{second}"), None).ok()["state"], "done", "what has ended stays as it is");
}

#[test]
fn a_job_survives_the_servers_death_without_a_second_copy() {
    let data = tempfile::tempdir().unwrap();
    let mut server = Server::start_on(data.path(), &[], &[]);
    let id = submit(&server, &json!({"options": long()}));
    wait_until_searching(&server, &id);
    server.signal("KILL");
    server.wait();
    wait_for("the job's process to be gone with the server", || processes(data.path()) == 0);
    drop(server);

    let mut server = Server::start_on(data.path(), &[], &[]);
    wait_until_searching(&server, &id);
    assert_eq!(processes(data.path()), 1);
    assert_eq!(job(&server, &id)["attempts"], 2);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(processes(data.path()), 0);
    let saved: Value = serde_json::from_slice(&std::fs::read(data.path().join("jobs").join(&id).join("job.json")).unwrap()).unwrap();
    assert_eq!(saved["state"], "interrupted");
    drop(server);

    let server = Server::start_on(data.path(), &[], &[]);
    wait_until_searching(&server, &id);
    assert_eq!(job(&server, &id)["attempts"], 3);
}

#[test]
fn a_job_that_fails_says_why() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let id = submit(&server, &json!({"options": {"sparsity": 7.5}}));
    let failed = wait_until(&server, &id, "failed");
    assert!(failed["error"].as_str().unwrap().contains("sparsity"), "{failed}");
    assert_eq!(server.admin("POST", &format!("/admin/v1/models/{id}/activate"), None).status, 404);
}

#[test]
fn an_idempotency_key_makes_one_job_of_two_requests() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let post = |body: &Value| request(&server.admin, "POST", "/admin/v1/prune", &[("idempotency-key", "abc")], Some(&body.to_string()));
    let body = json!({"options": small()});
    let (first, again) = (post(&body), post(&body));
    assert_eq!((first.status, again.status), (202, 202));
    assert_eq!(first.json()["job"]["id"], again.json()["job"]["id"]);
    assert_eq!(again.header("idempotency-replayed"), Some("true"));
    assert_eq!(post(&json!({"options": small(), "activate": true})).status, 409);
    assert_eq!(server.admin("GET", "/admin/v1/jobs", None).ok()["jobs"].as_array().unwrap().len(), 1);
}

#[test]
fn of_two_servers_on_one_data_directory_one_runs_the_jobs_and_the_other_takes_over() {
    let data = tempfile::tempdir().unwrap();
    let first = Server::start_on(data.path(), &[], &[]);
    let id = submit(&first, &json!({"options": long()}));
    wait_until_searching(&first, &id);
    let second = Server::start_on(data.path(), &[], &[]);
    assert_eq!(job(&second, &id)["state"], "running");
    let refused = second.admin("POST", "/admin/v1/prune", Some(&json!({})));
    assert_eq!(refused.status, 409, "{}", refused.body);
    assert!(refused.body.contains("another server"), "{}", refused.body);
    assert_eq!(processes(data.path()), 1);
    drop(first);
    wait_until_searching(&second, &id);
    assert_eq!(processes(data.path()), 1);
    assert_eq!(job(&second, &id)["attempts"], 2);
}

#[test]
fn a_pruned_model_can_be_pruned_further() {
    let data = tempfile::tempdir().unwrap();
    let server = Server::start_on(data.path(), &[], &[]);
    let first = submit(&server, &json!({"options": small()}));
    wait_until(&server, &first, "done");
    let second = submit(&server, &json!({"options": small(), "model": first, "activate": true}));
    wait_until(&server, &second, "done");
    let models = server.admin("GET", "/admin/v1/models", None).ok()["models"].clone();
    let parameters: Vec<u64> = models.as_array().unwrap().iter().map(|m| m["checkpoint"]["parameters"].as_u64().unwrap()).collect();
    assert!(parameters[0] > parameters[1] && parameters[1] > parameters[2], "{parameters:?}");
    assert_eq!((&models[2]["parent"], &models[2]["active"]), (&json!(first), &json!(true)));
}
