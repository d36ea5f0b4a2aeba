//! Hangs the programs on an interface, and takes over what a dead agent left there without a packet going by
//! uncounted in between.

use std::path::{Path, PathBuf};

use aya::Ebpf;
use aya::maps::{Array, MapData, MapError};
use aya::programs::links::{FdLink, LinkOrder, PinnedLink};
use aya::programs::tc::{
    NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact, qdisc_detach_program,
};
use aya::programs::{SchedClassifier, TcAttachType};
use irlm_common::policy::State;
use irlm_common::{ABI_VERSION, EGRESS_PROGRAM, INGRESS_PROGRAM, STATE_MAP};

use super::error::{BpfError, chain};
use super::pins::Pins;
use super::tables::{MAPS, pinned};

/// Both programs, which way they look, and the name of their link's pin.
pub(super) const PROGRAMS: [(&str, TcAttachType, &str); 2] = [
    (EGRESS_PROGRAM, TcAttachType::Egress, "link_egress"),
    (INGRESS_PROGRAM, TcAttachType::Ingress, "link_ingress"),
];

/// Where our filters are in a clsact qdisc: always the same place, so that a dead agent's are replaced and not
/// doubled. Ahead of the priorities that the kernel gives by itself, so that others' filters see our marks.
const CLSACT_PRIORITY: u16 = 0x1f1a;
const CLSACT_HANDLE: TcHandle = TcHandle::new(0, 1);

/// How the programs hang on the interface.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// TCX links (Linux 6.6 and later).
    Tcx,
    /// Filters of a clsact qdisc. The qdisc itself stays: others may have filters on it.
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

/// An attached program. Dropping it detaches.
#[derive(Debug)]
pub(super) enum Attached {
    Tcx {
        /// Removed first: a pin keeps its link alive.
        pin: Option<PathBuf>,
        // Held for the link: closed with the last of file descriptor and pin.
        _link: FdLink,
    },
    Clsact {
        // Held for the filter: removed with it, if that happens in the interface's network namespace.
        _link: SchedClassifierLink,
    },
}

impl Drop for Attached {
    fn drop(&mut self) {
        if let Self::Tcx { pin: Some(pin), .. } = self {
            std::fs::remove_file(pin).ok();
        }
    }
}

/// All names that an agent pins.
pub(super) fn pin_names() -> impl Iterator<Item = String> {
    MAPS.into_iter().chain(PROGRAMS.map(|(.., link)| link)).map(str::to_owned)
}

/// Whether the pins are those of a dead agent of this ABI on this interface. If not, they are to be replaced.
pub(super) fn can_be_taken_over(pins: &Pins, iface: &str, ifindex: u32) -> Result<(), String> {
    for name in MAPS {
        if !pins.path(name).exists() {
            return Err(format!("{name} is not there"));
        }
    }
    let state = state(&pins.path(STATE_MAP)).map_err(|e| format!("{STATE_MAP}: {}", chain(&e)))?;
    if state.abi != ABI_VERSION {
        return Err(format!("they are of ABI {}, not {ABI_VERSION}", state.abi));
    }
    if state.ifindex != ifindex {
        return Err(format!("they are of interface {}, and {iface} is {ifindex}", state.ifindex));
    }
    for (_, way, name) in PROGRAMS {
        let path = pins.path(name);
        if path.exists() && our_link(&path, iface, way).is_none() {
            return Err(format!("{name} is not on {iface}"));
        }
    }
    Ok(())
}

/// Reads a pinned state map.
pub(super) fn state(path: &Path) -> Result<State, MapError> {
    Array::<MapData, State>::try_from(pinned(path)?)?.get(&0, 0)
}

/// The pinned link, if its program hangs on this interface. An interface that is gone and one that was made anew under
/// the same name look alike; the kernel's list of programs does not.
fn our_link(path: &Path, iface: &str, way: TcAttachType) -> Option<FdLink> {
    let link = FdLink::from(PinnedLink::from_pin(path).ok()?);
    let program = link.info().ok()?.program_id();
    let (_, programs) = SchedClassifier::query_tcx(iface, way).ok()?;
    programs.iter().any(|info| info.id() == program).then_some(link)
}

/// Loads both programs into the kernel.
pub(super) fn load(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    for (name, ..) in PROGRAMS {
        program(ebpf, name)?.load()?;
    }
    Ok(())
}

/// Attaches both programs by the same hook.
pub(super) fn attach(
    ebpf: &mut Ebpf,
    iface: &str,
    only: Option<Hook>,
    pins: Option<&Pins>,
) -> Result<(Hook, Vec<Attached>), BpfError> {
    let mut said = Vec::new();
    for hook in [Hook::Tcx, Hook::Clsact] {
        if only.is_some_and(|only| only != hook) {
            continue;
        }
        let mut attached = Vec::new();
        let result = PROGRAMS.into_iter().try_for_each(|(name, way, link)| {
            let pin = pins.map(|pins| pins.path(link));
            let program = program(ebpf, name)?;
            attached.push(match hook {
                Hook::Tcx => tcx(program, iface, way, pin)?,
                Hook::Clsact => clsact(program, iface, name, way)?,
            });
            Ok(())
        });
        match result {
            Ok(()) => return Ok((hook, attached)),
            // What came in of the two goes again: the next hook must not find it counting already.
            Err(BpfError::Load { text, .. }) => said.push(format!("{}: {text}", hook.name())),
            Err(error) => return Err(error),
        }
    }
    Err(BpfError::Attach { iface: iface.to_owned(), text: said.join("; ") })
}

pub(super) fn program<'e>(
    ebpf: &'e mut Ebpf,
    name: &'static str,
) -> Result<&'e mut SchedClassifier, BpfError> {
    Ok(ebpf.program_mut(name).ok_or(BpfError::Missing(name))?.try_into()?)
}

/// By a TCX link: a dead agent's is given the new program in one step, else a new one is made.
fn tcx(
    program: &mut SchedClassifier,
    iface: &str,
    way: TcAttachType,
    pin: Option<PathBuf>,
) -> Result<Attached, BpfError> {
    let failed = |error: &dyn std::error::Error| BpfError::Load { text: chain(error), os_error: None };
    if let Some(path) = pin.as_ref().filter(|path| path.exists()) {
        if let Some(old) = our_link(path, iface, way) {
            let id = program.attach_to_link(old.try_into().map_err(|error| failed(&error))?)?;
            let link = program.take_link(id)?.try_into().map_err(|error| failed(&error))?;
            return Ok(Attached::Tcx { pin, _link: link });
        }
        std::fs::remove_file(path).map_err(|error| failed(&error))?;
    }
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(iface, way, options)?;
    let link: FdLink = program.take_link(id)?.try_into().map_err(|error| failed(&error))?;
    let Some(path) = pin else { return Ok(Attached::Tcx { pin: None, _link: link }) };
    let link = FdLink::from(link.pin(&path).map_err(|error| failed(&error))?);
    Ok(Attached::Tcx { pin: Some(path), _link: link })
}

/// By a filter of a clsact qdisc: one at our place is replaced in one step, else a new one is made.
fn clsact(
    program: &mut SchedClassifier,
    iface: &str,
    name: &str,
    way: TcAttachType,
) -> Result<Attached, BpfError> {
    // Fails when it is there already; attaching tells the rest.
    qdisc_add_clsact(iface).ok();
    let place = SchedClassifierLink::attached(iface, way, CLSACT_PRIORITY, CLSACT_HANDLE, None)
        .map_err(|error| BpfError::Load { text: chain(&error), os_error: error.raw_os_error() })?;
    let id = match program.attach_to_link(place) {
        Ok(id) => id,
        Err(_) => {
            // None at our place; one elsewhere would count everything twice.
            qdisc_detach_program(iface, way, name).ok();
            let options =
                NlOptions { priority: CLSACT_PRIORITY, handle: CLSACT_HANDLE, ..NlOptions::default() };
            program.attach_with_options(iface, way, TcAttachOptions::Netlink(options))?
        }
    };
    Ok(Attached::Clsact { _link: program.take_link(id)? })
}
