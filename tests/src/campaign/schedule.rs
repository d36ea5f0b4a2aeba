//! What is done in one run, drawn from its seed and from nothing else: two machines, or two programs under test, get the
//! same schedule for the same seed. What cannot be had where it runs is skipped there, never drawn again.

use super::rng::Rng;
use crate::irlm::Method;
use std::fmt;

/// What a guest's memory comes to on the wire: part of it is zero, and half of the rest can be compressed.
const PLAIN_PART: f64 = 0.75;
const COMPRESSED_PART: f64 = 0.4;

/// The front, and how its VMs move.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// QEMU, its stream through the agents.
    InPath,
    /// QEMU, streaming to QEMU.
    Direct,
    /// Our VMM.
    PreCopy,
    /// Our VMM: it runs before its pages are there.
    PostCopy,
    /// Our VMM: one round, then post-copy.
    Hybrid,
    /// A booted Linux under QEMU, its stream through the agents.
    Linux,
}

impl Kind {
    /// Whether its VMs are QEMU's.
    #[must_use]
    pub fn is_qemu(self) -> bool {
        matches!(self, Self::InPath | Self::Direct | Self::Linux)
    }

    /// In a run's line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::InPath => "in-path",
            Self::Direct => "direct",
            Self::PreCopy => "pre-copy",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
            Self::Linux => "linux",
        }
    }
}

/// QEMU at the source and at the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions(pub &'static str, pub &'static str);

/// One end of the move.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Where VMs were.
    Source,
    /// Where they are to go.
    Target,
}

/// A process that something happens to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// The agent of a host.
    Agent(Side, usize),
    /// The index server.
    Index,
    /// `irlm evacuate`.
    Coordinator,
    /// A VM's own process.
    Copy(Side, usize),
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL; an agent or the index is started again after so many milliseconds.
    Kill(Who, u32),
    /// SIGSTOP, and SIGCONT after so many milliseconds.
    Stop(Who, u32),
    /// Nothing passes the core link for so many milliseconds.
    Cut(u32),
    /// The core link has so many Mbit/s for so many milliseconds.
    Slow(u32, u32),
    /// The core link's queue holds three packets, so that many are lost, for so many milliseconds.
    Lossy(u32),
    /// An agent's disk is full for so many milliseconds.
    Full(Side, usize, u32),
    /// The operator runs the same file again.
    Again,
    /// The operator cancels.
    Cancel,
    /// The operator settles a VM.
    Settle(usize, Side),
    /// Its owner stops a VM, and lets it run again after so many milliseconds, or never.
    Pause(usize, Option<u32>),
    /// Its owner saves a VM to a file.
    Save(usize),
    /// Another group with the same VMs is started.
    Other,
}

/// Something that happens at some time after the evacuation began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Event {
    /// Milliseconds.
    pub at: u32,
    /// What.
    pub fault: Fault,
}

/// One run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Schedule {
    /// All of it follows from this.
    pub seed: u64,
    /// Source hosts, and as many target hosts.
    pub hosts: usize,
    /// VMs on each source host.
    pub vms: usize,
    /// Front and kind.
    pub kind: Kind,
    /// QEMU's versions; ours for a VMM.
    pub versions: Versions,
    /// QEMU runs its payload under KVM, not TCG.
    pub kvm: bool,
    /// `--method`.
    pub method: Method,
    /// Memory of a VM, MiB.
    pub mib: u32,
    /// Rate of a host's link, Mbit/s.
    pub edge: u32,
    /// Rate of the core link, Mbit/s.
    pub core: u32,
    /// Agents hold each VM so long before it is given up, and after, milliseconds: so that what happens at a random
    /// moment often happens there.
    pub drill: (u32, u32),
    /// VMs that their owner has paused before all begins.
    pub paused: Vec<usize>,
    /// How long such a move takes if nothing happens, milliseconds.
    pub length: u32,
    /// What happens, in the order of time.
    pub events: Vec<Event>,
}

/// What is drawn more or less often.
#[derive(Debug, Clone, Copy)]
pub struct Weights {
    /// One run in so many has booted Linux guests; 0: none.
    pub linux_one_in: u64,
    /// Faults come over so many percent of the expected length, for machines that are slower or faster.
    pub stretch: u32,
}

impl Default for Weights {
    fn default() -> Self {
        Self { linux_one_in: 20, stretch: 100 }
    }
}

impl Schedule {
    /// The schedule of this seed.
    #[must_use]
    pub fn draw(seed: u64, weights: Weights) -> Self {
        let mut rng = Rng::new(seed);
        let r = &mut rng;
        // Whatever is asked for, the same numbers are drawn for all that follows.
        let lot = r.next();
        let linux = weights.linux_one_in > 0 && lot.is_multiple_of(weights.linux_one_in);
        // Most are our own VMM's, which start in milliseconds.
        let kind = match r.below(10) {
            _ if linux => Kind::Linux,
            0..=1 => Kind::InPath,
            2..=3 => Kind::Direct,
            4..=5 => Kind::PreCopy,
            6..=7 => Kind::PostCopy,
            _ => Kind::Hybrid,
        };
        let shape = r.pick(&[(1, 1), (1, 2), (2, 1), (2, 2)]);
        let (hosts, vms) = if linux { (1, 1) } else { shape };
        let versions = r.pick(&[Versions("7.2", "7.2"), Versions("10.0", "10.0"), Versions("7.2", "10.0")]);
        let kvm = r.one_in(2);
        let method = match (kind, r.below(8)) {
            (Kind::InPath | Kind::Linux, 0) => Method::Oc,
            (Kind::InPath | Kind::Linux, 1) => Method::QemuMultifdZstd,
            (_, 2..=3) => Method::Gm,
            _ => Method::Irlm,
        };
        let small = (r.pick(&[16, 24, 32]), r.pick(&[100, 200, 400, 1000]), r.pick(&[100, 1000]));
        let (mib, core, edge) = if linux { (256, 1000, 1000) } else { small };
        let drill = match r.below(4) {
            0 => (r.below(400) as u32 + 100, 0),
            1 => (0, r.below(400) as u32 + 100),
            _ => (0, 0),
        };
        let all = hosts * vms;
        let paused: Vec<usize> = (0..all).filter(|_| r.one_in(12)).collect();
        let mut s = Self {
            seed,
            hosts,
            vms,
            kind,
            versions,
            kvm,
            method,
            mib,
            edge,
            core,
            drill,
            paused,
            length: 0,
            events: Vec::new(),
        };
        s.length = s.expected() * weights.stretch / 100;
        for _ in 0..1 + r.below(3) {
            // A little longer than the move, so that some of it happens just after.
            let at = r.below(u64::from(s.length) * 115 / 100) as u32;
            let fault = s.fault(r);
            s.events.push(Event { at, fault });
        }
        s.events.sort_by_key(|e| e.at);
        s
    }

    /// VMs in all.
    #[must_use]
    pub fn all(&self) -> usize {
        self.hosts * self.vms
    }

    /// The number of a VM's source host, and of its target host.
    #[must_use]
    pub fn host_of(&self, vm: usize) -> usize {
        vm / self.vms
    }

    /// From the links' rates and what was measured beside them; milliseconds.
    fn expected(&self) -> u32 {
        let part = if self.method == Method::Oc { PLAIN_PART } else { COMPRESSED_PART };
        let bits = f64::from(self.mib) * part * 8.0 * 1.05;
        let (a_host, group) = (bits * self.vms as f64, bits * self.all() as f64);
        let stream = (a_host / f64::from(self.edge)).max(group / f64::from(self.core)) * 1000.0;
        let prepare = match self.method {
            Method::Irlm => 300.0,
            Method::Gm => 250.0,
            Method::Oc | Method::QemuMultifdZstd => 100.0,
        };
        let front = if self.kind.is_qemu() { 500.0 } else { 200.0 };
        (prepare + front + stream) as u32 + self.drill.0 + self.drill.1
    }

    fn fault(&self, r: &mut Rng) -> Fault {
        let side = |r: &mut Rng| r.pick(&[Side::Source, Side::Target]);
        match r.below(100) {
            0..=24 => {
                let who = self.who(r);
                Fault::Kill(who, r.mostly_short(50.0, 5000.0))
            }
            25..=44 => {
                let who = self.who(r);
                Fault::Stop(who, r.mostly_short(100.0, 20_000.0))
            }
            45..=50 => Fault::Cut(r.mostly_short(100.0, 8000.0)),
            51..=54 => Fault::Slow(r.pick(&[1, 5, 20]), r.mostly_short(300.0, 5000.0)),
            55..=58 => Fault::Lossy(r.mostly_short(300.0, 5000.0)),
            59..=68 => Fault::Full(side(r), r.index(self.hosts), r.mostly_short(200.0, 8000.0)),
            69..=76 => Fault::Again,
            77..=81 => Fault::Cancel,
            82..=86 => Fault::Settle(r.index(self.all()), side(r)),
            87..=93 => {
                let vm = r.index(self.all());
                let back = (!r.one_in(3)).then(|| r.mostly_short(50.0, 3000.0));
                Fault::Pause(vm, back)
            }
            94..=96 if self.kind.is_qemu() => Fault::Save(r.index(self.all())),
            _ => Fault::Other,
        }
    }

    fn who(&self, r: &mut Rng) -> Who {
        match r.below(12) {
            0..=2 => Who::Agent(Side::Source, r.index(self.hosts)),
            3..=5 => Who::Agent(Side::Target, r.index(self.hosts)),
            6 => Who::Index,
            7 => Who::Coordinator,
            8..=9 => Who::Copy(Side::Source, r.index(self.all())),
            _ => Who::Copy(Side::Target, r.index(self.all())),
        }
    }
}

impl Fault {
    /// What it is, without whose, where and how long.
    #[must_use]
    pub fn kind(&self) -> String {
        let text = self.to_string();
        text.trim_end_matches(|c: char| !c.is_alphabetic()).chars().filter(|c| !c.is_ascii_digit()).collect()
    }

    /// How long it lasts, milliseconds; what is killed and stays dead does not.
    #[must_use]
    pub fn lasts(&self) -> u32 {
        match *self {
            Self::Kill(_, ms)
            | Self::Stop(_, ms)
            | Self::Cut(ms)
            | Self::Slow(_, ms)
            | Self::Lossy(ms)
            | Self::Full(_, _, ms)
            | Self::Pause(_, Some(ms)) => ms,
            _ => 0,
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Source { "source" } else { "target" })
    }
}

impl Side {
    fn letter(self) -> char {
        if self == Self::Source { 's' } else { 't' }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Agent(side, host) => write!(f, "agent-{}{host}", side.letter()),
            Self::Index => f.write_str("index"),
            Self::Coordinator => f.write_str("evacuate"),
            Self::Copy(side, vm) => write!(f, "vm{vm}-{side}"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(w @ (Who::Agent(..) | Who::Index), back) => write!(f, "kill {w} +{back}"),
            Self::Kill(w, _) => write!(f, "kill {w}"),
            Self::Stop(w, ms) => write!(f, "stop {w} +{ms}"),
            Self::Cut(ms) => write!(f, "cut +{ms}"),
            Self::Slow(mbit, ms) => write!(f, "slow {mbit}M +{ms}"),
            Self::Lossy(ms) => write!(f, "lossy +{ms}"),
            Self::Full(side, host, ms) => write!(f, "full {}{host} +{ms}", side.letter()),
            Self::Again => f.write_str("again"),
            Self::Cancel => f.write_str("cancel"),
            Self::Settle(vm, side) => write!(f, "settle vm{vm} {side}"),
            Self::Pause(vm, Some(ms)) => write!(f, "pause vm{vm} +{ms}"),
            Self::Pause(vm, None) => write!(f, "pause vm{vm}"),
            Self::Save(vm) => write!(f, "save vm{vm}"),
            Self::Other => f.write_str("other-group"),
        }
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{} {}", self.hosts, self.vms, self.kind.name())?;
        if self.kind.is_qemu() {
            let accel = if self.kvm && self.kind != Kind::Linux { "kvm" } else { "tcg" };
            write!(f, " {}>{} {accel}", self.versions.0, self.versions.1)?;
        }
        write!(f, " {} {}M edge={} core={}", self.method.name(), self.mib, self.edge, self.core)?;
        if self.drill != (0, 0) {
            write!(f, " hold={}/{}", self.drill.0, self.drill.1)?;
        }
        for vm in &self.paused {
            write!(f, " paused-vm{vm}")?;
        }
        write!(f, " len={} [", self.length)?;
        for (n, e) in self.events.iter().enumerate() {
            let comma = if n > 0 { ", " } else { "" };
            write!(f, "{comma}{}: {}", e.at, e.fault)?;
        }
        f.write_str("]")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::campaign::rng::seed_of;
    use std::collections::HashSet;

    fn many(n: u64) -> Vec<Schedule> {
        (0..n).map(|i| Schedule::draw(seed_of(1, i), Weights::default())).collect()
    }

    #[test]
    fn a_seed_gives_the_same_schedule_every_time() {
        for s in many(200) {
            assert_eq!(Schedule::draw(s.seed, Weights::default()), s);
        }
        let lines: HashSet<String> = many(200).iter().map(ToString::to_string).collect();
        assert_eq!(lines.len(), 200, "two seeds gave one schedule");
    }

    #[test]
    fn a_stretched_schedule_differs_in_its_moments_alone() {
        for s in many(50) {
            let long = Schedule::draw(s.seed, Weights { stretch: 200, ..Weights::default() });
            let faults = |s: &Schedule| {
                let mut all: Vec<String> = s.events.iter().map(|e| e.fault.to_string()).collect();
                all.sort();
                all
            };
            assert_eq!((s.kind, faults(&s)), (long.kind, faults(&long)));
            assert_eq!(s.length * 2, long.length);
            let none = Schedule::draw(s.seed, Weights { linux_one_in: 0, ..Weights::default() });
            assert!(none == s || s.kind == Kind::Linux, "{s} without Linux: {none}");
        }
    }

    #[test]
    fn every_kind_of_fault_and_of_move_is_drawn() {
        let all = many(3000);
        for kind in [Kind::InPath, Kind::Direct, Kind::PreCopy, Kind::PostCopy, Kind::Hybrid, Kind::Linux] {
            let n = all.iter().filter(|s| s.kind == kind).count();
            assert!(n > 90, "{} only {n} times", kind.name());
        }
        let lines: Vec<String> = all.iter().map(ToString::to_string).collect();
        for word in [
            "kill agent-s",
            "kill agent-t",
            "kill index",
            "kill evacuate",
            "kill vm0-source",
            "kill vm0-target",
            "stop agent-s",
            "stop agent-t",
            "stop index",
            "stop evacuate",
            "stop vm0-source",
            "stop vm0-target",
            "cut +",
            "slow 1M",
            "lossy +",
            "full s0",
            "full t0",
            "again",
            "cancel",
            "settle vm0 source",
            "settle vm0 target",
            "pause vm0 +",
            "pause vm0]",
            "save vm0",
            "other-group",
            "paused-vm0",
            "hold=",
            "oc ",
            "gm ",
            "qemu-multifd-zstd",
            "7.2>10.0",
            "10.0>10.0",
            "kvm",
            "2x2",
        ] {
            assert!(lines.iter().any(|l| l.contains(word)), "{word} is never drawn");
        }
    }

    #[test]
    fn faults_are_spread_over_the_whole_move_and_a_little_beyond() {
        let all = many(2000);
        let parts: Vec<u32> =
            all.iter().flat_map(|s| s.events.iter().map(|e| e.at * 100 / s.length)).collect();
        for tenth in 0..11 {
            let n = parts.iter().filter(|p| **p / 10 == tenth).count();
            assert!(n > parts.len() / 16, "{n} of {} in part {tenth}", parts.len());
        }
        assert!(parts.iter().all(|p| *p <= 115));
        assert!(all.iter().all(|s| (1..=3).contains(&s.events.len())));
        assert!(all.iter().all(|s| s.events.is_sorted_by_key(|e| e.at)));
    }
}
