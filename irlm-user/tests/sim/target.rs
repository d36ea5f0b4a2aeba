//! A target rack's agents: streams in, contents from push and peers, forwarding, voids, waiting lists with their
//! needs, and the target side of the handover with its journal. Same semantics as `flow`.

use crate::emit::{Emit, nth};
use crate::guest::TargetRun;
use crate::net::{Agent, CALLER, MS, TAKER, US, frame};
use crate::world::{Ev, World};
use irlm_user::core::account::Account;
use irlm_user::core::arrival::{TargetError, TargetHost, TargetVm, VoidAction, Wake};
use irlm_user::core::delta::{Slots, restore};
use irlm_user::core::digest::{Digest, Hasher};
use irlm_user::core::handover::arrival::Input as ArrivalInput;
use irlm_user::core::handover::{Arrival as Driver, GuestState, TargetState};
use irlm_user::core::units::{HostIx, Nanos, PAGE_SIZE, PageAddr, VmIx};
use irlm_user::core::wire::frame::{Kind, WireError};
use irlm_user::core::wire::messages::{
    Blocks, ContentEntry, Purpose, Word, decode_entries, decode_needs, encode_entries, encode_needs,
    encode_slots,
};
use irlm_user::core::wire::pages::{PageBatch, Record};
use std::collections::BTreeMap;

pub(crate) struct TargetAgent {
    pub(crate) up: bool,
    pub(crate) life: u32,
    pub(crate) host: TargetHost,
    /// Contents kept for differences, by source host and trust domain.
    slots: BTreeMap<(u16, u16), Slots>,
    pub(crate) vms: BTreeMap<u16, Arrival>,
    /// Peer connections called from here, by target and trust domain.
    peers: BTreeMap<(u16, u16), Peer>,
    /// Sends wrong bytes to its peers.
    pub(crate) hostile: bool,
}

/// A connection to a peer, and the frames that wait for it to stand.
struct Peer {
    conn: usize,
    waiting: Vec<Vec<u8>>,
}

/// Ids and waits that no honest run here comes near.
const PLENTY: usize = 1 << 20;

impl TargetAgent {
    pub(crate) fn new(budget: usize) -> Self {
        Self {
            up: true,
            life: 0,
            host: TargetHost::new(budget, PLENTY),
            slots: BTreeMap::new(),
            vms: BTreeMap::new(),
            peers: BTreeMap::new(),
            hostile: false,
        }
    }
}

/// One VM's arrival in its agent's memory.
pub(crate) struct Arrival {
    pub(crate) core: TargetVm,
    account: Option<Account>,
    pub(crate) h: Driver,
    pub(crate) conn: Option<usize>,
    pub(crate) settle: Option<usize>,
    pub(crate) busy: bool,
    pub(crate) tail: bool,
    /// Everything has been written to QEMU.
    pub(crate) fed: bool,
    pub(crate) left: bool,
}

/// The one line of why a VM's stream is unusable.
struct Refused(String);
impl From<WireError> for Refused {
    fn from(e: WireError) -> Self {
        Self(e.to_string())
    }
}
impl From<TargetError> for Refused {
    fn from(e: TargetError) -> Self {
        Self(e.to_string())
    }
}
fn wrong_hash(d: &Digest) -> Refused {
    Refused(format!("content does not hash to {d:?}"))
}

/// Contents to send on, with their hosts.
type Owed = Vec<(Digest, Vec<HostIx>)>;

impl World {
    pub(crate) fn tgt(&mut self, vm: u16) -> &mut TargetAgent {
        let t = self.vms[usize::from(vm)].target;
        &mut self.targets[usize::from(t)]
    }
    fn hasher(&self, vm: u16) -> Hasher {
        self.hashers[usize::from(self.vms[usize::from(vm)].domain)].clone()
    }
    fn nanos(&self) -> Nanos {
        Nanos(self.now)
    }

    fn new_arrival(&self, vm: u16, h: Driver) -> Arrival {
        let source = HostIx(self.vms[usize::from(vm)].source);
        Arrival {
            core: TargetVm::new(VmIx(vm), source, PLENTY),
            account: self.account(vm),
            h,
            conn: None,
            settle: None,
            busy: false,
            tail: false,
            fed: false,
            left: false,
        }
    }

    /// A Hello has come; whether it is taken.
    pub(crate) fn accepted(&mut self, c: usize) -> bool {
        match self.conns[c].purpose {
            Purpose::Vm { vm, .. } => {
                if self.vm(vm).journal_t.is_some() || self.vm(vm).t.run != TargetRun::Incoming {
                    return false;
                }
                self.vms[usize::from(vm.0)].journal_t = Some(TargetState::Filling);
                let mut a = self.new_arrival(vm.0, Driver::new());
                a.conn = Some(c);
                let life = self.tgt(vm.0).life;
                self.tgt(vm.0).vms.insert(vm.0, a);
                self.after(0, 10 * MS, Ev::Tick { vm: vm.0, life });
                true
            }
            Purpose::Settle { vm, .. } => {
                if !self.tgt(vm.0).vms.contains_key(&vm.0) {
                    // Never heard of it: written down, so that a Hello still on its way finds it settled.
                    self.vms[usize::from(vm.0)].journal_t = Some(TargetState::Discarded);
                    let h = Driver::recover(TargetState::Discarded, GuestState::Running, false);
                    let a = self.new_arrival(vm.0, h);
                    self.tgt(vm.0).vms.insert(vm.0, a);
                    self.drive_target(vm.0);
                }
                if let Some(a) = self.tgt(vm.0).vms.get_mut(&vm.0) {
                    a.settle = Some(c);
                }
                true
            }
            Purpose::Push { .. } | Purpose::Peer { .. } => true,
            _ => false,
        }
    }

    pub(crate) fn received(&mut self, c: usize, to: usize, kind: Kind, meta: &[u8], body: &[u8]) {
        if to == CALLER {
            return match self.conns[c].ends[CALLER] {
                Agent::Source(_) => self.received_at_source(c, kind, meta),
                Agent::Target(_) => panic!("{kind:?} from the taker of a peer connection"),
            };
        }
        match self.conns[c].purpose {
            Purpose::Vm { vm, .. } | Purpose::Settle { vm, .. } if kind == Kind::Word => {
                let word = Word::decode(meta).expect("good word");
                self.say(|_| format!("vm{}: target hears {word:?}", vm.0));
                self.target_event(vm.0, ArrivalInput::Word(word));
            }
            Purpose::Vm { vm, .. } => self.stream_frame(vm.0, kind, meta, body),
            Purpose::Push { source, domain } => self.contents(c, Some(source), domain, kind, meta, body),
            Purpose::Peer { domain, .. } => self.contents(c, None, domain, kind, meta, body),
            _ => panic!("{kind:?} on a connection for words"),
        }
    }

    fn stream_frame(&mut self, vm: u16, kind: Kind, meta: &[u8], body: &[u8]) {
        let Some(mut a) = self.tgt(vm).vms.remove(&vm) else { return };
        let mut wakes = Vec::new();
        let mut owed = Vec::new();
        let mut voids = Vec::new();
        let mut unkept = Vec::new();
        let done = if a.h.state() == TargetState::Filling {
            self.stream(vm, &mut a, kind, meta, body, (&mut wakes, &mut owed, &mut voids, &mut unkept))
        } else {
            Ok(())
        };
        if let Some(c) = a.conn.filter(|_| !unkept.is_empty()) {
            self.tally.unkept += unkept.len() as u64;
            self.say(|_| format!("vm{vm}: target lacks the contents of slots {unkept:?}"));
            self.send(c, TAKER, Kind::Unkept, &encode_slots(&unkept), &[]);
        }
        self.tgt(vm).vms.insert(vm, a);
        let t = self.vms[usize::from(vm)].target;
        self.serve(t, self.vms[usize::from(vm)].domain, owed);
        for (digest, rest) in voids {
            self.pass_void(t, self.vms[usize::from(vm)].domain, digest, &rest);
        }
        self.queue_wakes(t, wakes);
        match done {
            Ok(()) => self.feed(vm),
            Err(Refused(why)) => {
                self.say(|_| format!("vm{vm}: target refuses: {why}"));
                self.target_event(vm, ArrivalInput::Abort(why));
            }
        }
    }

    fn stream(
        &mut self,
        vm: u16,
        a: &mut Arrival,
        kind: Kind,
        meta: &[u8],
        body: &[u8],
        (wakes, owed, voids, unkept): (&mut Vec<Wake>, &mut Owed, &mut Owed, &mut Vec<u32>),
    ) -> Result<(), Refused> {
        let (hasher, now) = (self.hasher(vm), self.nanos());
        let v = &mut self.vms[usize::from(vm)];
        let TargetAgent { host, slots, .. } = &mut self.targets[usize::from(v.target)];
        match kind {
            Kind::Blocks => {
                let b = Blocks::decode(meta)?;
                for ((_, used), ram) in b.blocks.iter().zip(&v.t.ram) {
                    assert_eq!(*used, (ram.len() * PAGE_SIZE) as u64);
                }
            }
            Kind::Pages => {
                // Checked whole before anything is acted on, as the length of the body must fit it.
                let mut batch = PageBatch::default();
                batch.read(meta)?;
                assert_eq!(batch.contents() * PAGE_SIZE, body.len());
                let slots = slots.entry((v.source, v.domain)).or_insert_with(|| Slots::new(self.cfg.slots));
                for p in batch.records() {
                    let Record::Keep { digest, slot } = p.record else { continue };
                    match host.store.get(&digest) {
                        Some(bytes) => slots.keep(slot, bytes),
                        None => unkept.push(slot),
                    }
                }
                let mut scratch = Vec::new();
                let (body, missing) = restore(&batch, body.as_chunks().0, slots, &hasher, &mut scratch)?;
                self.tally.unmade += missing.len() as u64;
                let mut content = 0;
                for r in batch.records().iter().map(|p| p.record) {
                    let bytes = body.get(content).filter(|_| !missing.contains(content));
                    if let (Record::Shared { digest, .. }, Some(bytes)) = (r, bytes)
                        && hasher.page(bytes) != digest
                    {
                        return Err(wrong_hash(&digest));
                    }
                    let (addr, count) = match r {
                        Record::Uniform { addr, count, .. } | Record::Unique { addr, count } => (addr, count),
                        Record::Shared { addr, .. }
                        | Record::Named { addr, .. }
                        | Record::Ref { addr, .. }
                        | Record::Remote { addr, .. } => (addr, 1),
                        Record::Keep { .. } => continue,
                    };
                    for i in 0..count {
                        v.t.expect(PageAddr { page: addr.page + i, ..addr });
                    }
                    let harm = (self.cfg.harm, &mut self.rng);
                    let mut out = Emit::new(v, &mut a.account, harm, body.as_flattened());
                    a.core.record(host, r, &mut content, bytes, now, &mut out, wakes)?;
                }
                owed.extend(a.core.take_owed());
            }
            Kind::Contents => {
                for (i, e) in decode_entries(kind, meta)?.into_iter().enumerate() {
                    let bytes = nth(body, i);
                    if hasher.page(bytes) != e.digest {
                        return Err(wrong_hash(&e.digest));
                    }
                    let harm = (self.cfg.harm, &mut self.rng);
                    let mut out = Emit::new(v, &mut a.account, harm, body);
                    let hosts = a.core.answered(host, e.id, e.digest, bytes, now, &mut out, wakes)?;
                    owed.push((e.digest, hosts));
                }
            }
            Kind::Gone => {
                for e in decode_needs(kind, meta)? {
                    voids.extend(a.core.gone(host, e)?);
                }
            }
            Kind::RamEnd => a.core.ram_end(now)?,
            Kind::Verbatim => a.tail |= body == b"devices",
            Kind::Stopped | Kind::Heartbeat => {}
            other => panic!("{other:?} from a source agent"),
        }
        Ok(())
    }

    /// Push from a source host or forward from a peer.
    fn contents(
        &mut self,
        c: usize,
        source: Option<HostIx>,
        domain: u16,
        kind: Kind,
        meta: &[u8],
        body: &[u8],
    ) {
        let Agent::Target(t) = self.conns[c].ends[TAKER] else { panic!("contents go to targets") };
        let entries = decode_entries(kind, meta).expect("good entries");
        let mut wakes = Vec::new();
        let mut owed = Vec::new();
        for (i, e) in entries.into_iter().enumerate() {
            let host = &mut self.targets[usize::from(t)].host;
            if kind == Kind::Voids {
                let action = host.void(e.digest, &e.forward, &mut wakes);
                self.tally.voids += 1;
                match action {
                    VoidAction::Forward => owed.push((e.digest, e.forward)),
                    VoidAction::PassOn => self.pass_void(t, domain, e.digest, &e.forward),
                    VoidAction::Asking => {}
                }
                continue;
            }
            let bytes = nth(body, i);
            if self.hashers[usize::from(domain)].page(bytes) != e.digest {
                self.tally.refused += 1;
                self.say(|_| format!("target {t}: refuses wrong bytes for {:?}", e.digest));
                self.close(c, TAKER);
                break;
            }
            if let (Some(source), Some(id)) = (source, e.id) {
                host.bind(source, id, e.digest, &mut wakes).expect("far from its bound");
            }
            let mut hosts = host.content(source.is_none(), e.digest, bytes, &mut wakes);
            hosts.extend(e.forward);
            owed.push((e.digest, hosts));
            // At once, as the store may not keep it until the end of the frame.
            self.serve(t, domain, std::mem::take(&mut owed));
        }
        self.serve(t, domain, owed);
        self.queue_wakes(t, wakes);
    }

    fn queue_wakes(&mut self, t: u16, wakes: Vec<Wake>) {
        let life = self.targets[usize::from(t)].life;
        for wake in wakes {
            self.after(0, 500 * US, Ev::Wake { target: t, life, wake });
        }
    }

    /// Sends stored contents on to peers.
    fn serve(&mut self, t: u16, domain: u16, owed: Owed) {
        for (digest, mut hosts) in owed {
            hosts.sort();
            hosts.dedup();
            let Some(bytes) = self.targets[usize::from(t)].host.store.get(&digest).copied() else { continue };
            for h in hosts.into_iter().filter(|h| h.0 != t) {
                let mut bytes = bytes;
                if self.targets[usize::from(t)].hostile && self.rng.one_in(2) {
                    bytes[self.rng.index(PAGE_SIZE)] ^= 1;
                }
                let mut meta = Vec::new();
                encode_entries([ContentEntry { id: None, digest, forward: vec![] }].iter(), &mut meta);
                self.send_peer(t, h.0, domain, frame(Kind::Contents, &meta, &bytes));
                self.tally.forwarded += 1;
            }
        }
    }

    /// Passes a void on to the rest of its list.
    pub(crate) fn pass_void(&mut self, t: u16, domain: u16, digest: Digest, rest: &[HostIx]) {
        let Some((next, rest)) = rest.split_first() else { return };
        let mut meta = Vec::new();
        encode_entries([ContentEntry { id: None, digest, forward: rest.to_vec() }].iter(), &mut meta);
        self.send_peer(t, next.0, domain, frame(Kind::Voids, &meta, &[]));
    }

    fn send_peer(&mut self, t: u16, peer: u16, domain: u16, f: Vec<u8>) {
        let key = (peer, domain);
        if !self.targets[usize::from(t)].peers.contains_key(&key) {
            let purpose = Purpose::Peer { target: HostIx(t), domain };
            let conn = self.open(Agent::Target(t), Agent::Target(peer), purpose);
            self.targets[usize::from(t)].peers.insert(key, Peer { conn, waiting: vec![] });
        }
        let Some(peer) = self.targets[usize::from(t)].peers.get_mut(&key) else { return };
        let c = peer.conn;
        if self.conns[c].ok {
            self.send_frame(c, CALLER, f);
        } else {
            peer.waiting.push(f);
        }
    }

    pub(crate) fn peer_opened(&mut self, c: usize) {
        let Agent::Target(t) = self.conns[c].ends[CALLER] else { return };
        let peer = self.targets[usize::from(t)].peers.values_mut().find(|p| p.conn == c);
        for f in peer.map(|p| std::mem::take(&mut p.waiting)).unwrap_or_default() {
            self.send_frame(c, CALLER, f);
        }
    }

    pub(crate) fn wake(&mut self, t: u16, life: u32, w: Wake) {
        let agent = &self.targets[usize::from(t)];
        if !agent.up || agent.life != life {
            return;
        }
        let vm = w.vm.0;
        let Some(mut a) = self.tgt(vm).vms.remove(&vm) else { return };
        if a.h.state() == TargetState::Filling {
            let now = self.nanos();
            let v = &mut self.vms[usize::from(vm)];
            let host = &mut self.targets[usize::from(t)].host;
            let harm = (self.cfg.harm, &mut self.rng);
            let mut out = Emit::new(v, &mut a.account, harm, &[]);
            a.core.woken(host, w.key, now, &mut out).expect("no new waits");
            self.ask(vm, &mut a);
        }
        self.tgt(vm).vms.insert(vm, a);
        self.feed(vm);
    }

    pub(crate) fn tick(&mut self, vm: u16, life: u32) {
        if self.tgt(vm).life != life || !self.tgt(vm).up {
            return;
        }
        let Some(mut a) = self.tgt(vm).vms.remove(&vm) else { return };
        if a.h.state() == TargetState::Filling {
            self.ask(vm, &mut a);
            self.after(8 * MS, 12 * MS, Ev::Tick { vm, life });
        }
        self.tgt(vm).vms.insert(vm, a);
    }

    fn ask(&mut self, vm: u16, a: &mut Arrival) {
        let Some(c) = a.conn else { return };
        let needs = a.core.due(self.nanos(), self.cfg.patience);
        if !needs.is_empty() {
            self.say(|_| format!("vm{vm}: target asks for {} contents", needs.len()));
            self.send(c, TAKER, Kind::Need, &encode_needs(&needs), &[]);
        }
    }

    /// The end of the stream goes to QEMU once nothing waits.
    fn feed(&mut self, vm: u16) {
        let Some(a) = self.tgt(vm).vms.get_mut(&vm) else { return };
        if a.tail && !a.fed && a.core.complete() && a.h.state() == TargetState::Filling {
            a.fed = true;
            let (superseded, hits) = (a.core.stats.superseded, a.core.stats.hits);
            let waited = a.core.stats.waited;
            self.tally.superseded += superseded;
            self.tally.references += hits + waited;
            self.tally.remote += waited;
            self.after(100 * US, 5 * MS, Ev::Loads { vm });
        }
    }

    /// The target QEMU has everything. Rule 2: its RAM is the stopped source's, page by page.
    pub(crate) fn target_loads(&mut self, vm: u16) {
        let v = &mut self.vms[usize::from(vm)];
        if v.t.run != TargetRun::Incoming {
            return;
        }
        for (b, (loaded, stopped)) in v.t.ram.iter().zip(&v.q.stopped).enumerate() {
            for (p, (l, s)) in loaded.iter().zip(stopped).enumerate() {
                v.differs |= *l != Some(*s);
                assert!(*l == Some(*s) || self.cfg.harm > 0, "rule 2: page {p} of block {b} of vm{vm}");
            }
        }
        self.tally.proof.differed += u64::from(v.differs);
        v.t.run = TargetRun::Loaded;
        self.say(|_| format!("vm{vm}: target QEMU has loaded"));
        if self.tgt(vm).up {
            let arrival = self.tgt(vm).vms.get_mut(&vm);
            let made = arrival.and_then(|a| a.account.as_mut()).map(Account::tally);
            self.target_event(vm, ArrivalInput::Loaded(made));
        }
    }

    pub(crate) fn target_lost(&mut self, t: u16, c: usize) {
        let (Purpose::Vm { vm, .. } | Purpose::Settle { vm, .. }) = self.conns[c].purpose else {
            self.targets[usize::from(t)].peers.retain(|_, p| p.conn != c);
            return;
        };
        let Some(a) = self.tgt(vm.0).vms.get_mut(&vm.0) else { return };
        if a.conn == Some(c) {
            a.conn = None;
            self.say(|_| format!("vm{}: target has lost the connection", vm.0));
            self.target_event(vm.0, ArrivalInput::Lost);
        } else if a.settle == Some(c) {
            a.settle = None;
        }
    }

    pub(crate) fn kill_target(&mut self, t: u16) {
        let agent = &mut self.targets[usize::from(t)];
        self.tally.evicted += agent.host.store.evicted();
        agent.host = TargetHost::new(self.cfg.budget, PLENTY);
        agent.slots.clear();
        agent.up = false;
        agent.life += 1;
        agent.hostile = false;
        agent.vms.clear();
        agent.peers.clear();
        self.close_all_of(Agent::Target(t));
        for v in self.vms.iter_mut().filter(|v| v.target == t) {
            // The stream ends early: the loader fails. What was loaded already stays, paused.
            if v.t.run == TargetRun::Incoming && v.journal_t.is_some() && self.rng.one_in(2) {
                v.t.run = TargetRun::Dead;
            }
            // Told to run, and dead: whether it had run before is known to nobody any more.
            if v.journal_t == Some(TargetState::Running) && v.t.run == TargetRun::Dead {
                v.lost = true;
            }
        }
    }

    pub(crate) fn restart_target(&mut self, t: u16) {
        self.targets[usize::from(t)].up = true;
        for vm in (0..self.cfg.vms).filter(|vm| self.vms[usize::from(*vm)].target == t).collect::<Vec<_>>() {
            let Some(journal) = self.vms[usize::from(vm)].journal_t else { continue };
            let h = Driver::recover(journal, GuestState::Running, self.vms[usize::from(vm)].settled_t);
            let a = self.new_arrival(vm, h);
            self.tgt(vm).vms.insert(vm, a);
            self.say(|_| format!("vm{vm}: target recovers from {journal:?}"));
            self.drive_target(vm);
            if self.vms[usize::from(vm)].t.run == TargetRun::Dead {
                self.target_event(vm, ArrivalInput::Failed("gone".to_owned()));
            }
        }
    }

    pub(crate) fn arrival(&self, vm: u16) -> Option<&Arrival> {
        self.targets[usize::from(self.vms[usize::from(vm)].target)].vms.get(&vm)
    }
    pub(crate) fn target_settled(&self, vm: u16) -> bool {
        self.arrival(vm).is_none_or(|a| {
            let still = !a.busy && a.h.wake().is_none() && a.h.finished();
            // A copy that may be older than what its source's did waits for an operator.
            let behind = self.departure(vm).is_some_and(|d| d.h.behind());
            behind
                || self.left_in_doubt(vm)
                || (still
                    && matches!(
                        a.h.state(),
                        TargetState::Running | TargetState::Discarded | TargetState::Lost
                    ))
        })
    }
}
