//! The data port: accepts connections, reads their hello, and hands each to whom it is for. A
//! stranger gets nothing but a closed connection or one line of why.

use super::hosts::Hosts;
use crate::core::identity::{Ask, Identity, Mapping, NoIdentity, Refused, Subject, identify, may};
use crate::core::units::{HostIx, VmIx};
use crate::core::wire::frame::Kind;
use crate::core::wire::keys::pass;
use crate::core::wire::messages::{Hello, HelloOk, Purpose, Word};
use crate::flow::arrival::contents::{self, From};
use crate::flow::arrival::peers::Line;
use crate::flow::arrival::{Call, Input, TargetGroup, TargetVmShared};
use crate::flow::source::{SourceGroup, lend};
use crate::flow::squeeze::Landing;
use crate::flow::{FlowTags, Tagged, Timeouts, Traffic, lock};
use crate::net::conn::{FrameBuf, NetError, send, tune};
use crate::net::connection::{Connection, End, Security};
use crate::net::gate::{self, Gate, Pass, Sizes};
use crate::net::greeting::send_hello_ok;
use crate::net::hello::hear_hello;
use crate::obs::rare;
use std::collections::HashMap;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

/// Time a new connection has for its TLS handshake and its hello together.
const HELLO_TIME: Duration = Duration::from_secs(5);

/// What is said of whoever does not say it.
const NO_HELLO: &str = "data port: no hello";

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
    /// Connections that were let in and are served by a thread of the door: some per VM and peer of
    /// a large host.
    open: AtomicUsize,
    /// Those of which it is not known yet who calls.
    strangers: Strangers,
    /// How connections are secured.
    security: Security,
    /// Roles for certificates that do not name one themselves.
    roles: Mapping,
}

/// How many connections the port holds.
#[derive(Debug)]
struct Strangers {
    gate: Arc<Gate>,
    /// Of those that were let in. Further ones are told so, and closed.
    most: usize,
}

impl Strangers {
    fn new(sizes: Sizes) -> Self {
        Self { gate: Gate::new("data port: full", sizes.strangers, HELLO_TIME), most: sizes.data }
    }
}

impl Default for Strangers {
    fn default() -> Self {
        Self::new(Sizes::default())
    }
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
    /// That holds so many connections.
    #[must_use]
    pub fn sized(self, sizes: Sizes) -> Self {
        Self { strangers: Strangers::new(sizes), ..self }
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
    gate::deepen(listener);
    let strangers = &door.strangers.gate;
    while !stop.load(Ordering::Relaxed) {
        if let Some(pause) = strangers.pause() {
            std::thread::sleep(pause);
            continue;
        }
        match crate::flow::inbox::wait_readable([Some(listener.as_fd())], Duration::from_millis(200)) {
            Ok([true]) => {}
            _ => continue,
        }
        let (stream, peer) = match listener.accept() {
            Ok((s, peer)) => (Arc::new(s), peer),
            Err(e) => {
                if let Ok(here) = listener.local_addr() {
                    rare::warn("data port: cannot take a connection", here, format_args!("{e}"));
                }
                std::thread::sleep(Duration::from_millis(50));
                continue;
            }
        };
        let Some(pass) = strangers.enter_tcp(peer, &stream) else { continue };
        let (guest, tags) = (door.clone(), tags.clone());
        let run = move || greet(&guest, Stranger { stream, peer, pass }, &tags, timeouts);
        if let Err(e) = std::thread::Builder::new().name("irlm-data".into()).spawn(run) {
            rare::warn("data port: no thread", peer, format_args!("{e}"));
        }
    }
}

/// A connection of which nothing is known.
struct Stranger {
    stream: Arc<TcpStream>,
    peer: SocketAddr,
    pass: Pass,
}

/// Equal, in time that does not depend on where they differ.
fn same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    a.iter().zip(b).fold(0, |d, (x, y)| d | (x ^ y)) == 0
}

fn decline(stream: &Connection, why: &str) {
    if let Ok(peer) = stream.peer_addr() {
        rare::warn("data port: refused", peer, format_args!("{why}"));
    }
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
struct Caller<'a> {
    /// Ends before the stream does, or its port's next user would be counted under it.
    tag: Tagged,
    stream: Connection,
    /// As it came.
    hello: Vec<u8>,
    version: u16,
    /// By its certificate; none in plain text.
    who: Option<Identity>,
    /// Until it was let in.
    pass: Option<Pass>,
    place: Place<'a>,
}

/// A connection's place among those that were let in, while a thread of the door serves it.
struct Place<'a> {
    door: &'a Door,
    had: bool,
}

impl Place<'_> {
    fn take(&mut self) -> bool {
        let before = self.door.open.fetch_add(1, Ordering::Relaxed);
        self.had = before < self.door.strangers.most;
        if !self.had {
            self.door.open.fetch_sub(1, Ordering::Relaxed);
        }
        self.had
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.had {
            self.door.open.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Caller<'_> {
    /// Whether it is the host in whose name it calls, and there is a place for it. If so it is no
    /// stranger any more, else it is told so.
    fn may(&mut self, purpose: &Purpose, hosts: &Hosts) -> bool {
        if let Err(why) = self.is_host(purpose, hosts) {
            decline(&self.stream, &why.to_string());
            return false;
        }
        let has_place = self.place.take();
        if !has_place {
            decline(
                &self.stream,
                &format!("this agent serves {} connections", self.place.door.strangers.most),
            );
        }
        self.pass = None;
        has_place
    }

    fn is_host(&self, purpose: &Purpose, hosts: &Hosts) -> Result<(), Refused> {
        let Some(who) = &self.who else { return Ok(()) };
        let as_host = |host| may(who, Ask::from(purpose), Subject { tenants: None, host });
        match purpose {
            // An agent that was restarted counts its hosts anew.
            Purpose::Settle { .. } => {
                let any = hosts.sources.iter().map(|h| as_host(Some(h)));
                any.reduce(|a, b| a.or(b)).unwrap_or_else(|| as_host(None))
            }
            _ => as_host(hosts.caller(purpose)),
        }
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

fn greet(door: &Door, stranger: Stranger, tags: &Arc<dyn FlowTags>, timeouts: Timeouts) {
    let Stranger { stream, peer, mut pass } = stranger;
    pass.rest();
    let until = pass.until();
    let stream = tune(&stream, timeouts.peer)
        .and_then(|()| door.security.answer(stream, until.saturating_duration_since(Instant::now())));
    let stream = match stream {
        Ok(s) => s,
        Err(e) => return rare::warn("data port: not let in", peer, format_args!("{e}")),
    };
    let who = match stream.is_secured().then(|| identity(&stream, &door.roles)).transpose() {
        Ok(who) => who,
        Err(e) => return decline(&stream, &e.to_string()),
    };
    let (hello, said) = match hear_hello(&stream, until) {
        Ok(hello) => hello,
        Err(NetError::Wire { source, .. }) => return decline(&stream, &source.to_string()),
        // A look at whether the port is open leaves no line.
        Err(NetError::Closed { .. }) => return,
        Err(NetError::Lost { source, .. }) => return rare::warn(NO_HELLO, peer, format_args!("{source}")),
        Err(_) => return rare::warn(NO_HELLO, peer, format_args!("nothing in {HELLO_TIME:?}")),
    };
    let version = match hello.choose() {
        Ok(version) => version,
        Err(e) => return decline(&stream, &e.to_string()),
    };
    // What it carries is known when it is known who calls.
    let tag = Tagged::new(tags, stream.socket(), Traffic::Control);
    let place = Place { door, had: false };
    let caller = Caller { tag, stream, hello: said, version, who, pass: Some(pass), place };
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
fn probed(door: &Door, hello: &Hello, mut caller: Caller<'_>, patience: Duration) {
    let known = lock(&door.expected).get(&hello.group).filter(|(t, _)| same(&pass(t), &hello.pass)).cloned();
    let Some((_, hosts)) = known else {
        let what = format!("group {:?} is not expected at this host", hello.group);
        return decline(&caller.stream, &what);
    };
    if caller.may(&hello.purpose, &hosts) && caller.is_welcomed() {
        echo(&caller.stream, FrameBuf::new(), patience);
    }
}

/// Another source host lends contents.
fn lent(door: &Door, hello: &Hello, mut caller: Caller<'_>, source: HostIx, domain: u16) {
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
        lend::serve(&group, &caller.stream, FrameBuf::new(), source, domain);
    }
}

/// Something comes for a group that arrives here.
fn arrives(group: &Arc<TargetGroup>, purpose: Purpose, mut caller: Caller<'_>) {
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
                shared.inbox.post(Input::Demand(caller.stream, Box::default(), caller.tag));
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
                contents::serve(group, &caller.stream, FrameBuf::new(), from, domain, Landing::default());
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
                group.peers.serve(group, line, &Arc::new(caller.stream), FrameBuf::new());
            }
        }
    }
}

/// The source of a VM calls.
fn called(group: &TargetGroup, vm: VmIx, source: Option<HostIx>, call: Call, caller: Caller<'_>) {
    let Some(shared) = expected(group, &caller.stream, vm, source) else { return };
    let settle = call == Call::Settle;
    if settle && !caller.is_welcomed() {
        return;
    }
    // The vm thread answers a VM connection's hello itself, when its QEMU listens.
    caller.tag.change(if settle { Traffic::Switchover } else { Traffic::Bulk });
    shared.inbox.post(Input::Called(caller.stream, caller.tag, call));
}
