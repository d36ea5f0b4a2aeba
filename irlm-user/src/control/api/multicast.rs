//! What a target host says of its multicast.

use serde::{Deserialize, Serialize};

/// What a target host passed on by multicast, and what it heard of the others'.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct MulticastCounters {
    /// Target hosts that hear this one now.
    pub hearers: u64,
    /// Contents sent, each once.
    pub sent_pages: u64,
    /// Bytes of datagrams sent: contents for the first time.
    pub sent_bytes: u64,
    /// The same, sent again.
    pub repaired_bytes: u64,
    /// Announcements, reports and questions.
    pub control_bytes: u64,
    /// Contents for two target hosts or more that went by unicast, because too few of them hear.
    pub unheard_pages: u64,
    /// Contents sent by unicast after all, because a target host missed them too often or fell silent.
    pub handed_pages: u64,
    /// Contents that came.
    pub received_pages: u64,
    /// Bytes of datagrams that came.
    pub received_bytes: u64,
    /// Fragments that came twice.
    pub duplicates: u64,
    /// Fragments that only other hosts needed.
    pub others: u64,
    /// Datagrams refused: of nobody of the group, damaged, or old ones sent again.
    pub refused: u64,
    /// Datagrams let go on purpose (a drill).
    pub dropped: u64,
    /// Sending rate now, bit/s.
    pub rate: u64,
}
