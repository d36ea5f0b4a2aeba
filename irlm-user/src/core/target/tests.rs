//! The waiting list's promises one by one: what is superseded is never written, whoever waits is woken by name or by
//! digest, and every way in which a content can fail to come ends in a question, a newer version or an error.

use super::*;
use crate::core::digest::{Algorithm, Hasher};
use crate::core::units::{BlockIx, PAGE_SIZE};

const SRC: HostIx = HostIx(3);
const VM: VmIx = VmIx(1);
const OTHER: VmIx = VmIx(2);
const SOON: Patience = Patience { running_ms: 100, stopped_ms: 10 };

fn page(n: u32) -> PageBytes {
    let mut p = [0xa5; PAGE_SIZE];
    p[..4].copy_from_slice(&n.to_le_bytes());
    p
}
fn digest(n: u32) -> Digest {
    Hasher::new(Algorithm::Blake3, &[1; 32], "t").page(&page(n))
}
fn id(n: u32) -> PageId {
    PageId { bucket: 7, index: n }
}
fn at(page: u32) -> PageAddr {
    PageAddr { block: BlockIx(0), page }
}
fn ms(n: u64) -> Nanos {
    Nanos(0).plus_ms(n)
}
fn remote(p: u32, content: u32) -> Record {
    Record::Remote { addr: at(p), id: id(content), digest: digest(content) }
}
fn reference(p: u32, content: u32) -> Record {
    Record::Ref { addr: at(p), id: id(content) }
}
fn need(p: u32, content: u32) -> NeedEntry {
    NeedEntry { addr: at(p), want: Want::Digest(digest(content)) }
}

/// What came out, in order.
#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Out {
    Uniform(PageAddr, u32, u8),
    Body(PageAddr, usize),
    Stored(PageAddr, u32),
}
#[derive(Default)]
struct Log(Vec<Out>);
impl Output for Log {
    type Error = TargetError;
    fn uniform(&mut self, addr: PageAddr, count: u32, fill: u8) -> Result<(), TargetError> {
        self.0.push(Out::Uniform(addr, count, fill));
        Ok(())
    }
    fn body(&mut self, addr: PageAddr, content: usize) -> Result<(), TargetError> {
        self.0.push(Out::Body(addr, content));
        Ok(())
    }
    fn stored(&mut self, addr: PageAddr, bytes: &PageBytes) -> Result<(), TargetError> {
        let n = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        assert_eq!(*bytes, page(n));
        self.0.push(Out::Stored(addr, n));
        Ok(())
    }
}

/// One host, two VMs of the same source host, and what they wrote.
struct World {
    host: TargetHost,
    vms: [TargetVm; 2],
    out: [Log; 2],
    wakes: Vec<Wake>,
    body: usize,
}
impl World {
    fn new(budget: usize) -> Self {
        Self {
            host: TargetHost::new(budget, 64),
            vms: [TargetVm::new(VM, SRC, 64), TargetVm::new(OTHER, SRC, 64)],
            out: Default::default(),
            wakes: Vec::new(),
            body: 0,
        }
    }
    fn record(&mut self, vm: usize, r: Record, now: Nanos) -> Result<(), TargetError> {
        let shared = match r {
            Record::Shared { id, .. } => Some(page(id.index)),
            _ => None,
        };
        let (v, out) = (&mut self.vms[vm], &mut self.out[vm]);
        v.record(&mut self.host, r, &mut self.body, shared.as_ref(), now, out, &mut self.wakes)
    }
    fn run_wakes(&mut self, now: Nanos) {
        while let Some(w) = self.wakes.pop() {
            let vm = usize::from(w.vm == OTHER);
            self.vms[vm].woken(&mut self.host, w.key, now, &mut self.out[vm]).expect("bounded");
        }
    }
    fn content(&mut self, n: u32) -> Vec<HostIx> {
        self.host.content(true, digest(n), &page(n), &mut self.wakes)
    }
    fn due(&mut self, vm: usize, now: Nanos) -> Vec<NeedEntry> {
        self.vms[vm].due(now, SOON)
    }
}

#[test]
fn gone_for_an_older_want_leaves_the_newer_wait_alone() {
    let mut w = World::new(8);
    w.record(0, remote(5, 1), ms(0)).unwrap();
    assert_eq!(w.due(0, ms(100)), vec![need(5, 1)]);
    // The newer version overtakes the answer, which then is about the older one.
    w.record(0, remote(5, 2), ms(101)).unwrap();
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(None));
    assert_eq!(w.vms[0].ram_end(ms(102)), Ok(()));
    assert_eq!(w.vms[0].gone(&mut w.host, need(5, 1)), Ok(None), "after RAM end too");
    w.content(2);
    w.run_wakes(ms(103));
    assert_eq!(w.out[0].0, vec![Out::Stored(at(5), 2)]);
    assert!(w.vms[0].complete());
}
