//! The process that a job runs in: nice to the server, gone when the server is gone, and told what it may know.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How much the job stands back: the server's own threads come first.
#[cfg(unix)]
const NICENESS: i32 = 10;
/// How often to look whether the process has ended, once it has closed its output.
const POLL: Duration = Duration::from_millis(20);

/// A running job's process. Signals go through here, so that none goes to a process id that is someone else's by now.
#[derive(Debug)]
pub struct JobProcess {
    child: Mutex<Option<Child>>,
}

impl JobProcess {
    /// Starts `arguments` of this very program. Its stdout comes back as lines, its stderr is appended to `log`.
    ///
    /// The environment's `EVOP_*` are the server's settings and keys, and are not passed on.
    ///
    /// # Errors
    /// The process can't be started, or the log can't be written.
    pub fn spawn(arguments: &[String], log: &Path) -> io::Result<(Self, BufReader<ChildStdout>)> {
        let log: File = OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        for (name, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("EVOP_")) {
            command.env_remove(name);
        }
        stand_back(&mut command);
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| io::Error::other("the process has no stdout"))?;
        Ok((Self { child: Mutex::new(Some(child)) }, BufReader::new(stdout)))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Child>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks it to end; it saves its state first.
    pub fn terminate(&self) {
        // one that has ended may have been waited for, and its id be another process's by now
        if let Some(child) = self.lock().as_mut()
            && matches!(child.try_wait(), Ok(None))
        {
            terminate(child);
        }
    }

    /// Ends it. What it has written so far is whole: it writes by renaming.
    pub fn kill(&self) {
        if let Some(child) = self.lock().as_mut() {
            // it may have ended by itself
            let _ = child.kill();
        }
    }

    /// Waits until it has ended.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn wait(&self) -> io::Result<ExitStatus> {
        loop {
            let mut child = self.lock();
            // only this function takes the child out, and only once
            let Some(running) = child.as_mut() else { return Err(io::Error::other("the process has been waited for")) };
            if let Some(status) = running.try_wait()? {
                *child = None;
                return Ok(status);
            }
            drop(child);
            std::thread::sleep(POLL);
        }
    }

    /// Asks it to end, and ends it if it hasn't after `patience`.
    pub fn end_within(&self, patience: Duration) {
        self.terminate();
        let deadline = Instant::now() + patience;
        while Instant::now() < deadline {
            let ended = self.lock().as_mut().is_none_or(|child| child.try_wait().is_ok_and(|status| status.is_some()));
            if ended {
                return;
            }
            std::thread::sleep(POLL);
        }
        self.kill();
    }
}

#[cfg(unix)]
fn terminate(child: &Child) {
    let Ok(pid) = libc::pid_t::try_from(child.id()) else { return };
    // SAFETY: a system call without memory; the caller has seen that the child has not been waited for, so the id is its own
    unsafe { libc::kill(pid, libc::SIGTERM) };
}

#[cfg(not(unix))]
fn terminate(child: &mut Child) {
    let _ = child.kill();
}

/// Lower priority; and on Linux the process is killed when the thread that started it ends, which lives as long as the server: after a
/// crash of the server, the next one must be able to take the job up without meeting a second copy.
#[cfg(unix)]
fn stand_back(command: &mut Command) {
    use std::os::unix::process::CommandExt;
    let parent = std::process::id();
    let prepare = move || {
        // SAFETY: system calls that are safe between fork and exec, without memory
        unsafe {
            libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS);
            #[cfg(target_os = "linux")]
            {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                // the server may have ended before that
                if libc::getppid().cast_unsigned() != parent {
                    libc::_exit(1);
                }
            }
        }
        Ok(())
    };
    let _ = parent;
    // SAFETY: `prepare` allocates nothing and takes no lock
    unsafe { command.pre_exec(prepare) };
}

#[cfg(not(unix))]
fn stand_back(_: &mut Command) {}

/// The end of a log, for an error message.
pub fn log_tail(log: &Path) -> String {
    const LINES: usize = 5;
    let Ok(file) = File::open(log) else { return String::new() };
    let lines: Vec<String> = BufReader::new(file).lines().map_while(Result::ok).filter(|l| !l.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(LINES)..].join("\n")
}
