//! Loads the classifiers onto the core-facing port and keeps the table of flows they know. Tagging and counting are a
//! help to operators and to the reports, so nothing here can stop an agent: what fails leaves a classifier that counts
//! nothing and says why.
//!
//! One handle serves all threads: data-plane threads register their sockets, the reporter reads the sums.

mod attach;
mod counters;
pub(in crate::host) mod error;
mod inspect;
// How tables name a flow.
mod key;
mod lines;
// The programs of this build.
mod object;
pub(in crate::host) mod pins;
mod tables;
mod trial;

use std::fmt;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::MapError;
use aya::{Ebpf, EbpfLoader};
use irlm_common::{ABI_MARK, FlowKey, PROTO_TCP, PROTO_UDP, SLOTS};
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice, socket_with};

pub use self::attach::Hook;
use self::attach::{Attached, attach, can_be_taken_over, load, pin_names};
pub use self::counters::{Counters, CountsRow, Oddities};
pub use self::error::BpfError;
use self::error::chain;
pub use self::inspect::{MapRow, PolicyRow, ProgramRow, Snapshot, names};
use self::key::key;
use self::lines::Reader;
pub use self::object::OBJECT;
use self::pins::Pins;
pub use self::pins::{PIN_ROOT, default_pin_dir};
use self::tables::{MAPS, Tables};
pub use self::tables::{Marking, TagPolicy};
pub use self::trial::{Ran, Trial, Trialled};
pub use irlm_common::{Direction, FlowClass, Scope};

/// The interface's index in this thread's network namespace.
fn interface_index(iface: &str) -> Option<u32> {
    // The kernel is asked through a socket, of whatever kind.
    let socket = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None).ok()?;
    netdevice::name_to_index(socket, iface).ok()
}

/// What to attach where; [`Classifier::options`].
#[derive(Clone, Debug)]
pub struct Options<'a> {
    iface: &'a str,
    pin_dir: Option<&'a Path>,
    object: &'a [u8],
    hook: Option<Hook>,
}

impl<'a> Options<'a> {
    /// Shows maps and links in this directory of a bpffs, and takes over what a dead agent left in it. Without it the
    /// maps are reachable by id only, and the programs end with the handle.
    #[must_use]
    pub const fn pin_dir(mut self, dir: Option<&'a Path>) -> Self {
        self.pin_dir = dir;
        self
    }

    /// Loads this object instead of the one in the binary.
    #[must_use]
    pub const fn object(mut self, object: &'a [u8]) -> Self {
        self.object = object;
        self
    }

    /// Uses this hook only. The default is TCX, then clsact.
    #[must_use]
    pub const fn hook(mut self, hook: Hook) -> Self {
        self.hook = Some(hook);
        self
    }

    /// Loads, attaches, pins. The interface is looked up in the calling thread's network namespace.
    ///
    /// A failed pin is no error: counting goes on, [`Classifier::pin_error`] has the reason.
    pub fn attach(self) -> Result<Classifier, BpfError> {
        if self.object.is_empty() {
            return Err(BpfError::NoObject);
        }
        if !self.object.windows(ABI_MARK.len()).any(|part| part == ABI_MARK) {
            return Err(BpfError::Abi);
        }
        // An interface that is not there is said by whoever attaches; a kernel that refuses the programs says so first.
        let ifindex = interface_index(self.iface).unwrap_or(0);
        let (pins, pin_error) = match self.pin_dir.map(|dir| (dir, self.pins(dir, ifindex))) {
            None => (None, None),
            Some((_, Ok(pins))) => (Some(pins), None),
            Some((dir, Err(error))) => {
                let text = format!("eBPF maps not pinned in {}: {error}", dir.display());
                tracing::warn!(iface = self.iface, "{text}; counting goes on");
                (None, Some(text))
            }
        };
        let mut loader = EbpfLoader::new();
        if let Some(pins) = &pins {
            // A pin that is there is taken, one that is not is made.
            for name in MAPS {
                loader.map_pin_path(name, pins.path(name));
            }
        }
        let mut ebpf = loader.load(self.object)?;
        let lines = Reader::start(&mut ebpf, self.iface);
        if let Err(error) = &lines {
            tracing::warn!(iface = self.iface, "lines of the eBPF programs are not read: {error}");
        }
        load(&mut ebpf)?;
        let mut tables = Tables::of(&mut ebpf)?;
        tables.claim(self.iface, ifindex)?;
        let (hook, attached) = attach(&mut ebpf, self.iface, self.hook, pins.as_ref())?;
        let loaded = Loaded { _attached: attached, _ebpf: ebpf, tables, _lines: lines.ok(), pins };
        Ok(Classifier(Arc::new(State::On { loaded: Box::new(Mutex::new(Some(loaded))), hook, pin_error })))
    }

    /// Locks the directory, and removes what is in it unless it can be taken over.
    fn pins(&self, dir: &Path, ifindex: u32) -> std::io::Result<Pins> {
        let pins = Pins::open(dir, pin_names())?;
        if pins.any() {
            match can_be_taken_over(&pins, self.iface, ifindex) {
                Ok(()) => tracing::info!(iface = self.iface, "eBPF maps in {} taken over", dir.display()),
                Err(why) => {
                    tracing::info!(iface = self.iface, "eBPF pins in {} replaced: {why}", dir.display());
                    pins.clear()?;
                }
            }
        }
        Ok(pins)
    }
}

/// A handle to the classifiers of one interface, or to none. Cheap to clone; the last one detaches and unpins.
#[derive(Clone, Debug)]
pub struct Classifier(Arc<State>);

#[derive(Debug)]
enum State {
    Off { reason: String },
    On { loaded: Box<Mutex<Option<Loaded>>>, hook: Hook, pin_error: Option<String> },
}

/// Fields drop in this order: detach, unload, close the maps, end the log, unpin.
struct Loaded {
    _attached: Vec<Attached>,
    // Owns the programs.
    _ebpf: Ebpf,
    tables: Tables,
    _lines: Option<Reader>,
    pins: Option<Pins>,
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Loaded").field("pins", &self.pins).finish_non_exhaustive()
    }
}

impl Classifier {
    /// Starts describing where to attach.
    #[must_use]
    pub fn options(iface: &str) -> Options<'_> {
        Options { iface, pin_dir: None, object: OBJECT, hook: None }
    }

    /// Attaches this build's programs to `iface`, and shows their maps in `pin_dir`.
    pub fn attach(iface: &str, pin_dir: Option<&Path>) -> Result<Self, BpfError> {
        Self::options(iface).pin_dir(pin_dir).attach()
    }

    /// As [`Classifier::attach`]; what fails is logged once and gives a handle that counts nothing.
    #[must_use]
    pub fn attach_or_disabled(iface: &str, pin_dir: Option<&Path>) -> Self {
        Self::attach(iface, pin_dir).unwrap_or_else(|error| {
            tracing::warn!(iface, "{error}; going on without eBPF counters");
            Self::disabled(error.to_string())
        })
    }

    /// A handle that counts nothing. `reason` is shown to who asks.
    pub fn disabled(reason: impl Into<String>) -> Self {
        Self(Arc::new(State::Off { reason: reason.into() }))
    }

    /// Why nothing is counted; `None` if the programs are attached.
    #[must_use]
    pub fn disabled_reason(&self) -> Option<&str> {
        match &*self.0 {
            State::Off { reason } => Some(reason),
            State::On { .. } => None,
        }
    }

    /// How the programs are attached; `None` if they are not.
    #[must_use]
    pub fn hook(&self) -> Option<Hook> {
        match &*self.0 {
            State::Off { .. } => None,
            State::On { hook, .. } => Some(*hook),
        }
    }

    /// Where maps and links are pinned, if they are.
    #[must_use]
    pub fn pinned(&self) -> Option<PathBuf> {
        let loaded = self.loaded()?;
        Some(loaded.as_ref()?.pins.as_ref()?.dir().to_owned())
    }

    /// Why the maps are not pinned although a directory was given.
    #[must_use]
    pub fn pin_error(&self) -> Option<&str> {
        match &*self.0 {
            State::Off { .. } => None,
            State::On { pin_error, .. } => pin_error.as_deref(),
        }
    }

    /// Counts the TCP flow between `local` (this host) and `remote` under `class` from the next packet on; a flow
    /// that is known already changes class. Does nothing on a disabled handle.
    ///
    /// To count a connection from its first packet, bind before connecting and call this in between.
    pub fn add_flow(&self, local: SocketAddr, remote: SocketAddr, class: FlowClass) -> Result<(), BpfError> {
        self.add(key(PROTO_TCP, local, remote), local, remote, class)
    }

    /// As [`Classifier::add_flow`], for UDP.
    pub fn add_udp_flow(
        &self,
        local: SocketAddr,
        remote: SocketAddr,
        class: FlowClass,
    ) -> Result<(), BpfError> {
        self.add(key(PROTO_UDP, local, remote), local, remote, class)
    }

    /// Forgets a TCP flow: its later packets count as `other`. What is not known is no error.
    pub fn remove_flow(&self, local: SocketAddr, remote: SocketAddr) -> Result<(), BpfError> {
        self.remove(key(PROTO_TCP, local, remote), local, remote)
    }

    /// As [`Classifier::remove_flow`], for UDP.
    pub fn remove_udp_flow(&self, local: SocketAddr, remote: SocketAddr) -> Result<(), BpfError> {
        self.remove(key(PROTO_UDP, local, remote), local, remote)
    }

    /// Registers a connected or accepted stream until the guard is dropped; drop it before the stream, or the
    /// port's next user could be counted under this class. Never fails: what cannot be registered is logged and
    /// counts as `other`.
    pub fn track(&self, stream: &TcpStream, class: FlowClass) -> FlowGuard {
        if self.disabled_reason().is_some() {
            return FlowGuard(None);
        }
        let ends = stream.local_addr().and_then(|local| Ok((local, stream.peer_addr()?)));
        match ends {
            Ok((local, remote)) => self.track_ends(local, remote, class),
            Err(error) => {
                tracing::warn!("flow of class {} not registered: no addresses: {error}", class.name());
                FlowGuard(None)
            }
        }
    }

    /// As [`Classifier::track`], for a TCP socket known by its two ends.
    pub fn track_ends(&self, local: SocketAddr, remote: SocketAddr, class: FlowClass) -> FlowGuard {
        match self.add_flow(local, remote, class) {
            Ok(()) => FlowGuard(Some((self.clone(), local, remote))),
            Err(error) => {
                tracing::warn!("{error}");
                FlowGuard(None)
            }
        }
    }

    /// Changes the class of a registered TCP flow from the next packet on. What is not registered stays so, and is no
    /// error.
    pub fn set_class(&self, local: SocketAddr, remote: SocketAddr, class: FlowClass) -> Result<(), BpfError> {
        let key = key(PROTO_TCP, local, remote);
        self.with(Ok(()), |tables| tables.change(key, class)).map_err(flow_error(local, remote))
    }

    /// Puts a policy in force for every class and in both scopes. Live: a packet gets what the old policy says or what
    /// the new one says, never something of both. Returns when it is in force.
    pub fn set_policy(&self, policy: &TagPolicy) -> Result<(), BpfError> {
        self.set_policy_by_scope(policy, &policy.classes)
    }

    /// As [`Classifier::set_policy`], with other tags for packets that stay in the rack.
    pub fn set_policy_by_scope(
        &self,
        policy: &TagPolicy,
        rack: &[Marking; SLOTS as usize],
    ) -> Result<(), BpfError> {
        self.with(Ok(()), |tables| tables.set_policy(&policy.classes, rack, &policy.rack_prefixes))
    }

    /// The sums so far, over all CPUs, since the maps were made: they go on across a killed agent's restart. All zero,
    /// and [`Counters::counted`] false, on a disabled handle.
    pub fn counters(&self) -> Result<Counters, BpfError> {
        self.with(Ok(Counters::default()), |tables| tables.counters())
    }

    /// Detaches and unpins now, whoever still has a handle: it is as a disabled one from here on. For a process that
    /// ends in order; pinned links would outlive it.
    pub fn shut_down(&self) {
        if let Some(mut loaded) = self.loaded() {
            loaded.take();
        }
    }

    fn add(
        &self,
        key: FlowKey,
        local: SocketAddr,
        remote: SocketAddr,
        class: FlowClass,
    ) -> Result<(), BpfError> {
        self.with(Ok(()), |tables| tables.add(key, class)).map_err(flow_error(local, remote))
    }

    fn remove(&self, key: FlowKey, local: SocketAddr, remote: SocketAddr) -> Result<(), BpfError> {
        self.with(Ok(()), |tables| tables.remove(&key)).map_err(flow_error(local, remote))
    }

    /// What `use_them` makes of the maps; `off` if there are none.
    fn with<T>(&self, off: T, use_them: impl FnOnce(&mut Tables) -> T) -> T {
        match self.loaded().as_deref_mut() {
            Some(Some(loaded)) => use_them(&mut loaded.tables),
            _ => off,
        }
    }

    fn loaded(&self) -> Option<MutexGuard<'_, Option<Loaded>>> {
        match &*self.0 {
            State::Off { .. } => None,
            // The lock guards handles to kernel objects; a panic under it leaves nothing half done.
            State::On { loaded, .. } => Some(loaded.lock().unwrap_or_else(PoisonError::into_inner)),
        }
    }
}

/// A registered flow; forgets it when dropped. [`Classifier::track`].
#[derive(Debug)]
#[must_use = "the flow counts under its class only as long as the guard lives"]
pub struct FlowGuard(Option<(Classifier, SocketAddr, SocketAddr)>);

impl Drop for FlowGuard {
    fn drop(&mut self) {
        if let Some((classifier, local, remote)) = &self.0
            && let Err(error) = classifier.remove_flow(*local, *remote)
        {
            tracing::debug!("{error}");
        }
    }
}

fn flow_error(local: SocketAddr, remote: SocketAddr) -> impl FnOnce(MapError) -> BpfError {
    move |error| BpfError::Flow { local, remote, text: chain(&error) }
}

#[cfg(test)]
mod tests;
