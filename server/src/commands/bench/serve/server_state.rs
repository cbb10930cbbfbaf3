//! What the server says about itself after a load: `/metrics`, where it has them.

use crate::commands::http;
use serde::Serialize;
use std::time::{Duration, Instant};

/// A server notices at its next step that a client has left; one that reads half a body, when the client has gone.
const SETTLING: Duration = Duration::from_secs(20);
const PATIENCE: Duration = Duration::from_secs(5);

/// Gauges; `None` where the server has none of that name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct ServerState {
    /// Blocks of key/value memory that sequences hold.
    pub kv_blocks_used: Option<u64>,
    pub running: Option<u64>,
    pub waiting: Option<u64>,
    /// Memory of the process.
    pub resident_bytes: Option<u64>,
}

impl ServerState {
    /// As it is now; `None` of a server without metrics.
    pub fn read(url: &str) -> Option<Self> {
        let (status, text) = http::request(&format!("{}/metrics", url.trim_end_matches('/')), None, PATIENCE).ok()?;
        (status == 200).then(|| Self::parse(&text))
    }

    /// As it is when nothing runs any more, or when that has been waited for.
    pub fn read_settled(url: &str) -> Option<Self> {
        let started = Instant::now();
        loop {
            let state = Self::read(url)?;
            if !state.is_busy() || started.elapsed() > SETTLING {
                return Some(state);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Something is held though nobody asks for anything.
    pub fn is_busy(&self) -> bool {
        [self.kv_blocks_used, self.running, self.waiting].into_iter().flatten().any(|n| n > 0)
    }

    fn parse(text: &str) -> Self {
        // one model, one engine: labels don't matter
        let gauge = |name: &str| {
            let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '{'])))?;
            line.rsplit(' ').next()?.parse::<f64>().ok().map(|value| value as u64)
        };
        Self {
            kv_blocks_used: gauge("evop_kv_blocks_used"),
            running: gauge("vllm:num_requests_running"),
            waiting: gauge("vllm:num_requests_waiting"),
            resident_bytes: gauge("process_resident_memory_bytes"),
        }
    }

    /// One line.
    pub fn print(&self, when: &str) {
        let number = |n: Option<u64>| n.map_or_else(|| String::from("?"), |n| n.to_string());
        println!(
            "{when}: {} key/value blocks used, {} running, {} waiting, {} resident",
            number(self.kv_blocks_used),
            number(self.running),
            number(self.waiting),
            self.resident_bytes.map_or_else(|| String::from("? MB"), |bytes| format!("{:.1} MB", bytes as f64 / 1e6))
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gauges_are_found_with_and_without_labels() {
        let text = "# HELP evop_kv_blocks_used x\n# TYPE evop_kv_blocks_used gauge\nevop_kv_blocks_used 3\nevop_kv_blocks_used_total 9\n\
            vllm:num_requests_running{engine=\"0\",model_name=\"a b\"} 2\nprocess_resident_memory_bytes 1.5e3\n";
        let state = ServerState::parse(text);
        assert_eq!(state, ServerState { kv_blocks_used: Some(3), running: Some(2), waiting: None, resident_bytes: Some(1500) });
        assert!(state.is_busy());
        assert!(!ServerState::parse("evop_kv_blocks_used 0\n").is_busy());
    }
}
