//! What a source rack does beside its VMs' streams: preparation, the plan's parts, models, late contents and the push.

use super::{Model, SourceAgent, adopt};
use crate::guest::{at, page};
use crate::net::{Agent, CALLER, MS, US};
use crate::world::{Ev, Profile, World};
use irlm_user::core::digest::{Digest, uniform};
use irlm_user::core::index::{HostSet, Index, LateItem, LateReply, Limits, Registration, TargetSet};
use irlm_user::core::pair::PairTable;
use irlm_user::core::plan::{Carry, PlanInput, share_plan};
use irlm_user::core::units::HostIx;
use irlm_user::core::wire::frame::Kind;
use irlm_user::core::wire::messages::{ContentEntry, Purpose, encode_entries};
use std::collections::{BTreeMap, BTreeSet};

impl World {
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
}
