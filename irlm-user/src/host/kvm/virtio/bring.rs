//! The thread that brings a card's frames to its driver.

use super::net::RECEIVE;
use super::{DRIVER_OK, Device, Inner, Kind, NEEDS_RESET};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::time::Duration;

/// How long the thread sleeps at most: it sees within that time that it is to end.
const NAP: Duration = Duration::from_millis(200);

/// The thread that brings a card's frames, until it is over.
pub(in super::super) fn receive(device: &Device, over: impl Fn() -> bool) {
    while !over() {
        device.bring();
    }
}

impl Device {
    /// Waits for frames, a word of the driver, or a moment; then takes what there is.
    pub(super) fn bring(&self) {
        let hungry = {
            let mut inner = self.inner();
            let live = !inner.still && inner.status & DRIVER_OK != 0 && inner.status & NEEDS_RESET == 0;
            let Inner { kind, queues, .. } = &mut *inner;
            match kind {
                Kind::Net(n) if live => {
                    let took = n.take(&mut queues[RECEIVE], self.memory.guest());
                    let hungry = took.as_ref().map_or(true, |t| t.hungry);
                    self.answer(&mut inner, took.map(|t| t.any));
                    hungry
                }
                _ => true,
            }
        };
        let wire = match &self.inner().kind {
            Kind::Net(n) if !hungry => n.wire(),
            _ => None,
        };
        let mut fds = vec![PollFd::new(&self.wake, PollFlags::IN)];
        fds.extend(wire.as_ref().map(|w| PollFd::new(w, PollFlags::IN)));
        let nap = Timespec { tv_sec: 0, tv_nsec: NAP.subsec_nanos().into() };
        // Whatever it was: the next look tells.
        let _ = poll(&mut fds, Some(&nap));
        let _ = rustix::io::read(&self.wake, &mut [0u8; 8]);
    }
}
