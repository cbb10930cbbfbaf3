//! What a run found, on one page: HTML to look at, JSON to read.

pub mod compare;
mod plot;

use crate::budget::Drafting;
use crate::evaluate::Work;
use crate::run::{Outcome, human};
use serde_json::{Value, json};
use std::fmt::Write;
use std::path::Path;
use std::time::Duration;

/// `evop.json`: where a checkpoint came from.
pub(crate) fn provenance(outcome: &Outcome) -> Value {
    let options = &outcome.run.options;
    json!({
        "format": 2,
        "evop_version": outcome.run.version,
        "parent": { "model": outcome.run.model, "revision": outcome.run.revision, "sha256": outcome.run.model_sha256 },
        "pattern": outcome.found.pattern,
        "space": options.space.space,
        "strategy": options.search.strategy,
        "budgets": options.space.budgets,
        "kept": outcome.kept_of_budgets.iter().map(|(_, kept)| kept).collect::<Vec<_>>(),
        "compensation": outcome.levels.iter().map(|l| l.compensation.to_string()).collect::<std::collections::BTreeSet<_>>(),
        "seed": options.search.seed,
        "calibration": {
            "corpora": corpus_names(outcome), "clusters": outcome.calibration.cluster_sizes, "tokens": outcome.calibration.tokens,
            "sha256": outcome.calibration.sha256, "embedder": outcome.calibration.embedder, "options": options.calibration,
        },
        "objective": options.objective,
        "loss": { "dense": outcome.dense_loss, "pruned": outcome.found.fitness.loss, "held_out": outcome.held_out.loss },
        "held_out_perplexity": { "dense": outcome.dense.perplexity, "pruned": outcome.pruned.perplexity, "window": outcome.dense.window },
        "parameters": { "dense": outcome.parameters.0, "pruned": outcome.parameters.1 },
        "block_parameters": { "dense": outcome.block_parameters.0, "pruned": outcome.block_parameters.1 },
    })
}

/// Whether one of these corpora is of a file of this name: what a model was calibrated on says little of other texts.
pub fn calibrated_on<'a>(mut corpora: impl Iterator<Item = &'a str>, file: &Path) -> bool {
    // a corpus whose file shares its name with another's is called by its directories too
    corpora.any(|corpus| Path::new(corpus).file_name().is_some_and(|name| Some(name) == file.file_name()))
}

fn corpus_names(outcome: &Outcome) -> Vec<&str> {
    outcome.calibration.corpora.iter().map(|c| c.label.as_str()).collect()
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
        "{} block-forwards for {} evaluations of {} asked for; one by one with a memo {} ({:.2}x), without {} ({:.2}x)",
        work.block_forwards,
        work.evaluated,
        work.requested,
        work.memo_block_forwards,
        ratio(work.memo_block_forwards),
        work.naive_block_forwards,
        ratio(work.naive_block_forwards)
    )
}

/// What was held in memory, in words.
pub fn memory_text(outcome: &Outcome) -> String {
    let mb = |bytes: usize| format!("{:.1} MB", bytes as f64 / 1e6);
    let m = &outcome.memory;
    let (states, bound) = m.prefix_cache;
    let peak = m.peak_resident.map_or(String::new(), |bytes| format!("; {} resident at most, model and all", mb(bytes)));
    let (outputs, outputs_bound) = m.outputs;
    format!(
        "statistics {}, dense distributions {}, boundary states {} of at most {}, repaired layers {} of at most {}{peak}",
        mb(m.statistics),
        mb(m.distributions),
        mb(states),
        mb(bound),
        mb(outputs),
        mb(outputs_bound)
    )
}

/// The choice on held-out sequences, in words.
pub fn held_out_text(outcome: &Outcome) -> String {
    let h = &outcome.held_out;
    let place = if h.candidates > 1 { format!("number {} of the search's best {}", h.chosen + 1, h.candidates) } else { "the search's answer".to_string() };
    if let Some(Drafting { tokens, agreement, time }) = outcome.drafting {
        return format!(
            "{place}: {:.1}% of its guesses are taken on held-out sequences; {tokens} before each check make a token {:.3} times as fast as the whole model alone \
             ({:.3} on the sequences that the search saw)",
            100.0 * agreement,
            1.0 / time,
            1.0 / h.search_loss
        );
    }
    format!("{place}: {:.4} nats a token on held-out sequences, {:.4} on those that the search saw (gap {:+.4})", h.loss, h.search_loss, h.loss - h.search_loss)
}

/// What the search minimised: its name, of the dense model, of the pruned one.
pub fn loss_row(outcome: &Outcome) -> (String, f64, f64) {
    let pruned = outcome.found.fitness.loss;
    match outcome.drafting {
        Some(_) => ("time of a token with it as a draft".into(), 1.0, pruned),
        None => ("calibration loss, nats a token".into(), outcome.dense_loss, pruned),
    }
}

/// The page, self-contained.
pub(crate) fn html(outcome: &Outcome) -> String {
    let mut page = String::from(STYLE);
    let options = &outcome.run.options;
    let model = escape(outcome.run.model.as_deref().unwrap_or("the bundled model"));
    let kept: Vec<String> =
        outcome.kept_of_budgets.iter().map(|(b, kept)| format!("{:?} {:.4} of at most {}", b.resource, kept, b.keep).to_lowercase()).collect();
    let _ = write!(
        page,
        "<h1>{model}, pruned by EvoP</h1><p>Strategy <b>{}</b>, space <b>{}</b>, kept: <b>{}</b>, objective {}, seed {}. The pattern is {}.</p>",
        options.search.strategy,
        options.space.space,
        escape(&kept.join(", ")),
        options.objective,
        options.search.seed,
        escape(&certificate_text(outcome))
    );
    page.push_str("<h2>Before and after</h2><table><tr><th></th><th>dense</th><th>pruned</th><th>ratio</th></tr>");
    let mut row = |name: &str, dense: f64, pruned: f64, digits: usize| {
        let ratio = if dense > 0.0 { format!("{:.3}", pruned / dense) } else { String::new() };
        let _ = write!(page, "<tr><td>{name}</td><td>{dense:.digits$}</td><td>{pruned:.digits$}</td><td>{ratio}</td></tr>");
    };
    row("perplexity on text never seen", outcome.dense.perplexity, outcome.pruned.perplexity, 3);
    let (name, dense_loss, pruned_loss) = loss_row(outcome);
    row(&format!("{name} ({})", options.objective), dense_loss, pruned_loss, 4);
    row("parameters", outcome.parameters.0 as f64, outcome.parameters.1 as f64, 0);
    row("block parameters", outcome.block_parameters.0 as f64, outcome.block_parameters.1 as f64, 0);
    row("KV cache bytes per token (16-bit)", outcome.kv_bytes_per_token.0 as f64, outcome.kv_bytes_per_token.1 as f64, 0);
    let corpora: Vec<String> =
        outcome.calibration.corpora.iter().map(|c| format!("{} ({} chunks, {} duplicates left out)", c.label, c.chunks, c.duplicates)).collect();
    let [scored, statistics, held_out] = outcome.calibration.tokens;
    let _ = write!(
        page,
        "</table><p>Perplexity over {} windows of {} tokens ({} predicted). Calibrated on {}: {scored} tokens scored, {statistics} for statistics, {held_out} held out.</p><p>Held-out choice: {}.</p>",
        outcome.dense.windows,
        outcome.dense.window,
        outcome.dense.predicted_tokens,
        escape(&corpora.join(", ")),
        escape(&held_out_text(outcome))
    );
    page.push_str("<h2>What was removed</h2>");
    page.push_str(&plot::pattern(&outcome.widths));
    page.push_str("<h2>The search's course</h2>");
    page.push_str(&plot::course(outcome));
    if let Some(correlation) = outcome.found.surrogate_rank_correlation {
        let _ = write!(page, "<p>The surrogate ordered each generation's children with a mean rank correlation of {correlation:.2}.</p>");
    }
    if !outcome.found.front.is_empty() {
        page.push_str("<h2>Pareto front</h2>");
        page.push_str(&plot::front(outcome));
        page.push_str("<p>The patterns are in front/, each named by what it keeps; <code>evop prune --pattern FILE</code> makes a checkpoint of one.</p>");
    }
    page.push_str("<h2>Calibration clusters</h2>");
    page.push_str(&plot::clusters(&outcome.calibration.picture, &outcome.calibration.cluster_sizes));
    let _ = write!(page, "<p>Embedder: {}.</p>", escape(&outcome.calibration.embedder));
    if !outcome.clusters.is_empty() {
        page.push_str("<h3>A pattern for every cluster</h3><table><tr><th>cluster</th><th>tokens searched on</th><th>held-out tokens</th><th>its own pattern's loss there</th><th>the common one's</th></tr>");
        for c in &outcome.clusters {
            let (seen, unseen) = c.tokens;
            let loss = |of: Option<f64>| of.map_or("none".to_string(), |l| format!("{l:.4}"));
            let (own, common) = (loss(c.held_out.map(|l| l.0)), loss(c.held_out.map(|l| l.1)));
            let _ = write!(page, "<tr><td>{}</td><td>{seen}</td><td>{unseen}</td><td>{own}</td><td>{common}</td></tr>", c.cluster);
        }
        page.push_str("</table>");
    }
    if !outcome.levels.is_empty() {
        let _ = write!(
            page,
            "<h2>Levels</h2><p>Squared error of a sub-block's update on held-out activations, relative to its energy, at the level that was chosen. Skipped sub-blocks are made up for by: {}; a level that absorbs the next ones is refitted to give their updates too.</p><table><tr><th>sub-block</th><th>importance</th><th>compensation</th><th>width</th><th>absorbs</th><th>ridge</th><th>raw</th><th>repaired</th></tr>",
            outcome.skips
        );
        for of in &outcome.levels {
            let wanted = outcome.pattern_levels[of.sub_block];
            let Some(level) = of.levels.iter().find(|l| l.level == wanted) else { continue };
            let name = if of.sub_block.is_multiple_of(2) { "attention" } else { "MLP" };
            let _ = write!(
                page,
                "<tr><td>layer {} {name}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{:.0e}</td><td>{:.4}</td><td>{:.4}</td></tr>",
                of.sub_block / 2,
                of.importance,
                of.compensation,
                wanted.width,
                wanted.absorbed,
                level.ridge,
                level.raw,
                level.repaired
            );
        }
        page.push_str("</table>");
    }
    let time = |seconds: f64| human(Duration::from_secs_f64(seconds));
    let _ = write!(
        page,
        "<h2>Work</h2><p>Search: {}.</p><p>Certificate: {}.</p><p>Time: calibration {}, levels {}, search {}, finish {}.</p>\
         <p>Memory: {}.</p>",
        work_text(outcome.work),
        if outcome.certificate.is_some() { work_text(outcome.certificate_work) } else { "none".into() },
        time(outcome.seconds.calibration),
        time(outcome.seconds.levels),
        time(outcome.seconds.search),
        time(outcome.seconds.finish),
        memory_text(outcome),
    );
    if !outcome.run.command.is_empty() {
        let _ = write!(page, "<h2>Reproduce</h2><pre><code>{}</code></pre>", escape(&outcome.run.command.join(" ")));
    }
    let json = serde_json::to_string_pretty(&outcome.run).unwrap_or_default();
    let _ = write!(page, "<h2>Inputs</h2><pre><code>{}</code></pre></html>", escape(&json));
    page
}

const STYLE: &str = "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>EvoP pruning report</title><style>\
    body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1a1a1a;background:#fff}\
    h1{font-size:1.5rem}h2{font-size:1.1rem;margin-top:2rem}table{border-collapse:collapse}td,th{padding:.25rem .8rem;text-align:right;border-bottom:1px solid #ddd}\
    td:first-child,th:first-child{text-align:left}code{background:#f3f3f3;padding:.1rem .3rem}pre{overflow-x:auto}svg text{font:11px system-ui,sans-serif;fill:#444}\
    @media(prefers-color-scheme:dark){body{color:#ddd;background:#16181c}td,th{border-color:#333}code{background:#26292f}svg text{fill:#aaa}}</style>";

pub(crate) fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}
