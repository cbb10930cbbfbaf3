//! Several runs side by side: a table, and what each cost for what it gave.

use super::{STYLE, escape};
use crate::eval::{Perplexity, Task, TaskResult};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

/// One model of a comparison: the dense one, or what a run left of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The strategy; `dense` for the parent.
    pub strategy: String,
    /// Its space.
    pub space: String,
    /// The fraction of block parameters that was to go.
    pub sparsity: f64,
    /// Seed.
    pub seed: u64,
    /// Fraction of the block parameters that is kept.
    pub params_kept: f64,
    /// Fraction of the key/value cache that is kept.
    pub kv_kept: f64,
    /// Bytes of key/value cache that a token takes, 2 bytes a number.
    #[serde(default)]
    pub kv_bytes_per_token: usize,
    /// Perplexity of each text, by its label.
    pub perplexity: BTreeMap<String, Perplexity>,
    /// Each task's scores.
    pub tasks: Vec<Value>,
    /// Block-forwards of the search.
    pub block_forwards: usize,
    /// Evaluations of the search: a pattern that is raced counts once a stage.
    pub evaluations: usize,
    /// Seconds of the level database and of the search.
    pub seconds: (f64, f64),
    /// The pattern: (whole, kept) of every sub-block.
    pub widths: Vec<(usize, usize)>,
    /// What it was calibrated on; nothing for the parent.
    #[serde(default)]
    pub calibration: Option<Calibrated>,
    /// Texts and tasks whose file is called as one of the corpora is: what they say of it says little of other texts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub calibrated_on: Vec<String>,
}

/// What a model was calibrated on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calibrated {
    /// The corpora's labels.
    pub corpora: Vec<String>,
    /// Tokens of the sequences that patterns were scored on, of those for statistics, of those held out.
    pub tokens: [usize; 3],
}

impl Row {
    /// The task scores as they are printed: acc, and acc_norm where there is one.
    pub fn scores(&self) -> impl Iterator<Item = (String, f64, f64)> + '_ {
        self.tasks.iter().flat_map(|task| {
            let name = task["task"].as_str().unwrap_or_default().to_string();
            ["acc", "acc_norm"].into_iter().filter_map(move |score| {
                let value = task[score]["value"].as_f64()?;
                Some((format!("{name} {score}"), value, task[score]["stderr"].as_f64().unwrap_or(0.0)))
            })
        })
    }

    /// Whether all items of a task were scored, and no others.
    pub fn has_scores(&self, task: &Task) -> bool {
        self.tasks.iter().any(|scores| scores["task"] == task.name() && scores["n"].as_u64() == Some(task.items().len() as u64))
    }

    /// A task's result as a row keeps it.
    pub fn task(result: &TaskResult) -> Value {
        serde_json::to_value(result).unwrap_or_default()
    }
}

/// What the figures were had with, a line each: windows, calibration, and what was measured on its own calibration text.
pub fn notes(rows: &[Row]) -> Vec<String> {
    let window = |(label, p): (&String, &Perplexity)| format!("perplexity of {label}: {} windows of {} tokens without overlap", p.windows, p.window);
    let windows: BTreeSet<String> = rows.iter().flat_map(|row| row.perplexity.iter().map(window)).collect();
    let calibration = |of: &Calibrated| {
        let [scored, statistics, held_out] = of.tokens;
        format!("calibrated on {}: {scored} tokens scored, {statistics} for statistics, {held_out} held out", of.corpora.join(", "))
    };
    let calibrations: BTreeSet<String> = rows.iter().filter_map(|row| row.calibration.as_ref()).map(calibration).collect();
    let names: BTreeSet<&str> = rows.iter().flat_map(|row| &row.calibrated_on).map(String::as_str).collect();
    let warning = |name: &str| format!("warning: {name} is called as a calibration text is: what models were calibrated on says little of other texts");
    windows.into_iter().chain(calibrations).chain(names.into_iter().map(warning)).collect()
}

/// The page: a table and three plots of the first text's loss.
pub fn html(model: &str, rows: &[Row], command: &[String]) -> String {
    let mut page = STYLE.replace("EvoP pruning report", "EvoP comparison");
    let _ = write!(page, "<h1>{}: strategies side by side</h1>", escape(model));
    page.push_str(&table(rows));
    for note in notes(rows) {
        let _ = write!(page, "<p>{}.</p>", escape(&note));
    }
    if let Some(label) = rows.iter().find_map(|r| r.perplexity.keys().next()) {
        for (title, x, log) in [
            ("fraction of block parameters kept", (|r: &Row| r.params_kept) as fn(&Row) -> f64, false),
            ("block-forwards of the search", |r| r.block_forwards as f64, true),
            ("seconds of search and levels", |r| r.seconds.0 + r.seconds.1, true),
        ] {
            let _ = write!(page, "<h2>Loss on {} against {title}</h2>", escape(label));
            page.push_str(&scatter(rows, label, x, log, title));
        }
    }
    let _ = write!(page, "<h2>Reproduce</h2><pre><code>{}</code></pre></html>", escape(&command.join(" ")));
    page
}

fn table(rows: &[Row]) -> String {
    let labels: Vec<&String> = rows.first().map(|r| r.perplexity.keys().collect()).unwrap_or_default();
    let scores: Vec<String> = rows.first().map(|r| r.scores().map(|(name, _, _)| name).collect()).unwrap_or_default();
    let mut html = String::from("<table><tr><th>strategy</th><th>space</th><th>sparsity</th><th>parameters kept</th><th>KV kept</th><th>KV bytes a token</th>");
    for label in &labels {
        let _ = write!(html, "<th>perplexity, {}</th>", escape(label));
    }
    for score in &scores {
        let _ = write!(html, "<th>{}</th>", escape(score));
    }
    html.push_str("<th>block-forwards</th><th>evaluations</th><th>levels, s</th><th>search, s</th></tr>");
    for row in rows {
        let _ = write!(
            html,
            "<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.4}</td><td>{:.3}</td><td>{}</td>",
            row.strategy, row.space, row.sparsity, row.params_kept, row.kv_kept, row.kv_bytes_per_token
        );
        for label in &labels {
            let _ = write!(html, "<td>{}</td>", row.perplexity.get(*label).map_or(String::new(), |p| format!("{:.2}", p.perplexity)));
        }
        for (_, value, stderr) in row.scores() {
            let _ = write!(html, "<td>{value:.4} ± {stderr:.4}</td>");
        }
        let _ = write!(html, "<td>{}</td><td>{}</td><td>{:.0}</td><td>{:.0}</td></tr>", row.block_forwards, row.evaluations, row.seconds.0, row.seconds.1);
    }
    html + "</table>"
}

const COLOURS: [&str; 8] = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#777777"];

/// A point a row, joined where a strategy has several sparsities.
fn scatter(rows: &[Row], label: &str, x: fn(&Row) -> f64, log: bool, title: &str) -> String {
    const WIDTH: f64 = 620.0;
    const HEIGHT: f64 = 300.0;
    let at = |row: &Row| {
        let x = x(row);
        let y = row.perplexity.get(label)?.mean_nll;
        let x = if log { (x > 0.0).then(|| x.log10())? } else { x };
        y.is_finite().then_some((x, y))
    };
    let points: Vec<(&Row, (f64, f64))> = rows.iter().filter_map(|r| Some((r, at(r)?))).collect();
    let range = |f: fn(&(f64, f64)) -> f64| points.iter().map(|(_, p)| f(p)).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
    let place = |p: (f64, f64)| (60.0 + WIDTH * (p.0 - x0) / (x1 - x0).max(1e-12), 10.0 + HEIGHT * (1.0 - (p.1 - y0) / (y1 - y0).max(1e-12)));
    let mut svg = format!("<svg viewBox='0 0 900 350' width='100%' role=img aria-label='loss against {title}'>");
    for i in 0..=4 {
        let y = y0 + (y1 - y0) * f64::from(i) / 4.0;
        let h = place((x0, y)).1;
        let _ = write!(svg, "<line x1=60 x2={:.0} y1={h:.1} y2={h:.1} stroke='#8884'/><text x=54 y={:.1} text-anchor=end>{y:.2}</text>", 60.0 + WIDTH, h + 4.0);
        let x = x0 + (x1 - x0) * f64::from(i) / 4.0;
        let shown = if log { format!("{:.0}", 10f64.powf(x)) } else { format!("{x:.2}") };
        let _ = write!(svg, "<text x={:.1} y=328 text-anchor=middle>{shown}</text>", place((x, y0)).0);
    }
    let mut strategies: Vec<&str> = Vec::new();
    for (row, _) in &points {
        if !strategies.contains(&row.strategy.as_str()) {
            strategies.push(&row.strategy);
        }
    }
    for (i, strategy) in strategies.iter().enumerate() {
        let colour = COLOURS[i % COLOURS.len()];
        let mut own: Vec<(f64, f64)> = points.iter().filter(|(r, _)| r.strategy == *strategy).map(|(_, p)| *p).collect();
        own.sort_by(|a, b| a.0.total_cmp(&b.0));
        let path: Vec<String> = own.iter().map(|p| place(*p)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
        let _ = write!(svg, "<polyline points='{}' fill=none stroke='{colour}' stroke-opacity=.5 />", path.join(" "));
        for p in own {
            let (x, y) = place(p);
            let _ = write!(svg, "<circle cx={x:.1} cy={y:.1} r=4 fill='{colour}'><title>{strategy}: {:.4} nats</title></circle>", p.1);
        }
        let _ = write!(svg, "<circle cx=700 cy={0} r=4 fill='{colour}'/><text x=710 y={1}>{strategy}</text>", 14 + 16 * i, 18 + 16 * i);
    }
    svg + "</svg>"
}
