//! Listens to the target QEMU's return path, holds its SHUT back for the handover, and keeps the source hearing from
//! this side while the vm thread may be blocked on a slow QEMU.

use super::{Input, TargetVmShared};
use crate::core::qemu::{MAX_RP_PAYLOAD, RpKind, RpParser};
use crate::core::wire::frame::Kind;
use crate::flow::inbox::wait_readable;
use crate::flow::{HEARTBEAT, lock};
use crate::host::sched::Process;
use crate::net::conn::send;
use crate::net::connection::Connection;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// The sending half of the VM connection. Its frames are few and small (needs, words, heartbeats), so a lock held
/// over the write costs nothing; page data goes the other way.
pub(super) type Sender = Arc<Mutex<Option<Connection>>>;

/// Sends one frame to the source, if it can be heard.
pub(super) fn say(sender: &Sender, kind: Kind, meta: &[u8], body: &[u8]) -> io::Result<()> {
    match &*lock(sender) {
        Some(conn) => send(conn, kind, meta, &[io::IoSlice::new(body)]),
        None => Err(io::ErrorKind::NotConnected.into()),
    }
}

/// Runs until QEMU closes its end or the connection to the source is gone. `why` adds to a failure what QEMU
/// says of it.
pub(super) fn listen(
    mut qemu: &UnixStream,
    sender: &Sender,
    shared: &Arc<TargetVmShared>,
    why: &dyn Fn(&str) -> String,
) {
    let mut rp = RpParser::new();
    let mut buf = [0u8; 4 * (MAX_RP_PAYLOAD + 4)];
    let mut filled = 0;
    let mut beat = Instant::now();
    let mut told = false;
    loop {
        if beat.elapsed() >= HEARTBEAT {
            beat = Instant::now();
            if say(sender, Kind::Heartbeat, &[], &[]).is_err() && lock(sender).is_none() {
                return;
            }
        }
        match wait_readable([Some(qemu.as_fd())], HEARTBEAT.saturating_sub(beat.elapsed())) {
            Ok([true]) => {}
            Ok([false]) => continue,
            Err(_) => break,
        }
        match qemu.read(&mut buf[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => continue,
            Err(_) => break,
        }
        let used = rp.parse::<crate::core::qemu::RpError>(&buf[..filled], &mut |m| {
            let input = match m.kind {
                RpKind::Shut { ok: true } => Input::Loaded,
                RpKind::Shut { ok: false } => Input::LoadFailed(why("the target QEMU could not load the VM")),
                _ => Input::ReturnPath(m.bytes.to_vec()),
            };
            told |= matches!(m.kind, RpKind::Shut { .. });
            shared.inbox.post(input);
            Ok(())
        });
        match used {
            Ok(used) => {
                buf.copy_within(used..filled, 0);
                filled -= used;
            }
            Err(e) => {
                shared.inbox.post(Input::LoadFailed(e.to_string()));
                return;
            }
        }
    }
    if !told {
        shared.inbox.post(Input::LoadFailed(why("the target QEMU closed its stream before all was loaded")));
    }
}

/// The same for a VMM of ours, which says nothing on its own: heartbeats, and whether it is still there. Runs until the
/// connection to the source is gone.
pub(super) fn watch(process: Option<Process>, sender: &Sender, shared: &Arc<TargetVmShared>) {
    loop {
        std::thread::sleep(HEARTBEAT / 2);
        if process.is_some_and(Process::is_gone) {
            shared.inbox.post(Input::LoadFailed("the target VMM is gone".into()));
            return;
        }
        if say(sender, Kind::Heartbeat, &[], &[]).is_err() && lock(sender).is_none() {
            return;
        }
    }
}
