//! Two racks and a virtual clock: what there is, what happens next, and the checks after every single event.

use crate::guest::{FRESH, POOL, SourceQemu, SourceRun, TargetQemu, TargetRun, page};
use crate::net::{Agent, Conn, MS, US};
use crate::rng::Rng;
use crate::source::{Model, SourceAgent};
use crate::target::TargetAgent;
use irlm_user::core::arrival::{Patience, Wake};
use irlm_user::core::digest::{Algorithm, Digest, Hasher};
use irlm_user::core::handover::{SourceState, TargetState};
use irlm_user::core::index::{Index, LateItem, LateReply};
use irlm_user::core::units::{PageAddr, VmIx};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What kind of run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Profile {
    /// Nothing goes wrong, guests write only fresh contents once migration has begun, stores are ample.
    Clean,
    /// Guests write as they like, contents go stale, stores may be tiny, and what breaks is only what must never
    /// fail a migration: index, push and peer connections, a hostile forwarder, odd voids.
    Soft,
    /// Anything breaks.
    Hard,
}

#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) profile: Profile,
    pub(crate) sources: u16,
    pub(crate) targets: u16,
    pub(crate) vms: u16,
    pub(crate) max_pages: u64,
    pub(crate) pool: u64,
    pub(crate) budget: usize,
    pub(crate) max_entries: usize,
    pub(crate) jitter: bool,
    pub(crate) faults: u64,
    /// Faults that strike between two steps of a handover.
    pub(crate) aimed: u64,
    /// One action of a handover in so many fails, and one VM in so many finds its disk locked; 0: none.
    pub(crate) failing: u64,
    pub(crate) locks: u64,
    pub(crate) patience: Patience,
    /// Contents that a source host has a target host keep, and the milliseconds they are given to settle.
    pub(crate) references: (u32, u64),
    /// Slots that a target host has.
    pub(crate) slots: u32,
    /// Contents that source hosts lend to each other, at most.
    pub(crate) models: u64,
    /// Of so many models one is never brought to the target hosts; 0: all are.
    pub(crate) models_lost: u64,
    /// VMs start when all pushes have arrived (else some time after the plan).
    pub(crate) push_first: bool,
    /// Of so many pages that reach a target QEMU one is harmed just before, and nobody notices; 0: none.
    pub(crate) harm: u64,
    /// Whether pages are accounted for.
    pub(crate) verify: bool,
}

impl Config {
    pub(crate) fn random(profile: Profile, rng: &mut Rng) -> Self {
        let clean = profile == Profile::Clean;
        let small = !rng.one_in(12);
        Self {
            profile,
            sources: rng.range(1, 4) as u16,
            targets: rng.range(1, 5) as u16,
            vms: rng.range(1, 7) as u16,
            max_pages: if small { 96 } else { 513 },
            pool: *rng.pick(&[3, 12, 40]),
            budget: if clean || rng.one_in(3) { 100_000 } else { rng.range(1, 5) as usize },
            max_entries: if clean || !rng.one_in(8) { 100_000 } else { rng.range(0, 20) as usize },
            jitter: !clean,
            faults: match profile {
                Profile::Clean => 0,
                Profile::Soft => rng.range(0, 8),
                Profile::Hard => rng.range(1, 8),
            },
            aimed: if profile == Profile::Hard { rng.range(0, 7) } else { 0 },
            failing: if profile == Profile::Hard { *rng.pick(&[0, 4, 12, 40]) } else { 0 },
            locks: if profile == Profile::Hard { *rng.pick(&[0, 2, 5]) } else { 0 },
            patience: Patience {
                running_ms: if clean { 3000 } else { *rng.pick(&[3, 20, 100, 3000]) },
                stopped_ms: *rng.pick(&[5, 60]),
            },
            references: if clean {
                (1000, 500)
            } else {
                (*rng.pick(&[0, 2, 20, 1000]), *rng.pick(&[0, 0, 500]))
            },
            slots: if clean { 1000 } else { *rng.pick(&[0, 1, 10, 1000]) },
            models: *rng.pick(&[0, 8, 60]),
            models_lost: if clean { 0 } else { *rng.pick(&[0, 1, 4]) },
            push_first: clean || rng.one_in(2),
            harm: 0,
            verify: true,
        }
    }
}

pub(crate) struct Vm {
    pub(crate) source: u16,
    pub(crate) target: u16,
    pub(crate) domain: u16,
    pub(crate) q: SourceQemu,
    pub(crate) t: TargetQemu,
    /// What is on disk.
    pub(crate) journal_s: Option<SourceState>,
    pub(crate) journal_t: Option<TargetState>,
    /// Contents of the records that left for each page, in order.
    pub(crate) sent: HashMap<PageAddr, Vec<u32>>,
    /// It will not be started (any more).
    pub(crate) passed_over: bool,
    /// Its target has written down that it has loaded it.
    pub(crate) wrote_loaded: bool,
    /// It was noted that it runs at its target.
    pub(crate) settled_t: bool,
    /// Its target's QEMU has been told to run it, and who holds its disk until when.
    pub(crate) told: bool,
    pub(crate) locked: u64,
    /// Its source QEMU was killed in this state of the handover.
    pub(crate) killed_in: Option<SourceState>,
    /// Its target QEMU was killed.
    pub(crate) target_killed: bool,
    /// What its target QEMU has loaded is not what the stopped source was.
    pub(crate) differs: bool,
    /// A guest crash that no handover can undo.
    pub(crate) lost: bool,
}

#[derive(Debug)]
pub(crate) enum Ev {
    Deliver { conn: usize, from: usize, bytes: Vec<u8> },
    Lost { conn: usize, end: usize },
    Guest(u16),
    Qemu { vm: u16, gen_: u32 },
    Tap { vm: u16, gen_: u32 },
    Resumes { vm: u16, gen_: u32 },
    Completes { vm: u16, gen_: u32 },
    SourceStep { vm: u16, life: u32 },
    TargetStep { vm: u16, life: u32 },
    Push { host: u16, life: u32 },
    PlanPart { host: u16, life: u32 },
    Lent { host: u16, life: u32, model: Model },
    Late { host: u16, life: u32 },
    LateReply { host: u16, life: u32, answered: Vec<(LateItem, LateReply)> },
    Start(u16),
    Wake { target: u16, life: u32, wake: Wake },
    Tick { vm: u16, life: u32 },
    Loads { vm: u16 },
    Fault,
    Aimed(u16),
    Restart(Agent),
    LinkUp,
    Poll,
}

/// Virtual time after the last fault by which everything must be settled (rule 4).
const DEADLINE: u64 = 30_000 * MS;

pub(crate) struct World {
    pub(crate) cfg: Config,
    pub(crate) rng: Rng,
    pub(crate) now: u64,
    queue: BTreeMap<(u64, u64), Ev>,
    seq: u64,
    pub(crate) conns: Vec<Conn>,
    pub(crate) sources: Vec<SourceAgent>,
    pub(crate) targets: Vec<TargetAgent>,
    pub(crate) vms: Vec<Vm>,
    pub(crate) hashers: [Hasher; 2],
    pub(crate) core_up: bool,
    pub(crate) index_up: bool,
    /// The rack index, once its group is planned.
    pub(crate) index: Option<Index>,
    pub(crate) faults_left: u64,
    pub(crate) aimed_left: u64,
    pub(crate) last_fault: u64,
    pub(crate) next_fresh: u32,
    /// Contents by (domain, digest), to check stores against.
    pub(crate) known: HashMap<Digest, u32>,
    /// Times a content's bytes went over the core link, and what the plan and preparation said of it.
    pub(crate) crossed: HashMap<Digest, u64>,
    pub(crate) narrate: bool,
    pub(crate) tally: Tally,
}

/// What a set of runs has exercised, so that a sim that tests nothing is seen.
#[derive(Default, Debug, Clone)]
pub(crate) struct Tally {
    pub(crate) events: u64,
    pub(crate) migrated: u64,
    pub(crate) stayed: u64,
    pub(crate) lost: u64,
    pub(crate) planned: u64,
    pub(crate) voids: u64,
    pub(crate) needs: u64,
    pub(crate) gone: u64,
    pub(crate) evicted: u64,
    pub(crate) superseded: u64,
    pub(crate) references: u64,
    pub(crate) remote: u64,
    pub(crate) late_known: u64,
    pub(crate) refused: u64,
    pub(crate) differences: u64,
    /// Of them, from models.
    pub(crate) modelled: u64,
    /// Models that target hosts were told of, and those that they did not have.
    pub(crate) told: u64,
    pub(crate) unkept: u64,
    /// Models that source hosts forgot.
    pub(crate) forgotten: u64,
    /// Versions of pages that were held back until a newer one came.
    pub(crate) spared: u64,
    pub(crate) unmade: u64,
    pub(crate) forwarded: u64,
    pub(crate) squeezed: u64,
    pub(crate) doubts: u64,
    pub(crate) restarts: u64,
    pub(crate) given_back: u64,
    pub(crate) longest_ms: u64,
    /// Actions that failed, and refusals to run a VM.
    pub(crate) failed: u64,
    pub(crate) refusals: u64,
    pub(crate) proof: Proofs,
}

/// What came of the accounts.
#[derive(Default, Debug, Clone)]
pub(crate) struct Proofs {
    /// VMs that were loaded with harmed pages, and those of them that ran so.
    pub(crate) differed: u64,
    pub(crate) ran_harmed: u64,
    /// VMs whose pages both ends accounted for.
    pub(crate) proven: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, o: &Self) {
        self.events += o.events;
        self.migrated += o.migrated;
        self.stayed += o.stayed;
        self.lost += o.lost;
        self.planned += o.planned;
        self.squeezed += o.squeezed;
        self.voids += o.voids;
        self.needs += o.needs;
        self.gone += o.gone;
        self.evicted += o.evicted;
        self.superseded += o.superseded;
        self.references += o.references;
        self.remote += o.remote;
        self.late_known += o.late_known;
        self.refused += o.refused;
        self.differences += o.differences;
        self.modelled += o.modelled;
        self.told += o.told;
        self.unkept += o.unkept;
        self.forgotten += o.forgotten;
        self.spared += o.spared;
        self.unmade += o.unmade;
        self.forwarded += o.forwarded;
        self.doubts += o.doubts;
        self.restarts += o.restarts;
        self.given_back += o.given_back;
        self.longest_ms = self.longest_ms.max(o.longest_ms);
        self.failed += o.failed;
        self.refusals += o.refusals;
        self.proof.differed += o.proof.differed;
        self.proof.ran_harmed += o.proof.ran_harmed;
        self.proof.proven += o.proof.proven;
    }
}

impl World {
    pub(crate) fn new(seed: u64, profile: Profile, narrate: bool) -> Self {
        let mut rng = Rng::new(seed);
        let cfg = Config::random(profile, &mut rng);
        Self::with(cfg, rng, narrate)
    }

    pub(crate) fn with(cfg: Config, rng: Rng, narrate: bool) -> Self {
        let hashers = ["red", "blue"].map(|t| Hasher::new(Algorithm::Blake3, &[7; 32], t));
        let mut w = Self {
            now: 0,
            queue: BTreeMap::new(),
            seq: 0,
            conns: Vec::new(),
            sources: (0..cfg.sources).map(|_| SourceAgent::new()).collect(),
            targets: (0..cfg.targets).map(|_| TargetAgent::new(cfg.budget)).collect(),
            vms: Vec::new(),
            hashers,
            core_up: true,
            index_up: true,
            index: None,
            faults_left: cfg.faults,
            aimed_left: cfg.aimed,
            last_fault: 0,
            next_fresh: FRESH,
            known: HashMap::new(),
            crossed: HashMap::new(),
            narrate,
            tally: Tally::default(),
            rng,
            cfg,
        };
        for _ in 0..w.cfg.vms {
            let vm = w.new_vm();
            w.vms.push(vm);
        }
        w.say(|w| format!("{:?}", w.cfg));
        w.prepare();
        w.lend();
        for vm in 0..w.cfg.vms {
            w.after(0, 3 * MS, Ev::Guest(vm));
        }
        for _ in 0..w.cfg.faults {
            w.after(0, 400 * MS, Ev::Fault);
        }
        w.after(MS, MS + 1, Ev::Poll);
        w
    }

    fn new_vm(&mut self) -> Vm {
        let pages = self.rng.range(8, self.cfg.max_pages) as usize;
        let own = self.rng.range(0, 40);
        let ram = (0..pages)
            .map(|_| match self.rng.below(100) {
                n if n < own => self.fresh(),
                n if n < own + 15 => 0,
                n if n < own + 18 => self.rng.below(4) as u32,
                _ => POOL + self.rng.below(self.cfg.pool) as u32,
            })
            .collect();
        let rom = (0..self.rng.range(1, 4)).map(|_| self.fresh()).collect::<Vec<_>>();
        let sizes = [pages, rom.len()];
        Vm {
            source: self.rng.below(self.cfg.sources.into()) as u16,
            target: self.rng.below(self.cfg.targets.into()) as u16,
            domain: u16::from(self.rng.one_in(4)),
            q: SourceQemu::new([ram, rom], self.rng.range(1, 7) as u32),
            t: TargetQemu::new(sizes),
            journal_s: None,
            journal_t: None,
            sent: HashMap::new(),
            passed_over: false,
            wrote_loaded: false,
            settled_t: false,
            told: false,
            locked: 0,
            killed_in: None,
            target_killed: false,
            differs: false,
            lost: false,
        }
    }

    pub(crate) fn fresh(&mut self) -> u32 {
        self.next_fresh += 1;
        self.next_fresh
    }

    pub(crate) fn digest(&mut self, domain: u16, content: u32) -> Digest {
        let d = self.hashers[usize::from(domain)].page(&page(content));
        self.known.insert(d, content);
        d
    }

    pub(crate) fn at(&mut self, at: u64, ev: Ev) {
        self.seq += 1;
        self.queue.insert((at, self.seq), ev);
    }

    /// At a random time between `a` and `b` from now.
    pub(crate) fn after(&mut self, a: u64, b: u64, ev: Ev) {
        let at = self.now + self.rng.range(a, b);
        self.at(at, ev);
    }

    pub(crate) fn say(&self, what: impl FnOnce(&Self) -> String) {
        if self.narrate {
            println!("{:>9.3} ms  {}", self.now as f64 / 1e6, what(self));
        }
    }

    pub(crate) fn up(&self, a: Agent) -> bool {
        match a {
            Agent::Source(h) => self.sources[usize::from(h)].up,
            Agent::Target(t) => self.targets[usize::from(t)].up,
        }
    }
    pub(crate) fn life(&self, a: Agent) -> u32 {
        match a {
            Agent::Source(h) => self.sources[usize::from(h)].life,
            Agent::Target(t) => self.targets[usize::from(t)].life,
        }
    }
    pub(crate) fn vm(&self, vm: VmIx) -> &Vm {
        &self.vms[usize::from(vm.0)]
    }

    pub(crate) fn run(&mut self) {
        while let Some((&key, _)) = self.queue.first_key_value() {
            let ev = self.queue.remove(&key).expect("just seen");
            self.now = key.0;
            self.tally.events += 1;
            if matches!(ev, Ev::Poll) {
                if self.settled() {
                    return self.check_end();
                }
                assert!(
                    self.now < self.last_fault + DEADLINE,
                    "rule 4: not settled {} ms after the last fault: {}",
                    (self.now - self.last_fault) / MS,
                    self.describe()
                );
                self.after(10 * MS, 10 * MS + 1, Ev::Poll);
            } else {
                self.happen(ev);
                self.check_copies();
            }
        }
    }

    fn happen(&mut self, ev: Ev) {
        match ev {
            Ev::Deliver { conn, from, bytes } => self.deliver(conn, from, &bytes),
            Ev::Lost { conn, end } => self.lost(conn, end),
            Ev::Guest(vm) => self.guest_writes(vm),
            Ev::Qemu { vm, gen_ } => self.qemu(vm, gen_),
            Ev::Tap { vm, gen_ } => self.tap(vm, gen_),
            Ev::Resumes { vm, gen_ } => self.qemu_resumes(vm, gen_),
            Ev::Completes { vm, gen_ } => self.qemu_completes(vm, gen_),
            Ev::SourceStep { vm, life } => self.source_step(vm, life),
            Ev::TargetStep { vm, life } => self.target_step(vm, life),
            Ev::Push { host, life } => self.push(host, life),
            Ev::PlanPart { host, life } => self.plan_part(host, life),
            Ev::Lent { host, life, model } => self.lent(host, life, model),
            Ev::Late { host, life } => self.late(host, life),
            Ev::LateReply { host, life, answered } => self.late_reply(host, life, answered),
            Ev::Start(vm) => self.start(vm),
            Ev::Wake { target, life, wake } => self.wake(target, life, wake),
            Ev::Tick { vm, life } => self.tick(vm, life),
            Ev::Loads { vm } => self.target_loads(vm),
            Ev::Fault => self.fault(),
            Ev::Aimed(vm) => self.aimed(vm),
            Ev::Restart(a) => self.restart(a),
            Ev::LinkUp => {
                self.core_up = true;
                self.last_fault = self.now;
                self.say(|_| "core link is back".to_owned());
            }
            Ev::Poll => {}
        }
    }

    /// The guest writes some pages, at its source or at its target.
    fn guest_writes(&mut self, vm: u16) {
        self.after(100 * US, 4 * MS, Ev::Guest(vm));
        let clean = self.cfg.profile == Profile::Clean;
        let (runs, started) = {
            let v = &self.vms[usize::from(vm)];
            (v.q.runs(), v.journal_s.is_some())
        };
        if !runs || (clean && !started) {
            return;
        }
        let pages = self.vms[usize::from(vm)].q.ram[0].len() as u64;
        // Most writes hit a hot tenth.
        for _ in 0..self.rng.range(0, 4) {
            let p = if self.rng.one_in(3) { self.rng.below(pages) } else { self.rng.below(pages / 10 + 1) }
                as usize;
            let old = self.vms[usize::from(vm)].q.ram[0][p];
            let content = match self.rng.below(if clean { 1 } else { 6 }) {
                0 => self.fresh(),
                1 => 0,
                2 => old,
                // Copies a page: the shared contents are not only the pool's.
                3 => *self.rng.pick(&self.vms[usize::from(vm)].q.ram[0]),
                _ => POOL + self.rng.below(self.cfg.pool) as u32,
            };
            self.vms[usize::from(vm)].q.write(p, content);
        }
    }

    /// Whether everything that was to happen has happened.
    pub(crate) fn settled(&self) -> bool {
        self.faults_left == 0
            && self.core_up
            && self.sources.iter().all(|s| s.up)
            && self.targets.iter().all(|t| t.up)
            && (0..self.cfg.vms).all(|vm| self.vm_settled(vm))
    }

    pub(crate) fn describe(&self) -> String {
        let vms: Vec<String> = (0..self.cfg.vms).map(|vm| self.describe_vm(vm)).collect();
        format!("{} core_up {}", vms.join("; "), self.core_up)
    }

    /// Rule 1, after every event.
    fn check_copies(&mut self) {
        for (i, v) in self.vms.iter().enumerate() {
            let running = u8::from(v.q.runs()) + u8::from(v.t.run == TargetRun::Running);
            assert!(running <= 1, "rule 1: vm{i} runs twice");
            assert!(!(v.t.ran && v.q.runs()), "rule 1: vm{i} runs at its source after it ran at its target");
            let can = v.q.run != SourceRun::Dead || matches!(v.t.run, TargetRun::Loaded | TargetRun::Running);
            assert!(can || v.lost || v.killed_in.is_some(), "rule 1: no copy of vm{i} can run");
        }
    }

    /// Everything has settled: exactly one copy of each VM runs, and both sides know.
    fn check_end(&mut self) {
        self.check_stores();
        for vm in 0..self.cfg.vms {
            self.check_vm_end(vm);
        }
        if self.cfg.profile == Profile::Clean {
            self.check_crossings();
        }
        self.tally.longest_ms = self.now / MS;
        for t in &self.targets {
            self.tally.evicted += t.host.store.evicted();
        }
        self.say(|w| format!("settled: {:?}", w.tally));
    }

    /// Rule 3: whatever is in a store hashes to its digest. All digests that exist are known here.
    fn check_stores(&mut self) {
        let sent: BTreeSet<(u16, u32)> =
            self.vms.iter().flat_map(|v| v.sent.values().flatten().map(|c| (v.domain, *c))).collect();
        for (domain, content) in sent {
            self.digest(domain, content);
        }
        for (t, agent) in self.targets.iter().enumerate() {
            let mut found = 0;
            for (d, content) in &self.known {
                if let Some(bytes) = agent.host.store.get(d) {
                    assert_eq!(*bytes, page(*content), "rule 3: store of target {t} holds other bytes");
                    found += 1;
                }
            }
            assert_eq!(found, agent.host.store.len(), "rule 3: store of target {t} holds unknown digests");
        }
    }
}
