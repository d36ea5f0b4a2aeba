//! What is there before anything is done: each VM of a group at this host is asked who it is and how it
//! stands, and the host whether it could take part. Nothing is changed, and everything that is wrong is
//! said, not only the first of it. The coordinator compares what both ends of a VM say
//! (`coordinator::preflight`).

// What other agents take this one for.
mod peers;

use super::Shared;
use super::claims::process_behind;
use crate::control::api::{
    GroupSpec, Identity, Moved, OnRecord, Preflight, Refusal, Reply, Role, VmFacts, VmSpec,
};
use crate::control::journal::{JournalState, VmRecord};
use crate::control::registry::{Asker, Standing, Subject, outcome};
use crate::core::account::Pages;
use crate::core::direct::Direct;
use crate::core::handover::GuestState;
use crate::core::quota::Owner;
use crate::flow::lock;
use crate::flow::{Front, MoveError};
use crate::host::ram::may_read;
use crate::host::sched::{Process, memory_available, peer_pid};
use crate::net::qmp::{Qmp, QmpError};
use crate::net::vmm::{State, Vmm};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// A monitor must greet within this.
const SETUP: Duration = Duration::from_secs(10);
/// Monitors or ports asked at a time.
const AT_A_TIME: usize = 32;
/// What the journal's file system must have left, bytes: some records and their files while they are replaced.
const JOURNAL_ROOM: u64 = 64 << 10;

/// What a front says of its VM.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Facts {
    pub(super) process: Option<Process>,
    identity: Identity,
    /// Run state in QEMU's words.
    pub(super) state: String,
    /// Status of its migration in QEMU's words; empty: none.
    migration: String,
    /// QEMU's own reasons why it cannot migrate.
    blocked: Vec<String>,
    /// What else QEMU does with it: kind and name of each job.
    jobs: Vec<String>,
    /// It has memory that is plugged in blocks.
    virtio_mem: bool,
    /// Some of its pages are still at the host that it came from.
    lacks_pages: bool,
    /// It waits, and was told already where to listen for its VM.
    listens: bool,
    /// A plain group of this agent may have told it so.
    ours: bool,
}

/// Asks the process behind `front`, and changes nothing of it.
pub(super) fn gather(front: &Front, timeout: Duration) -> Result<Facts, MoveError> {
    match front {
        Front::Qmp(path) => {
            let mut qmp = Qmp::connect(path, timeout)?;
            qmp.set_timeout(timeout);
            Ok(of_qemu(&mut qmp)?)
        }
        Front::Vmm(path) => {
            let mut vmm = Vmm::connect(path, timeout)?;
            let st = vmm.status()?;
            let state = match st.state {
                State::Running => "running",
                State::Pausing | State::Paused => "paused",
                State::Incoming => "inmigrate",
                State::GivenUp => "postmigrate",
                State::Ended => "shutdown",
            };
            let identity =
                Identity { machine: "irlm-vmm".into(), memory: st.ram_bytes, ..Identity::default() };
            Ok(Facts {
                process: process_of(&vmm),
                identity,
                state: state.into(),
                lacks_pages: st.uffd && st.state != State::Incoming,
                ..Facts::default()
            })
        }
    }
}

/// The process behind a monitor or control connection.
fn process_of(socket: impl AsFd) -> Option<Process> {
    peer_pid(socket).ok().flatten().and_then(|pid| Process::of(pid).ok())
}

fn of_qemu(qmp: &mut Qmp) -> Result<Facts, QmpError> {
    let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
    let state = qmp.query_status()?.status;
    let migration = qmp.execute("query-migrate", Value::Null)?;
    let reasons = migration["blocked-reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
    let uuid = text(&qmp.execute("query-uuid", Value::Null)?["UUID"]);
    let name = text(&qmp.execute("query-name", Value::Null)?["name"]);
    let machine = serde_json::json!({ "path": "/machine", "property": "type" });
    let machine = text(&qmp.execute("qom-get", machine)?);
    let base = qmp.execute("query-memory-size-summary", Value::Null)?["base-memory"].as_u64().unwrap_or(0);
    // Not what the summary calls plugged: of virtio-mem that is what the guest has now, which the target
    // gets later.
    let devices = qmp.execute("query-memory-devices", Value::Null)?;
    let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
    let dimms = devices.iter().filter(|d| d["type"] != "virtio-mem");
    let plugged: u64 = dimms.filter_map(|d| d["data"]["size"].as_u64()).sum();
    Ok(Facts {
        process: process_of(&*qmp),
        identity: Identity { uuid, name, machine, memory: base.saturating_add(plugged) },
        state,
        migration: text(&migration["status"]),
        blocked: reasons.iter().map(text).collect(),
        jobs: qmp.jobs()?.into_iter().map(|j| format!("{} {}", j.kind, j.id)).collect(),
        virtio_mem: devices.iter().any(|d| d["type"] == "virtio-mem"),
        lacks_pages: false,
        // QEMU 7.2 has no status for it.
        listens: migration["socket-address"].as_array().is_some_and(|a| !a.is_empty()),
        ours: false,
    })
}

/// Of a VM that was paused when its migration failed: so QEMU 7.2 leaves it (`postmigrate`), and moves it no more.
const STUCK: &str = "a migration of it has failed while it was paused, and its QEMU moves it again only once it has run (it is \
                     postmigrate): `cont` it, and `stop` it again if it is to be paused";

/// Why a VM that stands so cannot be moved, a line each.
fn refusals(role: Role, f: &Facts, spec: &GroupSpec) -> Vec<String> {
    let mut out = Vec::new();
    let proxied = spec.recipe.proxied().is_some();
    match role {
        Role::Source => {
            if f.state == "postmigrate" && matches!(&*f.migration, "failed" | "cancelled") {
                out.push(STUCK.into());
            } else if f.state == "postmigrate" {
                out.push(
                    "its QEMU has completed a migration that IRLM knows nothing of: look where the VM runs, and end this QEMU or \
                     let it go on"
                        .into(),
                );
            } else if GuestState::parse(&f.state).is_none() {
                out.push(format!(
                    "its QEMU is in state {:?}: it can be moved once it runs or is paused",
                    f.state
                ));
            }
            if !matches!(&*f.migration, "" | "none" | "completed" | "failed" | "cancelled") {
                let what = &f.migration;
                out.push(format!(
                    "somebody else's migration or snapshot of it is under way ({what}): wait for it or end it first"
                ));
            }
            out.extend(f.blocked.iter().map(|b| format!("its QEMU cannot migrate: {b}")));
            // Plain QEMU is its owner's to judge: a mirror of its disks may belong to the move.
            let jobs = f.jobs.iter().filter(|_| proxied);
            out.extend(
                jobs.map(|j| format!("a job of its QEMU is under way ({j}): wait for its end, or cancel it")),
            );
            if f.lacks_pages {
                out.push(
                    "some of its pages are still to come from where it was before: wait until it is whole"
                        .into(),
                );
            }
            if f.virtio_mem && proxied && spec.recipe.direct() != Direct::Always {
                out.push(
                    "it has virtio-mem, which agents in the path do not move: give the group `direct = \"always\"`, or take a \
                     plain method"
                        .into(),
                );
            }
        }
        Role::Target => {
            let quiet = matches!(&*f.migration, "" | "none");
            // A plain group that came to nothing leaves its QEMU listening, and the next one uses it.
            let ours = f.ours && !proxied && (quiet || f.migration == "setup");
            // Whoever is there is never to be replaced on this program's word.
            if f.state != "inmigrate" && GuestState::parse(&f.state).is_some() {
                out.push(format!(
                    "a VM is in the QEMU there, in state {:?}, and stays: name the socket of one that waits (-S -incoming defer)",
                    f.state
                ));
            } else if f.state != "inmigrate" {
                out.push(format!(
                    "the QEMU there does not wait for a VM, it is in state {:?}: name the socket of one that does (-S -incoming \
                     defer)",
                    f.state
                ));
            } else if (f.listens || !quiet) && !ours {
                let what = if quiet { "it listens" } else { &*f.migration };
                out.push(format!(
                    "somebody else has told the QEMU there where its VM comes from (migrate-incoming; {what}): name the socket of \
                     one that was told nothing (-S -incoming defer)"
                ));
            }
        }
    }
    out
}

/// Why the memory of the QEMU there cannot be compared, where the group wants that.
fn unreadable(front: &Front, process: Option<Process>, spec: &GroupSpec) -> Option<String> {
    let wanted = spec.recipe.proxied().is_some_and(|p| p.verify == Pages::Ram) && front.is_qemu();
    let why = match process.filter(|_| wanted) {
        Some(p) => may_read(p.pid).err()?.to_string(),
        None if wanted => "its process is not visible from here".to_owned(),
        None => return None,
    };
    Some(format!("[verify] pages = \"ram\": its memory cannot be compared: {why}"))
}

/// Whether nobody listens at that socket; a failure of another kind says nothing of who is there. Does not
/// wait for one whose queue of connections is full.
fn nobody_listens(front: &Front) -> bool {
    let socket = socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::NONBLOCK | SocketFlags::CLOEXEC,
        None,
    );
    let (Ok(socket), Ok(addr)) = (socket, SocketAddrUnix::new(front.socket())) else { return false };
    connect(&socket, &addr).is_err_and(|e| matches!(e, Errno::NOENT | Errno::CONNREFUSED))
}

/// How the VM of a source whose process has ended left it, by the newest record of its place. None if it did
/// not leave, or if that record is another VM's.
fn left(last: &VmRecord, vm: &str, lives: Option<bool>) -> Option<Moved> {
    let gone = last.role == Role::Source && matches!(last.state, JournalState::GaveUp | JournalState::Done);
    let it = gone && last.vm == vm && lives == Some(false);
    it.then(|| Moved { group: last.group.clone(), to: last.peer, at_ns: last.at_ns })
}

/// A record as the coordinator is told of it.
fn on_record(r: &VmRecord, lives: Option<bool>) -> OnRecord {
    let key = blake3::derive_key("irlm: one run of a group", &r.token.0);
    let left = r.role == Role::Source && r.state == JournalState::Done;
    OnRecord {
        group: r.group.clone(),
        vm: r.vm.clone(),
        run: key.iter().take(8).fold(0, |n, b| n << 8 | u64::from(*b)),
        says: outcome(r).to_owned(),
        socket: r.front.to_string(),
        open: !r.state.is_final(),
        ended: lives == Some(false),
        left_for: left.then_some(r.peer),
    }
}

/// Bytes of the host's memory that a process holds, huge pages not among them.
fn resident(p: Process) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", p.pid)).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kib| kib << 10)
}

/// Memory that the host can still give, swap included.
fn available() -> Option<u64> {
    let free = memory_available().ok()?;
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let swap = text.lines().find_map(|l| l.strip_prefix("SwapFree:"));
    let swap = swap.and_then(|l| l.trim().trim_end_matches(" kB").parse::<u64>().ok());
    Some(free.saturating_add(swap.unwrap_or(0) << 10))
}

/// Writes what a record would be, has it on disk, and takes it away again.
fn journal_takes(dir: &Path) -> Result<(), Refusal> {
    static SERIAL: AtomicU64 = AtomicU64::new(0);
    // An agent that starts removes files of this ending, so that none stays behind.
    let n = SERIAL.fetch_add(1, Ordering::Relaxed);
    let probe = dir.join(format!("probe-{}-{n}.tmp", std::process::id()));
    let at = dir.display();
    let written = (|| -> io::Result<()> {
        let mut f = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&probe)?;
        f.write_all(&[0; 4096])?;
        f.sync_all()?;
        File::open(dir)?.sync_all()
    })();
    // Whatever was written of it.
    let removed = match std::fs::remove_file(&probe) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    };
    let unwritten = |e| Refusal::failed(format!("the journal in {at} cannot be written: {e}"));
    written.and(removed).map_err(unwritten)?;
    let unseen = |e| Refusal::failed(format!("the journal's file system at {at}: {e}"));
    let room = rustix::fs::statvfs(dir).map_err(unseen)?;
    let room = room.f_bavail.saturating_mul(room.f_frsize);
    if room < JOURNAL_ROOM {
        let why = format!("the journal in {at} has {room} bytes left: make room for {JOURNAL_ROOM}");
        return Err(Refusal::failed(why));
    }
    Ok(())
}

/// Where this agent will have to connect, by the group's ways: what is there, and its address.
fn ports(spec: &GroupSpec) -> Vec<(String, SocketAddr)> {
    let mut out = Vec::new();
    let mine =
        |ix: usize| spec.vms.iter().any(|v| usize::from(v.target) == ix && Some(v.source) == spec.my_source);
    // Where QEMUs stream to each other nothing is pushed, forwarded or lent.
    let rack = spec.recipe.rack();
    let shares = rack.is_some_and(|r| r.direct != Direct::Always);
    let models = shares && rack.is_some_and(|r| r.models);
    for (ix, t) in spec.targets.iter().enumerate() {
        let me = spec.my_target.is_some_and(|m| usize::from(m) == ix);
        let (what, addr) = match spec.recipe.proxied().is_some() {
            true => ("data", t.data),
            false => ("control", t.agent),
        };
        if mine(ix) || (shares && !me) {
            out.push((format!("{what} port {addr} of target host {}", t.name), addr));
        }
    }
    for (ix, s) in spec.sources.iter().enumerate() {
        let me = spec.my_source.is_some_and(|m| usize::from(m) == ix);
        if let (Some(data), true) = (s.data, models && spec.my_source.is_some() && !me) {
            out.push((format!("data port {data} of source host {}", s.name), data));
        }
    }
    if let (Some(r), true) = (rack, spec.my_source.is_some()) {
        out.push((format!("index {}", r.index), r.index));
    }
    out
}

/// Does `work` for all of `items`, some at a time; results in their order.
fn all_at_once<T: Sync, R: Send>(items: &[T], work: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let mut out = Vec::with_capacity(items.len());
    for some in items.chunks(AT_A_TIME) {
        let work = &work;
        std::thread::scope(|s| {
            let threads: Vec<_> = some.iter().map(|i| s.spawn(move || work(i))).collect();
            // A thread that panicked has said so; the panic is this request's.
            out.extend(
                threads.into_iter().map(|t| t.join().unwrap_or_else(|p| std::panic::resume_unwind(p))),
            );
        });
    }
    out
}

/// The VM's ends at this host.
fn ends(spec: &GroupSpec) -> Vec<(&VmSpec, Role)> {
    let both = |v| [(v, Role::Source), (v, Role::Target)];
    let here = |(v, role): &(&VmSpec, Role)| match role {
        Role::Source => spec.my_source == Some(v.source),
        Role::Target => spec.my_target == Some(v.target),
    };
    spec.vms.iter().flat_map(both).filter(here).collect()
}

fn front(v: &VmSpec, role: Role) -> &Front {
    match role {
        Role::Source => &v.source_front,
        Role::Target => &v.target_front,
    }
}

impl Shared {
    pub(super) fn preflight(&self, spec: &GroupSpec, vms_only: bool, by: &Owner) -> Result<Reply, Refusal> {
        self.usable(spec)?;
        let vms = all_at_once(&ends(spec), |(v, role)| self.look_at(spec, v, *role, !vms_only));
        let agent_of = self.calls_as();
        let mut found = Preflight { vms, problems: Vec::new(), available: available(), agent_of };
        if vms_only {
            return Ok(Reply::Preflight(Box::new(found)));
        }
        let there = lock(&self.groups).get(&spec.name).cloned();
        match there {
            Some(old) if old.spec.token != spec.token && !old.is_over() => found.problems.push(format!(
                "group {:?} is under way there: `irlm status` shows it, `irlm cancel` ends it",
                spec.name
            )),
            Some(_) => {}
            None => found.problems.extend(self.no_room(by)),
        }
        found.problems.extend(journal_takes(&self.config.state_dir).err().map(|e| e.msg));
        let unreachable = |(what, addr): &(String, SocketAddr)| {
            let reached = TcpStream::connect_timeout(addr, self.timeouts.peer)
                .and_then(|tcp| self.security.call(tcp, *addr, self.timeouts.peer));
            let e = reached.err()?;
            Some(format!("{what} is not reachable from there: {e}"))
        };
        found.problems.extend(all_at_once(&ports(spec), unreachable).into_iter().flatten());
        if self.keys.is_some() {
            let asked = all_at_once(&peers::called(spec), |peer| self.disbelieved_by(peer));
            found.problems.extend(asked.into_iter().flatten());
        }
        Ok(Reply::Preflight(Box::new(found)))
    }

    /// One end of a VM, and what this host knows of it. `closely`: also how a copy stands that is not the VM
    /// any more.
    fn look_at(&self, spec: &GroupSpec, v: &VmSpec, role: Role, closely: bool) -> VmFacts {
        let mut out = VmFacts::new(v.ix, &v.name, role);
        let front = front(v, role);
        if let Some(other) = self.moved_by(spec, front) {
            // Its monitor is taken.
            out.refusals.push(format!("group {other:?} is moving it: wait until that is over, or cancel it"));
            return out;
        }
        // Who listens is known also while somebody has the monitor.
        let process = process_behind(front, SETUP);
        let nobody = process.is_err() && nobody_listens(front);
        let process = process.ok().flatten();
        self.by_the_registry(spec, v, role, process, nobody, &mut out);
        out.process = process;
        if closely && self.in_hand(spec, front) {
            // Another run of this group has its monitor; that is a problem of the host, and said.
            return out;
        }
        if out.moved.is_some() {
            // The old copy: it may be that somebody has let it run.
            if closely
                && out.state.is_empty()
                && let Ok(facts) = gather(front, SETUP)
            {
                out.process = facts.process.or(process);
                out.identity = Some(facts.identity);
                out.state = facts.state;
            }
            return out;
        }
        let mut facts = match gather(front, SETUP) {
            Ok(facts) => facts,
            Err(e) => {
                out.refusals.push(e.to_string());
                return out;
            }
        };
        facts.ours = facts.process.or(process).is_some_and(|p| self.registry.may_listen(&p));
        if out.arrived.is_none() {
            // Of a VM that belongs here all has been said.
            out.refusals.extend(refusals(role, &facts, spec));
            out.refusals.extend(unreadable(front, facts.process, spec));
        }
        out.resident = facts.process.and_then(resident).unwrap_or(0);
        out.process = facts.process.or(process);
        out.identity = Some(facts.identity);
        out.state = facts.state;
        out
    }

    /// What the registry of ownership says of this end.
    fn by_the_registry(
        &self,
        spec: &GroupSpec,
        v: &VmSpec,
        role: Role,
        process: Option<Process>,
        nobody: bool,
        out: &mut VmFacts,
    ) {
        let newest = process.and_then(|p| self.registry.newest(&p));
        let at_place = self.registry.last_at(front(v, role));
        let last = newest.clone().or_else(|| at_place.clone());
        let last = last.or_else(|| self.registry.last_of(&v.name, role));
        out.record = last.map(|r| on_record(&r, self.registry.lives(&r)));
        out.history = newest.as_ref().map(|r| outcome(r).to_owned());
        let owned = [JournalState::Running, JournalState::Fetching, JournalState::Filled];
        if role == Role::Target {
            let arrived = newest.as_ref().filter(|r| r.role == Role::Target && owned.contains(&r.state));
            out.arrived = arrived.map(|r| r.group.clone());
        }
        let subject = Subject { process, front: front(v, role), identity: None };
        let asker = Asker { group: &spec.name, token: &spec.token, vm: &v.name };
        match self.registry.standing(&subject, &asker, role) {
            Standing::Moved { group, to, at_ns, .. } if role == Role::Source => {
                out.moved = Some(Moved { group, to, at_ns });
            }
            // Its old process was ended, which changes nothing of where the VM is.
            Standing::Free if role == Role::Source && nobody => {
                let last = at_place.as_ref();
                out.moved = last.and_then(|r| left(r, &v.name, self.registry.lives(r)));
                if out.moved.is_some() {
                    out.state = "ended".into();
                }
            }
            other => out.refusals.extend(other.allowed(&v.name).err().map(|e| e.msg)),
        }
    }

    /// The group that is moving the VM behind `front` now, if one does.
    fn moved_by(&self, spec: &GroupSpec, front: &Front) -> Option<String> {
        let groups: Vec<_> = lock(&self.groups).values().cloned().collect();
        groups.iter().find_map(|g| {
            let other = g.spec.name != spec.name && !g.is_over();
            let has = other && ends(&g.spec).into_iter().any(|(v, role)| self::front(v, role) == front);
            has.then(|| g.spec.name.clone())
        })
    }

    /// Whether another run of a group of this name moves the VM behind `front` now.
    fn in_hand(&self, spec: &GroupSpec, front: &Front) -> bool {
        let group = lock(&self.groups).get(&spec.name).cloned();
        group.is_some_and(|g| {
            let other = g.spec.token != spec.token && !g.is_over();
            other && ends(&g.spec).into_iter().any(|(v, role)| self::front(v, role) == front)
        })
    }

    /// Whether each VM is still who the other end's agent has seen, and can be moved: looked at again just
    /// before it is prepared, because the coordinator's look was a moment ago.
    pub(super) fn still_as_seen(&self, spec: &GroupSpec) -> Result<(), Refusal> {
        let check = |(v, role): &(&VmSpec, Role)| -> Vec<String> {
            let Some(theirs) = &v.identity else { return Vec::new() };
            let facts = self.look_at(spec, v, *role, false);
            let mut lines = facts.refusals;
            if let Some(ours) = &facts.identity {
                lines.extend(match role {
                    Role::Source => ours.differences(theirs),
                    Role::Target => theirs.differences(ours),
                });
            }
            lines.iter().map(|l| format!("{}: {l}", v.name)).collect()
        };
        let lines: Vec<String> = all_at_once(&ends(spec), check).concat();
        if lines.is_empty() { Ok(()) } else { Err(Refusal::failed(lines.join("; "))) }
    }
}

#[cfg(test)]
mod tests;
