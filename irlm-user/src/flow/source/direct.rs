//! A departing VM whose QEMU streams to the target's QEMU itself, because the link is faster than two agents are
//! (`core::direct`, docs/decisions/0014). The agents make the connection, authenticate it, tag it and give each QEMU its end;
//! not a byte of the stream passes through them. Who owns the VM is settled as ever, on the VM connection.

use super::minder::{self, Into, Minder};
use super::runner::{PumpError, Ready, Runner, Saw};
use super::tap::Out;
use super::{SourceGroup, SourceNote, SourceSpec, SourceVmShared};
use crate::core::handover::SourceEvent;
use crate::core::qemu::BlockList;
use crate::core::source::SourceVm;
use crate::core::wire::messages::{Hello, Purpose};
use crate::flow::front::{monitor, process_of};
use crate::flow::{Tagged, Traffic};
use crate::host::ram::GuestRam;
use crate::host::sched::Process;
use crate::net::conn::{dial, hand_over, wait_hello_ok};
use crate::net::qmp::Qmp;
use std::os::fd::AsFd as _;
use std::sync::Arc;

/// The name under which a QEMU is given its end.
const NAME: &str = "irlm";

/// A QEMU.
pub(super) struct Direct<'a> {
    group: &'a SourceGroup,
    spec: &'a SourceSpec,
    shared: &'a Arc<SourceVmShared>,
    minder: Option<Minder>,
    process: Option<Process>,
    /// Of QEMU's connection.
    tag: Option<Tagged>,
}

impl<'a> Direct<'a> {
    pub(super) fn new(group: &'a SourceGroup, spec: &'a SourceSpec, shared: &'a Arc<SourceVmShared>) -> Self {
        Self { group, spec, shared, minder: None, process: None, tag: None }
    }
}

impl Runner for Direct<'_> {
    fn set_up(&mut self, note: &mut dyn FnMut(SourceNote) -> Result<(), String>) -> Result<(), String> {
        let (setup, peer) = (self.group.timeouts.setup, self.group.timeouts.peer);
        let mut qmp = Qmp::connect(self.spec.front.socket(), setup).map_err(|e| e.to_string())?;
        let process = process_of(&qmp);
        self.process = process;
        if let Some(p) = process {
            note(SourceNote::Process(p))?;
        }
        let running =
            minder::set_up(&mut qmp, self.group.downtime_ms, Into::Qemu).map_err(|e| e.to_string())?;
        let purpose = Purpose::Stream { source: self.group.me, vm: self.spec.vm };
        let hello = Hello::new(&self.group.name, self.group.token, purpose);
        let addr = self.group.targets[usize::from(self.spec.target.0)];
        let tag = |ends| Tagged::of(&self.group.tags, ends, Traffic::Bulk);
        let (conn, tag) = dial(addr, &hello, peer, tag).map_err(|e| e.to_string())?;
        wait_hello_ok(&conn, setup).map_err(|e| e.to_string())?;
        hand_over(&conn, peer).map_err(|e| e.to_string())?;
        qmp.give(NAME, conn.as_fd()).map_err(|e| e.to_string())?;
        self.tag = Some(tag);
        // From here on the connection is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop(conn);
        qmp.migrate(&format!("fd:{NAME}")).map_err(|e| e.to_string())?;
        let downtime = self.group.downtime_ms;
        self.minder = Some(Minder::start(qmp, process, running, downtime, self.shared, Into::Qemu));
        Ok(())
    }

    fn ready(&self) -> Ready<'_> {
        Ready::Never
    }

    fn pump(&mut self, _: &mut Out<'_>, _: u32) -> Result<Saw, PumpError> {
        Ok(Saw::default())
    }

    fn gated(&self, _: u32) -> bool {
        false
    }

    fn vm(&mut self) -> Option<&mut SourceVm> {
        None
    }

    fn blocks(&self) -> Option<&Arc<BlockList>> {
        None
    }

    fn ram(&self) -> Option<&Arc<GuestRam>> {
        None
    }

    fn return_path(&mut self, _: &[u8]) {}

    fn let_complete(&mut self) -> Option<SourceEvent> {
        let told = self.minder.as_ref().map_or(Err("it has no monitor".to_owned()), Minder::go_on);
        // A QEMU that could not be told still waits, and has not let go of the VM.
        told.err().map(|e| {
            tracing::warn!("{}: migrate-continue: {e}", self.spec.name);
            SourceEvent::QemuRuns
        })
    }

    fn take_back(&mut self) -> Result<(), String> {
        match &self.minder {
            Some(m) => m.take_back(),
            None => monitor(self.spec.front.socket(), self.group.timeouts.setup, self.process)
                .and_then(|mut q| minder::take_back(&mut q, true)),
        }
    }

    fn found_dead(&mut self) -> bool {
        // The minder says so.
        false
    }

    fn stopped(&mut self) {
        if let Some(tag) = &self.tag {
            tag.change(Traffic::Switchover);
        }
    }
}
