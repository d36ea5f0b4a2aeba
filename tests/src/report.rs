//! The result of a run as a table for people, as JSON for programs, and as a picture.

use crate::round::Round;
use anyhow::{Context as _, Result, anyhow};
use comfy_table::{Cell, CellAlignment, Table, presets};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::path::Path;

/// One table, a row a method.
#[must_use]
pub fn table(rounds: &[Round]) -> String {
    let oc = rounds.iter().find(|r| r.method == "oc").map(|r| r.core.forward as f64);
    let mut t = Table::new();
    t.load_style(presets::UTF8_BORDERS_ONLY);
    t.set_header([
        "method",
        "core link\nMB",
        "of OC",
        "VM mean\ns",
        "group\ns",
        "prepare\ns",
        "downtime ms\nmedian, max",
        "unique\npages",
        "refer-\nences",
        "remote\nrefs",
        "for-\nwarded",
        "contents\nsent as",
        "agents' CPU\ns a GiB",
        "RAM MB\nidentical",
        "services\nanswer",
    ]);
    for r in rounds {
        let mb = |b: u64| format!("{:.1}", b as f64 / 1e6);
        let count = |key: &str| r.sum(key).map_or_else(|| "-".into(), |n| n.to_string());
        let forwarded = r.hosts("forwarded_pages");
        let cells = [
            r.method.clone(),
            mb(r.core.forward),
            oc.map_or_else(|| "-".into(), |oc| format!("{:.3}", r.core.forward as f64 / oc)),
            format!("{:.1}", r.mean_ms / 1e3),
            format!("{:.1}", r.group_ms / 1e3),
            format!("{:.1}", r.prepare_ms / 1e3),
            format!("{:.0}, {:.0}", r.downtime_median_ms, r.downtime_max_ms),
            count("unique"),
            count("reference"),
            count("remote_reference"),
            forwarded.map_or_else(|| "-".into(), |n| n.to_string()),
            r.sent_as().map_or_else(|| "-".into(), |n| format!("{n:.3}")),
            r.report["totals"]["cpu_s_per_gib"]
                .as_f64()
                .filter(|s| *s > 0.0)
                .map_or_else(|| "-".into(), |s| format!("{s:.2}")),
            mb(r.compared),
            r.services.to_string(),
        ];
        let right = |(n, c): (usize, String)| {
            Cell::new(c).set_alignment(if n == 0 { CellAlignment::Left } else { CellAlignment::Right })
        };
        t.add_row(cells.into_iter().enumerate().map(right));
    }
    t.to_string()
}

/// Everything, for programs.
pub fn json(rounds: &[Round], file: &Path) -> Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let text = serde_json::to_string_pretty(&serde_json::json!({ "rounds": rounds }))?;
    std::fs::write(file, text).with_context(|| format!("write {}", file.display()))
}

/// One bar chart.
#[derive(Debug)]
pub struct Panel<'a> {
    /// What the bars show, and in which unit.
    pub title: &'a str,
    /// Under each bar.
    pub names: &'a [&'a str],
    /// Its height.
    pub values: &'a [f64],
    /// Digits after the point.
    pub digits: usize,
    /// A line across, if there is something to be compared with.
    pub line: Option<f64>,
}

/// Bytes on the core link and group time of each method, side by side.
pub fn picture(rounds: &[Round], file: &Path) -> Result<()> {
    let bytes: Vec<f64> = rounds.iter().map(|r| r.core.forward as f64 / 1e6).collect();
    let times: Vec<f64> = rounds.iter().map(|r| r.group_ms / 1e3).collect();
    let names: Vec<&str> = rounds.iter().map(|r| r.method.as_str()).collect();
    let panel = |title, values| Panel { title, names: &names, values, digits: 1, line: None };
    panels(&[panel("MB on the core link", &bytes), panel("group time, s", &times)], file)
}

/// Draws bar charts, two in a row.
pub fn panels(panels: &[Panel<'_>], file: &Path) -> Result<()> {
    if let Some(dir) = file.parent() {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let rows = panels.len().div_ceil(2);
    let height = u32::try_from(rows).unwrap_or(1) * 380;
    let root = SVGBackend::new(file, (900, height)).into_drawing_area();
    let fail = |e: &dyn std::fmt::Display| anyhow!("draw {}: {e}", file.display());
    root.fill(&WHITE).map_err(|e| fail(&e))?;
    for (area, panel) in root.split_evenly((rows, 2)).iter().zip(panels) {
        bars(area, panel).map_err(|e| fail(&e))?;
    }
    root.present().map_err(|e| fail(&e))
}

fn bars<'a>(
    area: &DrawingArea<SVGBackend<'a>, plotters::coord::Shift>,
    panel: &Panel<'_>,
) -> Result<(), DrawingAreaErrorKind<<SVGBackend<'a> as DrawingBackend>::ErrorType>> {
    let Panel { title, names, values, digits, line } = *panel;
    let top = values.iter().copied().chain(line).fold(1.0f64, f64::max) * 1.15;
    let n = i32::try_from(names.len()).unwrap_or(i32::MAX);
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 18))
        .margin(12)
        .x_label_area_size(30)
        .y_label_area_size(55)
        .build_cartesian_2d((0..n - 1).into_segmented(), 0.0..top)?;
    chart
        .configure_mesh()
        .disable_x_mesh()
        .light_line_style(TRANSPARENT)
        .x_label_formatter(&|x| match x {
            SegmentValue::CenterOf(i) => {
                usize::try_from(*i).ok().and_then(|i| names.get(i)).map_or(String::new(), |s| (*s).to_owned())
            }
            _ => String::new(),
        })
        .x_labels(names.len())
        .draw()?;
    chart.draw_series((0..n).zip(values).map(|(i, &v)| {
        let mut bar = Rectangle::new(
            [(SegmentValue::Exact(i), 0.0), (SegmentValue::Exact(i + 1), v)],
            BLUE.mix(0.6).filled(),
        );
        bar.set_margin(0, 0, 18, 18);
        bar
    }))?;
    if let Some(y) = line {
        let ends = [(SegmentValue::Exact(0), y), (SegmentValue::Exact(n), y)];
        chart.draw_series(std::iter::once(PathElement::new(ends, RED.stroke_width(2))))?;
    }
    chart.draw_series((0..n).zip(values).map(|(i, &v)| {
        let style = TextStyle::from(("sans-serif", 14).into_font()).pos(Pos::new(HPos::Center, VPos::Bottom));
        // Above the bar, and not across the line.
        let over = line.filter(|y| (v..v + top * 0.08).contains(y)).unwrap_or(v);
        Text::new(format!("{v:.digits$}"), (SegmentValue::CenterOf(i), over + top * 0.02), style)
    }))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::CoreBytes;
    use crate::ram::Census;

    fn round(method: &str, bytes: u64) -> Round {
        Round {
            method: method.into(),
            core: CoreBytes { forward: bytes, back: 1, forward_packets: 2 },
            wall_ms: 1.0,
            group_ms: 2000.0,
            prepare_ms: 3.0,
            mean_ms: 4.0,
            downtime_median_ms: 5.0,
            downtime_max_ms: 6.0,
            cpu: crate::round::Cpu::default(),
            compared: 7_000_000,
            services: 4,
            census: Census::default(),
            others: None,
            report: serde_json::json!({"vms": [{"pages": {"unique": 3}}, {"pages": {"unique": 4}}]}),
        }
    }

    #[test]
    fn the_table_has_shares_and_sums() {
        let text = table(&[round("oc", 100_000_000), round("irlm", 46_000_000)]);
        assert!(text.contains("0.460") && text.contains(" 7 ") && text.contains("100.0"), "{text}");
    }

    #[test]
    fn the_picture_is_drawn() {
        let file = std::env::temp_dir().join(format!("irlm-lab-picture-{}.svg", std::process::id()));
        picture(&[round("oc", 100_000_000), round("irlm", 46_000_000)], &file).unwrap();
        let svg = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert!(svg.contains("irlm") && svg.contains("100.0") && svg.contains("46.0"), "{svg}");
    }
}
