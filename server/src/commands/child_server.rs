//! `evop serve` as a child of another command; it ends when this does.

use super::http;
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

/// A model may have to be downloaded, or quantised as it is loaded.
const PATIENCE: Duration = Duration::from_secs(600);

/// A running server.
#[derive(Debug)]
pub struct ChildServer {
    child: Child,
    url: String,
    /// Kept open: a server that prints into a closed pipe fails.
    _stdout: BufReader<ChildStdout>,
}

impl ChildServer {
    /// Starts this very program as `evop serve` and waits until it is ready. `set_up` adds options and variables.
    ///
    /// # Errors
    /// A server that can't be started, or that ends before it is ready; it has said why on standard error.
    pub fn start(set_up: impl FnOnce(&mut Command)) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve");
        set_up(&mut command);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("evop serve can't be started")?;
        let mut stdout = BufReader::new(child.stdout.take().context("evop serve has no standard output")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        let mut server = Self { child, url: String::new(), _stdout: stdout };
        let announced: Option<Value> = serde_json::from_str(&line).ok();
        let Some(address) = announced.as_ref().and_then(|line| line["address"].as_str()) else {
            bail!("evop serve ended before it listened ({})", server.child.wait()?);
        };
        server.url = format!("http://{address}");
        let started = Instant::now();
        while !matches!(http::request(&format!("{}/ready", server.url), None, Duration::from_secs(1)), Ok((200, _))) {
            if let Some(status) = server.child.try_wait()? {
                bail!("evop serve ended before it was ready ({status})");
            }
            if started.elapsed() > PATIENCE {
                bail!("evop serve was not ready within {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(server)
    }

    /// Where it listens, without a path.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Waits until it ends.
    ///
    /// # Errors
    /// The system doesn't say.
    pub fn wait(mut self) -> Result<()> {
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for ChildServer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
