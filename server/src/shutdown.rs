//! The end of the process: first it drains, then it stops, and a second signal makes it stop at once.

use std::time::Duration;
use tokio::sync::watch;

/// How far the end has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    Running,
    /// Nothing new is taken; what runs may finish.
    Draining,
    /// What still runs is ended.
    Stopping,
}

/// Shared by everyone who has to end; cheap to clone.
#[derive(Debug, Clone)]
pub struct Shutdown {
    phase: watch::Sender<Phase>,
}

impl Shutdown {
    /// Nothing ends yet.
    pub fn new() -> Self {
        Self { phase: watch::Sender::new(Phase::Running) }
    }

    /// Asks everyone to take nothing new.
    pub fn drain(&self) {
        self.advance(Phase::Draining);
    }

    /// Ends what runs.
    pub fn stop(&self) {
        self.advance(Phase::Stopping);
    }

    /// Nothing new is taken.
    pub fn is_draining(&self) -> bool {
        *self.phase.borrow() >= Phase::Draining
    }

    /// Waits for [`Self::drain`].
    pub async fn draining(&self) {
        self.reached(Phase::Draining).await;
    }

    /// Waits for [`Self::stop`].
    pub async fn stopping(&self) {
        self.reached(Phase::Stopping).await;
    }

    fn advance(&self, to: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = to > *phase;
            *phase = to.max(*phase);
            later
        });
    }

    async fn reached(&self, phase: Phase) {
        // can't fail: `self` holds the sender
        let _ = self.phase.subscribe().wait_for(|p| *p >= phase).await;
    }
}

/// Waits for SIGTERM or SIGINT, drains, and stops what still runs `patience` later. A second signal ends the process.
///
/// # Errors
/// The signals can't be listened to.
pub fn on_signals(shutdown: Shutdown, patience: Duration) -> std::io::Result<()> {
    let mut signals = Signals::new()?;
    tokio::spawn(async move {
        let name = signals.next().await;
        tracing::info!(signal = name, patience_seconds = patience.as_secs(), "stopping: nothing new is taken, running requests may finish");
        shutdown.drain();
        tokio::select! {
            () = tokio::time::sleep(patience) => {
                tracing::warn!("running requests did not finish in time and are ended");
                shutdown.stop();
            }
            name = signals.next() => now(name),
        }
        now(signals.next().await);
    });
    Ok(())
}

fn now(signal: &str) -> ! {
    tracing::warn!(signal, "second signal: ending at once");
    std::process::exit(130)
}

#[cfg(unix)]
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> std::io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self)
    }

    async fn next(&mut self) -> &'static str {
        let _ = tokio::signal::ctrl_c().await;
        "Ctrl-C"
    }
}
