//! The data port: accepts connections, reads their hello, and hands each to whom it is for. A
//! stranger gets nothing but a closed connection or one line of why.

use super::hosts::Hosts;
use crate::core::identity::{Ask, Identity, Mapping, NoIdentity, Subject, identify, may};
use crate::core::units::{HostIx, VmIx};
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::keys::pass;
use crate::core::wire::messages::{Hello, HelloOk, Purpose, Word};
use crate::flow::arrival::contents::{self, From};
use crate::flow::arrival::peers::Line;
use crate::flow::arrival::{Call, Input, TargetGroup, TargetVmShared};
use crate::flow::source::{SourceGroup, lend};
use crate::flow::squeeze::Landing;
use crate::flow::{FlowTags, Tagged, Timeouts, Traffic, lock};
use crate::net::conn::{FrameBuf, send, tune};
use crate::net::connection::{Connection, End, Security};
use crate::net::greeting::send_hello_ok;
use std::collections::HashMap;
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Connections served at once: some per VM and peer of a large host. Further ones are closed at
/// once.
pub const MAX_CONNECTIONS: usize = 4096;
/// Time a new connection has to say hello.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// The groups that arrive at this host.
#[derive(Debug, Default)]
pub struct Door {
    pub(super) groups: Mutex<HashMap<String, Arc<TargetGroup>>>,
    /// The groups that leave this host and may be lent contents.
    leaving: Mutex<HashMap<String, Arc<SourceGroup>>>,
    /// Secrets of groups that will come, and may measure their links beforehand.
    expected: Mutex<HashMap<String, Expected>>,
    /// Who knows groups that are let in no more, for a source that has something left to settle.
    recall: OnceLock<Recall>,
    open: AtomicUsize,
    /// How connections are secured.
    security: Security,
    /// Roles for certificates that do not name one themselves.
    roles: Mapping,
}

/// A group's secret, and its hosts by name.
type Expected = ([u8; 32], Arc<Hosts>);

/// The arrivals of a run of a group, by its name and what its secret opens connections with; nothing if there is none, or it cannot
/// be had.
pub type AskForGroup = dyn Fn(&str, &[u8; 32]) -> Option<Arc<TargetGroup>> + Send + Sync;

struct Recall(Box<AskForGroup>);

impl std::fmt::Debug for Recall {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Recall(…)")
    }
}

impl Door {
    /// Whose connections are secured in this way.
    #[must_use]
    pub fn secured(security: Security, roles: Mapping) -> Self {
        Self { security, roles, ..Self::default() }
    }
    /// Lets connections of this group in.
    pub fn admit(&self, group: Arc<TargetGroup>) {
        lock(&self.groups).insert(group.name.clone(), group);
    }
    /// Lets a group that is being prepared measure the link to this host.
    pub fn expect(&self, name: &str, token: [u8; 32], hosts: Arc<Hosts>) {
        lock(&self.expected).insert(name.to_owned(), (token, hosts));
    }
    /// Lets other source hosts of this group in, which lend contents.
    pub fn borrow_for(&self, group: Arc<SourceGroup>) {
        lock(&self.leaving).insert(group.name.clone(), group);
    }
    /// Lets no more in.
    pub fn dismiss(&self, name: &str) {
        lock(&self.leaving).remove(name);
        lock(&self.expected).remove(name);
        if let Some(g) = lock(&self.groups).remove(name) {
            g.close();
        }
    }
    /// Whom to ask for groups that are let in no more. The first counts.
    pub fn recall_by(&self, ask: Box<AskForGroup>) {
        let _ = self.recall.set(Recall(ask));
    }

    /// The group that a caller means. One that only settles may mean a group of before, also where
    /// another run of it has its name.
    fn meant(&self, hello: &Hello) -> Option<Arc<TargetGroup>> {
        let now = self.group(&hello.group).filter(|g| same(&pass(&g.token), &hello.pass));
        let settles = matches!(hello.purpose, Purpose::Settle { .. });
        now.or_else(|| (self.recall.get().filter(|_| settles)?.0)(&hello.group, &hello.pass))
    }

    /// The group of that name.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<Arc<TargetGroup>> {
        lock(&self.groups).get(name).cloned()
    }
}

/// Accepts until `stop`. The listener is polled, so that stopping needs no connection.
pub fn serve(
    listener: &TcpListener,
    door: &Arc<Door>,
    tags: &Arc<dyn FlowTags>,
    timeouts: Timeouts,
    stop: &AtomicBool,
) {
    use std::os::fd::AsFd;
    while !stop.load(Ordering::Relaxed) {
        match crate::flow::inbox::wait_readable([Some(listener.as_fd())], Duration::from_millis(200)) {
            Ok([true]) => {}
            _ => continue,
        }
        let stream = match listener.accept() {
            Ok((s, _)) => s,
            Err(e) => {
                tracing::warn!("data port: {e}");
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        if door.open.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            door.open.fetch_sub(1, Ordering::Relaxed);
            tracing::warn!("data port: more than {MAX_CONNECTIONS} connections; one was closed");
            continue;
        }
        let guest = door.clone();
        // What it carries is known when it has said hello.
        let tag = Tagged::new(tags, &stream, Traffic::Control);
        let run = move || {
            greet(&guest, stream, tag, timeouts);
            guest.open.fetch_sub(1, Ordering::Relaxed);
        };
        if let Err(e) = std::thread::Builder::new().name("irlm-data".into()).spawn(run) {
            door.open.fetch_sub(1, Ordering::Relaxed);
            tracing::error!("data port: no thread: {e}");
        }
    }
}

/// Equal, in time that does not depend on where they differ.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

fn decline(stream: &Connection, why: &str) {
    tracing::warn!("data port: {}: {why}", crate::net::conn::peer_name(stream));
    let _ = send(stream, Kind::Word, &Word::Aborted(why.to_owned()).encode(), &[]);
}

/// The VM's handle; a caller for one that is not expected, or not from that source host, is told
/// so. Whoever settles may have another number than before: an agent that was restarted counts
/// anew.
fn expected(
    group: &TargetGroup,
    stream: &Connection,
    vm: VmIx,
    source: Option<HostIx>,
) -> Option<Arc<TargetVmShared>> {
    let Some(shared) = group.vm(vm) else {
        decline(stream, &format!("VM {} of group {:?} is not expected here", vm.0, group.name));
        return None;
    };
    if let Some(source) = source.filter(|s| !shared.may_come_from(*s)) {
        let what =
            format!("VM {} of group {:?} does not come from source host {}", vm.0, group.name, source.0);
        decline(stream, &what);
        return None;
    }
    Some(shared)
}

/// Whether the group has that trust domain; a caller for another one is told so.
fn has_domain(domains: usize, stream: &Connection, group: &str, domain: u16) -> bool {
    let has = usize::from(domain) < domains;
    if !has {
        decline(stream, &format!("group {group:?} has no trust domain {domain}"));
    }
    has
}

/// Answers what measures the link, within a few seconds.
fn echo(stream: &Connection, mut frames: FrameBuf, patience: Duration) {
    let until = Instant::now() + patience;
    while Instant::now() < until && frames.wait(stream, patience).is_ok_and(|f| f.kind == Kind::Verbatim) {
        if send(stream, Kind::Heartbeat, &[], &[]).is_err() {
            return;
        }
    }
}

/// Who has said hello, and waits for an answer.
struct Caller {
    /// Ends before the stream does, or its port's next user would be counted under it.
    tag: Tagged,
    stream: Connection,
    frames: FrameBuf,
    /// As it came.
    hello: Vec<u8>,
    version: u16,
    /// By its certificate; none in plain text.
    who: Option<Identity>,
}

impl Caller {
    /// Whether it is the host in whose name it calls. One that is not is told so.
    fn may(&self, purpose: &Purpose, hosts: &Hosts) -> bool {
        let Some(who) = &self.who else { return true };
        let as_host = |host| may(who, Ask::from(purpose), Subject { tenants: None, host });
        let allowed = match purpose {
            // An agent that was restarted counts its hosts anew.
            Purpose::Settle { .. } => {
                let any = hosts.sources.iter().map(|h| as_host(Some(h)));
                any.reduce(|a, b| a.or(b)).unwrap_or_else(|| as_host(None))
            }
            _ => as_host(hosts.caller(purpose)),
        };
        if let Err(e) = &allowed {
            decline(&self.stream, &e.to_string());
        }
        allowed.is_ok()
    }

    /// It is of a group with this secret: what follows is sealed, where that is to be.
    fn is_of(&self, secret: [u8; 32], purpose: &Purpose) {
        if purpose.is_sealed() {
            self.stream.said_hello(secret, self.hello.clone(), End::Taker);
        }
    }

    /// Whether the answer that it is welcome has gone out.
    fn is_welcomed(&self) -> bool {
        send_hello_ok(&self.stream, HelloOk { version: self.version, window_log: 0, slots: 0 }).is_ok()
    }
}

/// What a caller says first; one that cannot be understood is told so.
fn hear(stream: Connection, tag: Tagged, who: Option<Identity>) -> Option<(Hello, Caller)> {
    let mut frames = FrameBuf::new();
    let mut said = Vec::new();
    let hello = match frames.wait(&stream, HELLO_TIME) {
        Ok(f) if f.kind == Kind::Hello => {
            said.extend_from_slice(f.meta);
            Hello::decode(f.meta)
        }
        Ok(f) => Err(WireError::Unexpected(f.kind)),
        Err(e) => {
            tracing::debug!("data port: {e}");
            return None;
        }
    };
    match hello.and_then(|h| h.choose().map(|v| (h, v))) {
        Ok((hello, version)) => Some((hello, Caller { tag, stream, frames, hello: said, version, who })),
        Err(e) => {
            decline(&stream, &e.to_string());
            None
        }
    }
}

fn greet(door: &Door, stream: TcpStream, tag: Tagged, timeouts: Timeouts) {
    if tune(&stream, timeouts.peer).is_err() {
        return;
    }
    let peer = stream.peer_addr();
    let stream = match door.security.answer(stream, HELLO_TIME) {
        Ok(s) => s,
        Err(e) => {
            let peer = peer.map_or_else(|_| "peer".to_owned(), |p| p.to_string());
            tracing::warn!("data port: {peer}: not let in: {e}");
            return;
        }
    };
    let who = match stream.is_secured().then(|| identity(&stream, &door.roles)).transpose() {
        Ok(who) => who,
        Err(e) => return decline(&stream, &e.to_string()),
    };
    let Some((hello, caller)) = hear(stream, tag, who) else { return };
    match hello.purpose {
        Purpose::Probe { .. } => probed(door, &hello, caller, timeouts.peer),
        Purpose::Lend { source, domain } => lent(door, &hello, caller, source, domain),
        purpose => match door.meant(&hello) {
            Some(group) => arrives(&group, purpose, caller),
            None => {
                let what = format!("group {:?} is not expected at this host", hello.group);
                decline(&caller.stream, &what);
            }
        },
    }
}

/// Who is at the other end, by its certificate.
fn identity(stream: &Connection, roles: &Mapping) -> Result<Identity, NoIdentity> {
    let leaf = stream.peer_certificates().first().ok_or(NoIdentity::Absent)?;
    identify(leaf, roles)
}

/// A source host measures the link to this one.
fn probed(door: &Door, hello: &Hello, caller: Caller, patience: Duration) {
    let known = lock(&door.expected).get(&hello.group).filter(|(t, _)| same(&pass(t), &hello.pass)).cloned();
    let Some((_, hosts)) = known else {
        let what = format!("group {:?} is not expected at this host", hello.group);
        return decline(&caller.stream, &what);
    };
    if caller.may(&hello.purpose, &hosts) && caller.is_welcomed() {
        echo(&caller.stream, caller.frames, patience);
    }
}

/// Another source host lends contents.
fn lent(door: &Door, hello: &Hello, caller: Caller, source: HostIx, domain: u16) {
    let leaving =
        lock(&door.leaving).get(&hello.group).filter(|g| same(&pass(&g.token), &hello.pass)).cloned();
    let Some(group) = leaving else {
        let what = format!("group {:?} does not leave this host", hello.group);
        return decline(&caller.stream, &what);
    };
    if !caller.may(&hello.purpose, &group.options.hosts)
        || !has_domain(group.hashers.len(), &caller.stream, &group.name, domain)
    {
        return;
    }
    caller.tag.change(Traffic::Forward);
    caller.is_of(group.token, &hello.purpose);
    if caller.is_welcomed() {
        lend::serve(&group, &caller.stream, caller.frames, source, domain);
    }
}

/// Something comes for a group that arrives here.
fn arrives(group: &Arc<TargetGroup>, purpose: Purpose, caller: Caller) {
    if !caller.may(&purpose, &group.options.hosts) {
        return;
    }
    caller.is_of(group.token, &purpose);
    match purpose {
        Purpose::Vm { vm, source } => {
            let call = Call::Vm(caller.version);
            called(group, vm, Some(source), call, caller);
        }
        Purpose::Direct { vm, source } => {
            let call = Call::Direct(caller.version);
            called(group, vm, Some(source), call, caller);
        }
        Purpose::Settle { vm, .. } => called(group, vm, None, Call::Settle, caller),
        Purpose::Stream { vm, source } => {
            let Some(shared) = expected(group, &caller.stream, vm, Some(source)) else { return };
            caller.tag.change(Traffic::Bulk);
            // Answered when its QEMU has the connection.
            shared.inbox.post(Input::Stream(caller.stream, caller.tag, caller.version));
        }
        Purpose::Demand { vm, source } => {
            let Some(shared) = expected(group, &caller.stream, vm, Some(source)) else { return };
            caller.tag.change(Traffic::Demand);
            if caller.is_welcomed() {
                shared.inbox.post(Input::Demand(caller.stream, Box::new(caller.frames), caller.tag));
            }
        }
        // Answered before a group is looked for.
        Purpose::Probe { .. } | Purpose::Lend { .. } => {}
        Purpose::Push { source, domain } => {
            if !has_domain(group.hashers.len(), &caller.stream, &group.name, domain) {
                return;
            }
            caller.tag.change(Traffic::Bulk);
            if caller.is_welcomed() {
                let from = From::Push(source);
                contents::serve(group, &caller.stream, caller.frames, from, domain, Landing::default());
            }
        }
        Purpose::Peer { target, domain } => {
            if !has_domain(group.hashers.len(), &caller.stream, &group.name, domain) {
                return;
            }
            if !group.peers.knows(target, group.me) {
                let what = format!("group {:?} has no other target host {}", group.name, target.0);
                return decline(&caller.stream, &what);
            }
            caller.tag.change(Traffic::Forward);
            if caller.is_welcomed() {
                let line = Line { host: target, domain };
                group.peers.serve(group, line, &Arc::new(caller.stream), caller.frames);
            }
        }
    }
}

/// The source of a VM calls.
fn called(group: &TargetGroup, vm: VmIx, source: Option<HostIx>, call: Call, caller: Caller) {
    let Some(shared) = expected(group, &caller.stream, vm, source) else { return };
    let settle = call == Call::Settle;
    if settle && !caller.is_welcomed() {
        return;
    }
    // The vm thread answers a VM connection's hello itself, when its QEMU listens.
    caller.tag.change(if settle { Traffic::Switchover } else { Traffic::Bulk });
    shared.inbox.post(Input::Called(caller.stream, caller.tag, call));
}
