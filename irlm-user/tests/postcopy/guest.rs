//! Models: page contents, the target VMM's memory as the kernel shows it to the agent, and vCPUs.

use crate::rng::Rng;
use irlm_user::core::postcopy::Run;
use irlm_user::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use std::collections::{HashMap, VecDeque};

/// Content numbers below this are shared by many pages and come from other hosts, those from it on are a page's own.
pub(crate) const SHARED: u32 = 1000;

/// The bytes of content number `n`; 0 is a page of zeros, 1 one of another byte.
pub(crate) fn page(n: u32) -> PageBytes {
    if n < 2 {
        return [n as u8; PAGE_SIZE];
    }
    let mut p = [0; PAGE_SIZE];
    for (i, w) in p.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        *w = (n ^ (i as u32).wrapping_mul(0x9e37_79b9)).to_le_bytes();
    }
    p
}

/// The number of a page, down to the last byte.
pub(crate) fn content_of(bytes: &PageBytes) -> Option<u32> {
    let n = if bytes[0] == bytes[1] && bytes[1] == bytes[2] && bytes[2] == bytes[3] {
        u32::from(bytes[0])
    } else {
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    };
    (page(n) == *bytes).then_some(n)
}

/// Where a VM's copy stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Run_ {
    Incoming,
    Paused,
    Running,
    Dead,
}

/// What a read of the userfaultfd gives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum KernelEvent {
    Fault(PageAddr),
    Removed(Run),
}

/// What the kernel says to placing a page.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Placing {
    Done,
    Present,
    Changing,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Vcpu {
    Runs,
    /// Waits for a page.
    Faults(PageAddr),
    /// Waits until its giving away has been read.
    Removes(Run),
}

/// The target VM: memory, vCPUs, userfaultfd.
pub(crate) struct TargetVm {
    pub(crate) run: Run_,
    pub(crate) ran: bool,
    pub(crate) caught: bool,
    pub(crate) memory: HashMap<PageAddr, u32>,
    /// What the guest must find.
    pub(crate) model: HashMap<PageAddr, u32>,
    pub(crate) vcpus: Vec<Vcpu>,
    pub(crate) touched: Vec<u64>,
    pub(crate) events: VecDeque<KernelEvent>,
    fresh: u32,
}

impl TargetVm {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            run: Run_::Incoming,
            ran: false,
            caught: false,
            memory: HashMap::new(),
            model: HashMap::new(),
            vcpus: vec![Vcpu::Runs; vcpus],
            touched: vec![0; vcpus],
            events: VecDeque::new(),
            fresh: 1 << 20,
        }
    }

    /// One step of a vCPU; whether it gave pages away.
    pub(crate) fn step(&mut self, n: usize, sizes: [u32; 2], rng: &mut Rng) -> bool {
        if self.run != Run_::Running || self.vcpus[n] != Vcpu::Runs {
            return false;
        }
        let block = rng.below(2) as u16;
        let addr = PageAddr {
            block: irlm_user::core::units::BlockIx(block),
            page: rng.below(sizes[usize::from(block)].into()) as u32,
        };
        if self.caught && rng.one_in(30) {
            let run =
                Run { addr, count: (rng.range(1, 6) as u32).min(sizes[usize::from(block)] - addr.page) };
            self.vcpus[n] = Vcpu::Removes(run);
            self.events.push_back(KernelEvent::Removed(run));
            return true;
        }
        let there = self.memory.get(&addr).copied();
        if there.is_none() && self.caught {
            self.vcpus[n] = Vcpu::Faults(addr);
            self.events.push_back(KernelEvent::Fault(addr));
            return false;
        }
        let found = there.unwrap_or(0);
        let expected = self.model.get(&addr).copied().unwrap_or(0);
        assert_eq!(found, expected, "rule 2: vCPU {n} finds another content in {addr:?}");
        self.touched[n] += 1;
        if rng.one_in(3) {
            self.fresh += 1;
            self.memory.insert(addr, self.fresh);
            self.model.insert(addr, self.fresh);
        }
        false
    }

    /// The agent reads one event; a giving away takes its course then.
    pub(crate) fn read(&mut self) -> Option<KernelEvent> {
        let e = self.events.pop_front()?;
        if let KernelEvent::Removed(run) = e {
            for addr in run.pages() {
                self.memory.remove(&addr);
                self.model.remove(&addr);
            }
            for v in &mut self.vcpus {
                if *v == Vcpu::Removes(run) {
                    *v = Vcpu::Runs;
                }
            }
        }
        Some(e)
    }

    pub(crate) fn place(&mut self, addr: PageAddr, content: u32) -> Placing {
        if self.events.iter().any(|e| matches!(e, KernelEvent::Removed(_))) {
            return Placing::Changing;
        }
        if self.memory.contains_key(&addr) {
            return Placing::Present;
        }
        self.memory.insert(addr, content);
        self.wake(addr);
        Placing::Done
    }

    pub(crate) fn wake(&mut self, addr: PageAddr) {
        for v in &mut self.vcpus {
            if *v == Vcpu::Faults(addr) {
                *v = Vcpu::Runs;
            }
        }
    }

    /// Nobody reads any more: who waits goes on, and what is not there is zeros.
    pub(crate) fn release(&mut self) {
        self.caught = false;
        while self.read().is_some() {}
        self.vcpus.fill(Vcpu::Runs);
    }

    /// A new reader: who waits faults again.
    pub(crate) fn wake_all(&mut self) {
        self.events.retain(|e| matches!(e, KernelEvent::Removed(_)));
        for v in &mut self.vcpus {
            if let Vcpu::Faults(addr) = *v {
                if self.memory.contains_key(&addr) {
                    *v = Vcpu::Runs;
                } else {
                    self.events.push_back(KernelEvent::Fault(addr));
                }
            }
        }
    }
}
