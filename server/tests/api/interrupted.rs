//! `evop prune` from outside: killed and resumed, and given what it can't use.

use crate::harness::command;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// EvoP as published, on a little text.
const PAPER: &str = "--preset paper --space block --sequences 2 --sequence-length 48 --population 16 --generations 12 --certify-up-to 0";
/// Drops and repaired widths: the level database is built, then searched.
const JOINT: &str = "--sequences 4 --sequence-length 48 --statistics-tokens 4096 --held-out-tokens 480 --generations 5 --offspring 8 --threads 1";

fn words(options: &'static str) -> Vec<&'static str> {
    options.split_whitespace().collect()
}

/// A little text to evaluate on: these tests are about the run, not its figures.
const EVAL_TEXT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");

fn prune(arguments: &[&str]) -> Command {
    let mut command = command();
    command.args(["prune", "--progress", "none", "--eval-window", "64"]).args(arguments);
    if arguments.first() != Some(&"--resume") {
        command.args(["--eval-text", EVAL_TEXT]);
    }
    command
}

fn finished(mut command: Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

fn read(directory: &Path, file: &str) -> Vec<u8> {
    std::fs::read(directory.join(file)).unwrap()
}

#[test]
fn kill_minus_nine_at_ten_moments_and_a_resume_give_the_same_pattern() {
    killed_and_resumed(&words(PAPER), 5);
    killed_and_resumed(&words(JOINT), 5);
}

/// Runs once to the end; then kills as many runs at as many moments, resumes them and compares.
fn killed_and_resumed(options: &[&str], moments: u32) {
    let straight = tempfile::tempdir().unwrap();
    let started = std::time::Instant::now();
    finished(prune(&[options, &["--out", straight.path().to_str().unwrap()]].concat()));
    let whole = started.elapsed();
    for moment in 1..=moments {
        let directory = tempfile::tempdir().unwrap();
        let out = directory.path().to_str().unwrap();
        let mut child = prune(&[options, &["--out", out]].concat()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        // odd fractions of the run's length, so that every phase is hit over time
        std::thread::sleep(whole * (2 * moment - 1) / (2 * moments) + Duration::from_millis(u64::from(std::process::id()) % 37));
        let _ = child.kill();
        let killed = !child.wait().unwrap().success();
        if directory.path().join("evop.json").exists() {
            continue; // it was faster than the kill
        }
        assert!(killed);
        if directory.path().join("run.json").exists() {
            finished(prune(&["--resume", out]));
        } else {
            finished(prune(&[options, &["--out", out]].concat()));
        }
        for file in ["pattern.json", "model.safetensors"] {
            assert_eq!(read(directory.path(), file), read(straight.path(), file), "{file} after a kill at moment {moment}");
        }
    }
}

/// Runs to a failure: exit status and error text.
fn fails(mut command: Command) -> (i32, String) {
    let output = command.output().unwrap();
    assert!(!output.status.success());
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!text.contains("panicked"), "{text}");
    (output.status.code().unwrap(), text)
}

#[test]
fn one_thread_and_two_find_the_same_pattern_and_write_the_same_weights() {
    let run = |threads: &'static str| {
        let directory = tempfile::tempdir().unwrap();
        let options: Vec<&str> = words(JOINT).into_iter().take_while(|w| *w != "--threads").collect();
        finished(prune(&[&options[..], &["--threads", threads, "--out", directory.path().to_str().unwrap()]].concat()));
        (read(directory.path(), "pattern.json"), read(directory.path(), "model.safetensors"))
    };
    assert!(run("1") == run("2"));
}

#[test]
fn what_cant_be_used_is_named_with_what_was_expected() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let out = out.to_str().unwrap();
    let empty = directory.path().join("empty.txt");
    std::fs::write(&empty, "").unwrap();
    let blank = directory.path().join("blank.txt");
    std::fs::write(&blank, "\n \n\t\n".repeat(1_000)).unwrap();
    let short = directory.path().join("short.txt");
    std::fs::write(&short, "Only this.").unwrap();
    let binary = directory.path().join("binary.txt");
    std::fs::write(&binary, [0xff, 0xfe, 0x00, 0x80]).unwrap();
    let path = |p: &Path| p.to_str().unwrap().to_string();
    for (arguments, status, texts) in [
        (vec!["--sparsity", "0"], 1, vec!["--sparsity", "expected", "found 0"]),
        (vec!["--sparsity", "1"], 1, vec!["--sparsity", "expected"]),
        (vec!["--sparsity", "1.5"], 1, vec!["--sparsity", "found 1.5"]),
        (vec!["--sparsity", "much"], 2, vec!["--sparsity", "invalid"]),
        (vec!["--strategy", "magic"], 2, vec!["expected joint, evop", "magic"]),
        (vec!["--model", "/nonexistent/model"], 1, vec!["no such directory", "/nonexistent/model"]),
        (vec!["--calibration", &path(&empty)], 1, vec!["calibration corpus", "empty"]),
        (vec!["--calibration", &path(&blank)], 1, vec!["calibration corpus", "empty"]),
        (vec!["--calibration", &path(&short)], 1, vec!["fewer than one sequence"]),
        (vec!["--params", "0.9", "--kv", "0"], 1, vec!["--kv", "expected the fraction to keep"]),
        (vec!["--calibration", &path(&binary)], 1, vec!["not UTF-8"]),
        (vec!["--device", "cuda"], 1, vec!["no CUDA support", "--features cuda"]),
    ] {
        let (code, text) = fails(prune(&[&arguments[..], &["--out", out]].concat()));
        assert_eq!(code, status, "{arguments:?}: {text}");
        for expected in texts {
            assert!(text.contains(expected), "{arguments:?}: expected {expected:?} in {text}");
        }
        let _ = std::fs::remove_dir_all(out);
    }
    let (_, text) = fails(prune(&["--out", "/proc/evop-cannot-be-here"]));
    assert!(text.contains("/proc/evop-cannot-be-here"), "{text}");
    let (_, text) = fails(prune(&["--resume", directory.path().to_str().unwrap()]));
    assert!(text.contains("expected a run directory"), "{text}");
}

#[test]
fn a_full_disk_ends_the_run_with_a_clear_error_and_room_lets_it_go_on() {
    let mount = tempfile::tempdir().unwrap();
    let mounted = |arguments: &[&str]| Command::new("mount").args(arguments).arg(mount.path()).stderr(Stdio::null()).status().is_ok_and(|s| s.success());
    if !mounted(&["-t", "tmpfs", "-o", "size=600k", "tmpfs"]) {
        println!("skipped: a small file system can't be mounted here (needs root)");
        return;
    }
    let out = mount.path().join("out");
    let out = out.to_str().unwrap();
    let result = std::panic::catch_unwind(|| {
        let (code, text) = fails(prune(&[&words(PAPER)[..], &["--out", out]].concat()));
        assert_eq!(code, 1);
        assert!(text.contains("No space left"), "{text}");
        assert!(!Path::new(out).join("evop.json").exists());
        assert!(!Path::new(out).join("model.safetensors").exists(), "no partial file is taken for a whole one");
        assert!(mounted(&["-o", "remount,size=40m"]));
        finished(prune(&["--resume", out]));
        assert!(Path::new(out).join("evop.json").exists());
    });
    let _ = Command::new("umount").arg(mount.path()).status();
    result.unwrap();
}
