//! The two QEMUs of a VM as far as migration sees them: RAM as numbers that stand for contents, precopy with a dirty
//! bitmap and rounds, and who runs when (the facts about stock QEMU that the handover leans on).

use crate::rng::Rng;
use irlm_user::core::digest::uniform;
use irlm_user::core::units::{BlockIx, PAGE_SIZE, PageAddr, PageBytes};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// Numbers below this are pages of that byte throughout.
const UNIFORM: u32 = 4;
/// First number of the contents that many VMs share.
pub(crate) const POOL: u32 = 16;
/// First number of the contents that are written once.
pub(crate) const FRESH: u32 = 10_000;

/// Contents whose numbers differ by less than this, from a multiple of it on, are alike but for an eighth.
const FAMILY: u32 = 8;

/// The page that a number stands for.
pub(crate) fn page(content: u32) -> PageBytes {
    if content < UNIFORM {
        return [content as u8; PAGE_SIZE];
    }
    let mut p = [0; PAGE_SIZE];
    for (i, w) in p.chunks_exact_mut(4).enumerate() {
        let seed = if i < PAGE_SIZE / 4 / 8 { content } else { content / FAMILY };
        w.copy_from_slice(&(seed ^ (i as u32).wrapping_mul(0x9e37_79b9)).to_le_bytes());
    }
    p
}

/// The number of a page, if it is one that [`page`] makes, down to the last byte.
pub(crate) fn content_of(bytes: &PageBytes) -> Option<u32> {
    let n = match uniform(bytes) {
        Some(fill) => u32::from(fill),
        None => u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
    };
    (*bytes == page(n)).then_some(n)
}

/// Block 0 is RAM that can be read from outside; block 1 is a small one that cannot.
pub(crate) const BLOCK_NAMES: [&str; 2] = ["pc.ram", "pc.rom"];

pub(crate) fn at(block: usize, page: usize) -> PageAddr {
    PageAddr { block: BlockIx(block as u16), page: page as u32 }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SourceRun {
    /// The guest runs; no migration.
    Running,
    /// The guest runs and is being migrated.
    Active,
    /// Stopped; the last round goes out.
    Final,
    /// Stopped; everything is in the pipe, waits for SHUT.
    Sent,
    /// SHUT came: stays paused.
    Completed,
    /// Gone: killed, or told to quit when the target runs.
    Dead,
}

/// What QEMU writes into its migration stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Item {
    /// A page with the content it had when QEMU copied it.
    Page(PageAddr, u32),
    Stopped,
    RamEnd,
    Tail,
}

pub(crate) struct SourceQemu {
    pub(crate) ram: [Vec<u32>; 2],
    pub(crate) run: SourceRun,
    /// Raised whenever what is under way no longer counts.
    pub(crate) gen_: u32,
    dirty: BTreeSet<PageAddr>,
    round: VecDeque<PageAddr>,
    rounds: u32,
    max_rounds: u32,
    pub(crate) pipe: VecDeque<Item>,
    /// The guest has run on here after it had been stopped for the last round.
    pub(crate) left_behind: bool,
    /// RAM as it was when the guest stopped for the last round.
    pub(crate) stopped: [Vec<u32>; 2],
    pub(crate) shut: bool,
}

/// Pages the socket between QEMU and the tap holds.
const PIPE: usize = 24;

impl SourceQemu {
    pub(crate) fn new(ram: [Vec<u32>; 2], max_rounds: u32) -> Self {
        Self {
            ram,
            run: SourceRun::Running,
            gen_: 0,
            dirty: BTreeSet::new(),
            round: VecDeque::new(),
            rounds: 0,
            max_rounds,
            pipe: VecDeque::new(),
            left_behind: false,
            stopped: [Vec::new(), Vec::new()],
            shut: false,
        }
    }
    pub(crate) fn runs(&self) -> bool {
        matches!(self.run, SourceRun::Running | SourceRun::Active)
    }
    /// It will not run the guest again by itself.
    pub(crate) fn gave(&self) -> bool {
        matches!(self.run, SourceRun::Completed | SourceRun::Dead)
    }
    pub(crate) fn migrating(&self) -> bool {
        matches!(self.run, SourceRun::Active | SourceRun::Final | SourceRun::Sent)
    }
    pub(crate) fn read(&self, a: PageAddr) -> Option<u32> {
        if self.run == SourceRun::Dead {
            return None;
        }
        self.ram.get(usize::from(a.block.0))?.get(a.page as usize).copied()
    }
    pub(crate) fn write(&mut self, page: usize, content: u32) {
        self.ram[0][page] = content;
        if self.run == SourceRun::Active {
            self.dirty.insert(at(0, page));
        }
    }
    pub(crate) fn migrate(&mut self) {
        self.run = SourceRun::Active;
        self.gen_ += 1;
        self.dirty.clear();
        self.round = (0..2).flat_map(|b| (0..self.ram[b].len()).map(move |p| at(b, p))).collect();
    }
    /// QEMU goes on for a moment.
    pub(crate) fn produce(&mut self, rng: &mut Rng) {
        if !matches!(self.run, SourceRun::Active | SourceRun::Final) {
            return;
        }
        for _ in 0..rng.range(1, 12) {
            if self.pipe.len() >= PIPE {
                return;
            }
            let Some(a) = self.round.pop_front() else { break };
            let content = self.ram[usize::from(a.block.0)][a.page as usize];
            self.pipe.push_back(Item::Page(a, content));
        }
        if !self.round.is_empty() {
            return;
        }
        if self.run == SourceRun::Final {
            self.pipe.extend([Item::RamEnd, Item::Tail]);
            self.run = SourceRun::Sent;
            return;
        }
        self.rounds += 1;
        if self.dirty.len() <= 4 || self.rounds >= self.max_rounds {
            self.run = SourceRun::Final;
            self.stopped = self.ram.clone();
            self.pipe.push_back(Item::Stopped);
        }
        self.round = std::mem::take(&mut self.dirty).into_iter().collect();
    }
    /// The migration is over for QEMU and the guest runs here, whatever was under way.
    pub(crate) fn resume(&mut self) {
        if self.run != SourceRun::Dead {
            self.left_behind |= !self.runs();
            self.run = SourceRun::Running;
        }
        self.gen_ += 1;
        self.pipe.clear();
        self.shut = false;
    }
    pub(crate) fn die(&mut self) {
        self.run = SourceRun::Dead;
        self.gen_ += 1;
        self.pipe.clear();
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum TargetRun {
    /// Waits for, or takes, the stream.
    Incoming,
    /// Has everything; paused.
    Loaded,
    Running,
    Dead,
}

pub(crate) struct TargetQemu {
    pub(crate) run: TargetRun,
    /// The guest has run here: no older copy may run any more.
    pub(crate) ran: bool,
    pub(crate) ram: [Vec<Option<u32>>; 2],
    /// Records that reached the target agent, by page, and the last one written to QEMU.
    received: HashMap<PageAddr, usize>,
    written: HashMap<PageAddr, usize>,
}

impl TargetQemu {
    pub(crate) fn new(pages: [usize; 2]) -> Self {
        Self {
            run: TargetRun::Incoming,
            ran: false,
            ram: pages.map(|n| vec![None; n]),
            received: HashMap::new(),
            written: HashMap::new(),
        }
    }
    /// A page is harmed on its way: it is not what its record says.
    pub(crate) fn harm(&mut self, a: PageAddr, content: Option<u32>) {
        let version = self.received.get(&a).copied().unwrap_or(0);
        self.written.insert(a, version);
        self.ram[usize::from(a.block.0)][a.page as usize] = content;
    }
    /// What the record before the newest said of this page.
    pub(crate) fn older(&self, a: PageAddr, sent: &HashMap<PageAddr, Vec<u32>>) -> Option<u32> {
        let version = self.received.get(&a).copied()?.checked_sub(2)?;
        sent[&a].get(version).copied()
    }
    /// A record for this page has come.
    pub(crate) fn expect(&mut self, a: PageAddr) {
        *self.received.entry(a).or_default() += 1;
    }
    /// A page reaches QEMU. Rule 2: it is the newest version that has come, and no version comes twice.
    pub(crate) fn write(&mut self, a: PageAddr, content: Option<u32>, sent: &HashMap<PageAddr, Vec<u32>>) {
        let version = self.received.get(&a).copied().unwrap_or(0);
        assert!(version > 0, "{a:?} written before any record for it");
        assert_eq!(content, Some(sent[&a][version - 1]), "{a:?} is not the content of its newest record");
        let before = self.written.insert(a, version);
        assert!(before < Some(version), "{a:?} version {version} written after {before:?}");
        self.ram[usize::from(a.block.0)][a.page as usize] = content;
    }
}
