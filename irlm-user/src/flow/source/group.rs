//! What all VMs of one group that leave this host share.

use super::handle::SourceSpec;
use super::lend::Lending;
use super::similar::Similar;
use crate::core::account::{Marker, Pages};
use crate::core::digest::Hasher;
use crate::core::migration::Migration;
use crate::core::pair::PairTable;
use crate::core::squeeze::Mode;
use crate::core::units::HostIx;
use crate::core::wire::keys;
use crate::flow::hosts::Hosts;
use crate::flow::pace::Pacer;
use crate::flow::squeeze::{Edge, Windows, Workers};
use crate::flow::work::Work;
use crate::flow::{FlowTags, Timeouts, lock};
use crate::net::connection::Security;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// What all VMs of one group that leave this host share.
#[derive(Debug)]
pub struct SourceGroup {
    /// Group name.
    pub name: String,
    /// Group secret.
    pub token: [u8; 32],
    /// This host's number among the source hosts.
    pub me: HostIx,
    /// Data address of each target host.
    pub targets: Vec<SocketAddr>,
    /// One hasher a trust domain.
    pub hashers: Vec<Hasher>,
    /// Dedup table towards each target host.
    pub tables: Vec<Mutex<PairTable>>,
    /// How its VMs leave.
    pub options: DepartureOptions,
    /// How long things may take.
    pub timeouts: Timeouts,
    /// Who is told of connections.
    pub tags: Arc<dyn FlowTags>,
    /// Who keeps the connections below the group's share of the core link, where the port does not.
    pub pacer: Arc<Pacer>,
    /// Whether QEMUs stream to each other, because this host's link is faster than its agent; known
    /// once it was measured.
    pub direct: AtomicBool,
    /// What target hosts keep, for differences.
    pub similar: Similar,
    /// What is lent to other source hosts, and borrowed.
    pub lending: Lending,
    /// What its connections share to compress.
    pub squeezing: Squeezing,
    /// What preparation and push cost.
    pub work: Work,
}

/// How the VMs of a group leave.
#[derive(Clone, Debug)]
pub struct DepartureOptions {
    /// Downtime limit that QEMU is given, milliseconds.
    pub downtime_ms: u64,
    /// How long a VM may stream before it is stopped; then its attempt ends.
    pub longest: Duration,
    /// How contents are compressed.
    pub compress: Mode,
    /// Whether pages that are written all the time are held back (`core::hold`).
    pub hold_back: bool,
    /// Whether pages are accounted for, and memory is compared.
    pub verify: Pages,
    /// When VMs run at their target, as far as whoever runs them can do it.
    pub migration: Migration,
    /// How connections are secured.
    pub security: Security,
    /// The names of the group's hosts.
    pub hosts: Arc<Hosts>,
    /// Points where a drill holds the handover (tests, operators' exercises).
    pub drill: Drill,
}

/// What the connections of a group share to compress.
#[derive(Debug, Default)]
pub struct Squeezing {
    /// Windows for compression.
    pub windows: Arc<Windows>,
    /// Threads that may compress beside those of the VMs.
    pub workers: Arc<Workers>,
    /// What is known of the link to the target hosts.
    pub edge: Arc<Edge>,
}

/// What drills and tests ask for: holding a departure's handover at a named point, so that a
/// failure can be caused exactly there, writing down what was sent, losing datagrams. All off in
/// earnest.
#[derive(Clone, Default, Debug, PartialEq, Eq)]
pub struct Drill {
    /// Milliseconds between the target's `loaded` word and the source's next step.
    pub before_give_up_ms: u64,
    /// Milliseconds between the source's giving up and its saying so.
    pub after_give_up_ms: u64,
    /// Where the digests of the newest version sent of every page are written, one file a VM
    /// (`tap`).
    pub audit: Option<PathBuf>,
    /// Target hosts: of a thousand multicast datagrams that arrive so many are let go.
    pub drop_multicast: u32,
    /// Post-copy: milliseconds that the filling waits after the source has given up, so that all
    /// comes that is asked for and nothing else.
    pub hold_filling_ms: u64,
    /// Post-copy, at the target: milliseconds for which what is in the store is placed only where a
    /// vCPU waits for it.
    pub hold_placing_ms: u64,
    /// Hash every page that leaves under a digest kept from preparation, and end the attempt if one
    /// was stale.
    pub prove_digests: bool,
}

#[cfg(test)]
impl SourceGroup {
    /// A group of source host 0 with one trust domain, which goes nowhere.
    pub(crate) fn bare() -> Self {
        Self {
            name: "g".into(),
            token: [1; 32],
            me: HostIx(0),
            targets: Vec::new(),
            hashers: vec![Hasher::new(crate::core::digest::Algorithm::Blake3, &[1; 32], "")],
            tables: Vec::new(),
            options: DepartureOptions {
                downtime_ms: 2,
                longest: Duration::from_secs(3600),
                compress: Mode::Off,
                hold_back: true,
                verify: Pages::Stream,
                migration: Migration::PreCopy,
                security: Security::Plain,
                hosts: Arc::default(),
                drill: Drill::default(),
            },
            timeouts: Timeouts::default(),
            tags: Arc::new(crate::flow::NoTags),
            pacer: Arc::default(),
            direct: AtomicBool::new(false),
            similar: Similar::default(),
            lending: Lending::default(),
            squeezing: Squeezing::default(),
            work: Work::default(),
        }
    }
}

impl SourceGroup {
    /// Gives back the memory of what was known of the target hosts: no VM of the group leaves any
    /// more.
    pub fn let_go(&self) {
        for t in &self.tables {
            *lock(t) = PairTable::new(self.me, 1);
        }
        self.similar.let_go();
    }

    /// What marks this VM's pages, if they are accounted for.
    pub(super) fn marker(&self, spec: &SourceSpec) -> Option<Marker> {
        let key = || keys::account(&self.token, spec.vm);
        (self.options.verify != Pages::Off).then(|| Marker::new(&key()))
    }

    /// Where this VM's audit goes, if there is one.
    pub(super) fn audit(&self, spec: &SourceSpec) -> Option<PathBuf> {
        self.options.drill.audit.as_ref().map(|f| {
            let mut file = f.clone().into_os_string();
            file.push(format!(".{}", spec.name));
            file.into()
        })
    }
}
