//! Which loader a VM has, by the kind of its front.

use super::kvm::Kvm;
use super::loader::{Before, Loader};
use super::qemu::Qemu;
use super::{TargetGroup, TargetSpec, TargetVmShared};
use crate::flow::Front;
use std::sync::Arc;

/// The loader of a VM's kind.
pub(super) fn loader<'a>(
    group: &'a TargetGroup,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    before: Before,
) -> Box<dyn Loader + 'a> {
    match &spec.front {
        Front::Qmp(_) => Box::new(Qemu::new(group, spec, shared, before)),
        Front::Vmm(_) => Box::new(Kvm::new(group, spec, shared, &before)),
    }
}
