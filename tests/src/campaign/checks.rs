//! Whether what was said of a VM is true: exit codes, reports and statuses held against where its copies were seen. Fields
//! that the program under test does not have yet are not asked for.

use super::vm::Whereabouts;
use serde_json::Value;

/// What is true of a VM when all is quiet.
#[derive(Debug, Clone)]
pub(super) struct Truth {
    pub(super) name: String,
    pub(super) place: Whereabouts,
    /// The run state of the copy that is its owner's, in its monitor's word; "ended" if there is none.
    pub(super) state: String,
    /// The schedule killed what it ran in: nothing but "never two" is asked.
    pub(super) excused: bool,
    /// It had ended well before the report was written.
    pub(super) ended_before: bool,
    /// What its owner did since may have changed its run state.
    pub(super) touched: bool,
}

impl Truth {
    fn at_target(&self) -> bool {
        matches!(self.place, Whereabouts::Runs(n) | Whereabouts::Stands(n) if n > 0)
    }

    fn at_source(&self) -> bool {
        matches!(self.place, Whereabouts::Runs(0) | Whereabouts::Stands(0))
    }
}

/// The exit codes of `irlm evacuate`, and what each says.
const SAYS: [(i32, &str); 5] =
    [(0, "all moved"), (2, "some stayed"), (3, "in doubt"), (4, "nothing was started"), (5, "some lost")];

/// What is untrue in the report of an evacuation that ended with `code`. `crossed`: other evacuations of the same VMs may have
/// moved since what stayed here.
pub(super) fn report(report: &Value, code: i32, truths: &[Truth], crossed: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    let Some((_, says)) = SAYS.iter().find(|s| s.0 == code) else {
        return vec![format!("it ended with {code}, which is none of its exit codes")];
    };
    let none = Vec::new();
    let rows = report["vms"].as_array().unwrap_or(&none);
    let verdicts: Vec<&str> = rows.iter().filter_map(|r| r["verdict"].as_str()).collect();
    let some = |v: &str| verdicts.contains(&v);
    let fits = match code {
        0 => verdicts.len() == truths.len() && verdicts.iter().all(|v| *v == "moved"),
        2 => some("stayed") && !some("in-doubt") && !some("open"),
        3 => some("in-doubt") || some("open"),
        4 => !some("in-doubt") && !some("open"),
        // One that has moved and whose process has ended since counts, too.
        _ => some("lost") || rows.iter().any(|r| r["verdict"] == "moved" && r["state"] == "ended"),
    };
    if !fits {
        wrong.push(format!("it ended with {code} ({says}), and its rows say {}", verdicts.join(", ")));
    }
    for t in truths {
        let row = rows.iter().find(|r| r["name"] == t.name.as_str());
        let said = row.and_then(|r| r["verdict"].as_str());
        let is = format!("it is {:?}, {}", t.place, t.state);
        match said {
            Some("moved") if !t.excused && !t.at_target() => {
                wrong.push(format!("{}: moved, it says, and {is}", t.name));
            }
            Some("stayed") if !t.excused && !crossed && !t.at_source() => {
                wrong.push(format!("{}: stayed, it says, and {is}", t.name));
            }
            Some("stayed") if row.is_some_and(|r| r["error"].as_str().is_none_or(str::is_empty)) => {
                wrong.push(format!("{}: it does not say why it stayed", t.name));
            }
            None if code == 4 && !t.excused && !crossed && !t.at_source() => {
                wrong.push(format!("{}: nothing was started, it says, and {is}", t.name));
            }
            _ => {}
        }
        let state = row.and_then(|r| r["state"].as_str());
        match state {
            // Nobody can ask at a host whose agent is gone; that must be said.
            Some("") if row.is_some_and(unseen) => {}
            Some(state)
                if !t.touched && !crossed && !t.excused && said != Some("in-doubt") && state != t.state =>
            {
                wrong.push(format!("{}: {state}, it says, and {is}", t.name));
            }
            None if t.ended_before && matches!(said, Some("stayed" | "moved")) => {
                let said = said.unwrap_or_default();
                wrong.push(format!("{}: {said}, it says, and its process had ended", t.name));
            }
            _ => {}
        }
    }
    wrong
}

/// Whether a row says that nobody could look.
fn unseen(row: &Value) -> bool {
    let why = row["error"].as_str().unwrap_or_default();
    why.contains("cannot be reached") || why.contains("was not seen")
}

/// Phases in which something is still to come.
const BUSY: [&str; 6] = ["pushing", "migrating", "stopped", "loaded", "gave-up", "fetching"];

/// What agents say of one VM.
struct Said<'a> {
    host: &'a str,
    vm: &'a str,
    role: &'a str,
    phase: &'a str,
}

fn said<'a>(status: &'a Value, group: &'a str) -> impl Iterator<Item = Said<'a>> {
    let hosts = status.as_array().into_iter().flatten();
    hosts.flat_map(move |h| {
        let groups = h["groups"].as_array().into_iter().flatten().filter(move |g| g["group"] == group);
        groups.flat_map(|g| g["vms"].as_array().into_iter().flatten()).map(move |v| Said {
            host: h["host"].as_str().unwrap_or("?"),
            vm: v["name"].as_str().unwrap_or("?"),
            role: v["role"].as_str().unwrap_or("?"),
            phase: v["phase"].as_str().unwrap_or("?"),
        })
    })
}

/// What is still under way by what the agents say, VMs of which nothing is asked left out.
pub(super) fn busy(status: &Value, group: &str, excused: impl Fn(&str) -> bool) -> Option<String> {
    said(status, group)
        .find(|s| BUSY.contains(&s.phase) && !excused(s.vm))
        .map(|s| format!("{} says of {} ({}): {}", s.host, s.vm, s.role, s.phase))
}

/// Whether a group was prepared and never started, by everybody who knows it.
pub(super) fn only_prepared(status: &Value, group: &str) -> bool {
    let mut all = said(status, group).peekable();
    all.peek().is_some()
        && all.all(|s| matches!(s.phase, "prepared" | "cancelled" | "failed"))
        && said(status, group).any(|s| s.phase == "prepared")
}

/// What is untrue in the agents' statuses.
pub(super) fn status(status: &Value, group: &str, truths: &[Truth], others: bool) -> Vec<String> {
    let mut wrong = Vec::new();
    for h in status.as_array().into_iter().flatten() {
        // Who forgets a group that is over says nothing untrue.
        if let Some(e) = h["error"].as_str().filter(|e| !e.contains("knows no group")) {
            wrong.push(format!("{} does not answer: {e}", h["host"].as_str().unwrap_or("?")));
        }
    }
    for s in said(status, group) {
        let Some(t) = truths.iter().find(|t| t.name == s.vm && !t.excused) else { continue };
        let runs = matches!(t.place, Whereabouts::Runs(_));
        let untrue = match (s.role, s.phase) {
            ("target", "running") => !(t.at_target() && (runs || t.touched)),
            ("target", "left-paused") => !t.at_target(),
            ("source", "done") => !t.at_target(),
            // Another group, or a later run, may have moved it since.
            ("source", "failed" | "cancelled") => !others && !t.at_source(),
            (_, "in-doubt") => runs,
            _ => false,
        };
        if untrue {
            wrong.push(format!(
                "{} says of {} ({}): {}, and it is {:?}, {}",
                s.host, s.vm, s.role, s.phase, t.place, t.state
            ));
        }
    }
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use Whereabouts::{Nowhere, Runs, Stands};
    use serde_json::json;

    fn truth(place: Whereabouts) -> Truth {
        let state = if matches!(place, Runs(_)) { "running" } else { "paused" };
        let (name, state) = ("vm0".into(), state.into());
        Truth { name, place, state, excused: false, ended_before: false, touched: false }
    }

    fn row(verdict: &str) -> Value {
        json!({ "vms": [{ "name": "vm0", "verdict": verdict, "error": "why" }] })
    }

    #[test]
    fn a_true_report_is_taken() {
        assert!(report(&row("moved"), 0, &[truth(Runs(1))], false).is_empty());
        assert!(report(&row("stayed"), 2, &[truth(Runs(0))], false).is_empty());
        assert!(report(&row("in-doubt"), 3, &[truth(Runs(1))], false).is_empty());
        assert!(report(&json!({ "vms": [] }), 4, &[truth(Stands(0))], false).is_empty());
        // A second evacuation has moved since what stayed in the first.
        assert!(report(&row("stayed"), 2, &[truth(Runs(1))], true).is_empty());
    }

    #[test]
    fn an_untrue_report_is_not() {
        for (verdict, code, place) in [
            ("moved", 0, Runs(0)),
            ("moved", 0, Nowhere),
            ("stayed", 2, Runs(1)),
            ("stayed", 0, Runs(0)),
            ("moved", 2, Runs(1)),
            ("moved", 3, Runs(1)),
            ("in-doubt", 4, Runs(0)),
            ("moved", 5, Runs(1)),
            ("moved", 1, Runs(1)),
        ] {
            let wrong = report(&row(verdict), code, &[truth(place)], false);
            assert!(!wrong.is_empty(), "{verdict} with {code} of {place:?}");
        }
        assert!(!report(&json!({ "vms": [] }), 4, &[truth(Runs(1))], false).is_empty());
        assert!(!report(&json!({ "vms": [] }), 0, &[truth(Runs(1))], false).is_empty());
        let mute = json!({ "vms": [{ "name": "vm0", "verdict": "stayed" }] });
        assert!(!report(&mute, 2, &[truth(Runs(0))], false).is_empty());
    }

    #[test]
    fn the_run_state_is_compared_where_the_report_has_it() {
        let says = |state| json!({ "vms": [{ "name": "vm0", "verdict": "moved", "state": state }] });
        assert!(report(&says("running"), 0, &[truth(Runs(1))], false).is_empty());
        assert!(!report(&says("paused"), 0, &[truth(Runs(1))], false).is_empty());
        assert!(!report(&says(""), 0, &[truth(Runs(1))], false).is_empty());
        let unseen = json!({ "vms": [{ "name": "vm0", "verdict": "moved", "state": "",
            "error": "t0 does not answer, and what it does there was not seen" }] });
        assert!(report(&unseen, 0, &[truth(Runs(1))], false).is_empty());
        let touched = Truth { touched: true, ..truth(Runs(1)) };
        assert!(report(&says("paused"), 0, &[touched], false).is_empty());
        let ended = Truth { excused: true, ended_before: true, ..truth(Nowhere) };
        assert!(!report(&row("stayed"), 2, std::slice::from_ref(&ended), false).is_empty());
        let said = json!({ "vms": [{ "name": "vm0", "verdict": "stayed", "error": "e", "state": "ended" }] });
        assert!(report(&said, 2, &[ended], false).is_empty());
    }

    fn agents(role: &str, phase: &str) -> Value {
        let vm = json!({ "name": "vm0", "role": role, "phase": phase });
        json!([{ "host": "s0", "error": null, "groups": [{ "group": "lab", "vms": [vm] }] }])
    }

    #[test]
    fn statuses_are_held_against_what_runs() {
        for (role, phase, place, ok) in [
            ("target", "running", Runs(1), true),
            ("target", "running", Runs(0), false),
            ("target", "running", Stands(1), false),
            ("source", "done", Runs(1), true),
            ("source", "done", Runs(0), false),
            ("source", "failed", Runs(0), true),
            ("source", "cancelled", Runs(1), false),
            ("source", "in-doubt", Stands(1), true),
            ("target", "in-doubt", Runs(1), false),
        ] {
            let wrong = status(&agents(role, phase), "lab", &[truth(place)], false);
            assert_eq!(wrong.is_empty(), ok, "{role} {phase} {place:?}: {wrong:?}");
        }
        let elsewhere =
            |others| status(&agents("source", "failed"), "lab", &[truth(Runs(1))], others).is_empty();
        assert!(!elsewhere(false) && elsewhere(true), "another group may have moved it");
        let excused = Truth { excused: true, ..truth(Nowhere) };
        assert!(status(&agents("target", "running"), "lab", &[excused], false).is_empty());
        assert!(status(&agents("target", "running"), "else", &[truth(Runs(0))], false).is_empty());
        let silent = json!([{ "host": "s0", "error": "no route", "groups": [] }]);
        assert!(!status(&silent, "lab", &[truth(Runs(0))], false).is_empty());
    }

    #[test]
    fn what_is_under_way_is_seen() {
        assert!(busy(&agents("source", "migrating"), "lab", |_| false).is_some());
        assert!(busy(&agents("source", "migrating"), "lab", |vm| vm == "vm0").is_none());
        assert!(busy(&agents("source", "done"), "lab", |_| false).is_none());
        assert!(only_prepared(&agents("source", "prepared"), "lab"));
        assert!(!only_prepared(&agents("source", "done"), "lab"));
        assert!(!only_prepared(&json!([]), "lab"));
    }
}
