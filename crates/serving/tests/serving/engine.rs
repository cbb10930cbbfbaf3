//! The engine on the bundled model, through its public interface.

use evop_model::{Checkpoint, DType, Decoder, Device, Gene, NoCache, Pattern, Span};
use evop_serving::{
    Detokenizer, Engine, EngineConfig, EngineHandle, FinishReason, OutputKind, Request, RequestStream, SamplingParams, StepOutput, SubmitError, TokenLogprobs,
    Usage,
};
use std::path::PathBuf;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

pub static CHECKPOINT: LazyLock<Checkpoint> = LazyLock::new(|| Checkpoint::open(&root().join("models/tiny")).unwrap());
pub static DECODER: LazyLock<Decoder> = LazyLock::new(|| CHECKPOINT.decoder(&Device::Cpu, DType::F32).unwrap());

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn defaults() -> EngineConfig {
    EngineConfig::for_decoder(&DECODER)
}

fn start(config: EngineConfig) -> EngineHandle {
    Engine::start(DECODER.clone(), vec![0], config).unwrap()
}

fn greedy(max_tokens: usize) -> SamplingParams {
    SamplingParams { max_tokens, temperature: 0.0, ignore_eos: true, ..SamplingParams::default() }
}

pub fn request(prompt: Vec<u32>, params: SamplingParams) -> Request {
    Request { prompt, params, request_id: "test".into(), ..Request::default() }
}

pub fn prompt(text: &str) -> Vec<u32> {
    CHECKPOINT.encode(text, true).unwrap()
}

/// Bytes of cache that a block of 32 tokens takes.
fn block_bytes() -> usize {
    32 * DECODER.config().kv_bytes_per_token(4)
}

/// Everything that came of one choice.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Choice {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprobs>,
    prompt_logprobs: Option<Vec<Option<TokenLogprobs>>>,
    ended_by_stop: bool,
    pub end: Option<(FinishReason, Usage)>,
}

pub fn collect(mut stream: RequestStream, n: usize) -> Vec<Choice> {
    let mut choices = vec![Choice::default(); n];
    while let Some(StepOutput { index, kind, .. }) = stream.blocking_next() {
        let choice = &mut choices[index];
        assert!(choice.end.is_none(), "output after the end");
        match kind {
            OutputKind::PromptRead { .. } => assert!(choice.tokens.is_empty() && choice.prompt_logprobs.is_none()),
            OutputKind::PromptLogprobs(logprobs) => {
                assert!(choice.tokens.is_empty());
                choice.prompt_logprobs = Some(logprobs);
            }
            OutputKind::Token { id, logprobs, is_stop } => {
                choice.tokens.push(id);
                choice.logprobs.extend(logprobs);
                choice.ended_by_stop = is_stop;
            }
            OutputKind::Finished { reason, usage } => {
                assert_eq!(usage.completion_tokens, choice.tokens.len());
                choice.end = Some((reason, usage));
            }
        }
    }
    assert!(choices.iter().all(|c| c.end.is_some()));
    choices
}

fn run(engine: &EngineHandle, prompt: Vec<u32>, params: SamplingParams) -> Choice {
    collect(engine.submit(request(prompt, params)).unwrap(), 1).remove(0)
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !holds() {
        assert!(Instant::now() < deadline, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn greedy_tokens_are_those_of_transformers() {
    let golden: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(root().join("tests/goldens/tiny.json")).unwrap()).unwrap();
    let ids = |value: &serde_json::Value| -> Vec<u32> { value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect() };
    let engine = start(defaults());
    let plain = &golden["plain"];
    let expected = ids(&plain["greedy_bf16"]["ids"]);
    assert_eq!(expected.len(), 200);
    assert_eq!(prompt(plain["prompt"].as_str().unwrap()), ids(&plain["prompt_ids"]));
    let found = run(&engine, ids(&plain["prompt_ids"]), greedy(200));
    assert_eq!(found.tokens, expected);
    assert_eq!(found.end, Some((FinishReason::Length, Usage { prompt_tokens: 5, cached_tokens: 0, completion_tokens: 200 })));
    let mut detokenizer = Detokenizer::new(Arc::new(CHECKPOINT.tokenizer().clone()), true);
    let mut text: String = found.tokens.iter().map(|id| detokenizer.push(*id).unwrap()).collect();
    text += &detokenizer.finish().unwrap();
    assert_eq!(text, plain["greedy_bf16"]["text"].as_str().unwrap());
    for chat in golden["chats"].as_array().unwrap() {
        let expected = ids(&chat["greedy_bf16"]["ids"]);
        assert_eq!(run(&engine, ids(&chat["prompt_ids"]), greedy(expected.len())).tokens, expected);
    }
}

#[test]
fn a_sequences_tokens_and_logprobs_do_not_depend_on_what_else_is_in_the_batch() {
    let text =
        prompt("The old man looked out over the sea, and there he saw a ship that came from the north with all its sails set. He called to his son and said");
    let lengths = [1, 2, 3, 5, 7, 11, 16, 17, 23, 31, 4, 9, 13, 28, 6, 20];
    let requests: Vec<Request> = lengths
        .iter()
        .enumerate()
        .map(|(i, length)| request(text[i % 3..i % 3 + length].to_vec(), SamplingParams { logprobs: Some(2), prompt_logprobs: Some(1), ..greedy(20 + i) }))
        .collect();
    let engine = start(defaults());
    let alone: Vec<Choice> = requests.iter().map(|r| collect(engine.submit(r.clone()).unwrap(), 1).remove(0)).collect();
    for max_batch_tokens in [16, 19, 512] {
        let engine = start(EngineConfig { max_batch_tokens, max_concurrent: 16, ..defaults() });
        let streams: Vec<RequestStream> = requests.iter().map(|r| engine.submit(r.clone()).unwrap()).collect();
        for (together, alone) in streams.into_iter().map(|s| collect(s, 1).remove(0)).zip(&alone) {
            assert_eq!(&together, alone, "with {max_batch_tokens} tokens a step");
        }
    }
}

#[test]
fn a_pruned_decoder_makes_the_tokens_of_its_plain_forward_pass() {
    let mut genes = Pattern::dense(DECODER.config()).layers().to_vec();
    (genes[3].kv_groups, genes[5].kv_groups, genes[7].ffn, genes[9]) = (0, 1, 0, Gene { kv_groups: 0, ffn: 0 });
    let pruned = DECODER.masked(&Pattern::new(genes, DECODER.config()).unwrap()).unwrap();
    let engine = Engine::start(pruned.clone(), vec![0], EngineConfig { max_batch_tokens: 32, ..EngineConfig::for_decoder(&pruned) }).unwrap();
    let mut tokens = prompt("Once upon a time");
    let mut stream = engine.submit(request(tokens.clone(), greedy(12))).unwrap();
    assert!(matches!(stream.blocking_next().unwrap().kind, OutputKind::PromptRead { cached_tokens: 0, .. }));
    while let Some(OutputKind::Token { id, .. }) = stream.blocking_next().map(|o| o.kind) {
        let hidden = pruned.forward(&tokens, &pruned.batch(&[Span::prompt(tokens.len())]).unwrap(), &mut NoCache).unwrap();
        let logits = pruned.logits(&hidden.narrow(0, tokens.len() - 1, 1).unwrap()).unwrap();
        let best: u32 = logits.argmax(1).unwrap().to_vec1().unwrap()[0];
        assert_eq!(id, best);
        // 24 key/value groups, of which 5 are gone
        let stats = engine.stats();
        assert!(stats.kv_blocks_used <= 1 && stats.kv_block_bytes == block_bytes() * 19 / 24);
        tokens.push(id);
    }
    assert_eq!(tokens.len(), 5 + 12);
}

#[test]
fn more_requests_than_places_all_finish_in_turn() {
    let engine = start(EngineConfig { max_concurrent: 3, max_batch_tokens: 8, ..defaults() });
    let streams: Vec<RequestStream> = (0..20).map(|i| engine.submit(request(vec![i + 1; 10], greedy(8))).unwrap()).collect();
    for stream in streams {
        assert_eq!(collect(stream, 1)[0].end.as_ref().unwrap().0, FinishReason::Length);
    }
    let stats = engine.stats();
    assert_eq!((stats.running, stats.waiting, stats.kv_blocks_used), (0, 0, 0));
    assert_eq!((stats.prompt_tokens_total, stats.generation_tokens_total, stats.finished.length), (200, 160, 20));
    assert!(stats.steps > 0);
}

#[test]
fn a_dropped_stream_gives_its_memory_back() {
    let engine = start(defaults());
    let mut stream = engine.submit(request(prompt("Once"), greedy(900))).unwrap();
    stream.blocking_next().unwrap();
    assert!((1..=29).contains(&engine.stats().kv_blocks_used));
    drop(stream);
    eventually("memory comes back", || engine.stats().kv_blocks_used == 0);
    let stats = engine.stats();
    assert_eq!((stats.running, stats.finished.cancelled), (0, 1));
    assert!(stats.generation_tokens_total < 900);
}

#[test]
fn a_dropped_stream_leaves_the_queue_too() {
    let engine = start(EngineConfig { max_concurrent: 1, ..defaults() });
    let mut running = engine.submit(request(prompt("Once"), greedy(900))).unwrap();
    running.blocking_next().unwrap();
    let waiting = engine.submit(request(prompt("Once"), greedy(900))).unwrap();
    assert_eq!(engine.stats().waiting, 1);
    drop(waiting);
    eventually("the queue is empty", || engine.stats().waiting == 0);
    assert_eq!(engine.stats().running, 1);
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() {
    let engine = start(EngineConfig { max_concurrent: 1, max_queue: 2, ..defaults() });
    let submit = || engine.submit(request(prompt("Once"), greedy(900)));
    let mut running = submit().unwrap();
    running.blocking_next().unwrap();
    let queued = [submit().unwrap(), submit().unwrap()];
    match submit() {
        Err(SubmitError::QueueFull { waiting: 2, retry_after }) => assert!((1..=60).contains(&retry_after.as_secs())),
        other => panic!("{other:?}"),
    }
    drop(queued);
    eventually("a place comes free", || submit().is_ok());
}

#[test]
fn sequences_that_outgrow_the_memory_take_turns_and_make_the_tokens_that_they_make_alone() {
    let params = |seed| SamplingParams { temperature: 0.8, seed: Some(seed), logprobs: Some(1), ..greedy(90) };
    let starts: Vec<Vec<u32>> = (0..6).map(|i| prompt(&"It was a dark night and the wind came from the sea. ".repeat(i + 1))[i..].to_vec()).collect();
    let roomy = start(defaults());
    let alone: Vec<Choice> = starts.iter().zip(0..).map(|(p, seed)| run(&roomy, p.clone(), params(seed))).collect();
    // enough for the longest alone, not for two
    let blocks = 1 + (starts[5].len() + 90) / 32;
    let engine = start(EngineConfig { kv_budget_bytes: blocks * block_bytes(), max_batch_tokens: 40, ..defaults() });
    let streams: Vec<RequestStream> = starts.iter().zip(0..).map(|(p, seed)| engine.submit(request(p.clone(), params(seed))).unwrap()).collect();
    for (found, alone) in streams.into_iter().map(|s| collect(s, 1).remove(0)).zip(&alone) {
        assert_eq!((&found.tokens, &found.logprobs), (&alone.tokens, &alone.logprobs));
    }
    let stats = engine.stats();
    assert!(stats.preemptions > 0);
    assert_eq!((stats.running, stats.kv_blocks_used, stats.kv_blocks), (0, 0, blocks));
    assert_eq!(
        engine.submit(request(vec![1; 10], greedy(32 * blocks))).unwrap_err(),
        SubmitError::TooLarge { needed_bytes: (blocks + 1) * block_bytes(), budget_bytes: blocks * block_bytes() }
    );
}

#[test]
fn a_prompt_that_begins_like_an_earlier_one_is_read_from_there_on_and_answered_alike() {
    let long = prompt(&"The captain looked at the map and said that they would sail at dawn. ".repeat(12));
    let engine = start(defaults());
    let cold = run(&engine, long.clone(), SamplingParams { logprobs: Some(2), ..greedy(20) });
    assert_eq!(cold.end.as_ref().unwrap().1.cached_tokens, 0);
    let before = engine.stats();
    let warm = run(&engine, long.clone(), SamplingParams { logprobs: Some(2), ..greedy(20) });
    let known = (long.len() - 1) / 32 * 32;
    assert_eq!(warm.end.as_ref().unwrap().1, Usage { prompt_tokens: long.len(), cached_tokens: known, completion_tokens: 20 });
    assert_eq!((&warm.tokens, &warm.logprobs), (&cold.tokens, &cold.logprobs), "bit for bit");
    let after = engine.stats();
    assert_eq!((after.prefix_queries - before.prefix_queries, after.prefix_hits - before.prefix_hits), (long.len() as u64, known as u64));
    // answers are known too: the next turn of a conversation reads only what is new
    let next = [long.clone(), cold.tokens, prompt("He went on deck")].concat();
    let turn = run(&engine, next, greedy(4));
    assert_eq!(turn.end.unwrap().1.cached_tokens, (long.len() + 19) / 32 * 32);
    // scoring a prompt computes every token of it
    let scored = run(&engine, long.clone(), SamplingParams { prompt_logprobs: Some(0), ..greedy(1) });
    assert_eq!((scored.prompt_logprobs.unwrap().len(), scored.end.unwrap().1.cached_tokens), (long.len(), 0));
}

#[test]
fn a_request_beyond_the_context_is_refused_before_anything_runs() {
    let engine = start(defaults());
    let refused = engine.submit(request(vec![1; 1000], greedy(25))).unwrap_err();
    assert_eq!(refused, SubmitError::ContextTooLong { prompt: 1000, max_tokens: 25, limit: 1024 });
    assert!(matches!(engine.submit(request(vec![], greedy(1))), Err(SubmitError::Invalid(e)) if e.param == "prompt"));
    assert!(matches!(engine.submit(request(vec![4096], greedy(1))), Err(SubmitError::Invalid(e)) if e.param == "prompt"));
    assert_eq!(engine.stats().steps, 0);
    assert_eq!(run(&engine, vec![1; 1000], greedy(24)).tokens.len(), 24);
}

#[test]
fn a_seed_gives_the_same_tokens_whatever_else_runs() {
    let engine = start(EngineConfig { max_batch_tokens: 32, ..defaults() });
    let params = |seed| SamplingParams { temperature: 1.0, top_p: 0.95, seed, ..greedy(30) };
    let alone = run(&engine, prompt("It was"), params(Some(42)));
    let others: Vec<RequestStream> = (0..7).map(|i| engine.submit(request(prompt("She said that"), params(Some(i)))).unwrap()).collect();
    assert_eq!(run(&engine, prompt("It was"), params(Some(42))), alone);
    drop(others);
    assert_ne!(run(&engine, prompt("It was"), params(Some(43))).tokens, alone.tokens);
    assert_ne!(run(&engine, prompt("It was"), params(None)).tokens, run(&engine, prompt("It was"), params(None)).tokens);
}

#[test]
fn the_choices_of_a_request_differ_and_are_reproducible() {
    let engine = start(defaults());
    let submit = || engine.submit(Request { n: 3, ..request(prompt("It was"), SamplingParams { seed: Some(1), temperature: 1.0, ..greedy(20) }) }).unwrap();
    let choices = collect(submit(), 3);
    assert!(choices[0].tokens != choices[1].tokens && choices[1].tokens != choices[2].tokens && choices[0].tokens != choices[2].tokens);
    assert_eq!(collect(submit(), 3), choices);
    // the first choice is what n = 1 gives
    let params = SamplingParams { seed: Some(1), temperature: 1.0, ..greedy(20) };
    assert_eq!(run(&engine, prompt("It was"), params).tokens, choices[0].tokens);
    assert_eq!(engine.stats().prompt_tokens_total, 3 * prompt("It was").len() as u64);
}

#[test]
fn stopping_one_choice_leaves_the_others() {
    let engine = start(defaults());
    let mut stream = engine.submit(Request { n: 2, ..request(prompt("It was"), greedy(400)) }).unwrap();
    stream.blocking_next().unwrap();
    stream.stop_choice(1);
    let mut ends = Vec::new();
    while let Some(output) = stream.blocking_next() {
        if let OutputKind::Finished { reason, usage, .. } = output.kind {
            ends.push((output.index, reason, usage.completion_tokens < 400));
        }
    }
    assert_eq!(ends, [(1, FinishReason::Stop, true), (0, FinishReason::Length, false)]);
    assert_eq!(engine.stats().finished.stop, 1);
}

#[test]
fn a_stop_token_or_the_end_of_sequence_ends_the_text() {
    let engine = start(defaults());
    let free = run(&engine, prompt("Once upon a time"), greedy(20)).tokens;
    let stop = free[7];
    let first = free.iter().position(|t| *t == stop).unwrap();
    let stopped = run(&engine, prompt("Once upon a time"), SamplingParams { stop_token_ids: vec![stop], ..greedy(20) });
    assert_eq!((stopped.tokens, stopped.ended_by_stop), (free[..=first].to_vec(), true));
    assert_eq!(stopped.end.unwrap().0, FinishReason::StopToken(stop));
    let forced = SamplingParams { allowed_token_ids: Some(vec![0]), ignore_eos: false, ..greedy(20) };
    let ended = run(&engine, prompt("Once"), forced.clone());
    assert_eq!((ended.tokens, ended.ended_by_stop, ended.end.unwrap().0), (vec![0], true, FinishReason::Stop));
    let ignored = run(&engine, prompt("Once"), SamplingParams { ignore_eos: true, ..forced });
    assert_eq!((ignored.tokens.len(), ignored.ended_by_stop, ignored.end.unwrap().0), (20, false, FinishReason::Length));
}

#[test]
fn prompt_logprobs_are_those_of_a_plain_forward_pass() {
    let prompt = prompt(&"It was a dark and stormy night; the rain fell in torrents. ".repeat(8));
    assert!(prompt.len() > 130, "longer than one block of rows and than one chunk");
    let engine = start(EngineConfig { max_batch_tokens: 50, ..defaults() });
    let scored = run(&engine, prompt.clone(), SamplingParams { prompt_logprobs: Some(3), ..greedy(0) });
    assert_eq!(scored.end, Some((FinishReason::Length, Usage { prompt_tokens: prompt.len(), cached_tokens: 0, completion_tokens: 0 })));
    let found = scored.prompt_logprobs.unwrap();
    assert_eq!(found.len(), prompt.len());
    assert_eq!(found[0], None);

    let batch = DECODER.batch(&[Span::prompt(prompt.len())]).unwrap();
    let hidden = DECODER.forward(&prompt, &batch, &mut NoCache).unwrap();
    let logits: Vec<Vec<f32>> = DECODER.logits(&hidden).unwrap().to_vec2().unwrap();
    for (position, found) in found.iter().enumerate().skip(1) {
        let found = found.as_ref().unwrap();
        let row = &logits[position - 1];
        let normaliser = row.iter().map(|l| f64::from(*l).exp()).sum::<f64>().ln();
        assert_eq!((found.token.id, found.top.len()), (prompt[position], 3));
        assert!((f64::from(found.token.logprob) - (f64::from(row[prompt[position] as usize]) - normaliser)).abs() < 1e-4);
        assert!(found.top[0].logprob >= found.token.logprob && found.top[0].logprob >= found.top[1].logprob);
        assert_eq!(found.rank == 1, found.top[0].id == found.token.id);
    }
}

#[test]
fn echoed_tokens_score_what_they_scored_when_they_were_made() {
    let engine = start(defaults());
    let start = prompt("Once upon a time");
    let made = run(&engine, start.clone(), SamplingParams { logprobs: Some(0), ..greedy(12) });
    let echoed = run(&engine, [start.clone(), made.tokens.clone()].concat(), SamplingParams { prompt_logprobs: Some(0), ..greedy(1) });
    let echoed: Vec<TokenLogprobs> = echoed.prompt_logprobs.unwrap().into_iter().skip(start.len()).flatten().collect();
    assert_eq!(made.logprobs.len(), 12);
    for (made, echoed) in made.logprobs.iter().zip(&echoed) {
        assert_eq!(made.token.id, echoed.token.id);
        assert!((made.token.logprob - echoed.token.logprob).abs() < 1e-4);
        assert_eq!(made.rank, 1);
    }
}

#[test]
fn draining_finishes_what_there_is_and_refuses_the_rest() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let engine = start(EngineConfig { max_concurrent: 1, ..defaults() });
        let mut running = engine.submit(request(prompt("Once"), greedy(40))).unwrap();
        let queued = engine.submit(request(prompt("Once"), greedy(40))).unwrap();
        running.next().await.unwrap();
        engine.drain();
        assert_eq!(engine.submit(request(prompt("Once"), greedy(1))).unwrap_err(), SubmitError::Draining);
        for mut stream in [running, queued] {
            let mut last = None;
            while let Some(output) = stream.next().await {
                last = Some(output.kind);
            }
            assert!(matches!(last, Some(OutputKind::Finished { reason: FinishReason::Length, .. })));
        }
        tokio::time::timeout(Duration::from_secs(10), engine.ended()).await.unwrap();
        assert!(!engine.is_alive());
        assert_eq!(engine.submit(request(prompt("Once"), greedy(1))).unwrap_err(), SubmitError::Stopped);
    });
}

#[test]
fn stopping_ends_running_and_queued_requests() {
    let engine = start(EngineConfig { max_concurrent: 16, ..defaults() });
    // sixteen together take seconds, however late this thread comes to stop them
    let mut running = engine.submit(Request { n: 16, ..request(prompt("Once"), greedy(1000)) }).unwrap();
    let queued = engine.submit(Request { n: 2, ..request(prompt("Once"), greedy(1000)) }).unwrap();
    running.blocking_next().unwrap();
    engine.stop();
    let mut ends = Vec::new();
    while let Some(output) = running.blocking_next() {
        if let OutputKind::Finished { reason, usage, .. } = output.kind {
            ends.push((reason, usage.completion_tokens));
        }
    }
    assert!(ends.len() == 16 && ends.iter().all(|(reason, _)| *reason == FinishReason::Cancelled), "{ends:?}");
    assert!(ends.iter().any(|(_, tokens)| *tokens > 0), "{ends:?}");
    for choice in collect(queued, 2) {
        assert_eq!(choice.end.unwrap().0, FinishReason::Cancelled);
    }
    eventually("the thread ends", || !engine.is_alive());
}

#[test]
fn an_engine_without_handles_finishes_its_work() {
    let engine = start(defaults());
    let stream = engine.submit(request(prompt("Once"), greedy(30))).unwrap();
    drop(engine);
    assert_eq!(collect(stream, 1)[0].tokens.len(), 30);
}

#[test]
fn an_idle_engine_shows_that_it_is_alive() {
    let engine = start(defaults());
    let before = Instant::now();
    eventually("a heartbeat", || engine.stats().last_step > before);
    assert!(engine.is_alive());
}
