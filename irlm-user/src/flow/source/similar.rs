//! What each target host keeps of this host's VMs, so that similar pages can be sent as differences (`core::sketch`): one
//! table for each target host and trust domain, shared by the VMs that go there, because what is similar is mostly in
//! another VM (docs/decisions/0010).

use crate::core::sketch::{References, SETTLE_MS, most_slots};
use crate::core::units::HostIx;
use crate::flow::lock;
use std::collections::HashMap;
use std::sync::Mutex;

/// The tables of one group. A table is made when its target host has said how much it keeps.
#[derive(Debug, Default)]
pub struct Similar {
    tables: HashMap<(HostIx, u16), Mutex<Option<References>>>,
    /// Slots that this host has memory for, a table.
    most: u32,
}

impl Similar {
    /// Tables for VMs that go to these target hosts, each with its trust domain, in `bytes` of memory altogether.
    #[must_use]
    pub fn new(lines: impl IntoIterator<Item = (HostIx, u16)>, bytes: u64) -> Self {
        let tables: HashMap<_, _> = lines.into_iter().map(|line| (line, Mutex::default())).collect();
        let most = most_slots(bytes / tables.len().max(1) as u64);
        Self { tables, most }
    }

    /// The target host keeps so many contents.
    pub(super) fn granted(&self, target: HostIx, domain: u16, slots: u32) {
        let slots = slots.min(self.most);
        if slots > 0
            && let Some(table) = self.tables.get(&(target, domain))
        {
            lock(table).get_or_insert_with(|| References::new(slots, SETTLE_MS));
        }
    }

    /// The table for pages of this trust domain that go there.
    pub(super) fn table(&self, target: HostIx, domain: u16) -> Option<&Mutex<Option<References>>> {
        self.tables.get(&(target, domain))
    }

    /// Bytes of memory taken.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.tables.values().map(|t| lock(t).as_ref().map_or(0, References::bytes) as u64).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_divided_and_never_more_than_the_receiver_keeps() {
        let lines = [(HostIx(0), 0), (HostIx(1), 0), (HostIx(1), 3), (HostIx(0), 0)];
        let s = Similar::new(lines, 64 << 20);
        s.granted(HostIx(1), 3, u32::MAX);
        s.granted(HostIx(1), 0, 7);
        s.granted(HostIx(0), 0, 0);
        s.granted(HostIx(9), 9, 100);
        let slots = |t, d| {
            let table = s.table(HostIx(t), d)?;
            lock(table).as_ref().map(References::slots)
        };
        let third = slots(1, 3).expect("granted");
        assert!((4000..6000).contains(&third), "{third} of 4 KiB and a little in 21 MiB");
        assert!(References::most_bytes(third) as u64 <= (64 << 20) / 3);
        assert_eq!((slots(1, 0), slots(0, 0), slots(9, 9)), (Some(7), None, None));
        s.granted(HostIx(1), 0, 50);
        assert_eq!(slots(1, 0), Some(7), "the first word counts");
        assert!(Similar::new([], 64 << 20).table(HostIx(0), 0).is_none());
    }
}
