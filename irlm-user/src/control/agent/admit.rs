//! Who may ask this agent for what (`core::identity`): by the certificate that a caller has shown.

use super::Shared;
use crate::control::api::{Code, GroupSpec, Refusal, Request};
use crate::core::identity::{Identity, NoIdentity, Subject, identify, may};

impl Shared {
    /// Who a caller is: nobody in particular in plain text, where everybody may do everything.
    pub(super) fn admission(&self, leaf: Option<&[u8]>) -> Result<Option<Identity>, Refusal> {
        if self.keys.is_none() {
            return Ok(None);
        }
        let leaf = leaf.ok_or(NoIdentity::Absent);
        let who = leaf.and_then(|leaf| identify(leaf, &self.config.roles));
        who.map(Some).map_err(|e| Refusal::new(Code::NotAllowed, e.to_string()))
    }

    /// Refuses what this caller may not ask for.
    pub(super) fn admit(&self, who: Option<&Identity>, request: &Request) -> Result<(), Refusal> {
        let Some(who) = who else { return Ok(()) };
        let known = request.group().and_then(|name| self.group(name).ok());
        let spec = known.as_ref().map(|g| &g.spec);
        let tenants = request.tenants().or(spec.map(|s| &s.tenants[..]));
        let host = match request {
            Request::Released { vm, .. } => spec.and_then(|s| source_of(s, *vm)),
            _ => None,
        };
        let about = Subject { tenants, host };
        may(who, request.ask(), about).map_err(|e| Refusal::new(Code::NotAllowed, e.to_string()))
    }
}

/// The source host of a VM of the group, by its name there.
fn source_of(spec: &GroupSpec, vm: u16) -> Option<&str> {
    let vm = spec.vms.iter().find(|v| v.ix == vm)?;
    spec.sources.get(usize::from(vm.source)).map(|s| s.name.as_str())
}
