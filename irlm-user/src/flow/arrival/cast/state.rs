//! What a group's multicast holds: what waits to be sent, where everybody is, and what was counted.

use super::super::peers::MAX_QUEUED;
use crate::core::cast::BLOCK_CONTENTS;
use crate::core::cast::receiver;
use crate::core::cast::sender::{self, Sender};
use crate::core::digest::Digest;
use crate::core::index::HostSet;
use crate::core::units::{HostIx, Nanos};
use crate::core::wire::cast::CastKey;
use crate::flow::FlowTags;
use crate::net::mcast::Sockets;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex};

/// How a group multicasts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CastConfig {
    /// Multicast address and port.
    pub group: SocketAddr,
    /// Bytes of the largest IP packet.
    pub mtu: u16,
    /// Bytes a second: the least and the most that this host sends.
    pub floor: u64,
    /// See `floor`.
    pub ceiling: u64,
    /// Drill: so many of a thousand datagrams that arrive are let go.
    pub drop_per_mille: u32,
    /// Tests: the hosts are on one machine.
    pub looped: bool,
}

/// Counters, so far.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
pub struct CastCounts {
    /// What was sent.
    pub sent: sender::Stats,
    /// What was heard.
    pub heard: receiver::Stats,
    /// Bytes of reports.
    pub report_bytes: u64,
    /// Bytes of datagrams that came and belong to the group.
    pub received_bytes: u64,
    /// Contents that came.
    pub contents: u64,
    /// Contents for two hosts or more that went by unicast, because too few of them hear.
    pub unheard: u64,
    /// Datagrams let go on purpose.
    pub dropped: u64,
    /// Datagrams that are not the group's, or damaged, or not from where their host is.
    pub foreign: u64,
    /// Hosts that hear this one now.
    pub hearers: usize,
    /// Bytes a second now.
    pub rate: u64,
}

/// Names that wait, by trust domain and set of hosts.
#[derive(Debug, Default)]
pub(super) struct Lanes {
    pub(super) lanes: BTreeMap<(u16, HostSet), VecDeque<(u64, Digest)>>,
    pub(super) len: usize,
    pub(super) count: u64,
}

impl Lanes {
    pub(super) fn put(&mut self, domain: u16, hosts: HostSet, digest: Digest) {
        if self.len < MAX_QUEUED {
            self.lanes.entry((domain, hosts)).or_default().push_back((self.count, digest));
            (self.len, self.count) = (self.len + 1, self.count + 1);
        }
    }

    /// The next block's contents: of the set of hosts whose oldest name has waited longest.
    pub(super) fn take(&mut self) -> Option<(u16, HostSet, Vec<Digest>)> {
        let oldest = |l: &VecDeque<(u64, Digest)>| l.front().map(|x| x.0);
        let (key, _) = self.lanes.iter().min_by_key(|(_, l)| oldest(l))?;
        let key = key.clone();
        let lane = self.lanes.get_mut(&key)?;
        let batch: Vec<Digest> = lane.drain(..lane.len().min(BLOCK_CONTENTS)).map(|x| x.1).collect();
        if lane.is_empty() {
            self.lanes.remove(&key);
        }
        self.len -= batch.len();
        Some((key.0, key.1, batch))
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) sender: Sender,
    pub(super) lanes: Lanes,
}

/// One group's multicast at one target host.
#[derive(Debug)]
pub struct Cast {
    pub(super) me: HostIx,
    pub(super) config: CastConfig,
    pub(super) key: CastKey,
    pub(super) sockets: Sockets,
    /// Where each target host is, by the group.
    pub(super) ips: Vec<IpAddr>,
    /// Where each host's own socket is, by what it said.
    pub(super) places: Mutex<HashMap<HostIx, SocketAddr>>,
    pub(super) state: Mutex<State>,
    pub(super) bell: Condvar,
    pub(super) stop: AtomicBool,
    pub(super) begun: Nanos,
    pub(super) counts: Counts,
    pub(super) tags: Arc<dyn FlowTags>,
}

#[derive(Debug, Default)]
pub(super) struct Counts {
    pub(super) heard: Mutex<receiver::Stats>,
    pub(super) report_bytes: AtomicU64,
    pub(super) received_bytes: AtomicU64,
    pub(super) contents: AtomicU64,
    pub(super) unheard: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) foreign: AtomicU64,
}
