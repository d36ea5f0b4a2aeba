//! The data plane: plain threads over blocking, vectored I/O. `source` and `arrival` mirror each other; what both
//! sides share is here.

// Accepts connections and tells them apart.
pub mod door;
// Carrying out what the drivers of the handover want.
mod drive;
// The hosts of a group by name.
pub mod hosts;
// What the memory of a VM comes to that stands still.
mod memory;
// Why a step of a move was not done, and what may be done next.
mod error;
// Who runs a VM, and how it is reached.
pub mod front;
// What a thread is told by others, pollable beside its sockets.
pub mod inbox;
// The rack index's server and its client.
pub mod index;
// A rate for connections where no class tree keeps one.
pub mod pace;
// The departure of VMs.
pub mod source;
// Frames with contents, compressed where that pays.
pub mod squeeze;
// The arrival of VMs.
pub mod arrival;
// What all this costs.
pub mod work;
// A VM from one flow to the other, past somebody who harms frames.
#[cfg(test)]
mod end_to_end;

use crate::core::units::Nanos;
use crate::net::connection::Connection;
pub use error::{After, MoveError};
pub use front::Front;
use std::net::{SocketAddr, TcpStream};
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// How long things may take before somebody acts. Set once per agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Setting a connection or a QEMU up.
    pub setup: Duration,
    /// Silence after which a peer counts as lost.
    pub peer: Duration,
    /// How long the local QEMU may take no bytes.
    pub stall: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self { setup: Duration::from_secs(20), peer: Duration::from_secs(5), stall: Duration::from_secs(30) }
    }
}

/// A side that has had nothing to say for this long sends a heartbeat.
pub const HEARTBEAT: Duration = Duration::from_millis(1000);

/// Unsent bytes that may wait in the kernel of one data connection: 10 ms of a 100 Mbit/s link.
pub const NOTSENT_LOWAT: u32 = 128 * 1024;

/// Bytes for which a reader is not woken before they have come, at most: far less than a receive buffer, and the peer's
/// window never closes for want of reading.
const RECEIVE_LOWAT: usize = 256 << 10;

/// When the reader of a connection is woken: not for each segment, of which a slow link brings one at a time, but
/// when what its next frame lacks has come.
#[derive(Debug, Default)]
struct Lowat(u32);

impl Lowat {
    /// Before waiting for `lacks` bytes.
    fn wants(&mut self, stream: &Connection, lacks: usize) {
        let bytes = stream.still_to_come(lacks).clamp(1, RECEIVE_LOWAT) as u32;
        // Without it there are more wakes, and nothing else is different.
        if bytes != self.0 && crate::host::sockopt::set_receive_lowat(stream, bytes).is_ok() {
            self.0 = bytes;
        }
    }
}

/// The monotonic clock, as `core` wants it.
#[must_use]
pub fn now() -> Nanos {
    static START: OnceLock<Instant> = OnceLock::new();
    Nanos(START.get_or_init(Instant::now).elapsed().as_nanos() as u64)
}

/// Wall clock, Unix nanoseconds: comparable with QEMU's event times.
#[must_use]
pub fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_nanos() as u64)
}

/// A moment by both clocks of this host: one to show, one to reckon with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Moment {
    /// Wall clock, Unix nanoseconds: for people, and to compare with other hosts' moments.
    pub unix_ns: u64,
    /// The monotonic clock ([`now`]): for durations, because it does not step.
    pub at: Nanos,
}

impl Moment {
    /// This one.
    #[must_use]
    pub fn now() -> Self {
        Self { unix_ns: unix_ns(), at: now() }
    }

    /// That of an event which somebody else stamped by the wall clock (0: not at all), and which is heard of now.
    #[must_use]
    pub fn heard(stamp: u64) -> Self {
        let heard = Self::now();
        let at = crate::core::clock::heard_at(heard.at, heard.unix_ns, stamp);
        Self { unix_ns: if stamp == 0 { heard.unix_ns } else { stamp }, at }
    }

    /// How long it is since then.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        Duration::from_nanos(now().0.saturating_sub(self.at.0))
    }
}

/// What a connection carries, for whoever tags and counts its packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Traffic {
    /// Unique contents and references: push connections, and VM connections while their VM runs at its source.
    Bulk,
    /// Everything else IRLM says.
    Control,
    /// Contents from one target host to another.
    Forward,
    /// A VM connection once its VM has been stopped: the last round and the device state, every millisecond of which
    /// is downtime.
    Switchover,
    /// Pages that a VM which already runs at its target waits for.
    Demand,
}

/// Learns of connections as they come and go (the eBPF classifier's flow map). Must not fail and must not block.
pub trait FlowTags: Send + Sync + std::fmt::Debug {
    /// A connection of class `class` stands, or is about to be made.
    fn add(&self, local: SocketAddr, remote: SocketAddr, class: Traffic);
    /// A connection that was added is of another class from now on.
    fn change(&self, local: SocketAddr, remote: SocketAddr, class: Traffic);
    /// It is gone.
    fn remove(&self, local: SocketAddr, remote: SocketAddr);
    /// Datagrams (UDP) between these ends are of class `class`.
    fn add_datagrams(&self, _local: SocketAddr, _remote: SocketAddr, _class: Traffic) {}
    /// No more of them come.
    fn remove_datagrams(&self, _local: SocketAddr, _remote: SocketAddr) {}
}

/// Nobody is interested.
#[derive(Debug)]
pub struct NoTags;

impl FlowTags for NoTags {
    fn add(&self, _: SocketAddr, _: SocketAddr, _: Traffic) {}
    fn change(&self, _: SocketAddr, _: SocketAddr, _: Traffic) {}
    fn remove(&self, _: SocketAddr, _: SocketAddr) {}
}

/// Keeps a connection's tag as long as it lives.
#[derive(Debug)]
pub struct Tagged {
    tags: std::sync::Arc<dyn FlowTags>,
    ends: Option<(SocketAddr, SocketAddr)>,
}

impl Tagged {
    /// Tags `stream`.
    #[must_use]
    pub fn new(tags: &std::sync::Arc<dyn FlowTags>, stream: &TcpStream, class: Traffic) -> Self {
        Self::of(tags, stream.local_addr().ok().zip(stream.peer_addr().ok()), class)
    }

    /// Tags the connection between these ends, this host's first. It need not stand yet.
    #[must_use]
    pub fn of(
        tags: &std::sync::Arc<dyn FlowTags>,
        ends: Option<(SocketAddr, SocketAddr)>,
        class: Traffic,
    ) -> Self {
        if let Some((local, remote)) = ends {
            tags.add(local, remote, class);
        }
        Self { tags: tags.clone(), ends }
    }

    /// What the connection carries from now on.
    pub fn change(&self, class: Traffic) {
        if let Some((local, remote)) = self.ends {
            self.tags.change(local, remote, class);
        }
    }
}

impl Drop for Tagged {
    fn drop(&mut self) {
        if let Some((local, remote)) = self.ends {
            self.tags.remove(local, remote);
        }
    }
}

/// Locks, also after another holder panicked: what the locks here guard is consistent between statements.
pub fn lock<T>(m: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::wire::frame::{HEADER_LEN, Header, Kind};
    use crate::net::conn::FrameBuf;
    use std::io::Write;

    #[test]
    fn the_end_of_a_frame_that_comes_in_pieces_is_not_waited_for() {
        let l = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let mut sender = TcpStream::connect(l.local_addr().unwrap()).unwrap();
        let receiver = Connection::from(l.accept().unwrap().0);
        let frame = [&Header::new(Kind::Pages, 0, 10_000).encode()[..], &[7; 10_000]].concat();
        let mut pieces =
            [frame[..6000].to_vec(), frame[6000..9000].to_vec(), frame[9000..].to_vec()].into_iter();
        let (mut frames, mut lowat, mut lacking) = (FrameBuf::new(), Lowat::default(), Vec::new());
        let began = Instant::now();
        let wait = frames.wait_asking(&receiver, Duration::from_secs(30), |lacks| {
            lowat.wants(&receiver, lacks);
            lacking.push(lacks);
            // Less than is lacking is here when the read begins, and the rest comes during it.
            if let Some(piece) = pieces.next() {
                sender.write_all(&piece).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
            if lacking.len() == 2
                && let Some(last) = pieces.next()
            {
                let mut sender = sender.try_clone().unwrap();
                std::thread::spawn(move || {
                    std::thread::sleep(Duration::from_millis(50));
                    sender.write_all(&last).unwrap();
                });
            }
        });
        assert_eq!(wait.unwrap().body, [7; 10_000]);
        assert!(began.elapsed() < Duration::from_secs(10), "it was waited for as much again");
        assert_eq!(lacking[..2], [HEADER_LEN, frame.len() - 6000]);
    }
}
