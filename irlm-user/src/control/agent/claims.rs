//! Taking the processes of a group's VMs in hand before anything is done to them, by the registry, and letting them go
//! again when nothing comes of it.

use super::{Group, Role, Shared, record};
use crate::control::api::{Code, GroupSpec, Refusal, VmSpec};
use crate::control::journal::VmRecord;
use crate::control::registry::{Asker, Subject};
use crate::flow::{Front, MoveError, lock};
use crate::host::sched::{Process, peer_pid};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Pause before a monitor whose queue of connections is full is tried again.
const AGAIN: Duration = Duration::from_millis(20);
/// Processes that open monitors for the QEMUs they start: who listens says nothing of who the VM is.
const STARTERS: &[&str] = &["libvirtd", "virtqemud", "systemd", "virt-launcher"];

/// The process behind a front's socket; none if it is not visible, or only its starter is. It is told who listens before
/// it accepts, so that a monitor that somebody else holds is no hindrance.
pub(super) fn process_behind(front: &Front, patience: Duration) -> Result<Option<Process>, MoveError> {
    let at = |e: Errno| MoveError::at(front)(std::io::Error::from(e));
    let until = Instant::now() + patience;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(at)?;
    let addr = SocketAddrUnix::new(front.socket()).map_err(at)?;
    while let Err(e) = connect(&socket, &addr) {
        if e != Errno::AGAIN || Instant::now() > until {
            return Err(at(e));
        }
        std::thread::sleep(AGAIN);
    }
    let pid = peer_pid(&socket).map_err(MoveError::at(front))?;
    let starter = |pid: &u32| {
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        STARTERS.contains(&name.trim_end())
    };
    Ok(pid.filter(|p| !starter(p)).and_then(|p| Process::of(p).ok()))
}

/// The roles that this host has for a VM of the group, with where the other side is.
pub(super) fn roles<'a>(spec: &'a GroupSpec, v: &'a VmSpec) -> impl Iterator<Item = (Role, SocketAddr)> + 'a {
    let source = (spec.my_source == Some(v.source)).then(|| {
        let to = spec.targets.get(usize::from(v.target));
        to.map(|t| (Role::Source, t.data))
    });
    let target = (spec.my_target == Some(v.target)).then(|| {
        let from = spec.sources.get(usize::from(v.source));
        from.map(|s| (Role::Target, s.agent))
    });
    [source, target].into_iter().flatten().flatten()
}

impl Shared {
    /// Takes all processes of the group's VMs at this host in hand, or none; the lines say why not.
    pub(super) fn claim(&self, group: &Group) -> Result<(), Refusal> {
        let spec = &group.spec;
        let mut refusals = Vec::new();
        for v in &spec.vms {
            for (role, peer) in roles(spec, v) {
                let mut claim = record(spec, v, role, peer, false);
                let got = process_behind(&claim.front, self.timeouts.setup)
                    .map_err(|e| Refusal::failed(format!("{}: {e}", v.name)))
                    .and_then(|process| {
                        claim.process = process;
                        self.registry.claim(claim)
                    });
                refusals.extend(got.err().map(|e| e.msg));
            }
        }
        if refusals.is_empty() {
            return Ok(());
        }
        self.release(group);
        Err(Refusal::new(Code::Conflict, refusals.join("; ")))
    }

    /// Lets go what was claimed for a group that nobody will start.
    pub(super) fn release(&self, group: &Group) {
        for v in &group.spec.vms {
            for (role, _) in roles(&group.spec, v) {
                self.registry.release(&group.spec.name, &group.spec.token, &v.name, role);
            }
        }
    }

    /// Whether what was claimed is still the group's, right before it starts.
    pub(super) fn claims_stand(&self, spec: &GroupSpec) -> Result<(), Refusal> {
        let conflict = |why: String| Refusal::new(Code::Conflict, why);
        for v in &spec.vms {
            for (role, _) in roles(spec, v) {
                let claim = self.registry.get(&spec.name, &spec.token, &v.name, role);
                let claim =
                    claim.ok_or_else(|| conflict(format!("{}: it is not in hand any more", v.name)))?;
                self.stands(&claim).map_err(|e| conflict(e.msg))?;
            }
        }
        Ok(())
    }

    fn stands(&self, claim: &VmRecord) -> Result<(), Refusal> {
        let asker = Asker { group: &claim.group, token: &claim.token, vm: &claim.vm };
        match claim.role {
            Role::Source => self.registry.may_leave(&Subject::of(claim), &asker),
            Role::Target => self.registry.may_arrive(&Subject::of(claim), &asker),
        }
    }

    /// Ends what can still be ended of a group. One that has not started lets its VMs go, at once or when its preparation has
    /// heard of it.
    pub(super) fn cancel_group(&self, group: &Group, why: &str) {
        let _gate = lock(&group.gate);
        group.cancelled.store(true, Ordering::Release);
        match &group.work {
            super::Work::InPath(w) => w.cancel(why),
            super::Work::Plain(w) => w.cancel(),
        }
        let started = group.started.load(Ordering::Acquire);
        if !started && group.phase() != super::PreparePhase::Preparing {
            self.release(group);
        }
    }

    /// Whether the phase of a VM and the records of its group say that nothing is left to do.
    pub(super) fn settled(&self, group: &Group) -> bool {
        let spec = &group.spec;
        let over = |name: &str, role| {
            // Nothing is written of a VM that never began.
            self.registry.get(&spec.name, &spec.token, name, role).is_none_or(|r| r.is_over())
        };
        group.vms().iter().all(|v| v.phase.is_final() && over(&v.name, v.role))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_monitor_that_somebody_holds_says_who_it_is_all_the_same() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let front = Front::Qmp(path.clone());
        assert!(process_behind(&front, Duration::ZERO).is_err());
        let _never_accepts = UnixListener::bind(&path).unwrap();
        let me = Process::of(std::process::id()).unwrap();
        assert_eq!(process_behind(&front, Duration::ZERO).unwrap(), Some(me));
    }
}
