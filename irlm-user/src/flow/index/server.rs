//! The index server: one thread a connection, one [`Index`] a group.
//!
//! A group is made by the first `Open`, which brings its token; every other connection must show the same one. Once no
//! coordinator of it is connected any more, the next `Open` of that name by the same caller makes it anew, also with
//! another token. Other callers' groups may have the same name: names are chosen by people. Source hosts register; when all have said that they are done, or the coordinator says `PlanNow`, the plan is made once and
//! the index sealed. Then hosts may report sketches; when all of the plan have asked for models, or the first that asked
//! will wait no longer, these are chosen once. Locks, always taken in this order: groups → a group's phase → its index →
//! its sketches. The index is written by registrations and late reports and read, by many threads at once, when sketches
//! come in and parts of plan and models are handed out.
//!
//! Bounds, all in [`ServerOptions`]: connections (more are told `Busy`), those of strangers (`net::gate`), groups (likewise;
//! one caller has half of them at most), entries a group (further contents stay host-local), sketches a group (further ones
//! are not compared). A group that nobody has spoken to for `group_idle` is forgotten.

use super::{Conn, ConnError, TICK};
use crate::core::identity::Mapping;
use crate::core::index::{HostSet, Index, Limits, Registration};
use crate::core::models::{MAX_SKETCHES, Sketches};
use crate::core::plan::{Plan, PlanInput, share_plan};
use crate::core::quota::{Full, Owner, Quota};
use crate::core::units::HostIx;
use crate::core::wire::index_msg::{
    ErrorCode, IndexMsg, MAX_BATCH, MAX_FIRST_BODY, Token, VERSIONS, choose_version,
};
use crate::net::connection::Security;
use crate::net::gate::{self, Gate, Pass, Sizes};
use crate::obs::rare;
use admit::Caller;
use group::{End, Group, Here, Phase, closed, out_of_place, say, stopping};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

// Who may ask for what.
mod admit;
// A group, and how its connections end.
mod group;
// Models: reports taken, the choice made once, parts handed out.
mod models;

/// Stack of a connection's thread: its depth is a few frames, its buffers are on the heap.
const STACK: usize = 256 * 1024;

/// The server's bounds and deadlines.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Connections at a time: agents of all groups and their coordinators; a caller has a quarter at most. Above it: `Busy`.
    pub max_connections: usize,
    /// Connections besides, of which it is not known yet who calls; above it the oldest one of those who have most goes.
    pub max_strangers: usize,
    /// Groups at a time, and half as many of one caller who is no operator. Above it an `Open` gets `Busy`.
    pub max_groups: usize,
    /// Bounds of each group's index; its `hash_seed` is replaced by a random one.
    pub limits: Limits,
    /// Sketches a group, of 52 bytes each, and up to 120 more while models are chosen; further ones are not compared.
    pub max_sketches: u32,
    /// A group without any message for so long is forgotten. Preparation at idle priority may be slow.
    pub group_idle: Duration,
    /// By when a new connection must have ended its TLS handshake and sent its first message.
    pub handshake: Duration,
    /// By when a message that has begun must have come or gone.
    pub message: Duration,
    /// The longest a `PlanRequest` or a `ModelsRequest` is kept waiting, whatever it asks for.
    pub max_plan_wait: Duration,
    /// How connections are secured.
    pub security: Security,
    /// Roles for certificates that do not name one themselves.
    pub roles: Mapping,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            max_connections: 1024,
            max_strangers: Sizes::default().strangers,
            max_groups: 8,
            limits: Limits::default(),
            max_sketches: MAX_SKETCHES,
            group_idle: Duration::from_secs(3600),
            handshake: Duration::from_secs(10),
            message: Duration::from_secs(30),
            max_plan_wait: Duration::from_secs(3600),
            security: Security::Plain,
            roles: Mapping::default(),
        }
    }
}

/// Serves until `stop` is set, then ends every connection's thread. Returns early only if the listener fails.
#[expect(clippy::needless_pass_by_value, reason = "callers see a closed port as soon as the server is gone")]
pub fn serve(listener: TcpListener, opts: ServerOptions, stop: Arc<AtomicBool>) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    gate::deepen(&listener);
    let strangers = Gate::new("index: full", opts.max_strangers, opts.handshake);
    let server = Arc::new(Server { opts, stop, groups: Mutex::default(), open: Mutex::default() });
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut next_expiry = Instant::now() + TICK * 10;
    let result = loop {
        if server.stopping() {
            break Ok(());
        }
        if Instant::now() >= next_expiry {
            next_expiry = Instant::now() + TICK * 10;
            server.expire();
            rare::flush();
        }
        threads.retain(|t| !t.is_finished());
        if let Some(pause) = strangers.pause() {
            std::thread::sleep(pause);
            continue;
        }
        match listener.accept() {
            Ok((stream, peer)) => {
                let stream = Arc::new(stream);
                let Some(pass) = strangers.enter_tcp(peer, &stream) else { continue };
                let serving = Arc::clone(&server);
                let name = format!("index {peer}");
                match std::thread::Builder::new().name(name).stack_size(STACK).spawn(move || {
                    serving.connection(stream, peer, pass);
                }) {
                    Ok(t) => threads.push(t),
                    Err(e) => rare::warn("index: no thread for a connection", peer, format_args!("{e}")),
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                // Woken by a caller or by the tick; the outcome does not matter, accept says which.
                let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
                if let Err(e) = poll(&mut [PollFd::new(&listener, PollFlags::IN)], Some(&wait))
                    && e != rustix::io::Errno::INTR
                {
                    break Err(e.into());
                }
            }
            // A caller that left again, or no descriptors: the next one may do better.
            Err(e) => {
                if let Ok(here) = listener.local_addr() {
                    rare::warn("index: cannot take a connection", here, format_args!("{e}"));
                }
                std::thread::sleep(TICK);
            }
        }
    };
    server.stop.store(true, Ordering::Relaxed);
    for t in threads {
        if t.join().is_err() {
            tracing::error!("index: a connection's thread panicked");
        }
    }
    result
}

#[derive(Debug)]
struct Server {
    opts: ServerOptions,
    stop: Arc<AtomicBool>,
    groups: Mutex<Vec<Arc<Group>>>,
    /// How many connections each caller has that has said who it is.
    open: Mutex<HashMap<Owner, usize>>,
}

/// The place of a connection that has said who calls.
struct Place<'a>(&'a Server, Owner);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut open = self.0.connections();
        if let Some(n) = open.get_mut(&self.1) {
            *n -= 1;
        }
        open.retain(|_, n| *n > 0);
    }
}

impl Server {
    fn stopping(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn groups(&self) -> MutexGuard<'_, Vec<Arc<Group>>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<Owner, usize>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets groups that nobody speaks to.
    fn expire(&self) {
        let idle = self.opts.group_idle;
        self.groups().retain(|group| {
            // Who holds the lock is speaking to it.
            let keep = group.phase.try_lock().map_or(true, |p| p.last_word.elapsed() < idle);
            if !keep {
                tracing::warn!(group = %group.name, "index: forgotten, no message for {idle:?}");
                group.close();
            }
            keep
        });
    }

    fn connection(&self, stream: Arc<TcpStream>, peer: SocketAddr, mut pass: Pass) {
        pass.rest();
        let left = pass.until().saturating_duration_since(Instant::now());
        let secured = self.opts.security.answer(stream, left);
        let mut conn = match secured.and_then(|s| Conn::new(s, MAX_FIRST_BODY)) {
            Ok(c) => c,
            Err(e) => return rare::warn("index: not let in", peer, format_args!("{e}")),
        };
        match self.serve_conn(&mut conn, peer, pass) {
            Err(End::Conn(ConnError::Closed)) | Ok(()) => {}
            Err(End::Conn(e)) => rare::warn("index: connection lost", peer, format_args!("{e}")),
            Err(End::Say(code, text)) => {
                rare::warn("index: hung up", peer, format_args!("{text} ({code:?})"));
                // The peer may be gone, or not read: then the end of the connection has to say it.
                let _ = self.send(&mut conn, &IndexMsg::error(code, &text));
            }
        }
    }

    /// One that has said who calls is no stranger any more.
    fn let_in(&self, pass: Pass, by: &Owner) -> Result<Place<'_>, End> {
        drop(pass);
        let mut open = self.connections();
        let each = open.iter().flat_map(|(owner, n)| std::iter::repeat_n(Some(owner), *n));
        Quota::new(self.opts.max_connections, 4).admits(by, each).map_err(|full| match full {
            Full::Own(n) => say(ErrorCode::Busy, &format!("too many connections of {by}: {n}")),
            Full::All(n) => say(ErrorCode::Busy, &format!("too many connections: {n}")),
        })?;
        *open.entry(by.clone()).or_default() += 1;
        drop(open);
        Ok(Place(self, by.clone()))
    }

    fn serve_conn(&self, conn: &mut Conn, peer: SocketAddr, pass: Pass) -> Result<(), End> {
        let caller = Caller::of(&conn.stream, peer.ip().into(), &self.opts.roles)?;
        let until = pass.until();
        let first = conn.recv(&mut |_| !self.stopping() && Instant::now() < until)?;
        let (IndexMsg::Hello { versions, .. } | IndexMsg::Open { versions, .. }) = &first else {
            return Err(out_of_place(&first));
        };
        let Some(version) = choose_version(versions) else {
            let text = format!("no common version: offered {versions:?}, spoken here {VERSIONS:?}");
            return Err(End::Say(ErrorCode::Version, text));
        };
        caller.may(&first)?;
        let _place = self.let_in(pass, &caller.owner)?;
        let welcome = IndexMsg::HelloOk { version };
        match first {
            IndexMsg::Open { group, token, source_hosts, target_hosts, .. } => {
                let group = self.open(&group, token, (source_hosts, target_hosts), &caller.owner)?;
                conn.let_in();
                // A host that is gone without a word must not keep the name.
                let ended = conn
                    .notice_death()
                    .map_err(|e| End::Conn(e.into()))
                    .and_then(|()| self.send(conn, &welcome))
                    .and_then(|()| self.coordinator(conn, &group));
                group.phase().coordinators -= 1;
                ended
            }
            IndexMsg::Hello { group, token, host, .. } => {
                let known =
                    self.groups().iter().find(|g| g.name == group && g.token.matches(&token)).cloned();
                let group = known.ok_or(say(ErrorCode::Refused, "no such group, or not its token"))?;
                if host.0 >= group.source_hosts {
                    let text = format!("no source host {}: the group has {}", host.0, group.source_hosts);
                    return Err(End::Say(ErrorCode::Protocol, text));
                }
                conn.let_in();
                caller.claim(&mut group.phase(), host)?;
                let _here = Here::new(&group, host);
                self.send(conn, &welcome)?;
                self.agent(conn, &group, host)
            }
            other => Err(out_of_place(&other)),
        }
    }

    /// The group of that name: found if token and shape are the same, else made.
    fn open(
        &self,
        name: &str,
        token: Token,
        (source_hosts, target_hosts): (u16, u16),
        by: &Owner,
    ) -> Result<Arc<Group>, End> {
        let mut groups = self.groups();
        let shape = (source_hosts, target_hosts);
        let same = |g: &&Arc<Group>| g.token.matches(&token) && (g.source_hosts, g.target_hosts) == shape;
        if let Some(group) = groups.iter().filter(|g| g.name == name).find(same) {
            let mut phase = group.phase();
            phase.last_word = Instant::now();
            phase.coordinators += 1;
            drop(phase);
            return Ok(Arc::clone(group));
        }
        if let Some(old) = groups.iter().position(|g| g.name == name && g.owner.is_as_good_as(by)) {
            if groups[old].phase().coordinators > 0 {
                let text = "a group of that name exists, with another token or shape";
                return Err(say(ErrorCode::NameInUse, text));
            }
            tracing::info!(
                group = name,
                "index: its coordinator is gone, and another one opens that name: made anew"
            );
            groups.swap_remove(old).close();
        }
        self.make_room(&mut groups, by)?;
        let limits = Limits { hash_seed: rand::random(), ..self.opts.limits };
        let phase = Phase {
            done: vec![None; usize::from(source_hosts)],
            plan: None,
            planning: false,
            asked: vec![None; usize::from(source_hosts)],
            models: None,
            agents: vec![None; usize::from(source_hosts)],
            live: vec![0; usize::from(source_hosts)],
            choosing: false,
            closed: false,
            coordinators: 1,
            last_word: Instant::now(),
        };
        let group = Arc::new(Group {
            name: name.to_owned(),
            token,
            owner: by.clone(),
            source_hosts,
            target_hosts,
            phase: Mutex::new(phase),
            turned: Condvar::new(),
            index: RwLock::new(Index::new(limits, source_hosts, target_hosts)),
            sketches: Mutex::new(Some(Sketches::new(self.opts.max_sketches, limits.hash_seed))),
        });
        groups.push(Arc::clone(&group));
        tracing::info!(group = name, source_hosts, target_hosts, "index: group opened");
        Ok(group)
    }

    /// Sees that there is room for a group of `by`, or says why there is none.
    fn make_room(&self, groups: &mut Vec<Arc<Group>>, by: &Owner) -> Result<(), End> {
        let quota = Quota::new(self.opts.max_groups, 2);
        let Err(full) = quota.admits(by, groups.iter().map(|g| Some(&g.owner))) else { return Ok(()) };
        let goes = match full {
            Full::Own(_) => own_idle(groups, by),
            Full::All(_) => goes_for(groups, by),
        };
        let Some(goes) = goes else {
            let text = match full {
                Full::Own(n) => format!("{n} groups of {by} are open here: wait until one is over"),
                Full::All(n) => format!("{n} groups are open here: too many"),
            };
            return Err(say(ErrorCode::Busy, &text));
        };
        let other = groups.swap_remove(goes);
        tracing::warn!(group = %other.name, owner = %other.owner, "index: closed, to make room: nobody has joined it");
        other.close();
        Ok(())
    }

    fn send(&self, conn: &mut Conn, msg: &IndexMsg) -> Result<(), End> {
        let (started, limit) = (Instant::now(), self.opts.message);
        // A stopping server still says so to peers that read.
        let limit = if self.stopping() { TICK } else { limit };
        Ok(conn.send(msg, &|| started.elapsed() < limit)?)
    }

    /// The next message of a connection that belongs to `group`.
    fn recv(&self, conn: &mut Conn, group: &Group) -> Result<IndexMsg, End> {
        let limit = self.opts.message;
        let got = conn.recv(&mut |partial| {
            !self.stopping() && partial.is_none_or(|t| t < limit) && !group.phase().closed
        });
        match got {
            Err(ConnError::GaveUp) if self.stopping() => Err(stopping()),
            got => {
                let mut phase = group.phase();
                if phase.closed {
                    return Err(closed());
                }
                phase.last_word = Instant::now();
                Ok(got?)
            }
        }
    }

    fn coordinator(&self, conn: &mut Conn, group: &Group) -> Result<(), End> {
        loop {
            match self.recv(conn, group)? {
                IndexMsg::PlanNow { missing } => {
                    let plan = self.plan_now(group, &missing)?;
                    let digests = group.index().stats().entries;
                    let (sources, shared) = (plan.sources().clone(), plan.shared());
                    self.send(conn, &IndexMsg::Planned { sources, digests, shared })?;
                }
                IndexMsg::Close => {
                    self.groups().retain(|g| !std::ptr::eq(Arc::as_ptr(g), group));
                    group.close();
                    tracing::info!(group = %group.name, "index: group closed");
                    return self.send(conn, &IndexMsg::Done);
                }
                other => return Err(out_of_place(&other)),
            }
        }
    }

    fn agent(&self, conn: &mut Conn, group: &Group, host: HostIx) -> Result<(), End> {
        loop {
            match self.recv(conn, group)? {
                IndexMsg::Register { seq, batch } => {
                    group.check_targets(batch.iter().filter_map(|r: &Registration| r.targets.highest()))?;
                    let ids = group.index_mut().register(host, &batch);
                    self.send(conn, &IndexMsg::Registered { seq, ids })?;
                }
                IndexMsg::RegisterDone { own_unique_pages } => {
                    let all_done = group.done(host, own_unique_pages);
                    // The last host's word makes the plan; its answer need not wait for that.
                    let told = self.send(conn, &IndexMsg::Done);
                    if all_done {
                        self.plan_now(group, &HostSet::new())?;
                    }
                    told?;
                }
                IndexMsg::PlanRequest { wait_ms } => self.hand_out(conn, group, host, wait_ms)?,
                IndexMsg::Late { seq, items } => {
                    group.check_targets(items.iter().map(|i| i.target))?;
                    let replies = group.index_mut().late(host, &items);
                    self.send(conn, &IndexMsg::LateReply { seq, replies })?;
                }
                IndexMsg::Sketches { domain, items } => {
                    group.check_targets(items.iter().map(|i| i.target))?;
                    group.take_sketches(host, domain, &items);
                }
                IndexMsg::ModelsRequest { room, wait_ms } => {
                    self.hand_out_models(conn, group, host, room, wait_ms)?;
                }
                other => return Err(out_of_place(&other)),
            }
        }
    }

    /// The plan over the hosts that are done and not missing; made once, by whoever asks first.
    fn plan_now(&self, group: &Group, missing: &HostSet) -> Result<Arc<Plan>, End> {
        let mut phase = group.phase();
        loop {
            if phase.closed {
                return Err(closed());
            }
            if let Some(plan) = &phase.plan {
                return Ok(Arc::clone(plan));
            }
            if !phase.planning {
                break;
            }
            if self.stopping() {
                return Err(stopping());
            }
            phase = group.turned.wait_timeout(phase, TICK).unwrap_or_else(PoisonError::into_inner).0;
        }
        phase.planning = true;
        let sources: HostSet = (0u16..)
            .zip(&phase.done)
            .filter(|(_, done)| done.is_some())
            .map(|(h, _)| HostIx(h))
            .filter(|h| !missing.contains(*h))
            .collect();
        let own_unique_pages = phase.done.iter().map(|d| d.unwrap_or(0)).collect();
        drop(phase);
        let started = Instant::now();
        group.index_mut().seal(sources.clone());
        let plan = Arc::new(share_plan(&group.index(), &PlanInput { sources, own_unique_pages }));
        tracing::info!(
            group = %group.name, sources = ?plan.sources(), stats = ?group.index().stats(), shared = plan.shared(),
            "index: plan made in {:?}", started.elapsed()
        );
        let mut phase = group.phase();
        phase.plan = Some(Arc::clone(&plan));
        phase.last_word = Instant::now();
        group.turned.notify_all();
        Ok(plan)
    }

    /// Waits for the plan and sends the host its part.
    fn hand_out(&self, conn: &mut Conn, group: &Group, host: HostIx, wait_ms: u32) -> Result<(), End> {
        let wait = Duration::from_millis(u64::from(wait_ms)).min(self.opts.max_plan_wait);
        let until = Instant::now() + wait;
        let plan = loop {
            let phase = group.phase();
            if phase.closed {
                return Err(closed());
            }
            if let Some(plan) = &phase.plan {
                break Arc::clone(plan);
            }
            if Instant::now() >= until {
                drop(phase);
                let text = format!("no plan after {wait:?}: not every source host is done");
                return self.send(conn, &IndexMsg::error(ErrorCode::NotReady, &text));
            }
            if self.stopping() {
                return Err(stopping());
            }
            // The condition is looked at again above, whatever woke us.
            drop(group.turned.wait_timeout(phase, TICK).unwrap_or_else(PoisonError::into_inner));
            if conn.peer_is_gone() {
                return Err(ConnError::Closed.into());
            }
        };
        let Some(all) = plan.part_len(host) else { return self.send(conn, &not_in_plan(host)) };
        let mut from = 0;
        loop {
            let piece = plan.piece(&group.index(), host, from, MAX_BATCH);
            from += MAX_BATCH;
            let last = from >= all;
            self.send(conn, &IndexMsg::PlanPart { last, piece })?;
            if last {
                return Ok(());
            }
            group.phase().last_word = Instant::now();
        }
    }
}

/// The group that goes when nobody may have more: of those that nobody has joined the oldest one of whoever has opened
/// most. None if all are joined, or if nobody has opened more than `by` would have then.
fn goes_for(groups: &[Arc<Group>], by: &Owner) -> Option<usize> {
    let of = |owner: &Owner| groups.iter().filter(|g| g.owner == *owner).count();
    let idle = groups.iter().enumerate().filter(|(_, g)| !g.is_joined() && of(&g.owner) > of(by) + 1);
    let rank = |(_, g): &(usize, &Arc<Group>)| (of(&g.owner), std::cmp::Reverse(g.phase().last_word));
    idle.max_by_key(rank).map(|(at, _)| at)
}

/// The group that goes when `by` may not have more: the oldest one of its own that nobody has joined, and whose coordinator
/// is gone.
fn own_idle(groups: &[Arc<Group>], by: &Owner) -> Option<usize> {
    let idle = |g: &Group| g.owner == *by && !g.is_joined() && g.phase().coordinators == 0;
    let idle = groups.iter().enumerate().filter(|(_, g)| idle(g));
    idle.min_by_key(|(_, g)| g.phase().last_word).map(|(at, _)| at)
}

fn not_in_plan(host: HostIx) -> IndexMsg {
    let text = format!("source host {} was given up before the plan was made", host.0);
    IndexMsg::error(ErrorCode::NotInPlan, &text)
}
