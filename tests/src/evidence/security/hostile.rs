//! Point 4: thousands of clients that are idle, slow, never read or talk nonsense do not get in the way of a move.

use super::super::{Point, at_most};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::cache::Cache;
use irlm_tests::irlm::{CONTROL, DATA, Irlm, Method};
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::middle::Middle;
use irlm_tests::net::{Host, Rates};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::io::{ErrorKind, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Clients that say nothing, that say a byte at a time, and that ask and never read.
const CROWD: [(Habit, usize); 3] = [(Habit::Idle, 2000), (Habit::Slow, 500), (Habit::Deaf, 200)];
/// Sessions a second with random bytes, and as many recorded ones with changes.
const NONSENSE: u32 = 20;
/// Seconds that `irlm status` may take.
const ANSWER: f64 = 1.0;
/// Memory that a crowd may cost an agent, MiB (docs/threads.md).
const MEMORY: f64 = 64.0;
/// Descriptors that may be left a while after.
const LEFT: f64 = 8.0;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Habit {
    Idle,
    Slow,
    Deaf,
}

pub(super) fn name(tls: bool) -> &'static str {
    if tls { "4-tls" } else { "4-plain" }
}

/// What was seen of the daemons during a move.
#[derive(Default)]
struct Seen {
    code: i32,
    slowest: f64,
    asked: usize,
    /// Largest resident set of any agent, MiB.
    memory: f64,
    descriptors: usize,
}

pub(super) fn points(points: &mut Vec<Point>, irlm: &Path, tls: bool) -> Result<()> {
    let wanted = Rlimit { current: getrlimit(Resource::Nofile).maximum, ..getrlimit(Resource::Nofile) };
    setrlimit(Resource::Nofile, wanted).context("raise the limit of open files")?;
    let cache = Cache::open()?;
    let mut spec = LabSpec::new(&cache, 1, 2, 256);
    spec.rates = Rates { edge: Some(20_000_000), core: Some(1_000_000_000) };
    (spec.tls, spec.hurry) = (tls, true);
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    let mut recorded = Vec::new();
    let alone = a_move(&lab, irlm, tls, None, &mut recorded)?;
    ensure!(alone.code == 0, "the move without a crowd ended with {}", alone.code);
    let crowd = Crowd::default();
    let beset = a_move(&lab, irlm, tls, Some(&crowd), &mut recorded)?;
    let met = crowd.met.load(Ordering::Relaxed);
    let who = format!(
        "{CROWD:?} and {NONSENSE} sessions of random and of changed recorded bytes a second, on the ports of both agents and \
         of the index, {met} connections in all"
    );
    let id = |what: &str| format!("{}-{what}", name(tls));
    let how = format!("exit code of irlm evacuate, 2 guests of 256 MiB, 20 Mbit/s, beside {who}");
    at_most(points, &id("completes"), "a move beside hostile clients", &how, beset.code.into(), 0.0)?;
    let how = format!("slowest of {} calls of irlm status; {:.3} s without them", beset.asked, alone.slowest);
    at_most(points, &id("status"), "seconds until irlm status has answered", &how, beset.slowest, ANSWER)?;
    let how = format!(
        "largest resident set of an agent: {:.1} MiB, {:.1} without them",
        beset.memory, alone.memory
    );
    let more = (beset.memory - alone.memory).max(0.0);
    at_most(points, &id("memory"), "MiB that they cost an agent", &how, more, MEMORY)?;
    let how = format!(
        "open files of agents and index 40 s after: {}, {} without them",
        beset.descriptors, alone.descriptors
    );
    let left = beset.descriptors.saturating_sub(alone.descriptors);
    at_most(points, &id("descriptors"), "descriptors that they leave behind", &how, left as f64, LEFT)
}

/// One move, watched; what callers say to the target is recorded in the first.
fn a_move(
    lab: &Lab,
    program: &Path,
    tls: bool,
    crowd: Option<&Crowd>,
    recorded: &mut Vec<Vec<u8>>,
) -> Result<Seen> {
    let guests = lab.start_guests()?;
    let irlm = Irlm::start(lab, program, &guests, "direct = \"never\"")?;
    let to = SocketAddr::new(Host::Target(0).ip().parse()?, DATA);
    // Under TLS nobody can stand there unseen, and a recorded session is noise.
    let middle = (!tls && crowd.is_none()).then(|| Middle::start(&lab.net, Host::Ctl, to)).transpose()?;
    if let Some(m) = &middle {
        let text = std::fs::read_to_string(irlm.group_file())?;
        std::fs::write(
            irlm.group_file(),
            text.replace(&format!("data = \"{to}\""), &format!("data = \"{}\"", m.addr())),
        )?;
    }
    let stop = AtomicBool::new(false);
    let mut seen = Seen::default();
    std::thread::scope(|s| -> Result<()> {
        let sessions = &*recorded;
        let hostile = crowd.map(|c| s.spawn(|| lab.net.within(Host::Ctl, || c.besets(&stop, sessions))));
        let watched = watch(lab, &irlm, &mut seen);
        stop.store(true, Ordering::Relaxed);
        if let Some(h) = hostile {
            h.join().map_err(|_| anyhow::anyhow!("the crowd panicked"))??;
        }
        watched
    })?;
    if let Some(m) = middle {
        recorded.extend(m.heard());
    }
    std::thread::sleep(Duration::from_secs(if crowd.is_some() { 40 } else { 5 }));
    seen.descriptors = irlm.agents.values().chain(&irlm.index).map(|p| descriptors(p.pid())).sum();
    Ok(seen)
}

/// Moves the group, and asks both agents how they are meanwhile.
fn watch(lab: &Lab, irlm: &Irlm<'_>, seen: &mut Seen) -> Result<()> {
    // The crowd is there first.
    std::thread::sleep(Duration::from_secs(4));
    let mut evacuate = irlm.evacuate(Method::Irlm, &lab.top().join("report.json"), false)?;
    let start = Instant::now();
    loop {
        for host in [Host::Source(0), Host::Target(0)] {
            let asked = Instant::now();
            irlm.status(host)?;
            seen.slowest = seen.slowest.max(asked.elapsed().as_secs_f64());
            seen.asked += 1;
        }
        let resident = irlm.agents.values().map(|p| resident_mib(p.pid()));
        seen.memory = resident.fold(seen.memory, f64::max);
        if let Some(code) = evacuate.ended()? {
            seen.code = code;
            if code != 0 {
                eprintln!("{}\n{}", evacuate.said(), irlm.logs());
            }
            return Ok(());
        }
        ensure!(start.elapsed() < Duration::from_secs(300), "the move does not end: {}", irlm.logs());
        std::thread::sleep(Duration::from_millis(300));
    }
}

fn resident_mib(pid: u32) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap_or(0.0) / 1024.0
}

fn descriptors(pid: u32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Everybody who means ill.
#[derive(Default)]
struct Crowd {
    met: AtomicUsize,
}

/// One of them.
struct Client {
    habit: Habit,
    to: SocketAddr,
    stream: Option<TcpStream>,
}

impl Crowd {
    fn besets(&self, stop: &AtomicBool, recorded: &[Vec<u8>]) -> Result<()> {
        let mut ports = vec![SocketAddr::new(Host::Ctl.ip().parse()?, 7710)];
        for host in [Host::Source(0), Host::Target(0)] {
            ports.extend(
                [CONTROL, DATA]
                    .map(|p| host.ip().parse().map(|ip| SocketAddr::new(ip, p)))
                    .into_iter()
                    .flatten(),
            );
        }
        let habits = CROWD.iter().flat_map(|(habit, n)| std::iter::repeat_n(*habit, *n));
        let mut all: Vec<Client> = habits
            .enumerate()
            .map(|(n, habit)| {
                // Only a control port reads what the deaf ask.
                let to = if habit == Habit::Deaf { ports[1 + 2 * (n % 2)] } else { ports[n % ports.len()] };
                Client { habit, to, stream: None }
            })
            .collect();
        let (mut round, mut next) = (0u64, Instant::now());
        while !stop.load(Ordering::Relaxed) {
            // Whoever was sent away comes again; all of them in a second or two.
            for client in &mut all {
                client.acts(&self.met);
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                if Instant::now() >= next {
                    next += Duration::from_secs(1) / NONSENSE;
                    round += 1;
                    self.nonsense(ports[(round % 5) as usize], round, recorded);
                }
            }
            std::thread::sleep(Duration::from_millis(500));
        }
        Ok(())
    }

    /// Random bytes, and a session that somebody else had, with some bytes changed.
    fn nonsense(&self, to: SocketAddr, round: u64, recorded: &[Vec<u8>]) {
        let mut noise = vec![0; 4096];
        blake3::Hasher::new().update(&round.to_le_bytes()).finalize_xof().fill(&mut noise);
        let mut sessions = vec![noise.clone()];
        if let Some(old) = recorded.get(round as usize % recorded.len().max(1)) {
            let mut changed = old.clone();
            for byte in noise.chunks_exact(9).take((round % 4) as usize) {
                let at =
                    byte[..8].iter().fold(0usize, |a, b| a << 8 | usize::from(*b)) % changed.len().max(1);
                if let Some(b) = changed.get_mut(at) {
                    *b ^= byte[8];
                }
            }
            sessions.push(changed);
        }
        for session in sessions {
            if let Ok(mut s) = TcpStream::connect_timeout(&to, Duration::from_millis(200)) {
                self.met.fetch_add(1, Ordering::Relaxed);
                let _ = s.set_nonblocking(true);
                let _ = s.write(&session);
            }
        }
    }
}

impl Client {
    fn acts(&mut self, met: &AtomicUsize) {
        let Some(stream) = &mut self.stream else {
            self.stream = TcpStream::connect_timeout(&self.to, Duration::from_millis(200)).ok();
            if let Some(s) = &self.stream {
                met.fetch_add(1, Ordering::Relaxed);
                let _ = s.set_nonblocking(true);
            }
            return;
        };
        let ask = b"{\"v\":1,\"req\":{\"do\":\"status\"}}\n";
        let said = match self.habit {
            Habit::Idle => stream.peek(&mut [0]).map(|n| if n == 0 { 0 } else { 1 }),
            Habit::Slow => stream.write(b"{"),
            Habit::Deaf => (0..64).try_fold(0, |sum, _| stream.write(ask).map(|n| sum + n)),
        };
        match said {
            Ok(0) => self.stream = None,
            Err(e) if e.kind() != ErrorKind::WouldBlock => self.stream = None,
            _ => {}
        }
    }
}
