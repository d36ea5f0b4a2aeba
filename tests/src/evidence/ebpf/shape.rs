//! The class tree on the core-facing port: the budget that a group keeps, also while its hosts finish one by one, and
//! that nothing of it stays behind.

use super::super::{Point, at_most};
use anyhow::{Context as _, Result, bail};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{Irlm, Method, Proc, agent};
use irlm_tests::janitor::Run;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::{Host, Net, NetSpec, Rates};
use irlm_tests::ports::{Port, Ports, Trace};
use irlm_tests::round::{self, Plan};
use rustix::process::Signal;
use std::path::Path;
use std::time::{Duration, Instant};

const MBIT: u64 = 1_000_000;
const EDGE: u64 = 100;
/// The whole group's, below what one host's edge link can carry, so that the budget is what is felt.
const BUDGET: u64 = 60;
/// The window over which the budget must hold, seconds, and how far its rate may be off.
const WINDOW: f64 = 2.0;
const OFF: f64 = 0.05;
/// How soon others must have what a host leaves that finishes, seconds.
const REDIVIDE: f64 = 1.0;

/// Longest evacuation.
const WAIT: Duration = Duration::from_secs(240);

const POLICY: &str = "[port]\nshaping = \"own\"\nlink_mbit = 100\nothers_mbit = 5\n\
                      rack_prefixes = [\"10.77.1.0/24\"]\n";

/// What the counters showed of one evacuation.
#[derive(Debug, serde::Serialize)]
struct Seen {
    hosts: usize,
    /// Steady from the first half second at the full rate until the first host finished, seconds since the start.
    from: f64,
    to: f64,
    windows: usize,
    /// Largest deviation of a window's rate from the budget, as a part of it, above and below.
    above: f64,
    below: f64,
    mean_mbit: f64,
    /// The core link, every half second, Mbit/s.
    every_half_second: Vec<f64>,
}

/// Point 3.
pub(super) fn budgets(irlm: &Path, out: &Path, points: &mut Vec<Point>) -> Result<()> {
    let mut all = Vec::new();
    for hosts in [1, 2, 4] {
        let lab = lab(hosts, true)?;
        let (seen, how) = evacuate(&lab, irlm, hosts, Method::Irlm)?;
        let what = "largest deviation of the core-link rate from the group's budget over any 2 s window";
        at_most(points, &format!("3-budget-{hosts}"), what, &how, seen.above.max(seen.below), OFF)?;
        all.push(seen);
        if hosts > 1 {
            redivide(&lab, irlm, hosts, points)?;
        }
    }
    // Without our tree the share is kept by TCP's own pacing; how coarsely is to be known, not to be bounded.
    // So is how QEMU keeps a limit of its own.
    let pacing =
        ("3-pacing-2", Method::Irlm, false, "TCP's pacing because the ports have trees of somebody else's");
    let qemu = "QEMU's own max-bandwidth";
    let others =
        [pacing, ("3-oc-2", Method::Oc, true, qemu), ("3-multifd-2", Method::QemuMultifdZstd, true, qemu)];
    for (id, method, free, by) in others {
        let (seen, how) = evacuate(&lab(2, free)?, irlm, 2, method)?;
        let what = format!("as 3-budget, kept by {by}");
        let (id, value) = (id.to_owned(), Some(seen.above.max(seen.below)));
        Point { id, what, value, bound: None, holds: true, how }.print(points)?;
        all.push(seen);
    }
    std::fs::create_dir_all(out).with_context(|| format!("make {}", out.display()))?;
    let file = out.join("budget.json");
    std::fs::write(&file, serde_json::to_string_pretty(&all)?)
        .with_context(|| format!("write {}", file.display()))
}

/// One guest a host. `free`: the ports are the agents' to shape.
fn lab(hosts: usize, free: bool) -> Result<Lab> {
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, hosts, 1, 256);
    spec.rates = Rates { edge: Some(EDGE * MBIT), core: Some(1000 * MBIT) };
    spec.host_qdisc = !free;
    spec.policy = Some(POLICY.to_owned());
    Lab::new(cache, spec, &|line| eprintln!("{line}"))
}

/// One evacuation, and how it was measured.
fn evacuate(lab: &Lab, irlm: &Path, hosts: usize, method: Method) -> Result<(Seen, String)> {
    let watch = Ports::watch(&lab.net, &ports(hosts), Instant::now())?;
    let extra = group_file();
    let plan = Plan { method, irlm, writers: 0, extra: &extra, wait: WAIT, others: None };
    let round = round::run(lab, &plan, &|_, _| {});
    let traces = watch.end()?;
    let seconds = round?.group_ms / 1e3;
    // What kept the share is what this measures.
    let mode = if lab.spec.host_qdisc { "shaping tag-only" } else { "shaping own" };
    for h in 0..hosts {
        let log = std::fs::read_to_string(lab.dir(Host::Source(h)).join("agent.log"))?;
        if !log.contains(mode) {
            bail!("the agent of s{h} does not say `{mode}`; its log: {log}");
        }
    }
    let seen = look(&traces, hosts)?;
    let how = format!(
        "{hosts} source hosts with a guest of 256 MiB each, edge {EDGE} Mbit/s, budget {BUDGET} Mbit/s, method {}, {seconds:.1} \
         s; core interface counter every 25 ms, {} windows of {WINDOW} s between {:.1} s (first half second at the full rate) \
         and {:.1} s (first host finished); mean {:.2} Mbit/s, above {:.4}, below {:.4}",
        method.name(),
        seen.windows,
        seen.from,
        seen.to,
        seen.mean_mbit,
        seen.above,
        seen.below
    );
    Ok((seen, how))
}

/// A budget, and contents that are not compressed, so that there is long enough to look.
fn group_file() -> String {
    format!("budget_mbit = {BUDGET}\ncompress = \"off\"")
}

/// The core link, and each source host's port.
fn ports(hosts: usize) -> Vec<Port> {
    std::iter::once(Port::Core).chain((0..hosts).map(|h| Port::Host(Host::Source(h)))).collect()
}

/// Hosts are made to finish together, so one is made to finish early: its VM's target dies, and the VM stays.
fn redivide(lab: &Lab, irlm: &Path, hosts: usize, points: &mut Vec<Point>) -> Result<()> {
    let mut guests = lab.start_guests()?;
    let running = Irlm::start(lab, irlm, &guests, &group_file())?;
    let watch = Ports::watch(&lab.net, &ports(hosts), Instant::now())?;
    let before = lab.net.core_bytes()?;
    let mut evacuate = running.evacuate(Method::Gm, &lab.top().join("redivide.json"), true)?;
    let until = Instant::now() + WAIT;
    // Every host is well under way, and none nearly through.
    while lab.net.core_bytes()?.since(before).forward < hosts as u64 * (20 << 20) {
        if Instant::now() > until || evacuate.ended()?.is_some() {
            bail!("nothing moved: {}\n{}", evacuate.said(), running.logs());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    guests.pairs[0].target.kill();
    let code = evacuate.wait(WAIT)?;
    let traces = watch.end()?;
    if code != 2 {
        bail!(
            "irlm evacuate ended with {code}, not with a VM that stayed: {}\n{}",
            evacuate.said(),
            running.logs()
        );
    }
    let (low, last) = after_the_first(&traces)?;
    let what = "seconds until the others use what a host leaves that finishes";
    let how = format!(
        "{hosts} source hosts as above, method gm; one host's VM stays because its target's QEMU was killed; from the \
         last 50 ms of traffic at its port until a quarter second on the core link is at 0.95 of the budget again; the others \
         went on for {last:.1} s"
    );
    at_most(points, &format!("3-redivide-{hosts}"), what, &how, low, REDIVIDE)
}

fn steps(from: f64, to: f64, step: f64) -> impl Iterator<Item = f64> {
    (0..).map(move |i| from + f64::from(i) * step).take_while(move |t| *t <= to)
}

/// Two readings of a counter, seconds.
const TICK: f64 = 0.05;

/// When a port had sent its last: from there on it sends next to nothing.
fn finished(t: &Trace, from: f64) -> f64 {
    let quiet = 0.02 * (BUDGET * MBIT) as f64;
    let end = t.0.last().map_or(from, |s| s.0);
    let busy = steps(from, end - TICK, TICK).filter(|at| t.rate(*at, at + TICK) > quiet);
    busy.last().map_or(from, |at| at + TICK)
}

/// How long the rate stayed low after the first host finished, and how long the others went on.
fn after_the_first(traces: &[Trace]) -> Result<(f64, f64)> {
    let budget = (BUDGET * MBIT) as f64;
    let (core, sources) = traces.split_first().context("no traces")?;
    let ends: Vec<f64> = sources.iter().map(|t| finished(t, 0.0)).collect();
    let first = ends.iter().copied().fold(f64::INFINITY, f64::min);
    let last = ends.iter().copied().fold(0.0, f64::max);
    if last - first < 3.0 {
        bail!("the other hosts went on for {:.1} s only", last - first);
    }
    let full = steps(first, last, 0.025).find(|t| core.rate(*t, t + 0.25) >= 0.95 * budget);
    Ok((full.map_or(f64::INFINITY, |t| t - first), last - first))
}

/// Finds the steady part and measures it.
fn look(traces: &[Trace], hosts: usize) -> Result<Seen> {
    let budget = (BUDGET * MBIT) as f64;
    let (core, sources) = traces.split_first().context("no traces")?;
    let end = core.0.last().context("an empty trace")?.0;
    let from = steps(0.0, end, 0.05).find(|t| core.rate(*t, t + 0.5) >= 0.95 * budget);
    let from = from.context("the core link never had the full rate")?;
    let first = sources.iter().map(|t| finished(t, from)).fold(f64::INFINITY, f64::min);
    let to = first - 0.5;
    let rates: Vec<f64> =
        steps(from, to - WINDOW, 0.025).map(|t| core.rate(t, t + WINDOW) / budget).collect();
    if rates.len() < 40 {
        bail!("the steady part of {hosts} hosts, {from:.1} to {to:.1} s, has {} windows only", rates.len());
    }
    let half = |t| (core.rate(t, t + 0.5) / 1e4).round() / 100.0;
    Ok(Seen {
        hosts,
        from,
        to,
        windows: rates.len(),
        above: rates.iter().copied().fold(0.0, f64::max) - 1.0,
        below: 1.0 - rates.iter().copied().fold(f64::INFINITY, f64::min),
        mean_mbit: core.rate(from, to) / 1e6,
        every_half_second: steps(0.0, end, 0.5).map(half).collect(),
    })
}

/// A port as operators leave it, by `tc`.
const OPERATORS: [(&str, &[&str]); 3] = [
    ("free", &[]),
    ("tbf", &["qdisc add dev eth0 root tbf rate 100mbit burst 32kb limit 100kb"]),
    (
        "htb",
        &[
            "qdisc add dev eth0 root handle 1: htb default 30 r2q 20",
            "class add dev eth0 parent 1: classid 1:1 htb rate 900mbit burst 64k",
            "class add dev eth0 parent 1:1 classid 1:10 htb rate 100mbit ceil 900mbit prio 1",
            "class add dev eth0 parent 1:1 classid 1:30 htb rate 50mbit ceil 9gbit quantum 5000 prio 3",
            "qdisc add dev eth0 parent 1:10 handle 100: pfifo limit 50",
            "filter add dev eth0 parent 1: protocol ip prio 7 u32 match ip dport 80 0xffff flowid 1:10",
        ],
    ),
];

/// A host whose agent is started and ended in every way.
struct Bench<'a> {
    net: &'a Net,
    dir: &'a Path,
    irlm: &'a Path,
}

const HOST: Host = Host::Source(0);

impl Bench<'_> {
    fn tc(&self, line: &str) -> Result<Vec<u8>> {
        let out = self.net.command(HOST, Path::new("tc")).args(line.split(' ')).output()?;
        if !out.status.success() {
            bail!("tc {line}: {}", String::from_utf8_lossy(&out.stderr).trim());
        }
        Ok(out.stdout)
    }

    /// What `tc` says of the port, byte for byte.
    fn shown(&self) -> Result<Vec<Vec<u8>>> {
        ["-j qdisc show dev eth0", "-j class show dev eth0", "filter show dev eth0"]
            .map(|l| self.tc(l))
            .into_iter()
            .collect()
    }

    fn ours(&self) -> Result<bool> {
        Ok(String::from_utf8_lossy(&self.shown()?.concat()).contains("1f1a:40"))
    }

    fn start(&self, shaping: Option<&str>) -> Result<Proc> {
        let policy = shaping.map(|s| POLICY.replace("own", s));
        let agent = agent((self.net, HOST, self.dir), self.irlm, policy.as_deref(), "", &[])?;
        // It listens early, and answers when it has done with the port.
        let at = format!("{}:7700", HOST.ip());
        let mut show = self.net.command(HOST, self.irlm);
        let out = show.args(["policy", "show", "--json", "--agent", &at]).output()?;
        if !out.status.success() {
            bail!("irlm policy show: {}; {}", String::from_utf8_lossy(&out.stdout), agent.said());
        }
        Ok(agent)
    }

    fn end(&self, mut agent: Proc) -> Result<()> {
        agent.signal(Signal::TERM)?;
        match agent.wait(Duration::from_secs(20))? {
            0 => Ok(()),
            code => bail!("the agent ended with {code}: {}", agent.said()),
        }
    }
}

/// Point 5.
pub(super) fn trees(irlm: &Path, _out: &Path, points: &mut Vec<Point>) -> Result<()> {
    let run = Run::start()?;
    let spec =
        NetSpec { hosts: 1, others: 0, rates: Rates::NONE, host_qdisc: false, congestion: None, tls: false };
    let net = Net::create(run.id(), spec)?;
    let dir = run.dir().join(HOST.name());
    std::fs::create_dir(&dir)?;
    let bench = Bench { net: &net, dir: &dir, irlm };
    for (name, lines) in OPERATORS {
        for line in lines {
            bench.tc(line)?;
        }
        let before = bench.shown()?;
        let mut checked = Vec::new();
        let mut wrong = Vec::new();
        let mut check = |what: &str, ours: bool| -> Result<()> {
            let as_it_should = if ours { bench.ours()? } else { bench.shown()? == before };
            checked.push(what.to_owned());
            if !as_it_should {
                wrong.push(what.to_owned());
            }
            Ok(())
        };
        let free = name == "free";
        for shaping in ["off", "own", "take-over"] {
            let sets_up = shaping == "take-over" || (shaping == "own" && free);
            let agent = bench.start(Some(shaping))?;
            check(&format!("{shaping}: running"), sets_up)?;
            bench.end(agent)?;
            check(&format!("{shaping}: ended"), false)?;
            let mut agent = bench.start(Some(shaping))?;
            agent.kill();
            check(&format!("{shaping}: killed"), sets_up)?;
            let agent = bench.start(None)?;
            check(&format!("{shaping}: restarted without a policy after SIGKILL"), false)?;
            bench.end(agent)?;
            let mut agent = bench.start(Some(shaping))?;
            agent.kill();
            let agent = bench.start(Some(shaping))?;
            check(&format!("{shaping}: restarted with the same policy after SIGKILL"), sets_up)?;
            bench.end(agent)?;
            check(&format!("{shaping}: ended after that"), false)?;
        }
        let what =
            "moments at which the port was not as it should be: byte for byte as before, or IRLM's tree";
        let how = format!(
            "`tc -j qdisc show`, `tc -j class show`, `tc filter show` of a port with {name}; {} moments: {}; wrong: {wrong:?}",
            checked.len(),
            checked.join(", ")
        );
        at_most(points, &format!("5-trees-{name}"), what, &how, wrong.len() as f64, 0.0)?;
        if !free {
            bench.tc("qdisc del dev eth0 root")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A port that sends at `mbit` from `a` to `b` seconds, read every 25 ms.
    fn sends(parts: &[(f64, f64, f64)]) -> Trace {
        let bytes = |t: f64| -> f64 {
            parts.iter().map(|(a, b, mbit)| (t.clamp(*a, *b) - a) * mbit * 125_000.0).sum()
        };
        Trace((0..1200).map(|i| f64::from(i) * 0.025).map(|t| (t, bytes(t) as u64)).collect())
    }

    #[test]
    fn the_steady_part_is_found_and_measured() {
        let one = sends(&[(3.0, 12.0, 30.0)]);
        let other = sends(&[(3.0, 12.0, 30.0), (12.4, 20.0, 60.0), (12.0, 12.4, 30.0)]);
        let core = sends(&[(3.0, 12.0, 60.0), (12.0, 12.4, 30.0), (12.4, 20.0, 60.0)]);
        let traces = [core, one, other];
        let seen = look(&traces, 2).unwrap();
        assert!((seen.from - 3.0).abs() < 0.1 && (seen.to - 11.5).abs() < 0.3, "{seen:?}");
        assert!(seen.above.abs() < 0.01 && seen.below < 0.03, "{seen:?}");
        let (low, last) = after_the_first(&traces).unwrap();
        assert!((low - 0.4).abs() < 0.1 && (last - 8.0).abs() < 0.3, "{low} {last}");
    }

    #[test]
    fn a_window_above_or_below_is_seen() {
        let core = sends(&[
            (1.0, 6.0, 60.0),
            (6.0, 7.0, 72.0),
            (7.0, 12.0, 60.0),
            (12.0, 13.0, 40.0),
            (13.0, 19.0, 60.0),
        ]);
        let seen = look(&[core.clone(), core], 1).unwrap();
        assert!((seen.above - 0.1).abs() < 0.01 && (seen.below - 0.167).abs() < 0.02, "{seen:?}");
    }
}
