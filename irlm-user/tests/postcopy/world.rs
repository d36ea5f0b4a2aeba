//! Hosts, connections and a virtual clock: what there is, what happens next, and the checks after every event.

use crate::guest::{Run_, SHARED, TargetVm, Vcpu, page};
use crate::rng::Rng;
use crate::source::SourceAgent;
use crate::target::TargetAgent;
use irlm_user::core::arrival::Wake;
use irlm_user::core::digest::{Algorithm, Digest, Hasher};
use irlm_user::core::handover::arrival::Input as ArrivalInput;
use irlm_user::core::handover::departure::Input as DepartureInput;
use irlm_user::core::handover::{Arrival, Departure, SourceState, TargetState};
use irlm_user::core::postcopy::PageSet;
use irlm_user::core::units::{BlockIx, HostIx, Nanos, PageAddr};
use irlm_user::core::wire::frame::Kind;
use std::collections::{BTreeMap, BTreeSet, HashMap};

pub(crate) const MS: u64 = 1_000_000;
pub(crate) const SOURCE: usize = 0;
pub(crate) const TARGET: usize = 1;
/// Virtual time after the last fault by which everything must be settled (rule 4).
const DEADLINE: u64 = 30_000 * MS;

/// What may happen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Profile {
    /// Nothing goes wrong.
    Clean,
    /// Connections break once the VM has been given up, other target hosts die or lie, stores are tiny.
    Soft,
    /// Agents, VMMs and hosts die, at any moment.
    Hard,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Deliver { conn: usize, to: usize, kind: Kind, meta: Vec<u8>, body: Vec<u8> },
    Lost { conn: usize, end: usize },
    Switch,
    Pump,
    SourceStep(u32),
    TargetStep(u32),
    Loads(u32),
    Vcpu(usize),
    Tick,
    Forward { peer: usize, content: u32 },
    Void(u32),
    Hurried(usize, Digest),
    NotHere(u32, usize, Digest),
    Wakes(u32, Vec<Wake>),
    Fault,
    LinkUp,
    SourceBack,
    TargetBack,
}

/// Another target host.
#[derive(Default)]
pub(crate) struct Peer {
    alive: bool,
    hostile: bool,
    has: BTreeSet<u32>,
    coming: BTreeSet<u32>,
}

#[derive(Default)]
struct Conn {
    broken: bool,
    /// When the last frame to each end arrives.
    last: [u64; 2],
}

/// What a set of runs has exercised.
#[derive(Default, Debug, Clone)]
pub(crate) struct Tally {
    pub(crate) runs: u64,
    pub(crate) moved: u64,
    pub(crate) stayed: u64,
    pub(crate) lost: u64,
    pub(crate) pages_lost: u64,
    pub(crate) faults: u64,
    pub(crate) forwarded: u64,
    pub(crate) from_source: u64,
    pub(crate) from_store: u64,
    pub(crate) given_away: u64,
    pub(crate) refused: u64,
    pub(crate) passed_over: u64,
    pub(crate) late: u64,
    pub(crate) changing: u64,
    pub(crate) evicted: u64,
    pub(crate) lost_connections: u64,
    pub(crate) restarts: u64,
    pub(crate) doubts: u64,
    pub(crate) given_back: u64,
    /// Actions that failed.
    pub(crate) failed: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, o: &Self) {
        for (mine, theirs) in [
            (&mut self.runs, o.runs),
            (&mut self.moved, o.moved),
            (&mut self.stayed, o.stayed),
            (&mut self.lost, o.lost),
            (&mut self.pages_lost, o.pages_lost),
            (&mut self.faults, o.faults),
            (&mut self.forwarded, o.forwarded),
            (&mut self.from_source, o.from_source),
            (&mut self.from_store, o.from_store),
            (&mut self.given_away, o.given_away),
            (&mut self.refused, o.refused),
            (&mut self.passed_over, o.passed_over),
            (&mut self.late, o.late),
            (&mut self.changing, o.changing),
            (&mut self.evicted, o.evicted),
            (&mut self.lost_connections, o.lost_connections),
            (&mut self.restarts, o.restarts),
            (&mut self.doubts, o.doubts),
            (&mut self.given_back, o.given_back),
            (&mut self.failed, o.failed),
        ] {
            *mine += theirs;
        }
    }
}

/// What is still to go wrong, and when something did last.
struct Faults {
    left: u64,
    deaths_left: u64,
    /// One action of a handover in so many fails; 0: none.
    failing: u64,
    last: u64,
}

impl Faults {
    fn drawn(rng: &mut Rng, profile: Profile) -> Self {
        Self {
            left: match profile {
                Profile::Clean => 0,
                Profile::Soft => rng.range(0, 5),
                Profile::Hard => rng.range(1, 5),
            },
            deaths_left: if profile == Profile::Hard { rng.below(3) } else { 0 },
            failing: if profile == Profile::Hard { *rng.pick(&[0, 4, 15]) } else { 0 },
            last: 0,
        }
    }
}

pub(crate) struct World {
    pub(crate) profile: Profile,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Ev>,
    seq: u64,
    conns: Vec<Conn>,
    pub(crate) link_up: bool,
    pub(crate) hasher: Hasher,
    pub(crate) sizes: [u32; 2],
    pub(crate) due: PageSet,
    /// Pages that wait for contents at the switch.
    pub(crate) waiting: Vec<(PageAddr, Digest)>,
    pub(crate) source_memory: HashMap<PageAddr, u32>,
    pub(crate) source_run: Run_,
    pub(crate) memory_lost: bool,
    pub(crate) gave_up: bool,
    pub(crate) vm: TargetVm,
    pub(crate) whole: bool,
    pub(crate) s: Option<SourceAgent>,
    pub(crate) s_life: u32,
    pub(crate) journal_s: Option<SourceState>,
    pub(crate) t: Option<TargetAgent>,
    pub(crate) t_life: u32,
    /// Its VMM has been told to run it.
    pub(crate) told: bool,
    pub(crate) journal_t: Option<TargetState>,
    /// The pages still due, as the target has them on disk.
    pub(crate) saved: PageSet,
    pub(crate) peers: Vec<Peer>,
    pub(crate) budget: usize,
    faults: Faults,
    narrate: bool,
    pub(crate) tally: Tally,
}

impl World {
    pub(crate) fn new(seed: u64, profile: Profile, narrate: bool) -> Self {
        let mut rng = Rng::new(seed);
        let sizes = [rng.range(1, 300) as u32, rng.range(1, 40) as u32];
        let hasher = Hasher::new(Algorithm::Blake3, &[3; 32], "");
        let pool = rng.range(3, 40) as u32;
        let mut vm = TargetVm::new(rng.range(1, 5) as usize);
        let (mut due, mut waiting, mut source_memory) = (PageSet::empty(&sizes), vec![], HashMap::new());
        let at_once = rng.one_in(2);
        let mut own = SHARED;
        for (block, pages) in (0u16..).zip(sizes) {
            for p in 0..pages {
                let addr = PageAddr { block: BlockIx(block), page: p };
                own += 1;
                let shared = 2 + rng.below(pool.into()) as u32;
                let n = *rng.pick(&[0, 0, 1, own, own, shared]);
                if n != 0 {
                    source_memory.insert(addr, n);
                    vm.model.insert(addr, n);
                }
                match rng.below(if at_once { 1 } else { 4 }) {
                    0 if n != 0 || rng.one_in(20) => {
                        due.insert(addr);
                        // An older version came in an earlier round.
                        if rng.one_in(3) {
                            vm.memory.insert(addr, own + 500_000);
                        }
                    }
                    1 if (2..SHARED).contains(&n) => waiting.push((addr, hasher.page(&page(n)))),
                    _ if n != 0 => {
                        vm.memory.insert(addr, n);
                    }
                    _ => {}
                }
            }
        }
        let clean = profile == Profile::Clean;
        let mut peers: Vec<Peer> =
            (0..rng.below(4)).map(|_| Peer { alive: true, ..Peer::default() }).collect();
        if !peers.is_empty() {
            for n in 2..2 + pool {
                let i = rng.index(peers.len());
                peers[i].coming.insert(n);
            }
        }
        if !clean {
            peers.iter_mut().for_each(|p| p.hostile = rng.one_in(4));
        }
        let none = PageSet::empty(&sizes);
        let mut w = Self {
            profile,
            now: 0,
            queue: BTreeMap::new(),
            seq: 0,
            conns: vec![],
            link_up: true,
            hasher,
            sizes,
            due,
            waiting,
            source_memory,
            source_run: Run_::Running,
            memory_lost: false,
            gave_up: false,
            vm,
            whole: false,
            s: Some(SourceAgent::new(Departure::new())),
            s_life: 0,
            journal_s: Some(SourceState::Streaming),
            t: None,
            t_life: 0,
            told: false,
            journal_t: Some(TargetState::Filling),
            saved: none,
            peers,
            budget: if clean || rng.one_in(2) { 10_000 } else { rng.range(1, 5) as usize },
            faults: Faults::drawn(&mut rng, profile),
            narrate,
            tally: Tally { runs: 1, ..Tally::default() },
            rng,
        };
        w.t = Some(TargetAgent::new(Arrival::new(), w.budget));
        w
    }

    pub(crate) fn say(&self, what: impl FnOnce() -> String) {
        if self.narrate {
            println!("{:9.3} ms  {}", self.now as f64 / 1e6, what());
        }
    }

    /// Something happens between `least` and `most` from now.
    pub(crate) fn after(&mut self, least: u64, most: u64, ev: Ev) {
        let at = self.now + self.rng.range(least, most.max(least + 1));
        self.at(at, ev);
    }

    fn at(&mut self, at: u64, ev: Ev) {
        self.seq += 1;
        self.queue.insert((at, self.seq), ev);
    }

    pub(crate) fn connect(&mut self) {
        let id = self.conns.len();
        self.conns.push(Conn::default());
        self.say(|| format!("connection {id} stands"));
        if let Some(s) = &mut self.s {
            s.conn = Some(id);
        }
        if let Some(t) = &mut self.t {
            t.conn = Some(id);
        }
        if id > 0 {
            self.called();
            self.source_event(DepartureInput::Connected);
        }
    }

    pub(crate) fn send(&mut self, from: usize, kind: Kind, meta: Vec<u8>, body: Vec<u8>) {
        let conn = match from {
            SOURCE => self.s.as_ref().and_then(|s| s.conn),
            _ => self.t.as_ref().and_then(|t| t.conn),
        };
        let Some(conn) = conn.filter(|c| !self.conns[*c].broken) else { return };
        let to = 1 - from;
        let at = (self.now + self.rng.range(MS / 10, 3 * MS)).max(self.conns[conn].last[to]);
        self.conns[conn].last[to] = at;
        self.at(at, Ev::Deliver { conn, to, kind, meta, body });
    }

    /// The connection that stands breaks; each end learns of it at its own time.
    pub(crate) fn cut(&mut self) {
        let Some(conn) = self.conns.len().checked_sub(1) else { return };
        if !std::mem::replace(&mut self.conns[conn].broken, true) {
            self.say(|| format!("connection {conn} breaks"));
            self.tally.lost_connections += 1;
            for end in [SOURCE, TARGET] {
                self.after(0, 40 * MS, Ev::Lost { conn, end });
            }
        }
    }

    /// In so many nanoseconds.
    pub(crate) fn after_ns(&mut self, ns: u64, ev: Ev) {
        self.at(self.now + ns, ev);
    }

    /// Whether the next action is not done, or is done and nobody says so.
    pub(crate) fn fails(&mut self) -> (bool, bool) {
        if self.faults.failing == 0 || !self.rng.one_in(self.faults.failing) {
            return (false, false);
        }
        self.tally.failed += 1;
        self.faults.last = self.now;
        let undone = self.rng.one_in(2);
        (undone, !undone)
    }

    pub(crate) fn dies_between_steps(&mut self) -> bool {
        let dies = self.faults.deaths_left > 0 && self.rng.one_in(5);
        self.faults.deaths_left -= u64::from(dies);
        if dies {
            self.faults.last = self.now;
        }
        dies
    }

    pub(crate) fn run(&mut self) {
        self.connect();
        self.after(0, 5 * MS, Ev::Switch);
        self.after(0, 5 * MS, Ev::Tick);
        (0..self.vm.vcpus.len()).for_each(|n| self.after(0, MS, Ev::Vcpu(n)));
        for peer in 0..self.peers.len() {
            for content in self.peers[peer].coming.clone() {
                self.after(0, 150 * MS, Ev::Forward { peer, content });
            }
        }
        (0..self.faults.left).for_each(|_| self.after(0, 200 * MS, Ev::Fault));
        while !self.settled() {
            let Some(((at, _), ev)) = self.queue.pop_first() else { panic!("nothing happens any more") };
            self.now = at;
            assert!(
                self.now < self.faults.last + DEADLINE,
                "rule 4: not settled: source {:?}, target {:?}, lacking {:?}, vCPUs {:?}",
                self.journal_s,
                self.journal_t,
                self.t.as_ref().and_then(|t| t.fill.as_ref()).map(|f| (f.lacking(), f.faulting())),
                self.vm.vcpus
            );
            self.handle(ev);
            assert!(
                self.source_run != Run_::Running || self.vm.run != Run_::Running,
                "rule 1: the VM runs twice"
            );
        }
        if let Some(t) = self.t.take() {
            self.count(&t);
        }
    }

    fn handle(&mut self, ev: Ev) {
        match ev {
            Ev::Deliver { conn, to, kind, meta, body } => {
                let knows = match to {
                    SOURCE => self.s.as_ref().and_then(|s| s.conn),
                    _ => self.t.as_ref().and_then(|t| t.conn),
                };
                if self.conns[conn].broken || knows != Some(conn) {
                    return;
                }
                match to {
                    SOURCE => self.source_hears(kind, &meta),
                    _ => self.target_hears(kind, &meta, &body),
                }
            }
            Ev::Lost { conn, end: SOURCE } => {
                if let Some(s) = self.s.as_mut().filter(|s| s.conn == Some(conn)) {
                    s.conn = None;
                    self.source_event(DepartureInput::Lost("cut".into()));
                }
            }
            Ev::Lost { conn, .. } => {
                if let Some(t) = self.t.as_mut().filter(|t| t.conn == Some(conn)) {
                    t.conn = None;
                    if let Some(f) = &mut t.fill {
                        f.lost();
                    }
                    self.target_event(ArrivalInput::Lost);
                }
            }
            Ev::Switch if self.s.is_some() && self.journal_s == Some(SourceState::Streaming) => self.switch(),
            Ev::Switch => {}
            Ev::Pump => self.pump(),
            Ev::SourceStep(life) => self.source_step(life),
            Ev::TargetStep(life) => self.target_step(life),
            Ev::Loads(life) => self.loads(life),
            Ev::Vcpu(n) => {
                self.vm.step(n, self.sizes, &mut self.rng);
                self.after(MS / 10, MS, Ev::Vcpu(n));
            }
            Ev::Tick => {
                self.look();
                self.after(MS / 4, 4 * MS, Ev::Tick);
            }
            Ev::Forward { peer, content } => {
                self.peers[peer].has.insert(content);
                self.peers[peer].coming.remove(&content);
                self.forward(peer, content);
            }
            Ev::Void(content) => {
                let digest = self.hasher.page(&page(content));
                let mut wakes = Vec::new();
                if let Some(t) = &mut self.t {
                    t.host.void(digest, &[], &mut wakes);
                }
                self.wakes(self.t_life, wakes);
            }
            Ev::Hurried(peer, digest) => self.hurried(peer, digest),
            Ev::NotHere(life, peer, digest) => {
                let now = Nanos(self.now);
                if let Some(t) = self.t.as_mut().filter(|_| self.t_life == life)
                    && let Some(f) = &mut t.fill
                {
                    f.not_here(HostIx(peer as u16 + 1), &digest, now);
                }
            }
            Ev::Wakes(life, wakes) => self.wakes(life, wakes),
            Ev::Fault => self.fault(),
            Ev::LinkUp => self.link_up = true,
            Ev::SourceBack => self.source_back(),
            Ev::TargetBack => self.target_back(),
        }
    }

    fn forward(&mut self, peer: usize, content: u32) {
        if !self.peers[peer].alive {
            return;
        }
        let mut bytes = page(content);
        if self.peers[peer].hostile {
            bytes[77] ^= 1;
        }
        self.content(peer, &bytes, content);
    }

    /// A host that is asked to hurry sends what it has at once, and says so if it does not have it.
    fn hurried(&mut self, peer: usize, digest: Digest) {
        if !self.peers[peer].alive {
            return;
        }
        let has = self.peers[peer].has.iter().copied().find(|n| self.hasher.page(&page(*n)) == digest);
        match has {
            Some(content) => self.forward(peer, content),
            None => self.after(MS / 5, 2 * MS, Ev::NotHere(self.t_life, peer, digest)),
        }
    }

    fn fault(&mut self) {
        self.faults.last = self.now;
        let soft = self.profile == Profile::Soft;
        let kind = self.rng.below(if soft { 4 } else { 9 });
        self.say(|| format!("fault {kind}"));
        match kind {
            // Before the VM is given up a lost connection ends the attempt.
            0 if !soft || self.gave_up => {
                self.link_up = false;
                self.cut();
                self.after(50 * MS, 1500 * MS, Ev::LinkUp);
            }
            1 if !soft || self.gave_up => self.cut(),
            0 | 1 => self.after(5 * MS, 50 * MS, Ev::Fault),
            2 if !self.peers.is_empty() => {
                let i = self.rng.index(self.peers.len());
                self.peers[i].alive = false;
            }
            3 => {
                let n = 2 + self.rng.below(40) as u32;
                self.after(0, MS, Ev::Void(n));
            }
            4 => self.source_dies(),
            5 => self.target_dies(),
            6 if self.vm.run != Run_::Dead => {
                self.vm.run = Run_::Dead;
                self.target_event(ArrivalInput::Failed("its VMM died".into()));
            }
            // The source host is switched off, and comes back without its VMs.
            7 if self.gave_up && !self.memory_lost && self.source_run != Run_::Dead => {
                self.memory_lost = true;
                self.source_run = Run_::Dead;
                self.source_dies();
            }
            _ => {}
        }
    }

    /// Whether the outcome is what it may be, and final. Panics on one that may not be.
    fn settled(&mut self) -> bool {
        if self.now < 400 * MS || self.now < self.faults.last + 100 * MS {
            return false;
        }
        let (Some(s), Some(t)) = (&self.s, &self.t) else { return false };
        // It died after it was given up, and after a restart nobody knows whether it had run: its old copy stays paused
        // until an operator decides.
        let owned =
            matches!(self.journal_t, Some(TargetState::Fetching | TargetState::Filled | TargetState::Lost));
        if self.vm.run == Run_::Dead && (self.vm.ran || owned) {
            // One that surely never ran goes back to its source, though the journal here may not hold that yet.
            assert!(!self.vm.ran || self.source_run != Run_::Running, "rule 1: an old copy runs again");
            assert!(
                self.whole || self.memory_lost || !self.vm.ran || self.source_run == Run_::Paused,
                "the old copy is kept"
            );
            self.tally.lost += 1;
            return true;
        }
        // Both its hosts have failed: nothing is left of it, and nothing runs.
        if self.memory_lost && self.vm.run == Run_::Dead {
            self.tally.lost += 1;
            return true;
        }
        if !self.vm.ran && s.h.state() == SourceState::Aborted {
            let runs = self.source_run == Run_::Running;
            self.tally.stayed += u64::from(runs && s.h.settled());
            return runs && s.h.settled();
        }
        // Its memory is gone before the target had all: that is said, with the pages.
        if self.memory_lost && self.journal_t != Some(TargetState::Filled) {
            let said = t.h.pages_lost() && t.fill.as_ref().is_some_and(|f| !f.lacks().is_empty());
            let gone = self.vm.run == Run_::Dead;
            self.tally.pages_lost += u64::from(said || gone);
            return said || gone;
        }
        if self.vm.run != Run_::Running || t.h.state() != TargetState::Filled || !s.h.settled() {
            return false;
        }
        let waits = self.vm.vcpus.iter().any(|v| matches!(v, Vcpu::Faults(_)));
        // The source's copy is no longer needed, and goes with the last step.
        if self.vm.caught || waits || self.source_run != Run_::Dead {
            return false;
        }
        for (block, pages) in (0u16..).zip(self.sizes) {
            for p in 0..pages {
                let a = PageAddr { block: BlockIx(block), page: p };
                let (found, expected) = (self.vm.memory.get(&a), self.vm.model.get(&a));
                assert_eq!(found.copied().unwrap_or(0), expected.copied().unwrap_or(0), "rule 2: {a:?}");
            }
        }
        assert!(self.vm.touched.iter().all(|n| *n > 0), "a vCPU never ran");
        self.tally.moved += 1;
        true
    }
}
