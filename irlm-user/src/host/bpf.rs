//! Loads the classifiers onto the core-facing port and keeps the table of flows they know. Counting is a help to
//! operators and to the reports, so nothing here can stop an agent: what fails leaves a classifier that counts
//! nothing and says why.
//!
//! One handle serves all threads: data-plane threads register their sockets, the reporter reads the sums.

mod counters;
pub(in crate::host) mod pins;

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::maps::{HashMap, Map, MapData, MapError, PerCpuArray};
use aya::programs::links::LinkOrder;
use aya::programs::tc::{NlOptions, TcAttachOptions, qdisc_add_clsact, qdisc_detach_program};
use aya::programs::{ProgramError, SchedClassifier, TcAttachType};
use aya::{Ebpf, EbpfError, EbpfLoader};
use irlm_common::{
    ABI_MARK, ABI_VERSION, COUNT_ENTRIES, COUNTS_MAP, Counter, EGRESS_PROGRAM, FLOWS_MAP, FlowKey,
    INGRESS_PROGRAM, MAX_FLOWS, PROTO_TCP, PROTO_UDP,
};

pub use self::counters::{Counters, CountsRow};
use self::pins::Pins;
pub use irlm_common::{Direction, FlowClass};

/// The eBPF object of this build; empty if it was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/irlm-ebpf"));

/// Parent of every agent's pin directory.
pub const PIN_ROOT: &str = "/sys/fs/bpf/irlm";
/// Longest name for [`default_pin_dir`].
const MAX_NAME: usize = 64;

/// Why the classifiers could not be loaded, attached, pinned, filled or read.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    /// The binary carries no object.
    #[error(
        "this build of irlm has no eBPF object: build it with `cargo xtask`, which makes the object first"
    )]
    NoObject,
    /// The object is of another version of this source tree.
    #[error("the eBPF object is not of ABI {ABI_VERSION}: build it anew with `cargo xtask`")]
    Abi,
    /// The kernel or the loader refused the object.
    #[error(
        "eBPF object not loaded: {text}; needs root (or CAP_BPF and CAP_NET_ADMIN) and Linux 5.15 or later"
    )]
    Load {
        /// The whole chain of causes.
        text: String,
        /// The kernel's error number, if the kernel said no.
        os_error: Option<i32>,
    },
    /// The object lacks a program or a map that its ABI promises.
    #[error("eBPF object has no {0}: build it anew with `cargo xtask`")]
    Missing(&'static str),
    /// Neither TCX nor clsact took the programs.
    #[error("eBPF classifiers not attached to {iface}: {text}; check the interface's name with `ip link`")]
    Attach {
        /// The interface.
        iface: String,
        /// What both ways of attaching said.
        text: String,
    },
    /// The table of flows is full, or the kernel refused the entry.
    #[error("flow {local} - {remote} not registered with eBPF (at most {MAX_FLOWS} flows): {text}")]
    Flow {
        /// This host's end.
        local: SocketAddr,
        /// The other end.
        remote: SocketAddr,
        /// What the kernel said.
        text: String,
    },
    /// The counters could not be read.
    #[error("eBPF counters not read: {0}")]
    Counters(String),
    /// An agent's name that cannot name a directory.
    #[error("{0:?} cannot name a pin directory: use up to {MAX_NAME} of A-Z a-z 0-9 _ - and .")]
    Name(String),
}

impl BpfError {
    /// True if this machine or build cannot do eBPF at all, so that trying again is no use: no object, no
    /// permission, no system call.
    #[must_use]
    pub fn is_unsupported(&self) -> bool {
        match self {
            Self::NoObject => true,
            Self::Load { os_error, .. } => {
                matches!(os_error, Some(libc::EPERM | libc::EACCES | libc::ENOSYS | libc::EOPNOTSUPP))
            }
            _ => false,
        }
    }
}

/// Longest text taken over from the loader: a verifier's log can fill a screen.
const MAX_TEXT: usize = 500;

/// An error with all its causes on one line; aya's errors keep the reason in `source`.
pub(in crate::host) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_TEXT).collect()
}

/// The first system error in the chain, as its number.
fn os_error(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(code) = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
            return Some(code);
        }
        cause = error.source();
    }
    None
}

impl From<EbpfError> for BpfError {
    fn from(error: EbpfError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}

impl From<ProgramError> for BpfError {
    fn from(error: ProgramError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}

impl From<MapError> for BpfError {
    fn from(error: MapError) -> Self {
        Self::Load { text: chain(&error), os_error: os_error(&error) }
    }
}

/// The pin directory of the agent called `name`: `/sys/fs/bpf/irlm/<name>`.
pub fn default_pin_dir(name: &str) -> Result<PathBuf, BpfError> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    if name.is_empty() || name.len() > MAX_NAME || name.starts_with('.') || !name.bytes().all(plain) {
        return Err(BpfError::Name(name.to_owned()));
    }
    Ok(Path::new(PIN_ROOT).join(name))
}

/// How the programs hang on the interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// TCX links (Linux 6.6 and later): vanish with the process.
    Tcx,
    /// Filters of a clsact qdisc: removed by the handle (dropped in the same network namespace), or, after a
    /// crash, by the next start. The qdisc itself stays: others may have filters on it.
    Clsact,
}

impl Hook {
    /// The name used in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcx => "tcx",
            Self::Clsact => "clsact",
        }
    }
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
    /// Shows the maps in this directory of a bpffs. Without it they are reachable by id only.
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
        let mut ebpf = EbpfLoader::new().load(self.object)?;
        let hook = attach_both(&mut ebpf, self.iface, self.hook)?;
        let flows = ebpf.take_map(FLOWS_MAP).ok_or(BpfError::Missing(FLOWS_MAP))?;
        let counts = ebpf.take_map(COUNTS_MAP).ok_or(BpfError::Missing(COUNTS_MAP))?;
        let (pins, pin_error) = match self.pin_dir.map(|dir| (dir, pin(dir, &flows, &counts))) {
            None => (None, None),
            Some((_, Ok(pins))) => (Some(pins), None),
            Some((dir, Err(error))) => {
                let text = format!("eBPF maps not pinned in {}: {error}", dir.display());
                tracing::warn!(iface = self.iface, "{text}; counting goes on");
                (None, Some(text))
            }
        };
        let counts = PerCpuArray::try_from(counts)?;
        if counts.len() != COUNT_ENTRIES {
            return Err(BpfError::Abi);
        }
        let loaded = Loaded { _ebpf: ebpf, flows: HashMap::try_from(flows)?, counts, pins };
        Ok(Classifier(Arc::new(State::On { loaded: Box::new(Mutex::new(loaded)), hook, pin_error })))
    }
}

fn pin(dir: &Path, flows: &Map, counts: &Map) -> io::Result<Pins> {
    let mut pins = Pins::open(dir, &[FLOWS_MAP, COUNTS_MAP])?;
    for (name, map) in [(FLOWS_MAP, flows), (COUNTS_MAP, counts)] {
        let path = pins.path(name);
        map.pin(&path).map_err(|error| io::Error::other(format!("{name}: {}", chain(&error))))?;
    }
    Ok(pins)
}

/// Attaches both programs by the same hook.
fn attach_both(ebpf: &mut Ebpf, iface: &str, only: Option<Hook>) -> Result<Hook, BpfError> {
    const PROGRAMS: [(&str, TcAttachType); 2] =
        [(EGRESS_PROGRAM, TcAttachType::Egress), (INGRESS_PROGRAM, TcAttachType::Ingress)];
    for (name, _) in PROGRAMS {
        program(ebpf, name)?.load()?;
    }
    let mut said = Vec::new();
    for hook in [Hook::Tcx, Hook::Clsact] {
        if only.is_some_and(|only| only != hook) {
            continue;
        }
        let mut links = Vec::new();
        let result = PROGRAMS.into_iter().try_for_each(|(name, way)| {
            links.push((name, attach_one(program(ebpf, name)?, iface, name, way, hook)?));
            Ok(())
        });
        match result {
            Ok(()) => return Ok(hook),
            Err(BpfError::Load { text, .. }) => said.push(format!("{}: {text}", hook.name())),
            Err(error) => return Err(error),
        }
        // Only one of the two may have come in; the next hook must not find it counting already.
        for (name, link) in links {
            program(ebpf, name)?.detach(link)?;
        }
    }
    Err(BpfError::Attach { iface: iface.to_owned(), text: said.join("; ") })
}

fn program<'e>(ebpf: &'e mut Ebpf, name: &'static str) -> Result<&'e mut SchedClassifier, BpfError> {
    Ok(ebpf.program_mut(name).ok_or(BpfError::Missing(name))?.try_into()?)
}

fn attach_one(
    program: &mut SchedClassifier,
    iface: &str,
    name: &str,
    way: TcAttachType,
    hook: Hook,
) -> Result<aya::programs::tc::SchedClassifierLinkId, BpfError> {
    let options = match hook {
        Hook::Tcx => TcAttachOptions::TcxOrder(LinkOrder::default()),
        Hook::Clsact => {
            // Both fail when there is nothing to do (qdisc there already, no leftover); attaching tells the rest.
            qdisc_add_clsact(iface).ok();
            qdisc_detach_program(iface, way, name).ok();
            TcAttachOptions::Netlink(NlOptions::default())
        }
    };
    Ok(program.attach_with_options(iface, way, options)?)
}

/// A handle to the classifiers of one interface, or to none. Cheap to clone; the last one detaches and unpins.
#[derive(Clone, Debug)]
pub struct Classifier(Arc<State>);

#[derive(Debug)]
enum State {
    Off { reason: String },
    On { loaded: Box<Mutex<Loaded>>, hook: Hook, pin_error: Option<String> },
}

/// Fields drop in this order: detach, close the maps, unpin.
struct Loaded {
    // Owns the programs and their links.
    _ebpf: Ebpf,
    flows: HashMap<MapData, FlowKey, u32>,
    counts: PerCpuArray<MapData, Counter>,
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

    /// Where the maps are pinned, if they are.
    #[must_use]
    pub fn pinned(&self) -> Option<PathBuf> {
        self.loaded().and_then(|loaded| loaded.pins.as_ref().map(|pins| pins.dir().to_owned()))
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

    /// The sums so far, over all CPUs, since the programs were attached. All zero, and
    /// [`Counters::counted`] false, on a disabled handle.
    pub fn counters(&self) -> Result<Counters, BpfError> {
        let Some(loaded) = self.loaded() else { return Ok(Counters::default()) };
        let mut sums = [Counter::default(); COUNT_ENTRIES as usize];
        for (index, sum) in (0..COUNT_ENTRIES).zip(&mut sums) {
            let cpus = loaded.counts.get(&index, 0).map_err(|error| BpfError::Counters(chain(&error)))?;
            cpus.iter().for_each(|cpu| sum.add(cpu));
        }
        Ok(Counters::new(sums))
    }

    fn add(
        &self,
        key: FlowKey,
        local: SocketAddr,
        remote: SocketAddr,
        class: FlowClass,
    ) -> Result<(), BpfError> {
        let Some(mut loaded) = self.loaded() else { return Ok(()) };
        let result = loaded.flows.insert(key, class.slot(), 0);
        result.map_err(|error| BpfError::Flow { local, remote, text: chain(&error) })
    }

    fn remove(&self, key: FlowKey, local: SocketAddr, remote: SocketAddr) -> Result<(), BpfError> {
        let Some(mut loaded) = self.loaded() else { return Ok(()) };
        match loaded.flows.remove(&key) {
            Ok(()) | Err(MapError::KeyNotFound | MapError::ElementNotFound) => Ok(()),
            Err(error) if os_error(&error) == Some(libc::ENOENT) => Ok(()),
            Err(error) => Err(BpfError::Flow { local, remote, text: chain(&error) }),
        }
    }

    fn loaded(&self) -> Option<MutexGuard<'_, Loaded>> {
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

fn key(proto: u8, local: SocketAddr, remote: SocketAddr) -> FlowKey {
    FlowKey {
        local_addr: address(local.ip()),
        remote_addr: address(remote.ip()),
        local_port: local.port(),
        remote_port: remote.port(),
        proto,
        pad: [0; 3],
    }
}

/// As the parser writes them: IPv4 mapped into IPv6, which is also how a dual-stack socket names its IPv4 peer.
fn address(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => irlm_common::parse::mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

#[cfg(test)]
mod tests;
