//! What a run found, on one page: HTML to look at, JSON to read.

use crate::evaluate::Work;
use crate::run::{Outcome, human};
use serde_json::{Value, json};
use std::fmt::Write;
use std::time::Duration;

/// `evop.json`: where a checkpoint came from.
pub(crate) fn provenance(outcome: &Outcome) -> Value {
    json!({
        "format": 1,
        "evop_version": outcome.run.version,
        "parent": { "model": outcome.run.model, "revision": outcome.run.revision, "sha256": outcome.run.model_sha256 },
        "pattern": outcome.found.pattern,
        "space": outcome.run.options.space,
        "strategy": outcome.run.options.search.strategy,
        "sparsity": outcome.run.options.sparsity,
        "seed": outcome.run.options.search.seed,
        "calibration": { "corpus": corpus_name(outcome), "clusters": outcome.cluster_sizes, "options": outcome.run.options.calibration },
        "loss": { "dense": outcome.dense_loss, "pruned": outcome.found.fitness.loss },
        "held_out_perplexity": { "dense": outcome.dense.perplexity, "pruned": outcome.pruned.perplexity, "window": outcome.dense.window },
        "parameters": { "dense": outcome.parameters.0, "pruned": outcome.parameters.1 },
        "block_parameters": { "dense": outcome.block_parameters.0, "pruned": outcome.block_parameters.1 },
    })
}

fn corpus_name(outcome: &Outcome) -> String {
    outcome.run.calibration.as_ref().map_or_else(|| "bundled books".to_string(), |path| path.display().to_string())
}

/// How the certificate reads in words.
pub fn certificate_text(outcome: &Outcome) -> String {
    match &outcome.certificate {
        None => "not enumerated: the space is too large to certify the optimum".to_string(),
        Some(c) if c.is_optimal() => format!("the optimum of all {} patterns, certified by enumeration", c.patterns),
        Some(c) => format!(
            "the search missed the optimum of all {} patterns by {:.6} nats ({:.4}%): it found {:.6}, the optimum is {:.6}; the optimum was taken",
            c.patterns,
            c.found - c.optimum,
            100.0 * (c.found - c.optimum) / c.optimum,
            c.found,
            c.optimum
        ),
    }
}

/// How much was computed, in words.
pub fn work_text(work: Work) -> String {
    let ratio = |whole: usize| whole as f64 / work.block_forwards.max(1) as f64;
    format!(
        "{} block-forwards for {} patterns evaluated of {} asked for; one by one with a memo {} ({:.2}x), without {} ({:.2}x)",
        work.block_forwards,
        work.evaluated,
        work.requested,
        work.memo_block_forwards,
        ratio(work.memo_block_forwards),
        work.naive_block_forwards,
        ratio(work.naive_block_forwards)
    )
}

/// The pattern as two rows of text: attention above, MLP below; `█` kept, `·` skipped.
pub fn pattern_text(kept: &[bool]) -> String {
    let row = |offset: usize| kept.iter().skip(offset).step_by(2).map(|k| if *k { '█' } else { '·' }).collect::<String>();
    format!("attention {}\nMLP       {}", row(0), row(1))
}

/// The page, self-contained.
pub(crate) fn html(outcome: &Outcome) -> String {
    let mut page = String::from(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>EvoP pruning report</title><style>\
         body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}\
         h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}\
         td:first-child,th:first-child{text-align:left}code{background:#f3f3f3;padding:.1rem .3rem}svg text{font:11px system-ui,sans-serif;fill:#444}\
         @media(prefers-color-scheme:dark){body{color:#ddd;background:#16181c}td,th{border-color:#333}code{background:#26292f}svg text{fill:#aaa}}</style>",
    );
    let options = &outcome.run.options;
    let model = escape(outcome.run.model.as_deref().unwrap_or("the bundled model"));
    let _ = write!(
        page,
        "<h1>{model}, pruned by EvoP</h1><p>Strategy <b>{}</b>, space <b>{}</b>, sparsity <b>{}</b>, seed {}. The pattern is {}.</p>",
        options.search.strategy,
        options.space,
        options.sparsity,
        options.search.seed,
        escape(&certificate_text(outcome))
    );
    page.push_str("<h2>Before and after</h2><table><tr><th></th><th>dense</th><th>pruned</th><th>ratio</th></tr>");
    let mut row = |name: &str, dense: f64, pruned: f64, digits: usize| {
        let _ = write!(page, "<tr><td>{name}</td><td>{dense:.digits$}</td><td>{pruned:.digits$}</td><td>{:.3}</td></tr>", pruned / dense);
    };
    row("perplexity on held-out text", outcome.dense.perplexity, outcome.pruned.perplexity, 3);
    row("calibration loss, nats", outcome.dense_loss, outcome.found.fitness.loss, 2);
    row("parameters", outcome.parameters.0 as f64, outcome.parameters.1 as f64, 0);
    row("block parameters", outcome.block_parameters.0 as f64, outcome.block_parameters.1 as f64, 0);
    row("KV cache bytes per token (16-bit)", outcome.kv_bytes_per_token.0 as f64, outcome.kv_bytes_per_token.1 as f64, 0);
    let _ = write!(
        page,
        "</table><p>Perplexity over {} windows of {} tokens ({} predicted). Calibration corpus: {}.</p>",
        outcome.dense.windows,
        outcome.dense.window,
        outcome.dense.predicted_tokens,
        escape(&corpus_name(outcome))
    );
    page.push_str("<h2>What was removed</h2>");
    page.push_str(&pattern_map(&outcome.kept));
    page.push_str("<h2>Best loss by round</h2>");
    page.push_str(&history_plot(&outcome.found.history, outcome.dense_loss));
    page.push_str("<h2>Calibration clusters</h2>");
    page.push_str(&bars(&outcome.cluster_sizes));
    let _ = write!(
        page,
        "<h2>Work</h2><p>Search: {}.</p><p>Certificate: {}.</p><p>{} in all.</p>",
        work_text(outcome.work),
        if outcome.certificate.is_some() { work_text(outcome.certificate_work) } else { "none".into() },
        human(Duration::from_secs_f64(outcome.search_seconds))
    );
    let json = serde_json::to_string_pretty(&outcome.run).unwrap_or_default();
    let _ = write!(page, "<h2>Inputs</h2><pre><code>{}</code></pre></html>", escape(&json));
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn pattern_map(kept: &[bool]) -> String {
    let layers = kept.len() / 2;
    let cell = (820 / layers.max(1)).clamp(6, 28);
    let mut svg = format!("<svg viewBox='0 0 {} 80' width='100%' role=img aria-label='pattern map'>", 80 + layers * cell);
    for (row, name) in ["attention", "MLP"].iter().enumerate() {
        let _ = write!(svg, "<text x=0 y={}>{name}</text>", 18 + row * 28);
        for layer in 0..layers {
            let (fill, what) = if kept[2 * layer + row] { ("#2f7d5b", "kept") } else { ("#e2b8b0", "removed") };
            let _ = write!(
                svg,
                "<rect x={} y={} width={} height=22 rx=2 fill='{fill}'><title>layer {layer} {name}: {what}</title></rect>",
                70 + layer * cell,
                3 + row * 28,
                cell - 2
            );
        }
    }
    for layer in (0..layers).step_by((layers / 10).max(1)) {
        let _ = write!(svg, "<text x={} y=74>{layer}</text>", 70 + layer * cell);
    }
    svg + "</svg>"
}

fn history_plot(history: &[f64], dense: f64) -> String {
    let finite: Vec<f64> = history.iter().copied().filter(|v| v.is_finite()).collect();
    let (low, high) = finite.iter().fold((dense, dense), |(l, h), v| (l.min(*v), h.max(*v)));
    let span = (high - low).max(1e-9);
    let (width, height) = (760.0, 180.0);
    let x = |i: usize| 60.0 + width * i as f64 / (history.len().max(2) - 1) as f64;
    let y = |v: f64| 10.0 + height * (1.0 - (v - low) / span);
    let points: Vec<String> = history.iter().enumerate().filter(|(_, v)| v.is_finite()).map(|(i, v)| format!("{:.1},{:.1}", x(i), y(*v))).collect();
    format!(
        "<svg viewBox='0 0 840 220' width='100%' role=img aria-label='best loss by round'>\
         <polyline points='{}' fill=none stroke='#2f7d5b' stroke-width=2 />\
         <line x1=60 x2=820 y1={yd:.1} y2={yd:.1} stroke='#999' stroke-dasharray='4 4'/><text x=64 y={:.1}>dense</text>\
         <text x=0 y=16>{high:.1}</text><text x=0 y=194>{low:.1}</text><text x=60 y=212>1</text><text x=800 y=212>{}</text></svg>",
        points.join(" "),
        y(dense) - 4.0,
        history.len(),
        yd = y(dense),
    )
}

fn bars(sizes: &[usize]) -> String {
    let most = sizes.iter().copied().max().unwrap_or(1).max(1);
    let mut svg = format!("<svg viewBox='0 0 840 {}' width='100%' role=img aria-label='cluster sizes'>", 24 * sizes.len() + 4);
    for (i, size) in sizes.iter().enumerate() {
        let y = 4 + 24 * i;
        let _ = write!(
            svg,
            "<text x=0 y={}>cluster {i}</text><rect x=70 y={y} width={} height=16 fill='#4a78a8'/><text x={} y={}>{size} chunks</text>",
            y + 13,
            600 * size / most,
            78 + 600 * size / most,
            y + 13
        );
    }
    svg + "</svg>"
}
