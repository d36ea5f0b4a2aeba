//! What is done to a migration packet by its class and scope, in a form that is swapped whole.
//!
//! There are two policies, each with its own trie of prefixes. Programs read one number, the generation, once per packet
//! and use nothing but what belongs to it; user space writes the other generation's parts, waits until no program can
//! still be using them, and turns the number. So no packet sees half a policy.

use crate::{SLOTS, Scope, known_slot};

/// What is done to packets of one class in one scope. A `set_` field of 0 leaves the packet's own value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct ClassPolicy {
    /// 1: write `dscp` into the IP header.
    pub set_dscp: u8,
    /// 1: `priority` goes to `skb->priority`.
    pub set_priority: u8,
    /// 1: `mark` goes to `skb->mark`.
    pub set_mark: u8,
    /// 0 to 63.
    pub dscp: u8,
    /// A class of the port's qdisc tree, as major × 65536 + minor.
    pub priority: u32,
    /// What filters and routing see as the packet's mark.
    pub mark: u32,
}

/// One generation of the policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct Policy {
    /// Prefixes in this generation's trie; 0 saves the look into it.
    pub prefixes: u32,
    /// By slot, for packets towards the core link.
    pub core: [ClassPolicy; SLOTS as usize],
    /// By slot, for packets that stay in the rack.
    pub rack: [ClassPolicy; SLOTS as usize],
}

impl Policy {
    /// What is done to a packet of this slot and scope.
    #[must_use]
    #[inline(always)]
    pub const fn of(&self, scope: Scope, slot: u32) -> &ClassPolicy {
        let classes = match scope {
            Scope::Core => &self.core,
            Scope::Rack => &self.rack,
        };
        // The mask says to the kernel's verifier what known_slot says to a reader.
        &classes[(known_slot(slot) & (SLOTS - 1)) as usize]
    }
}

/// What the programs and user space agree on.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct State {
    /// [`crate::ABI_VERSION`] of who made the maps.
    pub abi: u32,
    /// The interface that the programs hang on, by its index in its network namespace.
    pub ifindex: u32,
    /// Which policy and trie are in force, 0 or 1.
    pub generation: u32,
    /// The interface's name there, padded with zeros.
    pub iface: [u8; 16],
}

const _: () = assert!(size_of::<ClassPolicy>() == 12 && size_of::<Policy>() == 196);
const _: () = assert!(size_of::<State>() == 28 && SLOTS.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::{ClassPolicy, Policy};
    use crate::{SLOTS, Scope};

    #[test]
    fn a_slot_beyond_the_table_is_other_and_scopes_are_apart() {
        let mut policy = Policy::default();
        for slot in 0..SLOTS {
            policy.core[slot as usize].mark = 100 + slot;
            policy.rack[slot as usize].mark = 200 + slot;
        }
        for slot in 0..SLOTS {
            assert_eq!(policy.of(Scope::Core, slot).mark, 100 + slot);
            assert_eq!(policy.of(Scope::Rack, slot).mark, 200 + slot);
        }
        for slot in [SLOTS, SLOTS + 3, u32::MAX] {
            assert_eq!(policy.of(Scope::Core, slot), &ClassPolicy { mark: 100, ..ClassPolicy::default() });
        }
    }
}
