//! A server of one's own on free ports, and a client for it.

use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// Longest that anything in these tests may take.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A running server. Killed when dropped.
pub struct Server {
    process: Child,
    /// `127.0.0.1:port` of the public API.
    pub public: String,
    /// The same of the admin API.
    pub admin: String,
    log: PathBuf,
    _data: Option<tempfile::TempDir>,
}

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// Status.
    pub status: u16,
    /// Headers, names in lower case.
    pub headers: Vec<(String, String)>,
    /// Body.
    pub body: String,
}

impl Answer {
    /// The body as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("not JSON ({e}): {} {}", self.status, self.body))
    }

    /// A header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    /// The body's text, after seeing that all went well.
    pub fn ok(self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        self.json()
    }
}

impl Server {
    /// Starts with a data directory of its own and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        let data = tempfile::tempdir().unwrap();
        let mut server = Self::start_on(data.path(), arguments, &[]);
        server._data = Some(data);
        server
    }

    /// Starts on a data directory, with more variables, and waits until it is ready.
    pub fn start_on(data: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let server = Self::launch(data, arguments, variables);
        server.wait_until_ready();
        server
    }

    fn launch(data: &Path, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let log = data.join("server.log");
        let mut command = command();
        command.args(["serve", "--port", "0", "--admin-addr", "127.0.0.1:0", "--data-dir"]).arg(data).args(arguments).envs(variables.iter().copied());
        let stderr = std::fs::OpenOptions::new().create(true).append(true).open(&log).unwrap();
        let mut process = command.stdout(Stdio::piped()).stderr(stderr).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut address = || {
            let line = lines.next().unwrap_or_else(|| panic!("the server ended: {}", std::fs::read_to_string(&log).unwrap())).unwrap();
            let line: Value = serde_json::from_str(&line).unwrap();
            assert!(line["message"].as_str().unwrap().contains("listening on http://"), "{line}");
            line["address"].as_str().unwrap().to_string()
        };
        let (public, admin) = (address(), address());
        Self { process, public, admin, log, _data: None }
    }

    fn wait_until_ready(&self) {
        wait_for("the server to be ready", || self.get("/ready").status == 200);
    }

    /// GET from the public API.
    pub fn get(&self, path: &str) -> Answer {
        request(&self.public, "GET", path, &[], None)
    }

    /// POST to the public API.
    pub fn post(&self, path: &str, body: &Value) -> Answer {
        request(&self.public, "POST", path, &[("content-type", "application/json")], Some(&body.to_string()))
    }

    /// POST /v1/completions.
    pub fn complete(&self, body: &Value) -> Answer {
        self.post("/v1/completions", body)
    }

    /// POST /v1/chat/completions.
    pub fn chat(&self, body: &Value) -> Answer {
        self.post("/v1/chat/completions", body)
    }

    /// The text of a greedy completion.
    pub fn greedy(&self, prompt: &str, max_tokens: usize) -> String {
        let answer = self.complete(&json!({"prompt": prompt, "max_tokens": max_tokens, "temperature": 0})).ok();
        answer["choices"][0]["text"].as_str().unwrap().to_string()
    }

    /// A stream's chunks, after seeing that it ended with `[DONE]`.
    pub fn stream(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        assert!(answer.header("content-type").unwrap().starts_with("text/event-stream"));
        chunks(&answer.body)
    }

    /// The named events of a stream, after seeing that each name is its event's type.
    pub fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let mut body = body.clone();
        body["stream"] = json!(true);
        let answer = self.post(path, &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        let event = |text: &str| {
            let (name, data) = text.strip_prefix("event: ").and_then(|rest| rest.split_once("\ndata: ")).unwrap_or_else(|| panic!("no event: {text:?}"));
            let data: Value = serde_json::from_str(data).unwrap();
            assert_eq!(data["type"], name);
            data
        };
        answer.body.split("\n\n").filter(|text| !text.is_empty()).map(event).collect()
    }

    /// Requests that leave little to others for as long as they are kept, or until they are out of time.
    pub fn keep_busy(&self) -> Vec<TcpStream> {
        let body = json!({"prompt": "On and on", "max_tokens": 1000, "temperature": 0, "ignore_eos": true, "n": 32}).to_string();
        (0..2).map(|_| open(&self.public, "POST", "/v1/completions", &[], Some(&body))).collect()
    }

    /// Any request to the admin API.
    pub fn admin(&self, method: &str, path: &str, body: Option<&Value>) -> Answer {
        request(&self.admin, method, path, &[], body.map(Value::to_string).as_deref())
    }

    /// The value of a metric that has no labels, or of a sample with its labels as the exposition writes them.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let named = |line: &&str| line.split([' ', '{']).next() == Some(name) || line.rsplit_once(' ').is_some_and(|(sample, _)| sample == name);
        let line = text.lines().find(named).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Sends it a signal by name.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").args([&format!("-{name}"), &self.process.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the server to end", || {
            status = self.process.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// What it logged.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(&self.log).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            eprintln!("the end of the server's log:\n{}", lines[lines.len().saturating_sub(15)..].join("\n"));
        }
    }
}

/// The binary, without settings of the surroundings.
pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_evop"));
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("EVOP_")) {
        command.env_remove(name);
    }
    command.stdin(Stdio::null());
    command
}

/// One request on one connection.
pub fn request(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> Answer {
    let mut stream = open(address, method, path, headers, body);
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    parse(&bytes)
}

/// A connection with a request on its way.
pub fn open(address: &str, method: &str, path: &str, headers: &[(&str, &str)], body: Option<&str>) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: {}\r\n", body.map_or(0, str::len));
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all((head + "\r\n" + body.unwrap_or_default()).as_bytes()).unwrap();
    stream
}

/// The bytes of an answer.
pub fn parse(bytes: &[u8]) -> Answer {
    let end = bytes.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or_else(|| panic!("no answer: {:?}", String::from_utf8_lossy(bytes)));
    let head = std::str::from_utf8(&bytes[..end]).unwrap();
    let mut lines = head.split("\r\n");
    let status = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
    let headers: Vec<(String, String)> = lines.filter_map(|l| l.split_once(": ")).map(|(n, v)| (n.to_lowercase(), v.to_string())).collect();
    let chunked = headers.iter().any(|(n, v)| n == "transfer-encoding" && v == "chunked");
    let body = if chunked { unchunked(&bytes[end + 4..]) } else { bytes[end + 4..].to_vec() };
    Answer { status, headers, body: String::from_utf8(body).unwrap() }
}

fn unchunked(mut bytes: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    while let Some(line) = bytes.windows(2).position(|w| w == b"\r\n") {
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..line]).unwrap(), 16).unwrap();
        if length == 0 {
            break;
        }
        body.extend(&bytes[line + 2..line + 2 + length]);
        bytes = &bytes[line + 4 + length..];
    }
    body
}

/// The JSON of a stream's events, after seeing that `[DONE]` is the last.
pub fn chunks(body: &str) -> Vec<Value> {
    let mut data: Vec<&str> = body.split("\n\n").filter_map(|event| event.strip_prefix("data: ")).collect();
    assert_eq!(data.pop(), Some("[DONE]"), "{body}");
    data.into_iter().map(|text| serde_json::from_str(text).unwrap()).collect()
}

/// The texts of a completion's chunks, joined by choice.
pub fn joined(chunks: &[Value], choice: usize) -> String {
    let of_choice = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).filter(|c| c["index"] == choice);
    of_choice.filter_map(|c| c["text"].as_str().or(c["delta"]["content"].as_str())).collect()
}

/// Waits until something is so.
pub fn wait_for(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !so() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}
