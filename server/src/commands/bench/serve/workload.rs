//! What the clients of a load test ask, and how they behave: decided by the seed and a request's number alone, not by who asks when.

use anyhow::{Context, Result, bail};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use std::path::Path;
use std::time::Duration;

/// The first ids of a vocabulary are often special.
const FIRST_TOKEN: u32 = 16;
/// The number, beyond all requests', of what the requests of a series share.
const COMMON: u64 = (1 << 40) - 1;
/// Longest that a client sits on a body of which it sent half.
const LONGEST_HALF_BODY: Duration = Duration::from_secs(2);

/// Where prompts come from.
#[derive(Debug, Clone)]
pub enum Prompts {
    /// Random token ids below a bound: first those that a series' prompts share, then `tokens` of each one's own.
    Synthetic { shared: usize, tokens: usize, below: u32 },
    /// These texts, one after the other, from the first again at the end.
    Texts(Vec<String>),
}

impl Prompts {
    /// The lines of a file that are not blank.
    ///
    /// # Errors
    /// A file that can't be read or has none.
    pub fn from_file(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("--prompts {}", path.display()))?;
        let lines: Vec<String> = text.lines().filter(|line| !line.trim().is_empty()).map(String::from).collect();
        if lines.is_empty() {
            bail!("--prompts {}: expected a prompt a line, found none", path.display());
        }
        Ok(Self::Texts(lines))
    }

    /// Synthetic prompts.
    ///
    /// # Errors
    /// Lengths and bounds that leave nothing to choose from.
    pub fn synthetic(tokens: usize, below: u32) -> Result<Self> {
        if tokens == 0 || below <= FIRST_TOKEN {
            bail!("--prompt-tokens {tokens} --vocab {below}: expected at least 1 token, of ids below a number larger than {FIRST_TOKEN}");
        }
        Ok(Self::Synthetic { shared: 0, tokens, below })
    }

    /// Synthetic prompts, of which those of one series begin with the same `shared` tokens.
    ///
    /// # Errors
    /// As [`Self::synthetic`].
    pub fn sharing(shared: usize, tokens: usize, below: u32) -> Result<Self> {
        Self::synthetic(tokens, below).map(|_| Self::Synthetic { shared, tokens, below })
    }

    fn get(&self, number: u64, common: &mut ChaCha8Rng, rng: &mut ChaCha8Rng) -> Value {
        match self {
            Self::Synthetic { shared, tokens, below } => {
                let ids = FIRST_TOKEN..*below;
                let beginning = (0..*shared).map(|_| common.random_range(ids.clone()));
                beginning.chain((0..*tokens).map(|_| rng.random_range(ids.clone()))).collect()
            }
            Self::Texts(texts) => texts[(number % texts.len() as u64) as usize].as_str().into(),
        }
    }
}

/// Shares of clients that don't behave.
#[derive(Debug, Clone, Copy, Default)]
pub struct Misbehaviour {
    /// Hang up at a random token.
    pub disconnect: f64,
    /// Read a chunk now and then.
    pub slow_readers: f64,
    /// Send half a body.
    pub half_bodies: f64,
}

impl Misbehaviour {
    /// Checks the shares.
    ///
    /// # Errors
    /// Negative ones, and more than all clients.
    pub fn new(disconnect: f64, slow_readers: f64, half_bodies: f64) -> Result<Self> {
        let shares = [disconnect, slow_readers, half_bodies];
        if shares.iter().any(|s| !(0.0..=1.0).contains(s)) || shares.iter().sum::<f64>() > 1.0 {
            bail!("--disconnect {disconnect} --slow-readers {slow_readers} --half-bodies {half_bodies}: expected shares of the clients, together at most 1");
        }
        Ok(Self { disconnect, slow_readers, half_bodies })
    }

    fn choose(self, output_tokens: usize, rng: &mut ChaCha8Rng) -> Behaviour {
        let draw = rng.random::<f64>();
        if draw < self.disconnect {
            Behaviour::HangsUp { after_chunks: rng.random_range(0..output_tokens.max(1)) }
        } else if draw < self.disconnect + self.slow_readers {
            Behaviour::ReadsSlowly
        } else if draw < self.disconnect + self.slow_readers + self.half_bodies {
            Behaviour::SendsHalf { stays: LONGEST_HALF_BODY.mul_f64(rng.random()) }
        } else {
            Behaviour::Reads
        }
    }
}

/// What one client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    /// Reads to the end.
    Reads,
    /// Hangs up when it has so many chunks.
    HangsUp { after_chunks: usize },
    /// Reads through a small buffer, with a pause after every chunk.
    ReadsSlowly,
    /// Sends half of the body and leaves after a while.
    SendsHalf { stays: Duration },
}

/// One request as it will be sent.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The body, JSON.
    pub body: String,
    /// What its client does.
    pub behaviour: Behaviour,
}

/// Makes requests.
#[derive(Debug, Clone)]
pub struct Workload {
    pub seed: u64,
    pub prompts: Prompts,
    pub output_tokens: usize,
    /// `ignore_eos` is sent, so that answers have their full length; a field that OpenAI doesn't have.
    pub ignore_eos: bool,
    /// The model's name in requests.
    pub model: Option<String>,
    pub misbehaviour: Misbehaviour,
}

impl Workload {
    /// The `number`-th request of a series.
    pub fn request(&self, series: u32, number: u64) -> Plan {
        let stream = |number: u64| {
            let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
            rng.set_stream((u64::from(series) << 40) | number);
            rng
        };
        let mut rng = stream(number);
        let behaviour = self.misbehaviour.choose(self.output_tokens, &mut rng);
        let prompt = self.prompts.get(number, &mut stream(COMMON), &mut rng);
        Plan { body: self.body(prompt), behaviour }
    }

    fn body(&self, prompt: Value) -> String {
        let mut body = Map::new();
        if let Some(model) = &self.model {
            body.insert("model".into(), model.as_str().into());
        }
        body.insert("prompt".into(), prompt);
        body.insert("max_tokens".into(), self.output_tokens.into());
        body.insert("temperature".into(), 0.into());
        body.insert("stream".into(), true.into());
        body.insert("stream_options".into(), json!({"include_usage": true}));
        if self.ignore_eos {
            body.insert("ignore_eos".into(), true.into());
        }
        Value::Object(body).to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn workload(misbehaviour: Misbehaviour) -> Workload {
        Workload { seed: 7, prompts: Prompts::synthetic(5, 100).unwrap(), output_tokens: 9, ignore_eos: true, model: None, misbehaviour }
    }

    #[test]
    fn a_request_depends_on_its_number_and_the_seed_alone() {
        let workload = workload(Misbehaviour::default());
        let (a, b) = (workload.request(0, 3), workload.request(0, 3));
        assert_eq!((&a.body, a.behaviour), (&b.body, b.behaviour));
        assert_ne!(a.body, workload.request(0, 4).body);
        assert_ne!(a.body, workload.request(1, 3).body, "levels don't find each other's prompts in the prefix cache");
        assert_ne!(a.body, Workload { seed: 8, ..workload }.request(0, 3).body);
        let body: Value = serde_json::from_str(&a.body).unwrap();
        assert_eq!((body["prompt"].as_array().unwrap().len(), &body["max_tokens"]), (5, &json!(9)));
    }

    #[test]
    fn prompts_of_a_series_may_begin_alike() {
        let workload = Workload { prompts: Prompts::sharing(3, 2, 1_000_000).unwrap(), ..workload(Misbehaviour::default()) };
        let prompt = |series, number| serde_json::from_str::<Value>(&workload.request(series, number).body).unwrap()["prompt"].as_array().unwrap().clone();
        let (a, b, other) = (prompt(0, 0), prompt(0, 1), prompt(1, 0));
        assert_eq!((a.len(), &a[..3]), (5, &b[..3]));
        assert_ne!(a[3..], b[3..]);
        assert_ne!(a[..3], other[..3]);
    }

    #[test]
    fn shares_of_the_clients_misbehave() {
        let workload = workload(Misbehaviour::new(0.3, 0.1, 0.2).unwrap());
        let behaviours: Vec<Behaviour> = (0..2_000).map(|n| workload.request(0, n).behaviour).collect();
        let share = |of: fn(&Behaviour) -> bool| behaviours.iter().filter(|b| of(b)).count() as f64 / 2_000.0;
        assert!((share(|b| matches!(b, Behaviour::HangsUp { after_chunks } if *after_chunks < 9)) - 0.3).abs() < 0.05);
        assert!((share(|b| *b == Behaviour::ReadsSlowly) - 0.1).abs() < 0.05);
        assert!((share(|b| matches!(b, Behaviour::SendsHalf { .. })) - 0.2).abs() < 0.05);
        assert!(Misbehaviour::new(0.6, 0.6, 0.0).is_err() && Misbehaviour::new(-0.1, 0.0, 0.0).is_err());
    }

    #[test]
    fn lines_of_a_file_are_prompts_in_turn() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "one\n\ntwo\n").unwrap();
        let workload = Workload { prompts: Prompts::from_file(file.path()).unwrap(), ..workload(Misbehaviour::default()) };
        let prompt = |n| serde_json::from_str::<Value>(&workload.request(0, n).body).unwrap()["prompt"].clone();
        assert_eq!([prompt(0), prompt(1), prompt(2)], ["one", "two", "one"]);
    }
}
