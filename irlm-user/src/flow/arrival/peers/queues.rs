//! What waits for the other target hosts: queues of names and of frames, and the connections that
//! stand.

use crate::core::digest::Digest;
use crate::core::units::HostIx;
use crate::core::wire::messages::ContentEntry;
use crate::flow::squeeze::Body;
use crate::net::connection::Connection;
use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};

/// Names that may wait for one peer: 16 GiB of contents, some 200 MiB of queue.
pub const MAX_QUEUED: usize = 1 << 22;
/// Bytes of frames that wait to be passed on as they came: seconds of a 100 Mbit/s link for each of
/// a few peers.
pub const MAX_HELD: usize = 128 << 20;

/// A frame that is passed on as it came.
#[derive(Debug)]
pub(in super::super) struct Packed {
    pub(super) digests: Vec<Digest>,
    pub(super) body: Body,
    /// Of its group; what this one holds is given back at its end.
    pub(super) held: Arc<AtomicUsize>,
}

impl Drop for Packed {
    fn drop(&mut self) {
        self.held.fetch_sub(self.body.len(), Ordering::Relaxed);
    }
}

#[derive(Debug)]
pub(super) enum Item {
    Content(Digest),
    Packed(Arc<Packed>),
    Void(ContentEntry),
    /// A vCPU here waits for this content.
    Hurry(Digest),
    /// The peer asked for this content, and this host does not have it.
    NotHere(Digest),
}

#[derive(Debug, Default)]
pub(super) struct Waiting {
    /// These first: a vCPU waits for them.
    pub(super) urgent: VecDeque<Item>,
    pub(super) items: VecDeque<Item>,
    pub(super) closed: bool,
}

#[derive(Debug, Default)]
pub(super) struct Queue {
    pub(super) waiting: Mutex<Waiting>,
    pub(super) bell: Condvar,
}

/// The senders of a group: at most one a target host and trust domain of the group, and none once
/// it is closed.
#[derive(Debug, Default)]
pub(super) struct Senders {
    pub(super) queues: HashMap<(HostIx, u16), Arc<Queue>>,
    pub(super) closed: bool,
}

/// Senders to the other target hosts of a group, made when first needed.
#[derive(Debug)]
pub struct Peers {
    pub(super) addrs: Vec<SocketAddr>,
    pub(super) senders: Mutex<Senders>,
    /// Connections that stand, by peer and trust domain, whoever called.
    pub(super) lines: Mutex<HashMap<(HostIx, u16), Arc<Connection>>>,
    pub(super) called: Condvar,
    /// Bytes of frames that wait.
    pub(super) held: Arc<AtomicUsize>,
}

impl Peers {
    /// Data address of each target host of the group.
    #[must_use]
    pub fn new(addrs: Vec<SocketAddr>) -> Self {
        Self {
            addrs,
            senders: Mutex::default(),
            lines: Mutex::default(),
            called: Condvar::new(),
            held: Arc::default(),
        }
    }
}
