//! Arriving VMs at one target host, over any order of records, contents, names, voids, answers and wakes: a page is
//! never given an older version after a newer one (invariant 2), and every bound holds.

use crate::ops::Ops;
use irlm_user::core::arrival::{Output, Patience, TargetError, TargetHost, TargetVm, Wake};
use irlm_user::core::digest::Digest;
use irlm_user::core::units::{BlockIx, HostIx, Nanos, PAGE_SIZE, PageAddr, PageBytes, PageId, VmIx};
use irlm_user::core::wire::messages::{NeedEntry, Want};
use irlm_user::core::wire::pages::Record;
use std::collections::HashMap;

const STORE: usize = 3;
const NAMES: usize = 6;
const WAITING: usize = 8;
const CONTENTS: usize = 7;

fn digest(n: usize) -> Digest {
    Digest([n as u8; 20])
}
fn page(n: usize) -> PageBytes {
    [n as u8; PAGE_SIZE]
}
fn id(n: usize) -> PageId {
    PageId { bucket: 1, index: n as u32 }
}

/// What each page should hold, by the newest record about it. `None`: whatever a name stands for, which may change.
#[derive(Default)]
struct Guest {
    newest: HashMap<PageAddr, Option<u8>>,
    /// Content of the frame's body that a record has next.
    next: Option<u8>,
}

impl Guest {
    fn written(&self, addr: PageAddr, byte: u8) {
        let newest = self.newest.get(&addr).copied().flatten();
        assert!(newest.is_none_or(|n| n == byte), "{addr:?} is given {byte}, and its newest is {newest:?}");
    }
}

impl Output for Guest {
    type Error = TargetError;
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), TargetError> {
        (0..count).for_each(|i| self.written(PageAddr { page: addr.page + i, ..addr }, fill));
        Ok(())
    }
    fn body(&mut self, addr: PageAddr, _content: usize) -> Result<(), TargetError> {
        self.written(addr, self.next.expect("a record with a content"));
        Ok(())
    }
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), TargetError> {
        self.written(addr, bytes[0]);
        Ok(())
    }
}

struct World {
    host: TargetHost,
    vms: [(TargetVm, Guest); 2],
    wakes: Vec<Wake>,
    asked: Vec<NeedEntry>,
    now: Nanos,
}

/// The input is a list of operations; an error ends the VM's arrival, as it does in an agent.
pub(crate) fn target(data: &[u8]) {
    let mut ops = Ops::new(data);
    let vm = |n| (TargetVm::new(VmIx(n), HostIx(n % 2), WAITING), Guest::default());
    let mut w = World {
        host: TargetHost::new(STORE, NAMES),
        vms: [vm(0), vm(1)],
        wakes: Vec::new(),
        asked: Vec::new(),
        now: Nanos(0),
    };
    while !ops.is_over() {
        w.now = w.now.plus_ms(u64::from(ops.byte() & 63) * 10);
        let n = ops.below(2);
        if w.operation(n, &mut ops).is_err() {
            w.vms[n].0.leave(&mut w.host);
            w.vms[n] = vm(n as u16);
        }
        let host = &w.host;
        assert!(host.store.len() <= STORE);
        for (vm, _) in &w.vms {
            assert!(vm.waiting() <= WAITING && vm.awaited() <= vm.waiting());
        }
    }
}

impl World {
    fn operation(&mut self, n: usize, ops: &mut Ops<'_>) -> Result<(), TargetError> {
        let content = ops.below(CONTENTS);
        let Self { host, vms, wakes, asked, now } = self;
        let (vm, guest) = &mut vms[n];
        match ops.below(8) {
            0..=2 => return self.record(n, content, ops),
            3 => {
                host.content(ops.rarely(), digest(content), &page(content), wakes);
            }
            4 => {
                host.void(digest(content), &[HostIx(1), HostIx(2)][..ops.below(3)], wakes);
            }
            5 => {
                let Some(wake) = wakes.pop() else { return Ok(()) };
                let (vm, guest) = &mut vms[usize::from(wake.vm.0)];
                // An error here is another VM's: it would end that one.
                if vm.woken(host, wake.key, *now, guest).is_err() {
                    vm.leave(host);
                }
            }
            6 => {
                let patience = Patience { running_ms: 100, stopped_ms: 10 };
                let due = vm.due(*now, patience);
                assert!(due.len() <= vm.waiting());
                *asked = due;
            }
            _ if ops.rarely() => return vm.ram_end(*now),
            _ => {
                let Some(need) = asked.pop() else { return Ok(()) };
                if ops.byte() & 1 == 0 {
                    return vm.gone(host, need).map(drop);
                }
                let (name, content) = match need.want {
                    Want::Digest(d) => (None, usize::from(d.0[0])),
                    Want::Id(i) => (Some(i), content),
                };
                vm.answered(host, name, digest(content), &page(content), *now, guest, wakes)?;
            }
        }
        Ok(())
    }

    fn record(&mut self, n: usize, content: usize, ops: &mut Ops<'_>) -> Result<(), TargetError> {
        let (vm, guest) = &mut self.vms[n];
        let addr = PageAddr { block: BlockIx(0), page: ops.below(10) as u32 };
        let count = 1 + ops.below(4) as u32;
        let named = ops.below(NAMES + 2);
        let (record, pages, byte) = match ops.below(6) {
            0 => (Record::Uniform { addr, count, fill: content as u8 }, count, Some(content as u8)),
            1 => (Record::Unique { addr, count }, count, Some(content as u8)),
            2 => (Record::Shared { addr, id: id(named), digest: digest(content) }, 1, Some(content as u8)),
            3 => (Record::Named { addr, digest: digest(content) }, 1, Some(content as u8)),
            4 => (Record::Ref { addr, id: id(named) }, 1, None),
            _ => (Record::Remote { addr, id: id(named), digest: digest(content) }, 1, Some(content as u8)),
        };
        for i in 0..pages {
            guest.newest.insert(PageAddr { page: addr.page + i, ..addr }, byte);
        }
        guest.next = byte;
        let bytes = (!ops.rarely()).then(|| page(content));
        vm.record(&mut self.host, record, &mut 0, bytes.as_ref(), self.now, guest, &mut self.wakes)
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let remote = [1, 0, 3, 0, 4, 1, 2, 5, 0];
    let name = [1, 1, 3, 0, 5, 0, 2, 4, 0];
    let content = [1, 0, 3, 3, 0];
    let (wake, due, answer, gone) = ([1, 0, 0, 5], [63, 0, 0, 6], [0, 0, 3, 7, 0, 1], [0, 0, 3, 7, 0, 0]);
    vec![
        [&remote[..], &content, &wake].concat(),
        [&remote[..], &name, &due, &answer, &due, &gone].concat(),
        [&remote[..], &[0, 0, 3, 4, 2], &wake, &due, &answer, &[0, 0, 0, 7, 3]].concat(),
    ]
}
