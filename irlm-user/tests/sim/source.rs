//! A source rack's agents: preparation, the plan's parts, push, the tap on each VM's stream, needs, and the source
//! side of the handover with its journal. Same semantics as `flow`, with `core` doing the deciding.

use crate::guest::{Item, SourceRun, at, content_of, page};
use crate::net::{Agent, CALLER, MS, US};
use crate::world::{Ev, Profile, World};
use irlm_user::core::account::{Account, Marker};
use irlm_user::core::digest::{Digest, Hasher, uniform};
use irlm_user::core::handover::departure::Input as DepartureInput;
use irlm_user::core::handover::{Departure as Driver, GuestState, SourceState};
use irlm_user::core::hold::Hold;
use irlm_user::core::pair::PairTable;
use irlm_user::core::plan::{Carry, HostPlan};
use irlm_user::core::sketch::{Lane, References, Sketch};
use irlm_user::core::source::{BlockInfo, SourceVm};
use irlm_user::core::units::{HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::{
    Blocks, ContentEntry, NeedEntry, Purpose, Word, decode_needs, decode_slots, encode_entries, encode_needs,
};
use irlm_user::core::wire::pages::{Form, PagesBuilder};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

// What is done beside streams.
mod push;

pub(crate) struct SourceAgent {
    pub(crate) up: bool,
    pub(crate) life: u32,
    tables: BTreeMap<u16, PairTable>,
    /// What target hosts keep, by target host and trust domain.
    references: BTreeMap<(u16, u16), References>,
    pub(crate) vms: BTreeMap<u16, Departure>,
    /// Where preparation saw each content.
    seen: HashMap<Digest, Vec<(u16, PageAddr)>>,
    part: Option<HostPlan>,
    carry: VecDeque<Carry>,
    /// Models that others have lent, by target host and trust domain, until there is a table for them.
    lent: BTreeMap<(u16, u16), Vec<u32>>,
    /// Models that this host has lent, with the target hosts that are to have them.
    models: VecDeque<(u16, u32, Vec<HostIx>)>,
    /// Push connections by first target and trust domain.
    push: BTreeMap<(u16, u16), usize>,
    pub(crate) pushing: bool,
}

impl SourceAgent {
    pub(crate) fn new() -> Self {
        Self {
            up: true,
            life: 0,
            tables: BTreeMap::new(),
            references: BTreeMap::new(),
            vms: BTreeMap::new(),
            seen: HashMap::new(),
            part: None,
            carry: VecDeque::new(),
            lent: BTreeMap::new(),
            models: VecDeque::new(),
            push: BTreeMap::new(),
            pushing: false,
        }
    }
}

/// A content that another source host lends, for pages that go to a target host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Model {
    target: u16,
    domain: u16,
    content: u32,
}

/// One VM's departure in its agent's memory.
pub(crate) struct Departure {
    core: SourceVm,
    account: Option<Account>,
    hold: Hold,
    pub(crate) h: Driver,
    pub(crate) conn: Option<usize>,
    pub(crate) settle: Option<usize>,
    pub(crate) busy: bool,
}

impl World {
    pub(crate) fn src(&mut self, vm: u16) -> &mut SourceAgent {
        let h = self.vms[usize::from(vm)].source;
        &mut self.sources[usize::from(h)]
    }
    pub(crate) fn source_life(&self, vm: u16) -> u32 {
        self.sources[usize::from(self.vms[usize::from(vm)].source)].life
    }

    fn table(&mut self, host: u16, target: u16) -> &mut PairTable {
        let max = self.cfg.max_entries;
        let s = &mut self.sources[usize::from(host)];
        s.tables.entry(target).or_insert_with(|| PairTable::new(HostIx(host), max))
    }

    /// An account of a VM's pages, as each end keeps one.
    pub(crate) fn account(&self, vm: u16) -> Option<Account> {
        let v = &self.vms[usize::from(vm)];
        let pages = v.q.ram.iter().map(|r| r.len() as u32);
        self.cfg.verify.then(|| Account::new(Marker::new(&[vm as u8; 32]), pages))
    }

    /// The coordinator has the VM migrated.
    pub(crate) fn start(&mut self, vm: u16) {
        let (host, target) = (self.vms[usize::from(vm)].source, self.vms[usize::from(vm)].target);
        let agent = Agent::Source(host);
        // An agent that was restarted is out of the group: its names could mean other contents at the target.
        if !self.up(agent) || self.life(agent) > 0 || self.vms[usize::from(vm)].q.run == SourceRun::Dead {
            self.vms[usize::from(vm)].passed_over = true;
            return;
        }
        if self.cfg.push_first && self.now < 2_000 * MS {
            let pushing =
                self.sources.iter().any(|s| s.up && (s.pushing || s.part.is_some()) && self.index_up);
            let flying =
                self.conns.iter().any(|c| c.undelivered > 0 && !matches!(c.purpose, Purpose::Vm { .. }));
            if pushing || flying {
                return self.after(5 * MS, 6 * MS, Ev::Start(vm));
            }
        }
        let mut ram = BlockInfo::new(true);
        for (p, content) in self.vms[usize::from(vm)].q.ram[0].clone().into_iter().enumerate() {
            // The page's digest at preparation, where this is the page that preparation saw.
            let d = self.hashers[usize::from(self.vms[usize::from(vm)].domain)].page(&page(content));
            let seen = self.sources[usize::from(host)].seen.get(&d);
            if seen.is_some_and(|s| s.contains(&(vm, at(0, p)))) && self.table(host, target).is_lone(&d) {
                ram.set_lone(p as u32);
            }
        }
        let hasher = self.hashers[usize::from(self.vms[usize::from(vm)].domain)].clone();
        let core = SourceVm::new(hasher, vec![ram, BlockInfo::new(false)]);
        self.vms[usize::from(vm)].journal_s = Some(SourceState::Streaming);
        let purpose = Purpose::Vm { source: HostIx(host), vm: VmIx(vm) };
        let conn = self.open(agent, Agent::Target(target), purpose);
        let account = self.account(vm);
        let d = Departure {
            core,
            account,
            hold: Hold::new(true),
            h: Driver::new(),
            conn: Some(conn),
            settle: None,
            busy: false,
        };
        self.src(vm).vms.insert(vm, d);
        self.say(|_| format!("vm{vm}: starts from source {host} to target {target}"));
    }

    /// A connection that this side called stands.
    pub(crate) fn opened(&mut self, c: usize) {
        match self.conns[c].purpose {
            Purpose::Vm { vm, .. } => self.start_stream(vm.0, c),
            Purpose::Settle { vm, .. } => self.source_event(vm.0, DepartureInput::Connected),
            Purpose::Peer { .. } => self.peer_opened(c),
            _ => {}
        }
    }

    fn start_stream(&mut self, vm: u16, c: usize) {
        let streaming = self.src(vm).vms.get(&vm).is_some_and(|d| d.h.state() == SourceState::Streaming);
        if !streaming {
            // What there is to say could not be said before.
            return self.source_event(vm, DepartureInput::Connected);
        }
        let v = &mut self.vms[usize::from(vm)];
        if v.q.run != SourceRun::Running {
            return;
        }
        v.q.migrate();
        let gen_ = v.q.gen_;
        let names = crate::guest::BLOCK_NAMES.map(str::to_owned);
        let blocks =
            names.into_iter().zip(&v.q.ram).map(|(n, r)| (n, (r.len() * PAGE_SIZE) as u64)).collect();
        let blocks = Blocks { section_id: 2, footers: true, blocks };
        self.send(c, CALLER, Kind::Verbatim, &[], b"QEVM");
        self.send(c, CALLER, Kind::Blocks, &blocks.encode(), &[]);
        self.after(0, MS, Ev::Qemu { vm, gen_ });
        self.after(0, MS, Ev::Tap { vm, gen_ });
    }

    pub(crate) fn qemu(&mut self, vm: u16, gen_: u32) {
        let q = &mut self.vms[usize::from(vm)].q;
        if q.gen_ != gen_ {
            return;
        }
        q.produce(&mut self.rng);
        if q.run != SourceRun::Sent {
            self.after(50 * US, 3 * MS, Ev::Qemu { vm, gen_ });
        }
    }

    /// The tap takes what QEMU wrote, as far as the socket to the target has room.
    pub(crate) fn tap(&mut self, vm: u16, gen_: u32) {
        let q = &self.vms[usize::from(vm)].q;
        if q.gen_ != gen_ || !q.migrating() {
            return;
        }
        self.after(50 * US, 3 * MS, Ev::Tap { vm, gen_ });
        let (host, target) = (self.vms[usize::from(vm)].source, self.vms[usize::from(vm)].target);
        if !self.sources[usize::from(host)].up {
            return;
        }
        let Some(mut d) = self.sources[usize::from(host)].vms.remove(&vm) else { return };
        if let Some(c) = d.conn.filter(|c| self.backlog(*c, CALLER) < 20 * MS) {
            self.tap_some(vm, target, &mut d, c);
        }
        self.sources[usize::from(host)].vms.insert(vm, d);
    }

    fn tap_some(&mut self, vm: u16, target: u16, d: &mut Departure, c: usize) {
        let host = self.vms[usize::from(vm)].source;
        self.table(host, target);
        let mut out = (PagesBuilder::default(), Vec::new());
        let spared = d.hold.spared();
        d.hold.allow(self.rng.range(0, 30) as usize);
        for _ in 0..self.rng.range(1, 16) {
            let Some(item) = self.vms[usize::from(vm)].q.pipe.pop_front() else { break };
            if out.0.is_full() || !matches!(item, Item::Page(..)) {
                self.flush(c, &mut out.0, &mut out.1);
            }
            match item {
                Item::Page(a, content) => {
                    let bytes = page(content);
                    if let Some(account) = &mut d.account {
                        account.page(a, &bytes);
                    }
                    // As if sampling had found every fifth page hot.
                    let held = uniform(&bytes).is_none().then_some(&bytes);
                    if !d.hold.page(a, held, a.page % 5 == 0) {
                        self.page_leaves(vm, target, &mut d.core, a, &bytes, &mut out);
                    }
                }
                Item::Stopped => {
                    d.hold.stop();
                    d.h.handle(DepartureInput::Stopped, Nanos(self.now));
                    self.send(c, CALLER, Kind::Stopped, &[], &[]);
                    self.say(|_| format!("vm{vm}: stopped"));
                }
                Item::RamEnd => {
                    let all = d.hold.all();
                    self.leave(vm, target, &mut d.core, c, &all);
                    if let Some(account) = &mut d.account {
                        d.h.handle(DepartureInput::Sent(account.tally()), Nanos(self.now));
                    }
                    self.send(c, CALLER, Kind::RamEnd, &[], &[]);
                }
                Item::Tail => self.send(c, CALLER, Kind::Verbatim, &[], b"devices"),
            }
        }
        self.flush(c, &mut out.0, &mut out.1);
        let due = d.hold.due();
        self.leave(vm, target, &mut d.core, c, &due);
        d.hold.reuse(due);
        self.tally.spared += d.hold.spared() - spared;
    }

    /// Held pages leave.
    fn leave(
        &mut self,
        vm: u16,
        target: u16,
        core: &mut SourceVm,
        c: usize,
        pages: &[(PageAddr, Box<PageBytes>)],
    ) {
        let mut out = (PagesBuilder::default(), Vec::new());
        for (a, bytes) in pages {
            if out.0.is_full() {
                self.flush(c, &mut out.0, &mut out.1);
            }
            self.page_leaves(vm, target, core, *a, bytes, &mut out);
        }
        self.flush(c, &mut out.0, &mut out.1);
    }

    fn page_leaves(
        &mut self,
        vm: u16,
        target: u16,
        core: &mut SourceVm,
        a: PageAddr,
        bytes: &PageBytes,
        (frame, body): &mut (PagesBuilder, Vec<u8>),
    ) {
        let content = content_of(bytes).expect("a guest's page");
        let host = self.vms[usize::from(vm)].source;
        let mut page = [(a, None, Some(bytes))];
        core.look(&mut page);
        let leaving = page[0].1.expect("it leaves somehow");
        let source = &mut self.sources[usize::from(host)];
        let table = source.tables.get_mut(&target).expect("made before");
        let mut way = core.decide(table, leaving);
        let mut form = Form::Whole;
        if way.has_content() {
            let mut less = [0; PAGE_SIZE];
            let (domain, (slots, settle)) = (self.vms[usize::from(vm)].domain, self.cfg.references);
            let refs = source.references.entry((target, domain));
            let refs = refs.or_insert_with(|| References::new(slots, settle));
            for content in source.lent.remove(&(target, domain)).into_iter().flatten() {
                adopt(refs, &self.hashers[usize::from(domain)], content, self.now);
            }
            let (told, modelled) = (refs.counts.told, core.stats.modelled);
            let mut tell = Vec::new();
            let when = (Lane { vm, frame: 0 }, Nanos(self.now));
            form = core.form(refs, when, a, &mut way, Sketch::of(bytes), bytes, &mut less, &mut tell);
            self.tally.told += refs.counts.told - told;
            self.tally.modelled += core.stats.modelled - modelled;
            // Anywhere in the frame: it counts for all of it.
            tell.iter().for_each(|(slot, digest)| frame.keep(*slot, digest));
            let differs = matches!(form, Form::Less(_));
            self.tally.differences += u64::from(differs);
            body.extend_from_slice(if differs { &less } else { bytes });
            if self.cfg.profile == Profile::Clean {
                let d = self.digest(self.vms[usize::from(vm)].domain, content);
                *self.crossed.entry(d).or_default() += 1;
            }
        }
        way.put(a, form, frame);
        self.vms[usize::from(vm)].sent.entry(a).or_default().push(content);
    }

    fn flush(&mut self, c: usize, frame: &mut PagesBuilder, body: &mut Vec<u8>) {
        if !frame.is_empty() {
            assert_eq!(frame.contents() * PAGE_SIZE, body.len());
            let meta = frame.meta().to_vec();
            self.send(c, CALLER, Kind::Pages, &meta, body);
            frame.clear();
            body.clear();
        }
    }

    /// A frame from a target agent.
    pub(crate) fn received_at_source(&mut self, c: usize, kind: Kind, meta: &[u8]) {
        let (Purpose::Vm { vm, .. } | Purpose::Settle { vm, .. }) = self.conns[c].purpose else {
            panic!("{kind:?} on a connection that only carries contents");
        };
        match kind {
            Kind::Word => {
                let word = Word::decode(meta).expect("good word");
                self.say(|_| format!("vm{}: source hears {word:?}", vm.0));
                self.source_event(vm.0, DepartureInput::Word(word));
            }
            Kind::Unkept => {
                let slots = decode_slots(meta).expect("good slots");
                let v = &self.vms[usize::from(vm.0)];
                let (source, line) = (v.source, (v.target, v.domain));
                if let Some(refs) = self.sources[usize::from(source)].references.get_mut(&line) {
                    let before = refs.counts.forgotten;
                    refs.forget(&slots);
                    self.tally.forgotten += refs.counts.forgotten - before;
                }
            }
            Kind::Need => self.answer(vm.0, c, &decode_needs(kind, meta).expect("good needs")),
            other => panic!("{other:?} from a target agent"),
        }
    }

    /// Answers needs by what guest RAM holds now.
    fn answer(&mut self, vm: u16, c: usize, needs: &[NeedEntry]) {
        let (host, target) = (self.vms[usize::from(vm)].source, self.vms[usize::from(vm)].target);
        self.table(host, target);
        let Some(mut d) = self.src(vm).vms.remove(&vm) else { return };
        let (mut contents, mut body, mut gone) = (Vec::new(), Vec::new(), Vec::new());
        for n in needs {
            assert!(d.core.readable(n.addr.block), "only contents that can be read are named");
            let now = self.vms[usize::from(vm)].q.read(n.addr).map(page);
            let table = &self.sources[usize::from(host)].tables[&target];
            match d.core.answer(table, n.want, now.as_ref()) {
                Some(digest) => {
                    contents.push(ContentEntry { id: table.id_of(&digest), digest, forward: vec![] });
                    body.extend_from_slice(&now.expect("it was hashed"));
                    *self.crossed.entry(digest).or_default() += 1;
                }
                None => gone.push(*n),
            }
        }
        self.tally.needs += needs.len() as u64;
        self.tally.gone += gone.len() as u64;
        for (list, bytes) in contents.chunks(3).zip(body.chunks(3 * PAGE_SIZE)) {
            let mut meta = Vec::new();
            encode_entries(list.iter(), &mut meta);
            self.send(c, CALLER, Kind::Contents, &meta, bytes);
        }
        if !gone.is_empty() {
            self.send(c, CALLER, Kind::Gone, &encode_needs(&gone), &[]);
        }
        self.src(vm).vms.insert(vm, d);
    }

    pub(crate) fn source_lost(&mut self, c: usize) {
        let (Purpose::Vm { vm, .. } | Purpose::Settle { vm, .. }) = self.conns[c].purpose else { return };
        let Some(d) = self.src(vm.0).vms.get_mut(&vm.0) else { return };
        if d.conn == Some(c) {
            d.conn = None;
            self.say(|_| format!("vm{}: source has lost the connection", vm.0));
        } else if d.settle == Some(c) {
            d.settle = None;
        }
        self.source_event(vm.0, DepartureInput::Lost("cut".to_owned()));
    }

    pub(crate) fn kill_source(&mut self, host: u16) {
        let s = &mut self.sources[usize::from(host)];
        s.up = false;
        s.life += 1;
        s.vms.clear();
        s.tables.clear();
        s.push.clear();
        s.carry.clear();
        s.lent.clear();
        s.models.clear();
        s.pushing = false;
        s.part = None;
        self.close_all_of(Agent::Source(host));
        for vm in 0..self.cfg.vms {
            let v = &self.vms[usize::from(vm)];
            let gen_ = v.q.gen_;
            // Its stream closes before SHUT: stock QEMU resumes by itself.
            if v.source == host && v.q.migrating() && !v.q.shut {
                self.after(0, 20 * MS, Ev::Resumes { vm, gen_ });
            }
        }
    }

    pub(crate) fn restart_source(&mut self, host: u16) {
        self.sources[usize::from(host)].up = true;
        for vm in (0..self.cfg.vms).filter(|vm| self.vms[usize::from(*vm)].source == host).collect::<Vec<_>>()
        {
            let v = &self.vms[usize::from(vm)];
            let Some(journal) = v.journal_s else { continue };
            let h = Driver::recover(journal, GuestState::Running, Nanos(self.now));
            let core = SourceVm::new(self.hashers[usize::from(v.domain)].clone(), vec![]);
            let (conn, settle) = (None, None);
            let d = Departure { core, account: None, hold: Hold::new(false), h, conn, settle, busy: false };
            self.src(vm).vms.insert(vm, d);
            self.say(|_| format!("vm{vm}: source recovers from {journal:?}"));
            self.drive_source(vm);
        }
    }

    /// Whether nothing is left to do for the VM at its source.
    pub(crate) fn source_settled(&self, vm: u16) -> bool {
        let v = &self.vms[usize::from(vm)];
        match self.sources[usize::from(v.source)].vms.get(&vm) {
            Some(d) => {
                let left = d.h.lost().is_some() || d.h.behind() || self.left_in_doubt(vm);
                d.h.finished() || (left && d.h.wake().is_none() && !d.busy)
            }
            None => v.passed_over,
        }
    }
    /// What was loaded differs and has no other copy: it waits for an operator.
    pub(crate) fn left_in_doubt(&self, vm: u16) -> bool {
        let Some(d) = self.departure(vm).filter(|d| d.h.state() == SourceState::GaveUp) else { return false };
        d.h.differs().is_some() || self.arrival(vm).is_some_and(|a| a.h.differs())
    }
    pub(crate) fn departure(&self, vm: u16) -> Option<&Departure> {
        self.sources[usize::from(self.vms[usize::from(vm)].source)].vms.get(&vm)
    }
}

fn adopt(refs: &mut References, hasher: &Hasher, content: u32, now: u64) {
    let bytes = page(content);
    refs.adopt(Sketch::of(&bytes), &bytes, hasher.page(&bytes), Nanos(now));
}

/// Preparation's view of a content, for the count of crossings.
pub(crate) struct Sighting {
    pub(crate) hosts: BTreeSet<u16>,
    pub(crate) targets: BTreeSet<u16>,
    pub(crate) pages: usize,
}

impl World {
    /// Where each digest was when preparation looked.
    pub(crate) fn sightings(&self) -> BTreeMap<Digest, Sighting> {
        let mut out: BTreeMap<Digest, Sighting> = BTreeMap::new();
        for (h, s) in self.sources.iter().enumerate() {
            for (d, places) in &s.seen {
                let e = out.entry(*d).or_insert_with(|| Sighting {
                    hosts: BTreeSet::new(),
                    targets: BTreeSet::new(),
                    pages: 0,
                });
                e.hosts.insert(h as u16);
                e.pages += places.len();
                e.targets.extend(places.iter().map(|(vm, _)| self.vms[usize::from(*vm)].target));
            }
        }
        out
    }
}
