//! What TLS costs a move by IRLM and, beside it, what QEMU's own TLS costs a move by QEMU alone.

use super::super::{Only, Point};
use anyhow::Result;
use irlm_tests::cache::Cache;
use irlm_tests::irlm::Method;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::Rates;
use irlm_tests::plain;
use irlm_tests::round::{self, Cpu, Plan};
use irlm_tests::speeds::{SPEEDS, Speed};
use std::path::Path;
use std::time::Duration;

/// Moves of ours, and of QEMU's, with TLS and without at each speed.
const TIMES: (usize, usize) = (9, 3);
/// Longest time for one move.
const WAIT: Duration = Duration::from_secs(900);

/// What one move came to.
struct Came {
    /// On the core link, forward.
    bytes: f64,
    /// Time of the whole group.
    ms: f64,
    /// Seconds of processor time a GiB of guest memory, without the guests' own.
    cpu: f64,
}

/// The same move with TLS and without, some times each.
struct Pair {
    tls: Vec<Came>,
    plain: Vec<Came>,
}

/// What is compared of a pair.
struct Figure {
    /// In the names of points.
    name: &'static str,
    what: &'static str,
    unit: &'static str,
    of: fn(&Came) -> f64,
    /// The value is that with TLS by that without; if not, that with TLS.
    relative: bool,
    /// Which of several moves counts.
    counts: Counts,
}

/// Times of the same move differ by a third here, because guests and whatever else runs take the two processors too. That
/// only ever makes a move slower.
#[derive(Clone, Copy)]
enum Counts {
    Median,
    Least,
}

const FIGURES: [Figure; 3] = [
    Figure {
        name: "bytes",
        what: "core-link bytes",
        unit: "MB",
        of: |c| c.bytes / 1e6,
        relative: true,
        counts: Counts::Median,
    },
    Figure {
        name: "time",
        what: "group time",
        unit: "ms",
        of: |c| c.ms,
        relative: true,
        counts: Counts::Least,
    },
    Figure {
        name: "cpu",
        what: "processor time",
        unit: "s a GiB",
        of: |c| c.cpu,
        relative: false,
        counts: Counts::Least,
    },
];

/// Who moves the guests: how its points are called, and how a rack of its is described.
struct Mover {
    id: &'static str,
    says: &'static str,
}

const OURS: Mover = Mover { id: "", says: "irlm, direct = never" };
const QEMUS: Mover = Mover { id: "qemu-", says: "QEMU alone (as oc), its own TLS with verify-peer" };

/// Point 2.
pub(super) fn points(points: &mut Vec<Point>, irlm: &Path, only: &Only) -> Result<()> {
    for (speed, most) in SPEEDS.into_iter().zip([1.05, 1.05, 1.15]) {
        let wanted = |m: &Mover| FIGURES.iter().any(|f| only.wants(&id(m, f, speed)));
        if wanted(&OURS) {
            compared(points, &OURS, speed, &by_irlm(irlm, speed)?, [Some(1.01), Some(most), None])?;
        }
        if wanted(&QEMUS) {
            compared(points, &QEMUS, speed, &by_qemu(speed)?, [None; 3])?;
        }
    }
    Ok(())
}

fn id(mover: &Mover, figure: &Figure, speed: Speed) -> String {
    format!("2-{}{}-{}", mover.id, figure.name, speed.name)
}

fn lab(speed: Speed, tls: bool) -> Result<Lab> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 2, 2, 256);
    let rate = |mbit: Option<u64>| mbit.map(|m| m * 1_000_000);
    spec.rates = Rates { edge: rate(speed.edge), core: rate(speed.core) };
    spec.tls = tls;
    Lab::new(cache, spec, &|line| eprintln!("{line}"))
}

/// In turn, so that what else the machine does falls on both alike.
fn by_irlm(irlm: &Path, speed: Speed) -> Result<Pair> {
    let mut pair = Pair { tls: Vec::new(), plain: Vec::new() };
    for _ in 0..TIMES.0 {
        pair.plain.push(once_by_irlm(irlm, speed, false)?);
        pair.tls.push(once_by_irlm(irlm, speed, true)?);
    }
    Ok(pair)
}

fn once_by_irlm(irlm: &Path, speed: Speed, tls: bool) -> Result<Came> {
    let lab = lab(speed, tls)?;
    // With the agents in the path at every speed: what they encrypt is what is asked about.
    let extra = "direct = \"never\"";
    let plan = Plan { method: Method::Irlm, irlm, writers: 0, extra, wait: WAIT, others: None };
    let r = round::run(&lab, &plan, &|_, _| {})?;
    Ok(Came { bytes: r.core.forward as f64, ms: r.group_ms, cpu: r.cpu.per_gib(r.compared) })
}

fn by_qemu(speed: Speed) -> Result<Pair> {
    let lab = lab(speed, true)?;
    let mut pair = Pair { tls: Vec::new(), plain: Vec::new() };
    for _ in 0..TIMES.1 {
        pair.plain.push(once_by_qemu(&lab, false)?);
        pair.tls.push(once_by_qemu(&lab, true)?);
    }
    Ok(pair)
}

fn once_by_qemu(lab: &Lab, tls: bool) -> Result<Came> {
    let mut guests = lab.start_guests()?;
    if tls {
        plain::encrypt(lab, &mut guests)?;
    }
    let bytes = lab.net.core_bytes()?;
    let cpu = guests.spent();
    let (_, time) = plain::migrate(lab, &mut guests, false, WAIT)?;
    let cpu = Cpu { agents: 0.0, qemus: guests.spent() - cpu };
    let bytes = lab.net.core_bytes()?.since(bytes).forward;
    let mut compared = 0;
    for p in &mut guests.pairs {
        compared += lab.compare(p)?.bytes;
        p.resume_and_check()?;
    }
    Ok(Came { bytes: bytes as f64, ms: time.as_secs_f64() * 1e3, cpu: cpu.per_gib(compared) })
}

fn compared(
    points: &mut Vec<Point>,
    mover: &Mover,
    speed: Speed,
    pair: &Pair,
    bounds: [Option<f64>; 3],
) -> Result<()> {
    for (figure, bound) in FIGURES.iter().zip(bounds) {
        point(mover, speed, pair, figure, bound).print(points)?;
    }
    Ok(())
}

fn point(mover: &Mover, speed: Speed, pair: &Pair, figure: &Figure, bound: Option<f64>) -> Point {
    let (tls, plain) = (figure.over(&pair.tls), figure.over(&pair.plain));
    let (value, what) = if figure.relative {
        (tls / plain, format!("{} with TLS by that in plain text", figure.what))
    } else {
        (tls, format!("{} with TLS, {}", figure.what, figure.unit))
    };
    let how = format!(
        "{}, 2x2 guests of 256 MiB, {}, {} of {} moves each: {tls:.2} {unit} with TLS, {plain:.2} {unit} without",
        mover.says,
        speed.name,
        figure.counts.says(),
        pair.tls.len(),
        unit = figure.unit
    );
    let holds = bound.is_none_or(|b| value <= b);
    Point { id: id(mover, figure, speed), what, value: Some(value), bound, holds, how }
}

impl Figure {
    fn over(&self, moves: &[Came]) -> f64 {
        let mut all: Vec<f64> = moves.iter().map(self.of).collect();
        all.sort_by(f64::total_cmp);
        let n = match self.counts {
            Counts::Median => all.len() / 2,
            Counts::Least => 0,
        };
        all.get(n).copied().unwrap_or(f64::NAN)
    }
}

impl Counts {
    fn says(self) -> &'static str {
        match self {
            Self::Median => "median",
            Self::Least => "least",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Moves of so many MB, and everything else the same.
    fn moves(mb: [f64; 3]) -> Vec<Came> {
        mb.map(|mb| Came { bytes: mb * 1e6, ms: 100.0, cpu: 2.0 }).into()
    }

    #[test]
    fn medians_or_the_least_are_compared_and_only_a_bound_can_be_broken() {
        let pair = Pair { tls: moves([300.0, 102.0, 1.0]), plain: moves([100.0, 2.0, 900.0]) };
        let of = |mover, figure, bound| point(mover, SPEEDS[0], &pair, &FIGURES[figure], bound);
        let ours = of(&OURS, 0, Some(1.01));
        assert_eq!((&*ours.id, ours.holds), ("2-bytes-100-mbit", false));
        assert!((ours.value.unwrap() - 1.02).abs() < 1e-9, "{}", ours.how);
        assert!(of(&OURS, 0, Some(1.03)).holds);
        let qemus = of(&QEMUS, 0, None);
        assert_eq!((&*qemus.id, qemus.holds), ("2-qemu-bytes-100-mbit", true));
        let mut times = Pair { tls: moves([1.0; 3]), plain: moves([1.0; 3]) };
        (times.tls[2].ms, times.plain[1].ms) = (90.0, 900.0);
        let time = point(&OURS, SPEEDS[0], &times, &FIGURES[1], None);
        assert!((time.value.unwrap() - 0.9).abs() < 1e-9 && time.how.contains("least of 3"), "{}", time.how);
        // Processor time is told as it is, of both.
        let cpu = of(&QEMUS, 2, None);
        assert!((cpu.value.unwrap() - 2.0).abs() < 1e-9);
        assert!(cpu.how.contains("2.00 s a GiB with TLS, 2.00 s a GiB without"), "{}", cpu.how);
    }
}
