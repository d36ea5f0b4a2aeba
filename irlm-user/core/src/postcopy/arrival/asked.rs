//! What has been asked of whom.

use crate::digest::Digest;
use crate::units::{HostIx, Nanos, PageAddr};
use std::collections::{BTreeMap, HashMap, VecDeque};

/// Pages asked for after a faulting one, at first.
const WINDOW: u32 = 8;
/// Target hosts that are asked for a content one after the other before the source is.
const MAX_HOLDERS: usize = 3;

/// A page that the source was asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) at: Nanos,
    pub(super) urgent: bool,
}

/// A content that target hosts are asked for, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct Hurry {
    /// The next target host to ask.
    pub(super) next: usize,
    pub(super) asked: Option<HostIx>,
    pub(super) until: Nanos,
}

/// Who is asked, and has been.
#[derive(Debug)]
pub(super) struct Asking {
    /// Target hosts that may have what this one waits for, likeliest first.
    pub(super) holders: Vec<HostIx>,
    pub(super) hurries: BTreeMap<Digest, Hurry>,
    /// Of the source: what a vCPU waits for, and what comes ahead of a touch.
    pub(super) urgent: VecDeque<PageAddr>,
    pub(super) ahead: VecDeque<PageAddr>,
    pub(super) asked: HashMap<PageAddr, Asked>,
    pub(super) asked_order: VecDeque<(Nanos, PageAddr)>,
    pub(super) connected: bool,
    /// Pages asked for after a faulting one.
    pub(super) window: u32,
    /// The page that faulted last.
    pub(super) last: Option<PageAddr>,
}

impl Asking {
    pub(super) fn new(holders: &[HostIx]) -> Self {
        Self {
            holders: holders.iter().copied().take(MAX_HOLDERS).collect(),
            hurries: BTreeMap::new(),
            urgent: VecDeque::new(),
            ahead: VecDeque::new(),
            asked: HashMap::new(),
            asked_order: VecDeque::new(),
            connected: true,
            window: WINDOW,
            last: None,
        }
    }
}
