//! The target agent: places what comes, answers faults, asks.

use crate::guest::{KernelEvent, Placing, Run_, SHARED, content_of};
use crate::world::{Ev, MS, Profile, TARGET, World};
use irlm_user::core::arrival::{Key, TargetHost, Wake};
use irlm_user::core::handover::arrival::{Action, Arrival, Input, Outcome};
use irlm_user::core::handover::{GuestState, Ran, TargetState};
use irlm_user::core::postcopy::{Answer, Fill, Origin, PageSet, Patience, Put};
use irlm_user::core::units::{HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::Word;
use irlm_user::core::wire::pages::Records;
use irlm_user::core::wire::paging::{decode_set, encode_set};

pub(crate) struct TargetAgent {
    pub(crate) h: Arrival,
    busy: bool,
    switch: Option<PageSet>,
    switched: bool,
    pub(crate) fill: Option<Fill>,
    pub(crate) host: TargetHost,
    pub(crate) conn: Option<usize>,
    told: bool,
    /// Pages the kernel could not place for a change of layout, to be tried again.
    again: Vec<(PageAddr, u32, Origin)>,
}

impl TargetAgent {
    pub(crate) fn new(h: Arrival, budget: usize) -> Self {
        Self {
            h,
            busy: false,
            switch: None,
            switched: false,
            fill: None,
            host: TargetHost::new(budget, 100_000),
            conn: None,
            told: false,
            again: Vec::new(),
        }
    }
}

const PATIENCE: Patience = Patience { hurry_ms: 15, held_ms: 200, again_ms: 1000 };

impl World {
    pub(crate) fn target_event(&mut self, e: Input) {
        let now = Nanos(self.now);
        let Some(t) = &mut self.t else { return };
        t.h.handle(e, now);
        self.drive_target();
    }

    /// The arrival is looked at soon.
    pub(crate) fn drive_target(&mut self) {
        let life = self.t_life;
        let Some(t) = &mut self.t else { return };
        if !std::mem::replace(&mut t.busy, true) {
            self.after(0, 2 * MS, Ev::TargetStep(life));
        }
    }

    /// One action; a crash may come before it, and after it and before its driver hears of it.
    pub(crate) fn target_step(&mut self, life: u32) {
        let now = Nanos(self.now);
        let Some(t) = self.t.as_mut().filter(|_| self.t_life == life) else { return };
        t.busy = false;
        let Some(action) = t.h.poll(now) else {
            if let Some(at) = t.h.wake() {
                self.after_ns(at.0.saturating_sub(self.now).max(1), Ev::TargetStep(life));
            }
            return;
        };
        if self.dies_between_steps() {
            return self.target_dies();
        }
        self.say(|| format!("target does {action:?}"));
        let outcome = self.target_does(action);
        if self.dies_between_steps() {
            return self.target_dies();
        }
        if let Some(t) = &mut self.t {
            t.h.done(outcome, now);
        }
        self.drive_target();
    }

    fn target_does(&mut self, action: Action) -> Outcome {
        let (undone, unheard) = match action {
            Action::Finish | Action::EndStream => (false, false),
            _ => self.fails(),
        };
        let failed = || Outcome::Failed("it failed".into());
        if undone {
            if matches!(action, Action::Say(_)) {
                self.cut();
            }
            return failed();
        }
        let outcome = match action {
            Action::Write(state, _) => {
                self.journal_t = Some(state);
                Outcome::Done
            }
            Action::Say(word) => {
                self.send(TARGET, Kind::Word, word.encode(), vec![]);
                Outcome::Done
            }
            Action::Look => Outcome::Looked(match self.vm.run {
                Run_::Dead => None,
                run => Some(run != Run_::Incoming),
            }),
            Action::Run(_) => {
                let told = std::mem::replace(&mut self.told, true);
                Outcome::Ran(match self.vm.run {
                    Run_::Paused => {
                        self.vm.run = Run_::Running;
                        self.vm.ran = true;
                        Ran::Runs
                    }
                    Run_::Running => Ran::Runs,
                    Run_::Incoming => Ran::Refused("it is not loaded".into()),
                    Run_::Dead => Ran::Gone { told },
                })
            }
            Action::Settle => Outcome::Done,
            Action::Discard => {
                assert_ne!(self.vm.run, Run_::Running, "rule 1: a running copy is discarded");
                self.vm.run = Run_::Dead;
                Outcome::Done
            }
            Action::Finish => {
                let t = self.t.as_mut().expect("it acts");
                if t.h.state() == TargetState::Filled {
                    // Faults are not caught any more; what is not there is zeros.
                    self.vm.release();
                }
                if let Some(fill) = &mut t.fill {
                    fill.leave(&mut t.host);
                }
                Outcome::Done
            }
            Action::EndStream => Outcome::Done,
        };
        if unheard { failed() } else { outcome }
    }

    pub(crate) fn target_hears(&mut self, kind: Kind, meta: &[u8], body: &[u8]) {
        match kind {
            Kind::Word => self.target_event(Input::Word(Word::decode(meta).expect("a word"))),
            Kind::Switch => {
                let none = PageSet::empty(&self.sizes);
                let Some(t) = &mut self.t else { return };
                t.switched = decode_set(kind, meta, t.switch.get_or_insert(none)).expect("a set");
            }
            Kind::Verbatim => {
                assert!(self.t.as_ref().is_some_and(|t| t.switched), "the state comes after the switch");
                self.after(0, 5 * MS, Ev::Loads(self.t_life));
            }
            Kind::Pages => self.pages(meta, body),
            kind => panic!("the target hears {kind:?}"),
        }
    }

    /// The device state is loaded, and faults are caught.
    pub(crate) fn loads(&mut self, life: u32) {
        let now = Nanos(self.now);
        let holders: Vec<HostIx> = (1..=self.peers.len() as u16).map(HostIx).collect();
        let waiting = self.waiting.clone();
        let Some(t) = self.t.as_mut().filter(|t| self.t_life == life && t.h.state() == TargetState::Filling)
        else {
            return;
        };
        if self.vm.run != Run_::Incoming {
            return;
        }
        let due = t.switch.take().expect("the switch came first");
        // Older versions are thrown away.
        due.runs().flat_map(irlm_user::core::postcopy::Run::pages).for_each(|a| {
            self.vm.memory.remove(&a);
        });
        let mut fill = Fill::new(VmIx(0), HostIx(0), due, &holders, PATIENCE);
        let waiting = waiting.into_iter().map(|(a, d)| (a, Some(Key::Digest(d)))).collect();
        fill.take_over(&mut t.host, waiting, now).expect("no promise was broken");
        self.saved = fill.absent();
        t.fill = Some(fill);
        self.vm.run = Run_::Paused;
        self.vm.caught = true;
        self.target_event(Input::Prepared(None));
    }

    fn pages(&mut self, meta: &[u8], body: &[u8]) {
        let now = Nanos(self.now);
        let bodies = body.as_chunks::<PAGE_SIZE>().0;
        let (mut puts, mut wakes, mut content) = (Vec::new(), Vec::new(), 0);
        let Some(t) = &mut self.t else { return };
        let Some(fill) = &mut t.fill else { return };
        for record in Records::new(meta) {
            let record = record.expect("a record");
            fill.record(&mut t.host, record, &mut content, None, now, &mut puts, &mut wakes)
                .expect("within bounds");
        }
        self.take_wakes(wakes);
        for put in puts {
            match put {
                Put::Zero(a) => self.place(a, 0, Origin::Source),
                Put::Filled(a, b) => self.place(a, b.into(), Origin::Source),
                Put::Body(a, n) => self.place(a, number(&bodies[n]), Origin::Source),
            }
        }
        self.look();
    }

    fn take_wakes(&mut self, wakes: Vec<Wake>) {
        let now = Nanos(self.now);
        let Some(t) = &mut self.t else { return };
        let Some(fill) = &mut t.fill else { return };
        for w in wakes {
            fill.woken(&mut t.host, w.key, now);
        }
    }

    fn place(&mut self, addr: PageAddr, content: u32, origin: Origin) {
        let now = Nanos(self.now);
        let Some(t) = &mut self.t else { return };
        let Some(fill) = &mut t.fill else { return };
        if content != 0 && !fill.wants(addr) {
            return;
        }
        match self.vm.place(addr, content) {
            Placing::Changing => {
                self.tally.changing += 1;
                t.again.push((addr, content, origin));
            }
            Placing::Done | Placing::Present => {
                self.vm.wake(addr);
                let waited = if content == 0 && !fill.wants(addr) {
                    fill.answered(addr, now)
                } else {
                    fill.placed(&mut t.host, addr, now)
                };
                if waited.is_some() {
                    match origin {
                        Origin::Forward => self.tally.forwarded += 1,
                        Origin::Source => self.tally.from_source += 1,
                        Origin::Store | Origin::Here => self.tally.from_store += 1,
                    }
                }
            }
        }
    }

    /// A content comes from another target host.
    pub(crate) fn content(&mut self, peer: usize, bytes: &PageBytes, claimed: u32) {
        let digest = self.hasher.page(&crate::guest::page(claimed));
        if self.hasher.page(bytes) != digest {
            self.tally.refused += 1;
            return;
        }
        self.say(|| format!("content {claimed} comes from target host {peer}"));
        let mut wakes = Vec::new();
        if let Some(t) = &mut self.t {
            t.host.content(true, digest, bytes, &mut wakes);
        }
        self.after(0, 2 * MS, Ev::Wakes(self.t_life, wakes));
    }

    pub(crate) fn wakes(&mut self, life: u32, wakes: Vec<Wake>) {
        if self.t_life == life {
            self.take_wakes(wakes);
            self.look();
        }
    }

    /// Reads events, places what is ready, asks for what is wanted.
    pub(crate) fn look(&mut self) {
        let now = Nanos(self.now);
        if self.vm.run == Run_::Dead {
            // The kernel says that the process is gone: nothing is filled any more.
            return;
        }
        loop {
            let Some(t) = &mut self.t else { return };
            let Some(fill) = &mut t.fill else { return };
            if !self.vm.caught {
                break;
            }
            let Some(e) = self.vm.read() else { break };
            match e {
                KernelEvent::Removed(run) => {
                    self.tally.given_away += 1;
                    self.saved.remove_run(run);
                    let zeros = fill.removed(&mut t.host, run);
                    for a in zeros {
                        self.place(a, 0, Origin::Here);
                    }
                }
                KernelEvent::Fault(addr) => {
                    self.tally.faults += 1;
                    match fill.fault(&t.host, addr, now) {
                        Answer::Here => self.vm.wake(addr),
                        Answer::Settled => self.place(addr, 0, Origin::Here),
                        Answer::Store(key) => {
                            let n = number(t.host.find(&key).expect("in the store"));
                            self.place(addr, n, Origin::Store);
                        }
                        Answer::Wait => {}
                        Answer::Outside => panic!("a fault outside of the VM"),
                    }
                }
            }
        }
        let again = self.t.as_mut().map(|t| std::mem::take(&mut t.again)).unwrap_or_default();
        for (addr, content, origin) in again {
            self.place(addr, content, origin);
        }
        let (mut addrs, mut bytes) = (Vec::new(), Vec::new());
        let most = self.rng.range(0, 5) as usize;
        if let Some(t) = &mut self.t
            && let Some(fill) = &mut t.fill
        {
            fill.take_ready(&mut t.host, most, &mut addrs, &mut bytes);
        }
        for (addr, b) in addrs.into_iter().zip(bytes.as_chunks::<PAGE_SIZE>().0) {
            let origin =
                self.t.as_ref().and_then(|t| t.fill.as_ref()).map_or(Origin::Store, |f| f.origin(addr));
            self.place(addr, number(b), origin);
        }
        let Some(t) = &mut self.t else { return };
        let Some(fill) = &mut t.fill else { return };
        let asks = fill.asks(&mut t.host, now, PATIENCE.held_ms);
        let whole = fill.complete() && !std::mem::replace(&mut t.told, fill.complete());
        if !asks.demand.pages.is_empty() {
            self.send(TARGET, Kind::Demand, asks.demand.encode(), vec![]);
        }
        for (host, digest) in asks.hurry {
            self.after(MS / 5, 2 * MS, Ev::Hurried(usize::from(host.0) - 1, digest));
        }
        let fetches = |t: &TargetAgent| matches!(t.h.state(), TargetState::Ready | TargetState::Fetching);
        if whole && self.t.as_ref().is_some_and(fetches) {
            self.whole = true;
            self.target_event(Input::Filled);
        } else if whole && let Some(t) = &mut self.t {
            t.told = false;
        }
    }

    pub(crate) fn called(&mut self) {
        let Some(t) = &mut self.t else { return };
        let Some(fill) =
            t.fill.as_mut().filter(|_| matches!(t.h.state(), TargetState::Ready | TargetState::Fetching))
        else {
            return;
        };
        let lacks = fill.reconnected();
        for meta in encode_set(&lacks) {
            self.send(TARGET, Kind::Lacks, meta, vec![]);
        }
    }

    pub(crate) fn target_dies(&mut self) {
        if let Some(t) = self.t.take() {
            self.say(|| "the target agent dies".into());
            self.count(&t);
            self.t_life += 1;
            self.cut();
            self.tally.restarts += 1;
            self.after(50 * MS, 400 * MS, Ev::TargetBack);
        }
    }

    pub(crate) fn target_back(&mut self) {
        let state = self.journal_t.unwrap_or(TargetState::Filling);
        self.say(|| format!("the target agent is back in {state:?}"));
        let h = Arrival::recover(state, GuestState::Running, false);
        let mut t = TargetAgent::new(h, self.budget);
        if matches!(state, TargetState::Ready | TargetState::Fetching) {
            // What was due and is not in the memory's file yet.
            let mut due = self.saved.clone();
            self.vm.memory.keys().for_each(|a| {
                due.remove(*a);
            });
            let holders: Vec<HostIx> = (1..=self.peers.len() as u16).map(HostIx).collect();
            let mut fill = Fill::new(VmIx(0), HostIx(0), due, &holders, PATIENCE);
            fill.lost();
            t.fill = Some(fill);
            self.vm.wake_all();
        }
        self.t = Some(t);
        self.drive_target();
    }

    pub(crate) fn count(&mut self, t: &TargetAgent) {
        if let Some(f) = &t.fill {
            self.tally.passed_over += f.stats.passed_over;
            self.tally.late += f.stats.late;
        }
        self.tally.evicted += t.host.store.evicted();
        assert!(self.profile != Profile::Clean || f_none(t), "a clean run asks nobody twice");
    }
}

fn f_none(t: &TargetAgent) -> bool {
    t.host.store.evicted() == 0
}

fn number(bytes: &PageBytes) -> u32 {
    let n = content_of(bytes).expect("rule 3: bytes of no page are placed");
    assert!(n < SHARED || n >= 2);
    n
}
