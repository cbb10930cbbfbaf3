//! What Prometheus reads: `evop_*`, and the same values under vLLM's names for the tools that read those.
//!
//! Names, kinds, labels and buckets of `vllm:*` are vLLM V1's, so that its dashboards, KEDA triggers and endpoint pickers work unchanged.

use crate::served::Served;
use crate::serving_slot::ServingSlot;
use evop_model::BLOCK_TOKENS;
use evop_serving::{EngineStats, FinishReason};
use prometheus::core::Collector;
use prometheus::{Encoder, Error, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Seconds to a first token.
const FIRST_TOKEN: [f64; 22] =
    [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0];
/// Seconds between tokens.
const INTER_TOKEN: [f64; 19] = [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
/// Seconds of a whole request, or of a part of it.
const REQUEST: [f64; 21] = [0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0];
/// Tokens of a step.
const STEP_TOKENS: [f64; 13] = [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
/// Choices of a request.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// vLLM's labels.
const MODEL: [&str; 2] = ["model_name", "engine"];

/// All metrics of the process.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// The value of `model_name`.
    model_name: String,

    running: GaugeVec,
    waiting: GaugeVec,
    kv_cache_usage: GaugeVec,
    cache_config: IntGaugeVec,
    kv_blocks_used: IntGaugeVec,
    kv_blocks: IntGaugeVec,
    kv_bytes_used: IntGaugeVec,
    kv_bytes_budget: IntGaugeVec,
    ready: IntGaugeVec,
    served_info: IntGaugeVec,

    prompt_tokens: IntCounterVec,
    generation_tokens: IntCounterVec,
    requests: IntCounterVec,
    rejections: IntCounterVec,
    http_requests: IntCounterVec,
    elastic_level: IntGaugeVec,
    auto_requests: IntCounterVec,
    swaps: IntCounterVec,
    preemptions: IntCounterVec,
    prefix_queries: IntCounterVec,
    prefix_hits: IntCounterVec,
    drafts: IntCounterVec,
    draft_tokens: IntCounterVec,
    accepted_tokens: IntCounterVec,
    /// What the engines that there are have counted, as of the last rendering: the counters above go on when one ends.
    counted: Mutex<HashMap<usize, EngineStats>>,

    iteration_tokens: HistogramVec,
    first_token: HistogramVec,
    inter_token: HistogramVec,
    time_per_output_token: HistogramVec,
    end_to_end: HistogramVec,
    queued: HistogramVec,
    inference: HistogramVec,
    prefill: HistogramVec,
    decode: HistogramVec,
    request_prompt_tokens: HistogramVec,
    request_generation_tokens: HistogramVec,
    request_max_tokens: HistogramVec,
    request_choices: HistogramVec,
}

/// Registers what it makes.
struct Register(Registry);

impl Register {
    fn add<C: Collector + Clone + 'static>(&self, collector: C) -> Result<C, Error> {
        self.0.register(Box::new(collector.clone()))?;
        Ok(collector)
    }

    /// Memory, processor time and open files under the names that every Prometheus client has.
    #[cfg(target_os = "linux")]
    fn add_process(&self) -> Result<(), Error> {
        self.0.register(Box::new(prometheus::process_collector::ProcessCollector::for_self()))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<GaugeVec, Error> {
        self.add(GaugeVec::new(Opts::new(name, help), &MODEL)?)
    }

    fn int_gauge(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.add(IntGaugeVec::new(Opts::new(name, help), labels)?)
    }

    fn counter(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.add(IntCounterVec::new(Opts::new(name, help), labels)?)
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<HistogramVec, Error> {
        self.add(HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), &MODEL)?)
    }
}

impl Metrics {
    /// Registers everything under the served model's name.
    ///
    /// # Errors
    /// A name that is taken or not valid: a mistake in this file.
    pub fn new(model_name: String) -> Result<Self, Error> {
        let r = Register(Registry::new());
        let tokens = token_buckets(1 << 20);
        let metrics = Self {
            running: r.gauge("vllm:num_requests_running", "Sequences in the current batch.")?,
            waiting: r.gauge("vllm:num_requests_waiting", "Requests that wait to be computed.")?,
            kv_cache_usage: r.gauge("vllm:kv_cache_usage_perc", "Share of the key/value memory that sequences hold, 0 to 1.")?,
            cache_config: r.int_gauge(
                "vllm:cache_config_info",
                "Capacity of the key/value memory.",
                &["model_name", "engine", "block_size", "num_gpu_blocks"],
            )?,
            kv_blocks_used: r.int_gauge("evop_kv_blocks_used", "Blocks of key/value memory that sequences hold, by all engines.", &[])?,
            kv_blocks: r.int_gauge("evop_kv_blocks", "Blocks of key/value memory.", &[])?,
            kv_bytes_used: r.int_gauge("evop_kv_bytes_used", "Bytes of key/value memory that sequences hold, by all engines.", &[])?,
            kv_bytes_budget: r.int_gauge("evop_kv_bytes_budget", "Bytes of key/value memory.", &[])?,
            ready: r.int_gauge("evop_ready", "1 if a model is loaded, its engine runs and the server takes requests.", &[])?,
            served_info: r.int_gauge("evop_served_info", "The model that is served: its id and where it came from.", &["id", "root", "parent"])?,
            prompt_tokens: r.counter("vllm:prompt_tokens_total", "Prompt tokens of the requests that were taken.", &MODEL)?,
            generation_tokens: r.counter("vllm:generation_tokens_total", "Tokens generated.", &MODEL)?,
            requests: r.counter("vllm:request_success_total", "Finished choices by reason.", &["model_name", "engine", "finished_reason"])?,
            rejections: r.counter("vllm:admission_rejections_total", "Requests that were not taken.", &["model_name", "engine", "reason"])?,
            http_requests: r.counter("evop_http_requests_total", "HTTP requests by path and status.", &["path", "status"])?,
            swaps: r.counter("evop_model_swaps_total", "Models put into service.", &[])?,
            elastic_level: r.int_gauge("evop_elastic_level", "How many forms thinner than the whole model new requests get (--elastic).", &MODEL)?,
            auto_requests: r.counter("evop_auto_requests_total", "Requests whose prompt chose their form (--auto), by form.", &["form"])?,
            preemptions: r.counter("vllm:num_preemptions_total", "Sequences that gave their memory back and were computed again.", &MODEL)?,
            prefix_queries: r.counter("vllm:prefix_cache_queries_total", "Prompt tokens looked for in the prefix cache.", &MODEL)?,
            prefix_hits: r.counter("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", &MODEL)?,
            drafts: r.counter("vllm:spec_decode_num_drafts_total", "Times that tokens were drafted for a choice.", &MODEL)?,
            draft_tokens: r.counter("vllm:spec_decode_num_draft_tokens_total", "Tokens drafted.", &MODEL)?,
            accepted_tokens: r.counter("vllm:spec_decode_num_accepted_tokens_total", "Drafted tokens that were right.", &MODEL)?,
            counted: Mutex::default(),
            iteration_tokens: r.histogram("vllm:iteration_tokens_total", "Tokens of a step: of prompts, answers and drafts.", &STEP_TOKENS)?,
            first_token: r.histogram("vllm:time_to_first_token_seconds", "Seconds from a request to its first token.", &FIRST_TOKEN)?,
            inter_token: r.histogram("vllm:inter_token_latency_seconds", "Seconds between a choice's tokens.", &INTER_TOKEN)?,
            time_per_output_token: r.histogram("vllm:request_time_per_output_token_seconds", "Mean seconds a token, per choice.", &INTER_TOKEN)?,
            end_to_end: r.histogram("vllm:e2e_request_latency_seconds", "Seconds of a whole request.", &REQUEST)?,
            queued: r.histogram("vllm:request_queue_time_seconds", "Seconds that a choice waited for a place.", &REQUEST)?,
            inference: r.histogram("vllm:request_inference_time_seconds", "Seconds from a choice's place to its end.", &REQUEST)?,
            prefill: r.histogram("vllm:request_prefill_time_seconds", "Seconds from a choice's place to its first token.", &REQUEST)?,
            decode: r.histogram("vllm:request_decode_time_seconds", "Seconds from a choice's first token to its end.", &REQUEST)?,
            request_prompt_tokens: r.histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", &tokens)?,
            request_generation_tokens: r.histogram("vllm:request_generation_tokens", "Tokens of an answer.", &tokens)?,
            request_max_tokens: r.histogram("vllm:request_params_max_tokens", "Tokens that a request asked for at most.", &tokens)?,
            request_choices: r.histogram("vllm:request_params_n", "Choices that a request asked for.", &CHOICES)?,
            registry: r.0.clone(),
            model_name,
        };
        r.int_gauge("evop_build_info", "1; the version is a label.", &["version"])?.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        metrics.begin_at_zero();
        #[cfg(target_os = "linux")]
        r.add_process()?;
        Ok(metrics)
    }

    fn labels(&self) -> [&str; 2] {
        [&self.model_name, "0"]
    }

    /// Rates need a first sample of zero.
    fn begin_at_zero(&self) {
        for reason in ["stop", "length", "abort", "error"] {
            self.requests.with_label_values(&[&self.model_name, "0", reason]).reset();
        }
        for reason in ["queue_full", "rate_limit"] {
            self.rejections.with_label_values(&[&self.model_name, "0", reason]).reset();
        }
        let Self { prompt_tokens, generation_tokens, preemptions, prefix_queries, prefix_hits, drafts, draft_tokens, accepted_tokens, .. } = self;
        for counter in [prompt_tokens, generation_tokens, preemptions, prefix_queries, prefix_hits, drafts, draft_tokens, accepted_tokens] {
            counter.with_label_values(&self.labels()).reset();
        }
        self.swaps.with_label_values::<&str>(&[]).reset();
    }

    /// The exposition, with the engine's gauges brought up to date.
    ///
    /// # Errors
    /// Encoding failed.
    pub fn render(&self, slot: &ServingSlot, ready: bool) -> Result<String, Error> {
        let current = slot.current();
        let draining = slot.draining();
        let of_all = |value: fn(&EngineStats) -> usize| current.iter().chain(&draining).map(|served| value(&served.engine.stats())).sum::<usize>();
        let used = of_all(|stats| stats.kv_blocks_used * stats.kv_block_bytes);
        let (blocks, block_bytes) = current.as_ref().map_or((0, 0), |served| (served.engine.stats().kv_blocks, served.engine.stats().kv_block_bytes));
        let budget = blocks * block_bytes;
        self.count_engines(current.iter().chain(&draining));
        self.kv_blocks_used.with_label_values::<&str>(&[]).set(of_all(|stats| stats.kv_blocks_used) as i64);
        self.kv_blocks.with_label_values::<&str>(&[]).set(blocks as i64);
        self.running.with_label_values(&self.labels()).set(of_all(|stats| stats.running) as f64);
        self.waiting.with_label_values(&self.labels()).set(of_all(|stats| stats.waiting) as f64);
        self.kv_cache_usage.with_label_values(&self.labels()).set(if budget == 0 { 0.0 } else { (used as f64 / budget as f64).min(1.0) });
        self.kv_bytes_used.with_label_values::<&str>(&[]).set(used as i64);
        self.kv_bytes_budget.with_label_values::<&str>(&[]).set(budget as i64);
        self.ready.with_label_values::<&str>(&[]).set(i64::from(ready));
        if let Some(served) = &current {
            self.describe(served, blocks);
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }

    /// Adds what the engines counted since the last time.
    fn count_engines<'s>(&self, engines: impl Iterator<Item = &'s Arc<Served>>) {
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::take(&mut *counted);
        for served in engines {
            let (at, now) = (Arc::as_ptr(served) as usize, served.engine.stats());
            let since = |of: fn(&EngineStats) -> u64| of(&now).saturating_sub(before.get(&at).map_or(0, of));
            self.preemptions.with_label_values(&self.labels()).inc_by(since(|s| s.preemptions));
            self.prefix_queries.with_label_values(&self.labels()).inc_by(since(|s| s.prefix_queries));
            self.prefix_hits.with_label_values(&self.labels()).inc_by(since(|s| s.prefix_hits));
            self.drafts.with_label_values(&self.labels()).inc_by(since(|s| s.drafts));
            self.draft_tokens.with_label_values(&self.labels()).inc_by(since(|s| s.draft_tokens));
            self.accepted_tokens.with_label_values(&self.labels()).inc_by(since(|s| s.accepted_tokens));
            for (tokens, steps) in served.engine.take_iterations() {
                (0..steps).for_each(|_| self.iteration_tokens.with_label_values(&self.labels()).observe(tokens as f64));
            }
            counted.insert(at, now);
        }
    }

    fn describe(&self, served: &Served, blocks: usize) {
        self.cache_config.reset();
        let (size, blocks) = (BLOCK_TOKENS.to_string(), blocks.to_string());
        self.cache_config.with_label_values(&[&self.model_name, "0", size.as_str(), blocks.as_str()]).set(1);
        for form in served.chosen_by_prompt() {
            // rates need a first sample of zero
            self.auto_requests.with_label_values(&[form.name.as_str()]);
        }
        self.served_info.reset();
        self.served_info.with_label_values(&[served.id.as_str(), &served.root, served.parent.as_deref().unwrap_or("")]).set(1);
    }

    /// An answered HTTP request; `path` is the route's pattern, so there are few.
    pub fn http_request(&self, path: &str, status: u16) {
        self.http_requests.with_label_values(&[path, &status.to_string()]).inc();
    }

    /// A request that was refused: `queue_full` or `rate_limit`.
    pub fn rejected(&self, reason: &str) {
        self.rejections.with_label_values(&[self.model_name.as_str(), "0", reason]).inc();
    }

    /// How many forms thinner than the whole model new requests get.
    pub fn elastic_level(&self, level: usize) {
        self.elastic_level.with_label_values(&self.labels()).set(level as i64);
    }

    /// A prompt chose a form.
    pub fn auto_request(&self, form: &str) {
        self.auto_requests.with_label_values(&[form]).inc();
    }

    /// A model was put into service.
    pub fn swapped(&self) {
        self.swaps.with_label_values::<&str>(&[]).inc();
    }

    /// A request was taken.
    pub fn admitted(&self, prompt_tokens: usize, max_tokens: usize, choices: usize) {
        self.prompt_tokens.with_label_values(&self.labels()).inc_by(prompt_tokens as u64);
        self.request_prompt_tokens.with_label_values(&self.labels()).observe(prompt_tokens as f64);
        self.request_max_tokens.with_label_values(&self.labels()).observe(max_tokens as f64);
        self.request_choices.with_label_values(&self.labels()).observe(choices as f64);
    }

    /// A choice made a token, so long after the one before; the first of a request, so long after its arrival.
    pub fn token(&self, since: SinceToken) {
        self.generation_tokens.with_label_values(&self.labels()).inc();
        match since {
            SinceToken::RequestArrived(time) => self.first_token.with_label_values(&self.labels()).observe(time.as_secs_f64()),
            SinceToken::PreviousToken(time) => self.inter_token.with_label_values(&self.labels()).observe(time.as_secs_f64()),
            SinceToken::Unknown => {}
        }
    }

    /// A choice ended.
    pub fn finished(&self, choice: &FinishedChoice) {
        let observe = |histogram: &HistogramVec, time: Duration| histogram.with_label_values(&self.labels()).observe(time.as_secs_f64());
        self.requests.with_label_values(&[&self.model_name, "0", choice.reason]).inc();
        observe(&self.end_to_end, choice.total);
        self.request_generation_tokens.with_label_values(&self.labels()).observe(choice.tokens as f64);
        let Some(queued) = choice.queued else { return };
        observe(&self.queued, queued);
        observe(&self.inference, choice.total.saturating_sub(queued));
        if let Some(first) = choice.first_token {
            let decode = choice.total.saturating_sub(first);
            observe(&self.prefill, first.saturating_sub(queued));
            observe(&self.decode, decode);
            if choice.tokens > 1 {
                observe(&self.time_per_output_token, decode / u32::try_from(choice.tokens - 1).unwrap_or(u32::MAX));
            }
        }
    }
}

/// What a token's latency is measured from.
#[derive(Debug, Clone, Copy)]
pub enum SinceToken {
    /// The request's first token.
    RequestArrived(Duration),
    /// A further token of the same choice.
    PreviousToken(Duration),
    /// Another choice's first token.
    Unknown,
}

/// How a choice went.
#[derive(Debug, Clone, Copy)]
pub struct FinishedChoice {
    /// vLLM's word for the end.
    pub reason: &'static str,
    /// Tokens made.
    pub tokens: usize,
    /// From the request's arrival to the end.
    pub total: Duration,
    /// From the request's arrival to the choice's first token.
    pub first_token: Option<Duration>,
    /// How long it waited for a place, if it was told.
    pub queued: Option<Duration>,
}

/// vLLM's `finished_reason`.
pub fn finished_reason(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::StopToken(_) => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "abort",
        FinishReason::Error(_) => "error",
    }
}

/// 1, 2, 5, 10, 20, 50, ...
fn token_buckets(most: u32) -> Vec<f64> {
    let decades = std::iter::successors(Some(1u32), |decade| decade.checked_mul(10));
    decades.flat_map(|decade| [1, 2, 5].map(|m| decade.saturating_mul(m))).take_while(|b| *b <= most).map(f64::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_with_a_colon_are_registered_and_shown() {
        let metrics = Metrics::new("tiny".into()).unwrap();
        metrics.token(SinceToken::RequestArrived(Duration::from_millis(3)));
        let text = metrics.render(&ServingSlot::default(), false).unwrap();
        assert!(text.contains("vllm:num_requests_running{engine=\"0\",model_name=\"tiny\"} 0"), "{text}");
        assert!(text.contains("vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"tiny\",le=\"0.005\"} 1"), "{text}");
        assert!(text.contains("vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"tiny\"} 0"), "{text}");
        assert!(text.contains("evop_build_info"), "{text}");
    }

    #[test]
    fn token_buckets_are_one_two_five() {
        assert_eq!(token_buckets(100), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0]);
    }
}
