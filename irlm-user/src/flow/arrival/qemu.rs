//! An arriving VM for which a QEMU waits: its stream is re-made and written to it over a UNIX socket that it
//! is given; a thread listens to its return path.

use super::back::{self, Sender};
use super::direct::{Watch, could_not_load};
use super::emit::{Gather, OutError};
use super::loader::{Before, LoadError, Loader, Note};
use super::{TargetGroup, TargetNote, TargetSpec, TargetVmShared};
use crate::core::account::Tally;
use crate::core::arrival::Output;
use crate::core::handover::{GuestState, Ran};
use crate::core::qemu::{BlockList, Emitter, RamBlock};
use crate::core::wire::messages::HelloOk;
use crate::flow::error::unless_refused;
use crate::flow::front::{memory_of, monitor, qemu, target_refusals};
use crate::flow::{MoveError, Tagged, lock};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::conn::write_all_vectored;
use crate::net::connection::Connection;
use crate::net::greeting::send_hello_ok;
use crate::net::qmp::settings::Settings;
use crate::net::qmp::{MigrateStatus, Qmp, QmpError};
use crate::net::relay::end_for;
use std::io::IoSlice;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// The name under which QEMU is given its end of the stream.
const NAME: &str = "irlm";
/// How long QEMU may take to end when it was told to, or to be seen to run.
const TAKES: Duration = Duration::from_secs(5);
/// For how long settings are tried to be put back.
const RESTORE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(20);

/// The monitor, for the arrival's thread and the one that listens to the return path; none while a [`Watch`]
/// has it.
type Shared = Arc<Mutex<Option<Qmp>>>;

/// A QEMU.
pub(super) struct Qemu<'a> {
    group: &'a TargetGroup,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    qmp: Shared,
    /// The QEMU that was seen to wait for this VM; none other is ever touched.
    process: Option<Process>,
    found: Option<Settings>,
    /// It may have been told to run.
    told: bool,
    /// Somebody has let it run before it was given to this host.
    ran_early: bool,
    stream: Option<UnixStream>,
    gather: Option<Gather>,
    /// Of a QEMU that loads from another QEMU: the way back to the source, and who has the monitor meanwhile.
    direct: Option<Sender>,
    watch: Option<Watch>,
}

impl<'a> Qemu<'a> {
    pub(super) fn new(
        group: &'a TargetGroup,
        spec: &'a TargetSpec,
        shared: &'a Arc<TargetVmShared>,
        before: Before,
    ) -> Self {
        Self {
            group,
            spec,
            shared,
            qmp: Shared::default(),
            process: before.process,
            found: before.settings,
            told: before.told,
            ran_early: false,
            stream: None,
            gather: None,
            direct: None,
            watch: None,
        }
    }

    /// Asks on the monitor; a connection that failed is not used again.
    fn ask<T>(&mut self, what: impl FnOnce(&mut Qmp) -> Result<T, MoveError>) -> Result<T, MoveError> {
        let mut qmp = lock(&self.qmp);
        if let Some(watch) = self.watch.take() {
            *qmp = watch.end();
        }
        let had = match qmp.take() {
            Some(q) => q,
            None => monitor(self.spec.front.socket(), self.group.timeouts.peer, self.process)?,
        };
        let had = qmp.insert(had);
        let result = what(had);
        if result.as_ref().is_err_and(MoveError::is_mute) {
            *qmp = None;
        }
        result
    }

    /// The monitor of the QEMU that waits, set up for what comes.
    fn waiting(&mut self, note: &mut Note<'_>) -> Result<Qmp, MoveError> {
        let mut qmp = monitor(self.spec.front.socket(), self.group.timeouts.setup, self.process)?;
        unless_refused(&target_refusals(&qemu::facts(&mut qmp)?))?;
        let listed = qmp.capabilities()?;
        let mut caps = vec![
            ("xbzrle", false),
            ("compress", false),
            ("multifd", false),
            ("postcopy-ram", false),
            ("x-ignore-shared", false),
            ("mapped-ram", false),
            ("events", true),
        ];
        // Images, and their locks, are the source's until the VM runs here.
        if listed.contains_key("late-block-activate") {
            caps.push(("late-block-activate", true));
        }
        let found = qmp.found(&caps, &[])?;
        note(TargetNote::Settings(found.clone()))?;
        self.found = Some(found);
        qmp.set_capabilities(&caps)?;
        Ok(qmp)
    }

    fn is_gone(&self) -> bool {
        self.process.is_some_and(Process::is_gone)
    }
}

/// Begins the loading from the connection that QEMU is given. It does not run the VM by itself when it has
/// loaded, whether it was started with `-S` or not: `stop` is all that `-S` is to a QEMU that waits, and
/// nothing has come yet.
fn load(qmp: &mut Qmp, connection: BorrowedFd<'_>) -> Result<(), QmpError> {
    qmp.give(NAME, connection)?;
    qmp.stop()?;
    qmp.migrate_incoming_and_stay(&format!("fd:{NAME}"))
}

/// Lets a loaded VM run. `told` is whether it may have been told to, and is kept true to what happens here.
fn run(qmp: &mut Qmp, told: &mut bool) -> Result<Ran, MoveError> {
    let before = std::mem::replace(told, true);
    match qmp.cont() {
        Ok(()) => {}
        Err(QmpError::Refused { desc, .. }) => {
            let state = qmp.query_status()?;
            if state.running {
                return Ok(Ran::Runs);
            }
            *told = before;
            return Ok(Ran::Refused(desc));
        }
        Err(e) => return Err(e.into()),
    }
    let until = Instant::now() + TAKES;
    loop {
        let state = qmp.query_status()?;
        if state.running {
            return Ok(Ran::Runs);
        }
        if Instant::now() > until {
            return Err(MoveError::Unsettled(format!("it was told to run, and is {}", state.status)));
        }
        std::thread::sleep(AGAIN);
    }
}

/// What is to be done with a QEMU whose VM is not wanted.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    /// It was never given a stream: it waits as before.
    Left,
    /// It has been told to end.
    Quit,
}

/// Ends a QEMU whose VM has never run here.
fn discard(qmp: &mut Qmp) -> Result<Fate, MoveError> {
    let state = qmp.query_status()?;
    let migration = qmp.query_migrate()?;
    match state.status.as_str() {
        _ if state.running => Err(MoveError::refused("it runs, which it must not: left alone")),
        "inmigrate" if migration.status == MigrateStatus::None => Ok(Fate::Left),
        left @ ("postmigrate" | "finish-migrate") => {
            Err(MoveError::Refused(format!("it is {left}, so its VM has been moved on: left alone")))
        }
        // Loading, failed to, or loaded: then it stands as its owner has left it at the source, paused or
        // shut down.
        _ => {
            qmp.quit()?;
            Ok(Fate::Quit)
        }
    }
}

impl Loader for Qemu<'_> {
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError> {
        let gather = self.gather.as_mut().ok_or(OutError::NoBlocks)?;
        Ok(gather)
    }

    fn meet(&mut self) -> Result<Option<Process>, MoveError> {
        let mut met = monitor(self.spec.front.socket(), self.group.timeouts.setup, None)?;
        let facts = qemu::facts(&mut met)?;
        unless_refused(&target_refusals(&facts))?;
        self.process = facts.process;
        Ok(self.process)
    }

    fn set_up(&mut self, sender: &Sender, note: &mut Note<'_>) -> Result<(), MoveError> {
        let mut qmp = self.waiting(note)?;
        let failed = || MoveError::at("a socket for QEMU's stream");
        let (own, its) = UnixStream::pair().map_err(failed())?;
        own.set_write_timeout(Some(Duration::from_millis(500))).map_err(failed())?;
        load(&mut qmp, its.as_fd())?;
        // From here on that end is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop(its);
        *lock(&self.qmp) = Some(qmp);
        let listening = own.try_clone().map_err(failed())?;
        let (sender, shared, qmp) = (sender.clone(), self.shared.clone(), self.qmp.clone());
        std::thread::Builder::new()
            .name(format!("irlm-rp-{}", self.spec.name))
            .spawn(move || back::listen(&listening, &sender, &shared, &|why| in_its_words(&qmp, why)))?;
        self.stream = Some(own);
        Ok(())
    }

    fn set_up_direct(&mut self, sender: &Sender, note: &mut Note<'_>) -> Result<(), MoveError> {
        *lock(&self.qmp) = Some(self.waiting(note)?);
        self.direct = Some(sender.clone());
        Ok(())
    }

    fn take_stream(&mut self, conn: Connection, tag: Tagged, version: u16) -> Result<(), MoveError> {
        let Some(sender) = self.direct.clone().filter(|_| self.watch.is_none()) else {
            return Err(MoveError::refused("a QEMU's stream came that nobody waits for"));
        };
        let end = end_for(&self.spec.name, conn.clone(), self.group.timeouts.peer)?;
        self.ask(|q| Ok(load(q, end.as_fd())?))?;
        // The source's QEMU begins when its agent has read this.
        send_hello_ok(&conn, HelloOk { version, window_log: 0, slots: 0 })?;
        // From here on that end is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop((conn, end));
        let qmp = lock(&self.qmp).take().ok_or_else(|| MoveError::refused("no monitor"))?;
        self.watch = Some(Watch::start(qmp, tag, &sender, self.shared)?);
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.stream.is_some() || self.direct.is_some()
    }

    fn blocks(&mut self, list: BlockList) -> Result<(), LoadError> {
        let account = self.group.account(self.spec.vm, list.blocks().iter().map(RamBlock::pages));
        self.gather = Some(Gather::new(Emitter::new(Arc::new(list)), account));
        Ok(())
    }

    fn verbatim(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        match &mut self.gather {
            Some(gather) => {
                gather.verbatim(bytes);
                self.write(&[])
            }
            // What comes before QEMU's RAM section.
            None => self.state(bytes),
        }
    }

    fn end_ram(&mut self) {
        if let Some(gather) = &mut self.gather {
            gather.end();
        }
    }

    fn write(&mut self, body: &[u8]) -> Result<(), LoadError> {
        let (Some(stream), Some(gather)) = (&self.stream, &mut self.gather) else { return Ok(()) };
        let started = Instant::now();
        let stall = self.group.timeouts.stall;
        let n = gather.write(stream, body, || started.elapsed() < stall).map_err(LoadError::Qemu)?;
        self.shared.loaded_bytes.fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    fn tally(&mut self) -> Option<Tally> {
        self.gather.as_mut().and_then(Gather::tally)
    }

    fn memory(&mut self) -> Result<GuestRam, MoveError> {
        self.ask(memory_of)
    }

    fn state(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let Some(mut stream) = self.stream.as_ref() else { return Ok(()) };
        let started = Instant::now();
        let stall = self.group.timeouts.stall;
        write_all_vectored(&mut stream, &mut [IoSlice::new(bytes)], || started.elapsed() < stall)
            .map_err(LoadError::Qemu)?;
        self.shared.loaded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn end_stream(&mut self) {
        // QEMU's loader fails on the early end and says so, or has loaded everything already.
        if let Some(q) = &self.stream {
            let _ = q.shutdown(std::net::Shutdown::Write);
        }
    }

    fn look(&mut self) -> Result<Option<bool>, MoveError> {
        if self.process.is_some_and(Process::is_gone) {
            return Ok(None);
        }
        Ok(Some(self.ask(|q| Ok(q.query_migrate()?))?.status == MigrateStatus::Completed))
    }

    fn run(&mut self, guest: GuestState) -> Result<Ran, MoveError> {
        let leave = !guest.runs() || self.group.options.leave_paused;
        let mut told = self.told;
        let ran = self.ask(|q| {
            let state = q.query_status()?;
            match state.status.as_str() {
                _ if state.running => Ok(Ran::Runs),
                // `cont` would be kept for when it has loaded.
                "inmigrate" => Err(MoveError::refused("it has not loaded its VM")),
                _ if leave => Ok(Ran::Paused),
                _ => run(q, &mut told),
            }
        });
        self.told = told;
        match ran {
            Err(_) if self.is_gone() => Ok(Ran::Gone { told }),
            ran => ran,
        }
    }

    fn hold(&mut self) -> Result<bool, MoveError> {
        let ran = self.ask(|q| {
            let runs = q.query_status()?.running;
            if runs {
                q.stop()?;
            }
            Ok(runs)
        })?;
        self.ran_early |= ran;
        Ok(ran)
    }

    fn discard(&mut self) -> Result<(), MoveError> {
        if let Some(q) = self.stream.take() {
            let _ = q.shutdown(std::net::Shutdown::Both);
        }
        // Never seen to wait, so never touched: it may be anybody's.
        let Some(process) = self.process else { return Ok(()) };
        if process.is_gone() {
            return Ok(());
        }
        // It is not the VM, and runs: by somebody's hand, who may want to look at what it did.
        if self.hold().unwrap_or(false) || self.ran_early {
            tracing::warn!("{}: it was let run here, and is not the VM: stopped, and left", self.spec.name);
            return Ok(());
        }
        match self.ask(discard) {
            Ok(Fate::Left) => Ok(()),
            Ok(Fate::Quit) if process.wait_gone(TAKES) => Ok(()),
            Ok(Fate::Quit) => Err(MoveError::Unsettled("it was told to end, and has not yet".into())),
            // It may be ending by itself, as a QEMU does whose loading failed.
            Err(e) if e.is_mute() && process.wait_gone(TAKES) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn restore(&mut self) {
        let Some(found) = self.found.clone().filter(|f| !f.is_empty()) else { return };
        let until = Instant::now() + RESTORE;
        loop {
            match self.ask(|q| Ok(q.put_back(&found)?)) {
                Ok(()) => break self.found = None,
                Err(_) if self.is_gone() => break,
                Err(e) if Instant::now() > until => {
                    tracing::warn!(
                        "{}: its migration settings are not as they were found: {e}",
                        self.spec.name
                    );
                    break;
                }
                Err(_) => std::thread::sleep(10 * AGAIN),
            }
        }
    }

    fn close(&mut self) {
        if let Some(watch) = self.watch.take() {
            drop(watch.end());
        }
        // Its monitor is its owner's again; whoever wants something of it calls anew.
        *lock(&self.qmp) = None;
        self.stream = None;
        self.gather = None;
    }
}

/// A failure to load, with what QEMU says of it if it is still there (9.1 and later).
fn in_its_words(qmp: &Shared, what: &str) -> String {
    let until = Instant::now() + Duration::from_millis(500);
    while let Some(qmp) = &mut *lock(qmp) {
        // The stream is closed a little before it says so.
        match qmp.query_migrate() {
            Ok(m) if m.error_desc.is_some() => return could_not_load(m.error_desc),
            Ok(m) if m.status.is_final() || Instant::now() > until => break,
            Ok(_) => std::thread::sleep(AGAIN),
            Err(_) => return format!("{what}: it has ended, and its own log says why"),
        }
    }
    what.to_owned()
}

#[cfg(test)]
mod tests;
