//! A departing VM whose QEMU streams to the target's QEMU itself, because the link is faster than two agents are
//! (`core::direct`, docs/decisions/0014). The agents make the connection, authenticate it, tag it and give each QEMU its end;
//! not a byte of the stream passes through them. Who owns the VM is settled as ever, on the VM connection.

use super::minder::{Into, Monitor};
use super::out::Out;
use super::runner::{Before, Note, PumpError, Ready, Runner, Saw};
use super::{SourceGroup, SourceSpec, SourceVmShared};
use crate::core::account::Pages;
use crate::core::handover::{GuestState, Standing, Took};
use crate::core::qemu::BlockList;
use crate::core::source::SourceVm;
use crate::core::wire::messages::Purpose;
use crate::flow::front::memory_of;
use crate::flow::{MoveError, Tagged, Traffic};
use crate::host::ram::GuestRam;
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use crate::net::relay::end_for;
use std::os::fd::AsFd as _;
use std::sync::Arc;

/// The name under which a QEMU is given its end.
const NAME: &str = "irlm";

/// A QEMU.
pub(super) struct Direct<'a> {
    group: &'a SourceGroup,
    spec: &'a SourceSpec,
    monitor: Monitor,
    /// Its memory, if that is to be compared.
    ram: Option<Arc<GuestRam>>,
    /// Of QEMU's connection.
    tag: Option<Tagged>,
}

impl<'a> Direct<'a> {
    pub(super) fn new(
        group: &'a SourceGroup,
        spec: &'a SourceSpec,
        shared: &Arc<SourceVmShared>,
        before: Before,
    ) -> Self {
        let monitor = Monitor::new(spec.front.socket(), group.timeouts.setup, shared, before);
        Self { group, spec, monitor, ram: None, tag: None }
    }
}

impl Runner for Direct<'_> {
    fn may_leave(&mut self) -> Result<(), MoveError> {
        self.monitor.may_leave()
    }

    fn set_up(&mut self, note: &mut Note<'_>) -> Result<(), MoveError> {
        let (setup, peer) = (self.group.timeouts.setup, self.group.timeouts.peer);
        let downtime = self.group.options.downtime_ms;
        let mut qmp = self.monitor.set_up(downtime, Into::Qemu, note)?;
        if self.group.options.verify == Pages::Ram {
            self.ram = Some(Arc::new(memory_of(&mut qmp)?));
        }
        let purpose = Purpose::Stream { source: self.group.me, vm: self.spec.vm };
        let hello = Greeting::new(&self.group.name, self.group.token, purpose);
        let addr = self.group.targets[usize::from(self.spec.target.0)];
        let tag = |ends| Tagged::of(&self.group.tags, ends, Traffic::Bulk);
        let (conn, tag) = dial(addr, &hello, peer, &self.group.options.security, tag)?;
        wait_hello_ok(&conn, setup)?;
        let end = end_for(&self.spec.name, conn, peer)?;
        qmp.give(NAME, end.as_fd())?;
        self.tag = Some(tag);
        // From here on that end is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop(end);
        self.monitor.begin(qmp, NAME, (downtime, Into::Qemu), note)
    }

    fn ready(&self) -> Ready<'_> {
        Ready::Never
    }

    fn pump(&mut self, _: &mut Out<'_>, _: u32) -> Result<Saw, PumpError> {
        Ok(Saw::default())
    }

    fn in_path(&self) -> bool {
        false
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
        self.ram.as_ref()
    }

    fn started(&self) -> u64 {
        self.monitor.started()
    }

    fn return_path(&mut self, _: &[u8]) {}

    fn let_complete(&mut self) -> Result<Standing, MoveError> {
        self.monitor.go_on()
    }

    fn ask(&mut self) -> Result<Standing, MoveError> {
        self.monitor.standing()
    }

    fn take_back(&mut self, guest: GuestState) -> Result<Took, MoveError> {
        self.monitor.take_back(guest)
    }

    fn restore(&mut self) {
        self.monitor.restore();
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
