//! The report's pictures, as inline SVG.

use crate::calibration::Point;
use crate::run::Outcome;
use crate::search::Round;
use std::fmt::Write;

/// One colour a cluster, told apart with common colour vision deficiencies (Okabe and Ito).
const COLOURS: [&str; 8] = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b59f00", "#777777"];

/// A map of the pattern: a column a layer, attention above, MLP below; how much of a cell is filled is how much is kept.
pub(super) fn pattern(widths: &[(usize, usize)]) -> String {
    let layers = widths.len() / 2;
    let cell = (820 / layers.max(1)).clamp(6, 28);
    let mut svg =
        format!("<svg viewBox='0 0 {} 96' width='100%' style='max-width:{}px' role=img aria-label='pattern map'>", 80 + layers * cell, 80 + layers * cell);
    const HEIGHT: usize = 30;
    for (row, name) in ["attention", "MLP"].iter().enumerate() {
        let top = 3 + row * (HEIGHT + 6);
        let _ = write!(svg, "<text x=0 y={}>{name}</text>", top + 19);
        for layer in 0..layers {
            let (whole, kept) = widths[2 * layer + row];
            let x = 70 + layer * cell;
            let filled = (HEIGHT * kept).checked_div(whole).unwrap_or(0);
            let what = match (whole, kept) {
                (0, _) => "absent in the parent".to_string(),
                (_, 0) => "removed".to_string(),
                (whole, kept) => format!("{kept} of {whole}"),
            };
            let _ = write!(
                svg,
                "<g><title>layer {layer} {name}: {what}</title><rect x={x} y={top} width={w} height={HEIGHT} rx=2 fill='#e2b8b0'/><rect x={x} y={} width={w} height={filled} rx=2 fill='#2f7d5b'/></g>",
                top + HEIGHT - filled,
                w = cell - 2
            );
        }
    }
    for layer in (0..layers).step_by((layers / 10).max(1)) {
        let _ = write!(svg, "<text x={} y=90>{layer}</text>", 70 + layer * cell);
    }
    svg + "</svg>"
}

/// Best loss by round and by block-forwards, side by side.
pub(super) fn course(outcome: &Outcome) -> String {
    let history: Vec<&Round> = outcome.found.history.iter().filter(|r| r.best_loss.is_finite()).collect();
    let by_round: Vec<(f64, f64)> = history.iter().enumerate().map(|(i, r)| (i as f64, r.best_loss)).collect();
    let by_work: Vec<(f64, f64)> = history.iter().map(|r| (r.block_forwards as f64, r.best_loss)).collect();
    let mut svg = String::from("<svg viewBox='0 0 900 240' width='100%' role=img aria-label='best loss by round and by block-forwards'>");
    line(&mut svg, 0.0, &by_round, "best loss by round");
    line(&mut svg, 455.0, &by_work, "best loss by block-forwards");
    svg + "</svg>"
}

/// Loss against what is kept of the first budget's resource.
pub(super) fn front(outcome: &Outcome) -> String {
    let points: Vec<(f64, f64)> = outcome.found.front.iter().map(|p| (100.0 * p.kept, p.loss)).collect();
    let mut svg = String::from("<svg viewBox='0 0 450 240' width='100%' style='max-width:450px' role=img aria-label='Pareto front'>");
    line(&mut svg, 0.0, &points, "loss by percent kept");
    svg + "</svg>"
}

fn line(svg: &mut String, left: f64, points: &[(f64, f64)], title: &str) {
    const WIDTH: f64 = 360.0;
    const HEIGHT: f64 = 170.0;
    let range = |f: fn(&(f64, f64)) -> f64| points.iter().map(f).fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let _ = write!(svg, "<text x={} y=14>{title}</text>", left + 60.0);
    if points.is_empty() {
        return;
    }
    let ((x0, x1), (y0, y1)) = (range(|p| p.0), range(|p| p.1));
    let x = |v: f64| left + 60.0 + WIDTH * (v - x0) / (x1 - x0).max(1e-12);
    let y = |v: f64| 26.0 + HEIGHT * (1.0 - (v - y0) / (y1 - y0).max(1e-12));
    for i in 0..=4 {
        let at = y0 + (y1 - y0) * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<line x1={:.1} x2={:.1} y1={h:.1} y2={h:.1} stroke='#8884' /><text x={:.1} y={:.1} text-anchor=end>{at:.4}</text>",
            left + 60.0,
            left + 60.0 + WIDTH,
            left + 54.0,
            y(at) + 4.0,
            h = y(at)
        );
    }
    // a best-so-far curve stays until the next better one
    let mut path = format!("M{:.1},{:.1}", x(points[0].0), y(points[0].1));
    for p in &points[1..] {
        let _ = write!(path, "H{:.1}V{:.1}", x(p.0), y(p.1));
    }
    let _ = write!(
        svg,
        "<path d='{path}' fill=none stroke='#2f7d5b' stroke-width=2 /><text x={:.1} y=214>{}</text><text x={:.1} y=214 text-anchor=end>{}</text>",
        left + 60.0,
        short(x0),
        left + 60.0 + WIDTH,
        short(x1)
    );
}

fn short(value: f64) -> String {
    match value {
        v if v >= 1e6 => format!("{:.2} M", v / 1e6),
        v if v >= 1e4 => format!("{:.1} k", v / 1e3),
        v => format!("{v:.0}"),
    }
}

/// The clusters' sizes, and the chunks in a plane.
pub(super) fn clusters(picture: &[Point], sizes: &[usize]) -> String {
    let most = sizes.iter().copied().max().unwrap_or(1).max(1);
    let height = (24 * sizes.len() + 8).max(if picture.is_empty() { 0 } else { 320 });
    let mut svg = format!("<svg viewBox='0 0 900 {height}' width='100%' role=img aria-label='calibration clusters'>");
    for (i, size) in sizes.iter().enumerate() {
        let y = 4 + 24 * i;
        let _ = write!(
            svg,
            "<text x=0 y={0}>cluster {i}</text><rect x=70 y={y} width={1} height=16 fill='{2}'/><text x={3} y={0}>{size} chunks</text>",
            y + 13,
            240 * size / most,
            COLOURS[i % COLOURS.len()],
            78 + 240 * size / most,
        );
    }
    let range = |f: fn(&Point) -> f32| picture.iter().map(f).fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let ((x0, x1), (y0, y1)) = (range(|p| p.x), range(|p| p.y));
    for point in picture {
        let x = 440.0 + 440.0 * (point.x - x0) / (x1 - x0).max(1e-9);
        let y = 8.0 + 300.0 * (1.0 - (point.y - y0) / (y1 - y0).max(1e-9));
        let _ = write!(svg, "<circle cx={x:.1} cy={y:.1} r=2.2 fill='{}' fill-opacity=.7 />", COLOURS[point.cluster % COLOURS.len()]);
    }
    svg + "</svg>"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partial_width_fills_part_of_its_cell() {
        let svg = pattern(&[(3, 3), (384, 192), (3, 0), (384, 384)]);
        assert!(svg.contains("layer 0 MLP: 192 of 384") && svg.contains("layer 1 attention: removed"));
        assert!(svg.contains("height=15"));
    }

    #[test]
    fn a_picture_without_points_is_only_bars() {
        let svg = clusters(&[], &[4, 2]);
        assert!(svg.contains("cluster 1") && !svg.contains("circle"));
    }
}
