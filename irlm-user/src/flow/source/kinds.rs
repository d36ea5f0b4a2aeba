//! Which runner a VM has, by the kind of its front and the group's way.

use super::direct::Direct;
use super::kvm::Kvm;
use super::prepare::PreparedVm;
use super::qemu::Qemu;
use super::runner::{Before, Runner};
use super::{SourceGroup, SourceSpec, SourceVmShared};
use crate::flow::Front;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The runner of a VM's kind; for a recovery `process` is the one that ran it then.
pub(super) fn runner<'a>(
    group: &'a SourceGroup,
    spec: &'a SourceSpec,
    shared: &'a Arc<SourceVmShared>,
    prepared: PreparedVm,
    before: Before,
) -> Box<dyn Runner + 'a> {
    match &spec.front {
        // After a restart the stream is as good as over, whoever it went to.
        Front::Qmp(_) if group.direct.load(Ordering::Relaxed) => {
            Box::new(Direct::new(group, spec, shared, before))
        }
        Front::Qmp(_) => Box::new(Qemu::new(group, spec, shared, prepared, before)),
        Front::Vmm(_) => Box::new(Kvm::new(group, spec, shared, prepared, before)),
    }
}
