//! What a VMM of our own says of itself.

use super::facts::{Facts, Identity};
use super::reach::process_of;
use crate::core::handover::GuestState;
use crate::net::vmm::{State, Status, Vmm, VmmError};

/// What can be seen of a VMM and its VM.
pub(in crate::flow) fn facts(vmm: &mut Vmm, at: &str) -> Result<Facts, VmmError> {
    let status = vmm.status()?;
    Ok(Facts { process: process_of(&*vmm), ..of_status(&status, at) })
}

fn of_status(s: &Status, at: &str) -> Facts {
    Facts {
        at: format!("VMM {at}"),
        identity: Identity {
            // It has neither name nor number: only its shape is compared.
            machine: format!("irlm vmm, {} vCPUs", s.vcpus),
            memory: s.ram_bytes,
            ..Identity::default()
        },
        state: match (s.state, guest(s.state)) {
            (_, Some(guest)) => guest.name().to_owned(),
            (State::Incoming, _) => "inmigrate".to_owned(),
            (State::GivenUp, _) => "postmigrate".to_owned(),
            // Somebody is pausing it just now.
            _ => "pausing".to_owned(),
        },
        migration: "none".to_owned(),
        fetching: s.uffd,
        ..Facts::default()
    }
}

/// How the VM was left; none of one that waits for its state, was given up, or is being paused.
pub(in crate::flow) fn guest(state: State) -> Option<GuestState> {
    match state {
        State::Running => Some(GuestState::Running),
        State::Paused => Some(GuestState::Paused),
        // A guest that ends by its own wish ends its process: this one broke.
        State::Ended => Some(GuestState::InternalError),
        State::Incoming | State::GivenUp | State::Pausing => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::front::{source_refusals, target_refusals};
    use crate::net::vmm::DirtyMode;

    fn status(state: State, uffd: bool) -> Status {
        Status {
            state,
            why: None,
            vcpus: 2,
            ram_bytes: 64 << 20,
            dirty: DirtyMode::Bitmap,
            dirty_on: false,
            ring_full: 0,
            ring_lost: 0,
            uffd,
            balloon: None,
            pid: 1,
            version: String::new(),
        }
    }

    #[test]
    fn a_vm_whose_pages_still_come_does_not_leave() {
        let facts = |state, uffd| of_status(&status(state, uffd), "/run/v");
        assert!(source_refusals(&facts(State::Running, false)).is_empty());
        let lines = source_refusals(&facts(State::Running, true));
        assert!(
            lines.len() == 1 && lines[0].contains("VMM /run/v: pages of it are still to come"),
            "{lines:?}"
        );
        assert_eq!(source_refusals(&facts(State::Incoming, false)).len(), 1);
        assert!(target_refusals(&facts(State::Incoming, false)).is_empty());
        let lines = target_refusals(&facts(State::Paused, false));
        assert!(lines[0].contains("a VM is there already, and is paused"), "{lines:?}");
        let fewer = of_status(&Status { vcpus: 1, ..status(State::Incoming, false) }, "");
        assert!(facts(State::Running, false).identity.differs(&fewer.identity).unwrap().contains("1 vCPUs"));
    }
}
