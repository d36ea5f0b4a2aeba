//! A source rack's agents: preparation, the plan's parts, push, the tap on each VM's stream, needs, and the source
//! side of the handover with its journal. Same semantics as `flow`, with `core` doing the deciding.

use crate::guest::{Item, SourceRun, at, content_of, page};
use crate::net::{Agent, CALLER, MS, US};
use crate::world::{Ev, Profile, World};
use irlm_user::core::digest::{Digest, Hasher, uniform};
use irlm_user::core::handover::{SourceEvent, SourceHandover, SourceState, SourceStep};
use irlm_user::core::hold::Hold;
use irlm_user::core::index::{HostSet, Index, LateItem, LateReply, Limits, Registration, TargetSet};
use irlm_user::core::pair::PairTable;
use irlm_user::core::plan::{Carry, HostPlan, PlanInput, share_plan};
use irlm_user::core::sketch::{Lane, References, Sketch};
use irlm_user::core::source::{BlockInfo, SourceVm};
use irlm_user::core::units::{HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, VmIx};
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::{
    Blocks, ContentEntry, NeedEntry, Purpose, Word, decode_needs, decode_slots, encode_entries, encode_needs,
};
use irlm_user::core::wire::pages::{Form, PagesBuilder};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

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
    hold: Hold,
    pub(crate) h: SourceHandover,
    pub(crate) conn: Option<usize>,
    pub(crate) settle: Option<usize>,
    pub(crate) steps: VecDeque<SourceStep>,
    pub(crate) busy: bool,
    pub(crate) calling: bool,
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

    /// Preparation of all hosts, and the plan made from what they registered.
    pub(crate) fn prepare(&mut self) {
        let mut index = Index::new(Limits::default(), self.cfg.sources, self.cfg.targets);
        // Now and then the index loses a host's registrations, or its life, early.
        let registering = if self.cfg.profile != Profile::Clean && self.rng.one_in(10) {
            self.rng.below(self.cfg.sources.into()) as u16
        } else {
            self.cfg.sources
        };
        for host in 0..self.cfg.sources {
            let mut needed: BTreeMap<Digest, (BTreeSet<u16>, u32)> = BTreeMap::new();
            for vm in
                (0..self.cfg.vms).filter(|vm| self.vms[usize::from(*vm)].source == host).collect::<Vec<_>>()
            {
                let (target, domain) = (self.vms[usize::from(vm)].target, self.vms[usize::from(vm)].domain);
                for (p, content) in self.vms[usize::from(vm)].q.ram[0].clone().into_iter().enumerate() {
                    if uniform(&page(content)).is_some() {
                        continue;
                    }
                    let d = self.digest(domain, content);
                    self.table(host, target).note(d);
                    let n = needed.entry(d).or_default();
                    n.0.insert(target);
                    n.1 += 1;
                    self.sources[usize::from(host)].seen.entry(d).or_default().push((vm, at(0, p)));
                }
            }
            let batch: Vec<_> = needed
                .into_iter()
                .map(|(digest, (t, pages))| {
                    let targets: TargetSet = t.into_iter().map(HostIx).collect();
                    Registration { digest, targets, pages }
                })
                .collect();
            if host < registering {
                index.register(HostIx(host), &batch);
            }
        }
        let sources = HostSet::first(self.cfg.sources);
        index.seal(sources.clone());
        let plan = share_plan(&index, &PlanInput { sources, own_unique_pages: vec![] });
        self.tally.planned += plan.shared();
        for h in 0..self.cfg.sources {
            self.sources[usize::from(h)].part = plan.host_plan(&index, HostIx(h));
            self.after(20 * MS, 60 * MS, Ev::PlanPart { host: h, life: 0 });
        }
        self.index = Some(index);
        for vm in 0..self.cfg.vms {
            self.after(40 * MS, 160 * MS, Ev::Start(vm));
        }
    }

    /// Source hosts lend contents that only they hold to the others, and bring them to the others' target hosts.
    pub(crate) fn lend(&mut self) {
        let clean = self.cfg.profile == Profile::Clean;
        for _ in 0..self.rng.range(0, self.cfg.models + 1) {
            let vm = self.rng.index(self.vms.len());
            let (lender, domain) = (self.vms[vm].source, self.vms[vm].domain);
            let ram = &self.vms[vm].q.ram[0];
            let content = ram[self.rng.index(ram.len())];
            let d = self.digest(domain, content);
            let holds = |s: &SourceAgent| s.seen.contains_key(&d);
            if uniform(&page(content)).is_some() || self.sources.iter().filter(|s| holds(s)).count() != 1 {
                continue;
            }
            let mut lines = BTreeSet::new();
            for v in self.vms.iter().filter(|v| v.source != lender && v.domain == domain) {
                lines.insert((v.source, v.target));
            }
            if self.cfg.models_lost == 0 || !self.rng.one_in(self.cfg.models_lost) {
                let targets: BTreeSet<u16> = lines.iter().map(|(_, t)| *t).collect();
                let targets = targets.into_iter().map(HostIx).collect();
                self.sources[usize::from(lender)].models.push_back((domain, content, targets));
            }
            for (host, target) in lines {
                let model = Model { target, domain, content };
                // Some come while the streams are under way.
                let by = if clean || self.rng.one_in(2) { MS } else { 300 * MS };
                self.after(0, by, Ev::Lent { host, life: 0, model });
            }
        }
        for host in 0..self.cfg.sources {
            if !self.sources[usize::from(host)].models.is_empty() {
                self.sources[usize::from(host)].pushing = true;
                self.after(0, if clean { MS } else { 300 * MS }, Ev::Push { host, life: 0 });
            }
        }
    }

    /// A model has come to a source host.
    pub(crate) fn lent(&mut self, host: u16, life: u32, model: Model) {
        let s = &mut self.sources[usize::from(host)];
        if !s.up || s.life != life {
            return;
        }
        let Model { target, domain, content } = model;
        match s.references.get_mut(&(target, domain)) {
            Some(refs) => adopt(refs, &self.hashers[usize::from(domain)], content, self.now),
            None => s.lent.entry((target, domain)).or_default().push(content),
        }
    }

    /// The next model that this host has lent goes to the first of its target hosts. Whether there was one.
    fn push_model(&mut self, host: u16) -> bool {
        let Some((domain, content, targets)) = self.sources[usize::from(host)].models.front().cloned() else {
            return false;
        };
        let Some((first, forward)) = targets.split_first() else {
            self.sources[usize::from(host)].models.pop_front();
            return true;
        };
        let conn = self.push_conn(host, first.0, domain);
        if self.conns[conn].live() && (!self.conns[conn].ok || self.backlog(conn, CALLER) > 5 * MS) {
            return false;
        }
        self.sources[usize::from(host)].models.pop_front();
        if self.conns[conn].live() {
            let entry =
                ContentEntry { id: None, digest: self.digest(domain, content), forward: forward.to_vec() };
            let mut meta = Vec::new();
            encode_entries([entry].iter(), &mut meta);
            self.send(conn, CALLER, Kind::Contents, &meta, &page(content));
        }
        true
    }

    fn push_conn(&mut self, host: u16, first: u16, domain: u16) -> usize {
        if let Some(c) = self.sources[usize::from(host)].push.get(&(first, domain)) {
            return *c;
        }
        let purpose = Purpose::Push { source: HostIx(host), domain };
        let c = self.open(Agent::Source(host), Agent::Target(first), purpose);
        self.sources[usize::from(host)].push.insert((first, domain), c);
        c
    }

    /// The index gives a host its part of the plan, if it still can.
    pub(crate) fn plan_part(&mut self, host: u16, life: u32) {
        let s = &mut self.sources[usize::from(host)];
        let Some(part) = s.part.take() else { return };
        if !s.up || s.life != life || !self.index_up {
            return;
        }
        let own_targets = |w: &Self, d: &Digest| -> BTreeSet<u16> {
            let seen = &w.sources[usize::from(host)].seen[d];
            seen.iter().map(|(vm, _)| w.vms[usize::from(*vm)].target).collect()
        };
        for c in &part.carry {
            for t in own_targets(self, &c.digest) {
                self.table(host, t).planned(c.digest, c.id);
            }
        }
        for r in &part.remote {
            for t in r.targets.iter() {
                self.table(host, t.0).planned(r.digest, r.id);
            }
        }
        self.say(|_| format!("source {host}: carries {}, {} by others", part.carry.len(), part.remote.len()));
        let s = &mut self.sources[usize::from(host)];
        s.tables.values_mut().for_each(PairTable::note_fresh);
        self.after(MS, 20 * MS, Ev::Late { host, life });
        let s = &mut self.sources[usize::from(host)];
        s.carry = part.carry.into();
        s.pushing = true;
        self.after(0, 2 * MS, Ev::Push { host, life });
    }

    /// The host asks the index about contents that appeared after the plan. An index that is lost ends it.
    pub(crate) fn late(&mut self, host: u16, life: u32) {
        let s = &mut self.sources[usize::from(host)];
        if !s.up || s.life != life || !self.index_up {
            return;
        }
        let mut items = Vec::new();
        for (&t, table) in &mut s.tables {
            let fresh = table.take_fresh();
            items.extend(fresh.iter().map(|f| LateItem {
                digest: f.digest,
                target: HostIx(t),
                kept: f.kept,
            }));
        }
        let index = self.index.as_mut().expect("planned");
        let answered: Vec<_> = items.iter().copied().zip(index.late(HostIx(host), &items)).collect();
        self.after(MS, 40 * MS, Ev::LateReply { host, life, answered });
    }

    pub(crate) fn late_reply(&mut self, host: u16, life: u32, answered: Vec<(LateItem, LateReply)>) {
        let s = &mut self.sources[usize::from(host)];
        if !s.up || s.life != life {
            return;
        }
        for (item, reply) in answered {
            let Some(id) = reply.id else { continue };
            for t in reply.delivered.iter().filter(|t| !(item.kept && *t == item.target)) {
                self.table(host, t.0).planned(item.digest, id);
                self.tally.late_known += 1;
            }
        }
        self.after(MS, 20 * MS, Ev::Late { host, life });
    }

    /// The next few contents of the push.
    pub(crate) fn push(&mut self, host: u16, life: u32) {
        if self.life(Agent::Source(host)) != life || !self.up(Agent::Source(host)) {
            return;
        }
        for _ in 0..self.rng.range(1, 4) {
            if self.push_model(host) {
                continue;
            }
            let s = &mut self.sources[usize::from(host)];
            let Some(c) = s.carry.front() else {
                if !s.models.is_empty() {
                    break;
                }
                s.pushing = false;
                return;
            };
            let domain = self.vms[usize::from(s.seen[&c.digest][0].0)].domain;
            let first = c.first.0;
            let conn = self.push_conn(host, first, domain);
            if self.conns[conn].live() && (!self.conns[conn].ok || self.backlog(conn, CALLER) > 5 * MS) {
                break;
            }
            // A lost push connection: its contents are not sent, and who waits for them asks.
            let c = self.sources[usize::from(host)].carry.pop_front().expect("just seen");
            if self.conns[conn].live() {
                self.push_one(host, conn, domain, &c);
            }
        }
        self.after(50 * US, MS, Ev::Push { host, life });
    }

    fn push_one(&mut self, host: u16, conn: usize, domain: u16, c: &Carry) {
        let mut places = self.sources[usize::from(host)].seen[&c.digest].clone();
        // Looking at one place only makes for more voids.
        if self.rng.one_in(3) && self.cfg.profile != Profile::Clean {
            places.truncate(1);
        }
        let found = places.iter().find_map(|(vm, a)| {
            let content = self.vms[usize::from(*vm)].q.read(*a)?;
            (self.hashers[usize::from(domain)].page(&page(content)) == c.digest).then_some(content)
        });
        let forward: Vec<HostIx> = c.forward.iter().collect();
        let mut meta = Vec::new();
        if let Some(content) = found {
            let entry = ContentEntry { id: Some(c.id), digest: c.digest, forward };
            encode_entries([entry].iter(), &mut meta);
            self.send(conn, CALLER, Kind::Contents, &meta, &page(content));
            self.table(host, c.first.0).pushed(&c.digest);
            *self.crossed.entry(c.digest).or_default() += 1;
        } else {
            for t in self.sources[usize::from(host)].tables.values_mut() {
                t.void(&c.digest);
            }
            let entry = ContentEntry { id: None, digest: c.digest, forward };
            encode_entries([entry].iter(), &mut meta);
            self.send(conn, CALLER, Kind::Voids, &meta, &[]);
            self.say(|_| format!("source {host}: {:?} went stale, void", c.digest));
        }
    }

    /// Repeats or invents a void on some push connection.
    pub(crate) fn odd_void(&mut self) {
        let digests: Vec<Digest> = {
            let mut d: Vec<_> = self.known.keys().copied().collect();
            d.sort();
            d
        };
        let conns: Vec<usize> = (0..self.conns.len())
            .filter(|c| matches!(self.conns[*c].purpose, Purpose::Push { .. }))
            .filter(|c| self.conns[*c].live() && self.conns[*c].ok)
            .collect();
        if conns.is_empty() || digests.is_empty() {
            return;
        }
        let conn = *self.rng.pick(&conns);
        let digest = *self.rng.pick(&digests);
        let forward = (0..self.cfg.targets)
            .map(HostIx)
            .filter(|t| Agent::Target(t.0) != self.conns[conn].ends[1])
            .collect();
        let mut meta = Vec::new();
        encode_entries([ContentEntry { id: None, digest, forward }].iter(), &mut meta);
        self.send(conn, CALLER, Kind::Voids, &meta, &[]);
        self.say(|_| format!("odd void of {digest:?}"));
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
        let d = Departure {
            core,
            hold: Hold::new(true),
            h: SourceHandover::new(),
            conn: Some(conn),
            settle: None,
            steps: VecDeque::new(),
            busy: false,
            calling: false,
        };
        self.src(vm).vms.insert(vm, d);
        self.say(|_| format!("vm{vm}: starts from source {host} to target {target}"));
    }

    /// A connection that this side called stands.
    pub(crate) fn opened(&mut self, c: usize) {
        match self.conns[c].purpose {
            Purpose::Vm { vm, .. } => self.start_stream(vm.0, c),
            Purpose::Settle { vm, .. } => self.source_event(vm.0, SourceEvent::Reconnected),
            Purpose::Peer { .. } => self.peer_opened(c),
            _ => {}
        }
    }

    fn start_stream(&mut self, vm: u16, c: usize) {
        let streaming = self.src(vm).vms.get(&vm).is_some_and(|d| d.h.state() == SourceState::Streaming);
        if !streaming {
            // What there is to say could not be said before.
            return self.source_event(vm, SourceEvent::Reconnected);
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
                    // As if sampling had found every fifth page hot.
                    let held = uniform(&bytes).is_none().then_some(&bytes);
                    if !d.hold.page(a, held, a.page % 5 == 0) {
                        self.page_leaves(vm, target, &mut d.core, a, &bytes, &mut out);
                    }
                }
                Item::Stopped => {
                    d.hold.stop();
                    self.send(c, CALLER, Kind::Stopped, &[], &[]);
                    self.say(|_| format!("vm{vm}: stopped"));
                }
                Item::RamEnd => {
                    let all = d.hold.all();
                    self.leave(vm, target, &mut d.core, c, &all);
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
                self.source_event(vm.0, SourceEvent::Word(word));
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
        self.source_event(vm.0, SourceEvent::Lost);
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
            let completed = match v.q.run {
                SourceRun::Dead => None,
                r => Some(r == SourceRun::Completed),
            };
            let (h, steps) = SourceHandover::recover(journal, completed);
            let core = SourceVm::new(self.hashers[usize::from(v.domain)].clone(), vec![]);
            let (conn, settle) = (None, None);
            let (hold, steps_) = (Hold::new(false), VecDeque::new());
            let d = Departure { core, hold, h, conn, settle, steps: steps_, busy: false, calling: false };
            self.src(vm).vms.insert(vm, d);
            self.say(|_| format!("vm{vm}: source recovers from {journal:?}, completed {completed:?}"));
            self.take_steps(vm, steps);
        }
    }

    /// Whether nothing is left to do for the VM at its source.
    pub(crate) fn source_settled(&self, vm: u16) -> bool {
        let v = &self.vms[usize::from(vm)];
        match self.sources[usize::from(v.source)].vms.get(&vm) {
            Some(d) => d.h.settled() && d.steps.is_empty() && !d.busy,
            None => v.passed_over,
        }
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
