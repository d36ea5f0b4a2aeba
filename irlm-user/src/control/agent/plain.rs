//! A group moved by plain QEMU (`oc`, `qemu-multifd-zstd`): the agents only drive the monitors, so that a comparison
//! measures the pages' way and nothing else. For comparison, not for evacuation: the step from "the source's QEMU has
//! completed" to "the target runs" is not in the journal; an agent that dies just there leaves the VM paused on both
//! sides, for an operator to continue.

use super::{Group, GroupSpec, Incoming, Method, Phase, Reply, Request, Role, Shared, VmStatus, blank};
use crate::control::client::AgentClient;
use crate::control::plain::{self, SourceEnd, TargetEnd};
use crate::flow::{lock, unix_ns};
use crate::net::qmp::{MigrateInfo, Qmp};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// How long a target that has been released may take to say that it runs.
const RELEASE: Duration = Duration::from_secs(20);
/// Pause between tries to tell the target that it may run.
const AGAIN: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(super) struct Plain {
    sides: Vec<Arc<Side>>,
    multifd: bool,
    rate: Arc<Rate>,
}

/// What all departures of a group may put on the wire, divided equally among those under way.
#[derive(Debug, Default)]
struct Rate {
    /// Bytes a second; 0: no limit.
    all: AtomicU64,
    running: AtomicU64,
}

impl Rate {
    /// One departure's part, bytes of QEMU's stream a second; none: no limit.
    fn part(&self) -> Option<u64> {
        let all = self.all.load(Ordering::Relaxed);
        // 1448 of 1514 bytes on the wire are QEMU's.
        (all > 0).then(|| (all / 1000 * 956 / self.running.load(Ordering::Relaxed).max(1)).max(4096))
    }
}

/// A departure counts as under way while this lives.
struct Running<'a>(&'a Rate);

impl<'a> Running<'a> {
    fn new(rate: &'a Rate) -> Self {
        rate.running.fetch_add(1, Ordering::Relaxed);
        Self(rate)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One VM, one role.
#[derive(Debug)]
struct Side {
    vm: super::super::api::VmSpec,
    role: Role,
    status: Mutex<VmStatus>,
    cancel: AtomicBool,
    released: AtomicBool,
    /// Target: the monitor, between listening and watching.
    qmp: Mutex<Option<Qmp>>,
}

impl Side {
    fn set(&self, change: impl FnOnce(&mut VmStatus)) {
        change(&mut lock(&self.status));
    }
    fn fail(&self, why: &str) {
        self.set(|s| {
            s.phase = Phase::Failed;
            s.error = Some(why.to_owned());
        });
    }
    fn progress(&self, i: &MigrateInfo) {
        self.set(|s| {
            s.wire_bytes = i.transferred;
            s.stream_bytes = i.transferred;
            s.ram_total = i.ram_total;
            s.ram_remaining = i.ram_remaining;
            s.pages.uniform = i.zero_pages;
            s.pages.unique = i.normal_pages;
        });
    }
}

impl Plain {
    pub(super) fn new(spec: &GroupSpec) -> Self {
        let mut sides = Vec::new();
        for v in &spec.vms {
            for (role, mine) in [
                (Role::Source, spec.my_source == Some(v.source)),
                (Role::Target, spec.my_target == Some(v.target)),
            ] {
                if mine {
                    sides.push(Arc::new(Side {
                        vm: v.clone(),
                        role,
                        status: Mutex::new(blank(v, role, Phase::Prepared)),
                        cancel: AtomicBool::new(false),
                        released: AtomicBool::new(false),
                        qmp: Mutex::new(None),
                    }));
                }
            }
        }
        Self { sides, multifd: spec.method == Method::QemuMultifdZstd, rate: Arc::default() }
    }

    /// Most that all departures together put on the wire, bytes a second; none: no limit.
    pub(super) fn set_rate(&self, rate: Option<u64>) {
        self.rate.all.store(rate.map_or(0, |r| r.max(1)), Ordering::Relaxed);
    }

    pub(super) fn prepare(&self, shared: &Arc<Shared>, group: &Arc<Group>) -> Result<(), String> {
        for side in &self.sides {
            let front = if side.role == Role::Source { &side.vm.source_front } else { &side.vm.target_front };
            let path = front.socket();
            let at = |e: &dyn std::fmt::Display| format!("{}: {e}", side.vm.name);
            let mut qmp = Qmp::connect(path, shared.timeouts.setup).map_err(|e| at(&e))?;
            if side.role == Role::Target {
                let addr =
                    plain::listen(&mut qmp, self.multifd, shared.config.data.ip()).map_err(|e| at(&e))?;
                lock(&group.prepare).incoming.push(Incoming { vm: side.vm.ix, addr });
                *lock(&side.qmp) = Some(qmp);
            }
        }
        Ok(())
    }

    pub(super) fn start(
        &self,
        shared: &Arc<Shared>,
        group: &Arc<Group>,
        leave_paused: bool,
        incoming: &[Incoming],
    ) -> Result<(), String> {
        let mut sources = Vec::new();
        for side in &self.sides {
            match side.role {
                Role::Source => {
                    let to = incoming
                        .iter()
                        .find(|i| i.vm == side.vm.ix)
                        .ok_or_else(|| format!("{}: nobody said where its target listens", side.vm.name))?;
                    sources.push((side.clone(), to.addr));
                }
                Role::Target => {
                    let side = side.clone();
                    spawn(move || target(&side, leave_paused))?;
                }
            }
        }
        let (shared, group, multifd, rate) = (shared.clone(), group.clone(), self.multifd, self.rate.clone());
        spawn(move || {
            let places = usize::from(group.spec.parallel.unwrap_or(u16::MAX)).max(1);
            let mut begun: Vec<Arc<Side>> = Vec::new();
            for (side, to) in sources {
                let busy =
                    |b: &Vec<Arc<Side>>| b.iter().filter(|s| !lock(&s.status).phase.is_final()).count();
                while busy(&begun) >= places && !side.cancel.load(Ordering::Acquire) {
                    std::thread::sleep(Duration::from_millis(20));
                }
                let (shared, group, own, rate) = (shared.clone(), group.clone(), side.clone(), rate.clone());
                begun.push(side);
                if let Err(e) = spawn(move || source(&shared, &group, &own, multifd, to, &rate)) {
                    tracing::error!("{e}");
                }
            }
        })
    }

    pub(super) fn cancel(&self) {
        for s in &self.sides {
            s.cancel.store(true, Ordering::Release);
        }
    }

    pub(super) fn released(&self, vm: u16) -> Result<(), String> {
        let side = self
            .sides
            .iter()
            .find(|s| s.role == Role::Target && s.vm.ix == vm)
            .ok_or_else(|| format!("VM number {vm} does not arrive here"))?;
        side.released.store(true, Ordering::Release);
        let until = Instant::now() + RELEASE;
        while Instant::now() < until {
            match lock(&side.status).phase {
                Phase::Running | Phase::LeftPaused => return Ok(()),
                Phase::Failed | Phase::Cancelled => {
                    return Err(format!("{}: the target's copy is gone", side.vm.name));
                }
                _ => {}
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(format!("{}: the target has not loaded it yet", side.vm.name))
    }

    pub(super) fn vms(&self, _: &Group) -> Vec<VmStatus> {
        self.sides.iter().map(|s| lock(&s.status).clone()).collect()
    }
}

fn spawn(run: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new()
        .name("irlm-plain".into())
        .spawn(run)
        .map(drop)
        .map_err(|e| format!("no thread: {e}"))
}

fn target(side: &Side, leave_paused: bool) {
    let Some(mut qmp) = lock(&side.qmp).take() else {
        return side.fail("its monitor was not prepared");
    };
    side.set(|s| s.phase = Phase::Migrating);
    match plain::watch_target(&mut qmp, &side.cancel, &mut |i| side.set(|s| s.stream_bytes = i.transferred)) {
        Ok(TargetEnd::Loaded { at_ns }) => side.set(|s| {
            s.phase = Phase::Loaded;
            s.ready_ns = at_ns;
        }),
        Ok(TargetEnd::Failed { why }) => return side.fail(&why),
        Ok(TargetEnd::Cancelled) => {
            let _ = qmp.quit();
            return side.set(|s| s.phase = Phase::Cancelled);
        }
        Err(e) => return side.fail(&e.to_string()),
    }
    // Loaded, and the source's: until it says otherwise this copy may not run. A cancel that comes now ends it only
    // if the source has not let go.
    while !side.released.load(Ordering::Acquire) {
        std::thread::sleep(Duration::from_millis(1));
        if side.cancel.load(Ordering::Acquire) && qmp.query_status().is_err() {
            return side.set(|s| s.phase = Phase::Cancelled);
        }
    }
    if leave_paused {
        return side.set(|s| s.phase = Phase::LeftPaused);
    }
    match plain::run(&mut qmp) {
        Ok(at) => side.set(|s| {
            s.running_ns = at;
            s.phase = Phase::Running;
        }),
        Err(e) => side.fail(&format!("this is the VM, but it cannot be continued: {e}")),
    }
}

fn source(
    shared: &Arc<Shared>,
    group: &Group,
    side: &Side,
    multifd: bool,
    to: std::net::SocketAddr,
    rate: &Rate,
) {
    if side.cancel.load(Ordering::Acquire) {
        return side.set(|s| s.phase = Phase::Cancelled);
    }
    side.set(|s| s.phase = Phase::Migrating);
    let running = Running::new(rate);
    let begun = Qmp::connect(side.vm.source_front.socket(), shared.timeouts.setup).and_then(|mut q| {
        let was_running = q.query_status()?.running;
        let at = plain::start(&mut q, multifd, to, group.spec.downtime_ms, rate.part())?;
        side.set(|s| s.started_ns = at);
        Ok((q, was_running))
    });
    let (mut qmp, was_running) = match begun {
        Ok(x) => x,
        Err(e) => return side.fail(&e.to_string()),
    };
    let end = plain::watch_source(&mut qmp, was_running, &side.cancel, &|| rate.part(), &mut |i| {
        side.progress(i);
    });
    drop(running);
    match end {
        Ok(SourceEnd::Completed { stopped_ns, info, .. }) => {
            side.progress(&info);
            side.set(|s| {
                s.stopped_ns = stopped_ns;
                s.phase = Phase::GaveUp;
            });
            release(group, side);
        }
        Ok(SourceEnd::Failed { why }) => side.fail(&why),
        Ok(SourceEnd::Cancelled) => side.set(|s| s.phase = Phase::Cancelled),
        Err(e) => side.fail(&e.to_string()),
    }
}

/// Tells the target that it may run, until it has heard.
fn release(group: &Group, side: &Side) {
    let Some(target) = group.spec.targets.get(usize::from(side.vm.target)) else { return };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(r) => r,
        Err(e) => return side.set(|s| s.error = Some(format!("control runtime: {e}"))),
    };
    let mut client = AgentClient::new(target.agent, RELEASE + Duration::from_secs(5));
    let request =
        Request::Released { group: group.spec.name.clone(), token: group.spec.token, vm: side.vm.ix };
    loop {
        match runtime.block_on(client.call(&request)) {
            Ok(Reply::Done) => {
                let now = unix_ns();
                return side.set(|s| {
                    s.running_ns = now;
                    s.downtime_ns = Some(now.saturating_sub(s.stopped_ns));
                    s.error = None;
                    s.phase = Phase::Done;
                });
            }
            Ok(_) => {}
            Err(e) => side.set(|s| {
                s.phase = Phase::InDoubt;
                s.error = Some(e.to_string());
            }),
        }
        std::thread::sleep(AGAIN);
    }
}
