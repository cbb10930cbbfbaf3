//! OpenTelemetry: spans arrive at a collector.

use crate::harness::{Server, request};
use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message;
use serde_json::json;
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, Sender, channel};

/// Takes spans as a collector does: its address, and what came.
fn collector() -> (String, Receiver<ExportTraceServiceRequest>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let (sender, receiver) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let sender = sender.clone();
            std::thread::spawn(move || collect(BufReader::new(stream.unwrap()), &sender));
        }
    });
    (address, receiver)
}

fn collect(mut stream: BufReader<TcpStream>, sender: &Sender<ExportTraceServiceRequest>) {
    loop {
        let mut lines = Vec::new();
        loop {
            let mut line = String::new();
            if stream.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            if line.trim().is_empty() {
                break;
            }
            lines.push(line.trim().to_lowercase());
        }
        assert!(lines[0].starts_with("post /v1/traces "), "{lines:?}");
        assert!(lines.contains(&"content-type: application/x-protobuf".to_string()), "{lines:?}");
        let length = lines.iter().find_map(|line| line.strip_prefix("content-length: ")).unwrap().parse().unwrap();
        let mut body = vec![0; length];
        stream.read_exact(&mut body).unwrap();
        sender.send(ExportTraceServiceRequest::decode(body.as_slice()).unwrap()).unwrap();
        stream.get_mut().write_all(b"HTTP/1.1 200 OK\r\ncontent-type: application/x-protobuf\r\ncontent-length: 0\r\n\r\n").unwrap();
    }
}

fn attributes(span: &Span) -> HashMap<String, Value> {
    span.attributes.iter().filter_map(|a| Some((a.key.clone(), a.value.clone()?.value?))).collect()
}

fn text(value: &str) -> Option<Value> {
    Some(Value::StringValue(value.into()))
}

#[test]
fn a_span_of_every_request_says_what_it_was_and_where_its_time_went() {
    let (collector, exports) = collector();
    let mut server = Server::start(&["--otlp-endpoint", &format!("http://{collector}")]);
    let body = json!({"prompt": "Once upon a time", "max_tokens": 5, "temperature": 0, "ignore_eos": true, "stream": true}).to_string();
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    let headers = [("x-request-id", "traced-1"), ("traceparent", &format!("00-{trace}-{parent}-01"))];
    assert_eq!(request(&server.public, "POST", "/v1/completions", &headers, Some(&body)).status, 200);
    assert_eq!(server.complete(&json!({"prompt": 5})).status, 400);
    server.signal("TERM");
    assert!(server.wait().success());
    let mut spans = Vec::new();
    for export in exports.try_iter() {
        for resource in export.resource_spans {
            let named = resource.resource.unwrap().attributes.into_iter().any(|a| a.key == "service.name" && a.value.unwrap().value == text("evop"));
            assert!(named, "the service has its name");
            spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
        }
    }
    assert_eq!(spans.len(), 2, "probes and scrapes make no spans: {spans:?}");
    let find = |status: i64| spans.iter().find(|s| attributes(s).get("http.response.status_code") == Some(&Value::IntValue(status))).unwrap();
    let span = find(200);
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    assert_eq!((hex(&span.trace_id).as_str(), hex(&span.parent_span_id).as_str()), (trace, parent), "it continues the caller's trace");
    let found = attributes(span);
    let value = |name: &str| found.get(name).cloned();
    assert_eq!((value("request_id"), value("http.route"), value("gen_ai.response.model")), (text("traced-1"), text("/v1/completions"), text("base")));
    assert!(matches!(value("gen_ai.usage.input_tokens"), Some(Value::IntValue(4..))), "{found:?}");
    assert_eq!(value("gen_ai.usage.output_tokens"), Some(Value::IntValue(5)));
    assert_eq!(value("gen_ai.response.finish_reasons"), text("length"));
    let seconds = |name: &str| match value(&format!("gen_ai.latency.{name}")) {
        Some(Value::DoubleValue(seconds)) => seconds,
        other => panic!("{name}: {other:?} in {found:?}"),
    };
    let parts = seconds("time_in_queue") + seconds("time_in_model_prefill") + seconds("time_in_model_decode");
    assert!((parts - seconds("e2e")).abs() < 1e-3 && seconds("time_to_first_token") > 0.0, "the parts make up the whole: {found:?}");
    assert!(span.end_time_unix_nano - span.start_time_unix_nano >= (seconds("e2e") * 1e9) as u64, "it lasts until the stream's end");
    assert!(!attributes(find(400)).contains_key("gen_ai.usage.output_tokens"));
}

#[test]
fn a_collector_that_is_not_there_keeps_nobody_from_being_served() {
    let mut server = Server::start(&["--otlp-endpoint", "http://127.0.0.1:9"]);
    assert!(!server.greedy("Once", 3).is_empty());
    server.signal("TERM");
    assert!(server.wait().success());
}
