//! What `evop serve` can be told: one struct, every flag also an environment variable.

use crate::pressure::Goal;
use clap::{Args, ValueEnum};
use evop_model::device::DeviceChoice;
use evop_model::{Checkpoint, DType, Device, WeightType};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// Requests and sequences: more than any machine computes, and far from where sums of them end.
const MOST_REQUESTS: usize = 1_000_000;
/// Tokens of one pass, likewise.
const MOST_BATCH_TOKENS: usize = 100_000_000;
/// Guesses at a time: a model checks some ten of them in the time of one token.
const MOST_GUESSES: usize = 1_000;
/// Some 30 years, which every clock can add to its time.
const MOST_SECONDS: u64 = 1_000_000_000;
/// 1 EiB.
const MOST_BYTES: f64 = (1u64 << 60) as f64;

/// Options of `evop serve`.
#[derive(Debug, Clone, Args)]
pub struct ServeConfig {
    /// A checkpoint directory, a .gguf file, a hub id (org/name), or random:SHAPE for random weights (to measure speeds); without it the small bundled model is served.
    #[arg(long, env = "EVOP_MODEL", value_name = "MODEL", help_heading = "Model")]
    pub model: Option<String>,
    /// Branch, tag or commit of a hub id.
    #[arg(long, env = "EVOP_REVISION", value_name = "REVISION", help_heading = "Model")]
    pub revision: Option<String>,
    /// Names that clients ask for; give several, or one list with commas. By default the model's own name.
    #[arg(long, env = "EVOP_SERVED_MODEL_NAME", value_name = "NAME", value_delimiter = ',', num_args = 1.., help_heading = "Model")]
    pub served_model_name: Vec<String>,
    /// Where to compute: cpu, cuda, cuda:N or auto.
    #[arg(long, env = "EVOP_DEVICE", value_name = "DEVICE", default_value_t = DeviceChoice::Auto, help_heading = "Model")]
    pub device: DeviceChoice,
    /// What to compute in.
    #[arg(long, env = "EVOP_DTYPE", value_enum, default_value_t = DTypeChoice::Auto, help_heading = "Model")]
    pub dtype: DTypeChoice,
    /// What keys and values are held in. On the CPU f16 takes half the memory of f32.
    #[arg(long, env = "EVOP_KV_DTYPE", value_enum, default_value_t = KvDTypeChoice::Auto, help_heading = "Model")]
    pub kv_dtype: KvDTypeChoice,
    /// Longest context (prompt and answer together) in tokens; by default the model's own.
    #[arg(long, env = "EVOP_MAX_MODEL_LEN", value_name = "TOKENS", help_heading = "Model")]
    pub max_model_len: Option<usize>,

    /// A thinner form of the model over the same weights, asked for as MODEL@FORM: the pattern.json of a run of evop prune --preset elastic. May be given again.
    #[arg(long = "pattern", env = "EVOP_PATTERNS", value_name = "FORM=FILE", value_delimiter = ',', help_heading = "Model")]
    pub patterns: Vec<FormFile>,
    /// Serve MODEL@auto too: each prompt gets the pattern of the calibration text that it is most like. The directory of an evop prune --preset elastic --per-cluster; its patterns are forms too, MODEL@c0, MODEL@c1, ...
    #[arg(long, env = "EVOP_AUTO", value_name = "DIR", help_heading = "Model")]
    pub auto: Option<PathBuf>,
    /// Let this form guess tokens that the whole model then checks several at a time. The answers stay the same; how many are guessed, or none, follows what is fastest.
    #[arg(long, env = "EVOP_SPECULATE", value_name = "FORM", help_heading = "Model")]
    pub speculate: Option<String>,
    /// Tokens that it guesses at most.
    #[arg(long, env = "EVOP_SPECULATE_TOKENS", value_name = "N", default_value_t = 4, value_parser = within::<1, MOST_GUESSES>, help_heading = "Model")]
    pub speculate_tokens: usize,
    /// Guess that many each time, whatever is fastest: to measure how often guesses are right.
    #[arg(long, env = "EVOP_SPECULATE_ALWAYS", requires = "speculate", help_heading = "Model")]
    pub speculate_always: bool,

    /// While first tokens take longer than this, for example p99_ttft=500ms, requests that name no form get a thinner one of --pattern; the answer's model says which. [default: never]
    #[arg(long, env = "EVOP_ELASTIC", value_name = "GOAL", help_heading = "Model")]
    pub elastic: Option<Goal>,

    /// Address of the public API.
    #[arg(long, env = "EVOP_HOST", value_name = "ADDRESS", default_value = "127.0.0.1", help_heading = "Network")]
    pub host: String,
    /// Port of the public API; 0 takes a free one.
    #[arg(long, env = "EVOP_PORT", value_name = "PORT", default_value_t = 8000, help_heading = "Network")]
    pub port: u16,
    /// Address and port of the admin API, or "off".
    #[arg(long, env = "EVOP_ADMIN_ADDR", value_name = "ADDRESS:PORT", default_value = "127.0.0.1:8001", help_heading = "Network")]
    pub admin_addr: String,
    /// Largest request body.
    #[arg(long, env = "EVOP_MAX_BODY_SIZE", value_name = "SIZE", default_value = "32MiB", help_heading = "Network")]
    pub max_body_size: ByteSize,

    /// File with the keys that clients may use, one a line; without any key the API is open.
    #[arg(long, env = "EVOP_API_KEYS_FILE", value_name = "FILE", help_heading = "Keys")]
    pub api_keys_file: Option<PathBuf>,
    /// Keys as a list with commas. Other users of the machine can see a command line: prefer the variable or the file.
    #[arg(long, env = "EVOP_API_KEYS", value_name = "KEYS", hide_env_values = true, value_delimiter = ',', help_heading = "Keys")]
    pub api_keys: Vec<Secret>,
    /// File with the key of the admin API.
    #[arg(long, env = "EVOP_ADMIN_KEY_FILE", value_name = "FILE", help_heading = "Keys")]
    pub admin_key_file: Option<PathBuf>,
    /// The key of the admin API. Other users of the machine can see a command line: prefer the variable or the file.
    #[arg(long, env = "EVOP_ADMIN_KEY", value_name = "KEY", hide_env_values = true, help_heading = "Keys")]
    pub admin_key: Option<Secret>,

    /// Where prune jobs and their models are kept. [default: ~/.local/share/evop]
    #[arg(long, env = "EVOP_DATA_DIR", value_name = "DIRECTORY", help_heading = "Operation")]
    pub data_dir: Option<PathBuf>,
    /// Log filter, for example "info" or "info,evop_serving=debug". Logs are JSON when stderr is not a terminal.
    #[arg(long, env = "EVOP_LOG", value_name = "FILTER", default_value = "info", help_heading = "Operation")]
    pub log: String,
    /// An OpenTelemetry collector (OTLP over HTTP, for example http://localhost:4318) that gets a span of every request. [default: none]
    #[arg(long, env = "EVOP_OTLP_ENDPOINT", value_name = "URL", help_heading = "Operation")]
    pub otlp_endpoint: Option<String>,

    /// Requests that may wait before the server answers 429.
    #[arg(long, env = "EVOP_MAX_QUEUE", value_name = "N", default_value_t = 256, value_parser = within::<0, MOST_REQUESTS>, help_heading = "Limits")]
    pub max_queue: usize,
    /// Sequences that are computed together.
    #[arg(long, env = "EVOP_MAX_CONCURRENT", value_name = "N", default_value_t = 32, value_parser = within::<1, MOST_REQUESTS>, help_heading = "Limits")]
    pub max_concurrent: usize,
    /// Tokens of one forward pass. [default: the engine's own]
    #[arg(long, env = "EVOP_MAX_BATCH_TOKENS", value_name = "TOKENS", value_parser = within::<1, MOST_BATCH_TOKENS>, help_heading = "Limits")]
    pub max_batch_tokens: Option<usize>,
    /// How many times as long as without prompts a step may take while answers stream: prompts are read in chunks that small. 0 = chunks of --max-batch-tokens, which reads prompts fastest and makes answers wait for them.
    #[arg(long, env = "EVOP_DECODE_SLOWDOWN", value_name = "FACTOR", default_value_t = 1.8, value_parser = slowdown, help_heading = "Limits")]
    pub decode_slowdown: f64,
    /// Memory for keys and values, for example 2GiB, taken from the system as it is used; prompts that begin alike share it. [default: what the concurrent sequences need, at most a quarter of what is free]
    #[arg(long, env = "EVOP_KV_MEMORY", value_name = "SIZE", help_heading = "Limits")]
    pub kv_memory: Option<ByteSize>,
    /// On CUDA, launch the kernels of generating steps one by one instead of replaying recorded steps (CUDA graphs): slower, for comparisons.
    #[arg(long, env = "EVOP_NO_CUDA_GRAPHS", help_heading = "Limits")]
    pub no_cuda_graphs: bool,
    /// Requests a minute that one API key may send; without keys, all clients together. [default: no limit]
    #[arg(long, env = "EVOP_RATE_LIMIT", value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub rate_limit: Option<u32>,
    /// Tokens a minute, of prompts and answers, that one API key may use; without keys, all clients together. [default: no limit]
    #[arg(long, env = "EVOP_TOKEN_RATE_LIMIT", value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..), help_heading = "Limits")]
    pub token_rate_limit: Option<u32>,
    /// Seconds for a request's head to arrive, and so for a connection to be idle; more than the idle timeout of a proxy before the server.
    #[arg(long, env = "EVOP_HEAD_TIMEOUT", value_name = "SECONDS", default_value_t = 90, value_parser = clap::value_parser!(u64).range(1..=MOST_SECONDS), help_heading = "Limits")]
    pub head_timeout: u64,
    /// Seconds for a request's body to arrive.
    #[arg(long, env = "EVOP_BODY_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=MOST_SECONDS), help_heading = "Limits")]
    pub body_timeout: u64,
    /// Seconds that a client may go without taking any byte of its answer.
    #[arg(long, env = "EVOP_WRITE_TIMEOUT", value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=MOST_SECONDS), help_heading = "Limits")]
    pub write_timeout: u64,
    /// Seconds that one request may take; 0 = no limit.
    #[arg(long, env = "EVOP_REQUEST_TIMEOUT", value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS), help_heading = "Limits")]
    pub request_timeout: u64,
    /// Seconds that running requests get to finish when the server is asked to stop.
    #[arg(long, env = "EVOP_SHUTDOWN_TIMEOUT", value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(..=MOST_SECONDS), help_heading = "Limits")]
    pub shutdown_timeout: u64,
}

impl ServeConfig {
    /// Longest that a request may take.
    pub fn request_timeout(&self) -> Option<Duration> {
        (self.request_timeout > 0).then(|| Duration::from_secs(self.request_timeout))
    }

    /// How much longer a step may take with prompts than without.
    pub fn decode_slowdown(&self) -> Option<f64> {
        (self.decode_slowdown > 0.0).then_some(self.decode_slowdown)
    }

    /// The data directory that was given, or the platform's place for one.
    pub fn data_dir(&self) -> PathBuf {
        let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let by_default = || match (variable("XDG_DATA_HOME"), variable("HOME")) {
            (Some(data), _) => data.join("evop"),
            (None, Some(home)) => home.join(".local/share/evop"),
            (None, None) => PathBuf::from("evop-data"),
        };
        self.data_dir.clone().unwrap_or_else(by_default)
    }
}

/// What `--pattern` says: a form's name and the file that it is in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FormFile {
    /// What stands after the `@` of a model's name.
    pub name: String,
    /// A run's `pattern.json`.
    pub file: PathBuf,
}

impl FromStr for FormFile {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fits = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
        match text.split_once('=') {
            Some((name, file)) if fits(name) && !file.is_empty() => Ok(Self { name: name.into(), file: file.into() }),
            _ => Err(format!("expected FORM=FILE such as 25=pruned/pattern.json, the form's name of letters, digits, '-', '_' and '.', found {text:?}")),
        }
    }
}

/// What `--dtype` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DTypeChoice {
    /// bf16 on CUDA. On the CPU f32, but to serve a GGUF's own types, and q8_0 of a directory.
    Auto,
    /// The types that the file has, matrix by matrix; CPU only. Runs and measures a model; pruning needs f32, bf16 or f16.
    Stored,
    /// 32-bit floats.
    F32,
    /// 16-bit brain floats; on the CPU for the weights, with sums in f32 (fast where the processor has AMX or AVX-512-BF16).
    Bf16,
    /// 16-bit floats; on the CPU for the weights, with activations and sums in f32.
    F16,
    /// 8-bit blocks, rounded as the model is loaded unless a GGUF has them; CPU only, as stored.
    #[value(name = "q8_0")]
    Q8_0,
    /// 4-bit blocks, the head in 6 bits, rounded as the model is loaded unless a GGUF has them; rows that are no multiple of 256 weights are q5_0, the head's q8_0. CPU only, as stored.
    #[value(name = "q4_k")]
    Q4K,
}

impl DTypeChoice {
    /// The choice of this name; the device's own for another.
    pub fn named(name: &str) -> Self {
        Self::from_str(name, true).unwrap_or(Self::Auto)
    }

    /// What matrices are to be held in while they are served: on a CPU a GGUF's as they are, others in 8-bit blocks, unless it was said.
    pub fn weights_to_serve(self, device: &Device, checkpoint: &Checkpoint) -> Option<WeightType> {
        self.weights_to_run(device, checkpoint).or(device.is_cpu().then_some(WeightType::Q8_0))
    }

    /// What matrices are to be held in while it is measured how fast they run: on a CPU a GGUF's as they are, unless it was said.
    pub fn weights_to_run(self, device: &Device, checkpoint: &Checkpoint) -> Option<WeightType> {
        self.weights().or((device.is_cpu() && checkpoint.source().keeps_types()).then_some(WeightType::Stored))
    }

    /// What matrices are to be held in, if it was said.
    pub fn weights(self) -> Option<WeightType> {
        match self {
            Self::Auto => None,
            Self::Stored => Some(WeightType::Stored),
            Self::F32 => Some(DType::F32.into()),
            Self::Bf16 => Some(DType::BF16.into()),
            Self::F16 => Some(DType::F16.into()),
            Self::Q8_0 => Some(WeightType::Q8_0),
            Self::Q4K => Some(WeightType::Q4K),
        }
    }
}

/// What `--kv-dtype` may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDTypeChoice {
    /// What the model computes in: f32 on the CPU.
    Auto,
    /// 32-bit floats.
    F32,
    /// 16-bit floats.
    F16,
}

impl KvDTypeChoice {
    /// What a model that computes in `compute` holds its keys and values in.
    pub fn of(self, compute: DType) -> DType {
        match self {
            Self::Auto => compute,
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
        }
    }
}

/// A number of bytes as people write it: `2GiB`, `1.5GB`, `512m`, `1000000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub usize);

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a size such as 2GiB, 512MB or 1000000, found {text:?}");
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let number: f64 = number.parse().map_err(|_| wrong())?;
        let factor = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1u64,
            "k" | "kb" => 1_000,
            "m" | "mb" => 1_000_000,
            "g" | "gb" => 1_000_000_000,
            "t" | "tb" => 1_000_000_000_000,
            "ki" | "kib" => 1 << 10,
            "mi" | "mib" => 1 << 20,
            "gi" | "gib" => 1 << 30,
            "ti" | "tib" => 1 << 40,
            _ => return Err(wrong()),
        };
        let bytes = number * factor as f64;
        match bytes {
            1.0..=MOST_BYTES => Ok(Self(bytes as usize)),
            _ if bytes > MOST_BYTES => Err(format!("expected at most 1048576TiB, found {text:?}")),
            _ => Err(wrong()),
        }
    }
}

/// Text that must not be printed.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// The text itself.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_string())
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

fn within<const LEAST: usize, const MOST: usize>(text: &str) -> Result<usize, String> {
    text.parse::<usize>().ok().filter(|n| (LEAST..=MOST).contains(n)).ok_or_else(|| format!("expected a whole number from {LEAST} to {MOST}, found {text:?}"))
}

fn slowdown(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|f: &f64| *f == 0.0 || *f > 1.0 && f.is_finite()).ok_or_else(|| format!("expected a factor of more than 1, or 0, found {text:?}"))
}

/// `EVOP_X=""` is what a template leaves that has no value to put there: it means "not given".
///
/// Must run before any other thread exists.
pub fn forget_empty_variables() {
    let empty: Vec<_> = std::env::vars_os().filter(|(name, value)| value.is_empty() && name.to_string_lossy().starts_with("EVOP_")).collect();
    for (name, _) in empty {
        // SAFETY: called at the start of main, before any other thread exists
        unsafe { std::env::remove_var(name) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::time::Instant;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        let bytes = |text: &str| text.parse::<ByteSize>().map(|s| s.0);
        assert_eq!(bytes("2GiB"), Ok(2 << 30));
        assert_eq!(bytes("2Gi"), Ok(2 << 30));
        assert_eq!(bytes("1.5 GB"), Ok(1_500_000_000));
        assert_eq!(bytes("512m"), Ok(512_000_000));
        assert_eq!(bytes("4096"), Ok(4096));
        for wrong in ["", "GiB", "2 pounds", "-1", "0", "1.2.3", "2000000TiB"] {
            assert!(bytes(wrong).is_err(), "{wrong:?}");
        }
        assert_eq!(bytes("1048576TiB"), Ok(1 << 60));
    }

    #[derive(Parser)]
    struct Arguments {
        #[command(flatten)]
        config: ServeConfig,
    }

    #[test]
    fn limits_that_no_sum_could_hold_are_refused_with_what_was_expected() {
        let parse = |option: &str, value: &str| Arguments::try_parse_from(["serve", option, value]).map(|read| read.config).map_err(|e| e.to_string());
        let config = parse("--max-queue", "1000000").unwrap();
        assert_eq!(config.max_queue + config.max_concurrent, 1_000_032);
        assert_eq!(tokio::sync::Semaphore::new(2 * MOST_REQUESTS).available_permits(), 2 * MOST_REQUESTS);
        let longest = parse("--request-timeout", "1000000000").unwrap().request_timeout().unwrap();
        assert!(Instant::now().checked_add(longest).is_some());
        assert_eq!(parse("--request-timeout", "0").unwrap().request_timeout(), None);
        for (option, value, expected) in [
            ("--max-queue", "1000001", "from 0 to 1000000"),
            ("--max-queue", "18446744073709551615", "from 0 to 1000000"),
            ("--max-queue", "many", "from 0 to 1000000"),
            ("--max-concurrent", "0", "from 1 to 1000000"),
            ("--max-concurrent", "18446744073709551615", "from 1 to 1000000"),
            ("--max-batch-tokens", "18446744073709551615", "from 1 to 100000000"),
            ("--speculate-tokens", "18446744073709551615", "from 1 to 1000"),
            ("--request-timeout", "18446744073709551615", "0..=1000000000"),
            ("--shutdown-timeout", "1000000001", "0..=1000000000"),
            ("--head-timeout", "1000000001", "1..=1000000000"),
            ("--body-timeout", "18446744073709551615", "1..=1000000000"),
            ("--write-timeout", "0", "1..=1000000000"),
            ("--kv-memory", "1e30", "expected a size"),
            ("--kv-memory", "1048577TiB", "at most 1048576TiB"),
        ] {
            let error = parse(option, value).map(drop).unwrap_err();
            assert!(error.contains(option) && error.contains(expected), "{option} {value}: {error}");
        }
    }

    #[test]
    fn a_secret_does_not_print_itself() {
        assert_eq!(format!("{:?}", Secret::from("sk-1234")), "***");
    }
}
