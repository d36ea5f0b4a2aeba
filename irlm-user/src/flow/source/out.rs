//! The sending half of a VM connection: frames go out, are counted, and wait for a slow link as
//! long as the target is heard.

use super::{SourceGroup, SourceSpec, SourceVmShared};
use crate::core::units::PageBytes;
use crate::core::wire::frame::Kind;
use crate::flow::now;
use crate::flow::squeeze::Lane;
use crate::net::conn::{frame_len, send_while};
use crate::net::connection::Connection;
use std::io::{self, IoSlice};
use std::sync::atomic::Ordering;

/// The sending half of the VM connection.
#[derive(Debug)]
pub(super) struct Out<'a> {
    pub(super) conn: &'a Connection,
    pub(super) lane: &'a mut Lane,
    pub(super) shared: &'a SourceVmShared,
    pub(super) spec: &'a SourceSpec,
    pub(super) group: &'a SourceGroup,
}

impl Out<'_> {
    /// For the log.
    pub(super) fn counted(&self) -> String {
        let get = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
        format!("stream {} B, wire {} B", get(&self.shared.stream_bytes), get(&self.shared.wire_bytes))
    }

    /// Sends what was given and has not gone out yet.
    pub(super) fn drain(&mut self) -> io::Result<()> {
        let go_on = go_on(self.shared, self.group);
        let bytes = self.lane.drain(self.conn, &self.shared.work, go_on)?;
        self.shared.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Sends one frame without contents.
    pub(super) fn send(&mut self, kind: Kind, meta: &[u8], body: &[IoSlice<'_>]) -> io::Result<()> {
        self.drain()?;
        send_while(self.conn, kind, meta, body, go_on(self.shared, self.group))?;
        let bytes = frame_len(self.conn, meta.len(), body.iter().map(|b| b.len()).sum());
        self.shared.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Sends one frame with these contents.
    pub(super) fn contents(&mut self, kind: Kind, meta: &[u8], contents: &[&PageBytes]) -> io::Result<()> {
        let go_on = go_on(self.shared, self.group);
        let bytes = self.lane.send(self.conn, (kind, meta), contents, &self.shared.work, go_on)?;
        self.shared.wire_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        Ok(())
    }
}

/// Whether to wait on for a slow link: as long as the target is heard.
fn go_on<'a>(s: &'a SourceVmShared, group: &SourceGroup) -> impl Fn() -> bool + use<'a> {
    let silence = group.timeouts.peer.as_nanos() as u64;
    move || {
        !s.lost.load(Ordering::Relaxed)
            && (s.given_up.load(Ordering::Relaxed) || !s.cancelled.load(Ordering::Relaxed))
            && now().0.saturating_sub(s.heard.load(Ordering::Relaxed)) < silence
    }
}
