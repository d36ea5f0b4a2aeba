//! A departing VM that a QEMU runs: its stream comes over a UNIX socket that it was given, its monitor is minded by a thread of its own.

use super::book::Book;
use super::minder::{Into, Monitor};
use super::out::Out;
use super::prepare::PreparedVm;
use super::runner::{Before, Note, PumpError, Ready, Runner, Saw};
use super::tap::{Tap, TapError};
use super::{SourceGroup, SourceSpec, SourceVmShared};
use crate::core::account::{Pages, Tally};
use crate::core::handover::{GuestState, Standing, Took};
use crate::core::hold::Hold;
use crate::core::qemu::{BlockList, shut};
use crate::core::source::SourceVm;
use crate::flow::MoveError;
use crate::flow::front::memory_of;
use crate::host::ram::GuestRam;
use socket2::SockRef;
use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

/// With more pages than this waiting for content at the target the last tenth of the first round is held back: QEMU
/// would stop the VM, and waiting would be downtime. 64 pages are 20 ms of a 100 Mbit/s link. Every wait at the target
/// has a deadline, so the gate opens (docs/decisions/0001).
pub(super) const GATE_PAGES: u32 = 64;

/// The name under which QEMU is given its end of the stream.
const NAME: &str = "irlm";
/// What QEMU may write before it is read, bytes: twice what a UNIX socket takes by itself, so that there is a frame's worth of contents
/// in one read more often, and little enough for QEMU's idea of how fast its stream is taken.
const AHEAD: usize = 512 << 10;

/// A QEMU.
pub(super) struct Qemu<'a> {
    group: &'a SourceGroup,
    spec: &'a SourceSpec,
    ram: Option<Arc<GuestRam>>,
    tap: Tap,
    stream: Option<UnixStream>,
    /// SHUT has been written, so that it is not written twice.
    told: bool,
    monitor: Monitor,
}

impl<'a> Qemu<'a> {
    pub(super) fn new(
        group: &'a SourceGroup,
        spec: &'a SourceSpec,
        shared: &'a Arc<SourceVmShared>,
        prepared: PreparedVm,
        before: Before,
    ) -> Self {
        let ram = prepared.ram.clone();
        let tap = Tap::new(
            SourceVm::new(group.hashers[usize::from(spec.domain)].clone(), Vec::new()),
            Hold::new(group.options.hold_back),
            prepared.block_finder(),
            Book::new(group.marker(spec)),
            group.audit(spec),
        );
        let monitor = Monitor::new(spec.front.socket(), group.timeouts.setup, shared, before);
        Self { group, spec, ram, tap, stream: None, told: false, monitor }
    }
}

impl Runner for Qemu<'_> {
    fn may_leave(&mut self) -> Result<(), MoveError> {
        self.monitor.may_leave()
    }

    fn set_up(&mut self, note: &mut Note<'_>) -> Result<(), MoveError> {
        let downtime = self.group.options.downtime_ms;
        let mut qmp = self.monitor.set_up(downtime, Into::Agent, note)?;
        if self.group.options.verify == Pages::Ram {
            // Since preparation memory may have been plugged.
            self.ram = Some(Arc::new(memory_of(&mut qmp)?));
        }
        let failed = || MoveError::at("a socket for QEMU's stream");
        let (qemu, its) = UnixStream::pair().map_err(failed())?;
        qemu.set_write_timeout(Some(self.group.timeouts.stall)).map_err(failed())?;
        // Less than asked for is fine.
        let _ = SockRef::from(&its).set_send_buffer_size(AHEAD);
        qmp.give(NAME, its.as_fd())?;
        // From here on that end is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop(its);
        self.stream = Some(qemu);
        self.monitor.begin(qmp, NAME, (downtime, Into::Agent), note)
    }

    fn ready(&self) -> Ready<'_> {
        self.stream.as_ref().map_or(Ready::Never, |s| Ready::Fd(s.as_fd()))
    }

    fn pump(&mut self, out: &mut Out<'_>, _awaited: u32) -> Result<Saw, PumpError> {
        let Some(stream) = &self.stream else { return Ok(Saw::default()) };
        let table = &self.group.tables[usize::from(self.spec.target.0)];
        let saw = self.tap.pump(stream, table, out).map_err(|e| match e {
            TapError::Send(e) => PumpError::Send(e),
            e => MoveError::memory(e).into(),
        })?;
        if saw.eof {
            // QEMU closes after SHUT only; before that its monitor says why.
            self.stream = None;
        }
        Ok(saw)
    }

    fn gated(&self, awaited: u32) -> bool {
        awaited > GATE_PAGES && self.tap.near_end()
    }

    fn tally(&self) -> Option<Tally> {
        self.tap.tally()
    }

    fn vm(&mut self) -> Option<&mut SourceVm> {
        Some(self.tap.vm())
    }

    fn blocks(&self) -> Option<&Arc<BlockList>> {
        self.tap.blocks()
    }

    fn ram(&self) -> Option<&Arc<GuestRam>> {
        self.ram.as_ref()
    }

    fn started(&self) -> u64 {
        self.monitor.started()
    }

    fn return_path(&mut self, bytes: &[u8]) {
        if let Some(q) = &mut self.stream
            && let Err(e) = q.write_all(bytes)
        {
            tracing::debug!("{}: return path: {e}", self.spec.name);
        }
    }

    fn let_complete(&mut self) -> Result<Standing, MoveError> {
        if !self.told {
            let stream =
                self.stream.as_mut().ok_or_else(|| MoveError::refused("QEMU has closed its stream"))?;
            stream.write_all(&shut(true)).map_err(MoveError::at("SHUT to QEMU"))?;
            self.told = true;
        }
        Ok(Standing::UnderWay)
    }

    fn ask(&mut self) -> Result<Standing, MoveError> {
        self.monitor.standing()
    }

    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        // Closing the stream before SHUT makes QEMU fail the migration and resume the VM by itself.
        if let Some(q) = self.stream.take() {
            let _ = q.shutdown(std::net::Shutdown::Both);
        }
        self.monitor.take_back(guest)
    }

    fn restore(&mut self) {
        self.monitor.restore();
    }

    fn found_dead(&mut self) -> bool {
        // The minder says so.
        false
    }
}
