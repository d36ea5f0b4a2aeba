//! What is known of VMs' writes, as `irlm evacuate --dry-run` and `irlm status` print it.

use super::tables::{right, table};
use crate::control::api::SamplerStatus;
use crate::control::coordinator::forecast::{GroupForecast, VmForecast};
use crate::obs::human::bytes;
use crate::obs::say::outln;
use comfy_table::Cell;

/// Bytes of so many pages.
fn pages(n: f64) -> String {
    bytes((n.max(0.0) * 4096.0) as u64)
}

fn or_dash(text: Option<String>) -> Cell {
    right(text.unwrap_or_else(|| "-".to_owned()))
}

/// The forecast of each VM, and the lines below it.
pub(super) fn print_forecast(found: &GroupForecast) {
    let mut t = table(&[
        "turn",
        "VM",
        "from",
        "dirties/s",
        "working set",
        "hot",
        "to send",
        "at Mbit/s",
        "rounds",
        "time",
        "downtime",
        "needs Mbit/s",
        "seen by",
    ]);
    for v in &found.vms {
        let s = v.seen.as_ref();
        let f = v.forecast.as_ref();
        let seconds = |x: f64| format!("{x:.2} s");
        t.add_row(vec![
            right(v.turn),
            Cell::new(&v.name),
            Cell::new(&v.source),
            or_dash(s.map(|s| pages(s.writes.rate))),
            or_dash(s.map(|s| pages(s.writes.working_set))),
            or_dash(s.map(|s| pages(s.hot_pages as f64))),
            or_dash(s.map(|s| pages(s.data_pages as f64))),
            right(v.mbit),
            or_dash(f.map(|f| if f.converges { f.rounds.to_string() } else { "no end".into() })),
            or_dash(f.filter(|f| f.converges).map(|f| seconds(f.seconds))),
            or_dash(f.map(|f| {
                if f.converges { seconds(f.downtime) } else { format!("> {}", seconds(f.downtime)) }
            })),
            or_dash(s.map(|_| format!("{:.1}", v.needs_mbit))),
            Cell::new(s.map_or("not watched", |s| s.sampler.name())),
        ]);
    }
    outln!("{t}");
    for p in &found.problems {
        outln!("! {p}");
    }
    for line in notes(&found.vms) {
        outln!("{line}");
    }
}

/// Where the figures are from, each thing once.
fn notes(vms: &[VmForecast]) -> Vec<String> {
    let mut out = Vec::new();
    let mut say = |line: String| {
        if !out.contains(&line) {
            out.push(line);
        }
    };
    for v in vms {
        say(format!("{} Mbit/s is from {}", v.mbit, v.mbit_from));
        let Some(s) = &v.seen else { continue };
        say(format!("{} sees {}", s.sampler.name(), s.sampler.sees()));
        if !s.note.is_empty() {
            say(format!("why not another sampler: {}", s.note));
        }
        if s.lost > 0 {
            say(format!("! {}: the place of {} dirtied pages was lost", v.name, s.lost));
        }
        if v.forecast.is_some_and(|f| !f.converges) {
            say(format!("! {} does not converge at {} Mbit/s: it needs {:.1}", v.name, v.mbit, v.needs_mbit));
        }
    }
    out.push(
        "forecasts are for a VM alone on its link, each page sent in full once: shared contents make it less"
            .into(),
    );
    out
}

/// An agent's samplers, a line each.
pub(super) fn print_samplers(host: &str, samplers: &[SamplerStatus]) {
    for s in samplers {
        match &s.refused {
            None => outln!("{host}: dirty pages: {}: sees {}", s.name, s.sees),
            Some(why) => outln!("{host}: dirty pages: not {}: {why}", s.name),
        }
    }
}
