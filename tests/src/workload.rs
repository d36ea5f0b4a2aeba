//! What the guests of our own VMM do, and what each of their pages must hold after so many steps of it. The rest of their
//! memory is a real guest's.

use crate::drivers::Drivers;
use crate::payload::{COUNTER, Payload};
use crate::steps::Steps;
use anyhow::{Context as _, Result, ensure};
use std::fs::File;
use std::os::unix::fs::FileExt as _;

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;
/// Pages below 1 MiB are the workload's: its image, its count.
pub const LOW: u32 = 256;
/// The first four bytes of a page that [`Payload`] will write to and has not.
const UNWRITTEN: u32 = u32::MAX;

/// A guest's work.
#[derive(Clone, Debug)]
pub enum Workload {
    /// One processor writes into the first bytes of page after page.
    Rounds(Payload),
    /// Each processor writes pages of its own, and checks what it wrote there a round ago.
    Steps(Steps),
    /// As rounds, and drives devices in between.
    Driven(Payload, Drivers),
}

impl Workload {
    /// The 64 KiB image for `irlm vmm --payload`.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        match self {
            Self::Rounds(p) => p.image(),
            Self::Steps(s) => s.image(),
            Self::Driven(p, d) => p.image_with(&d.begin(), &d.turn()),
        }
    }

    /// Whether the page is the workload's alone, nothing of the real guest's in it.
    #[must_use]
    pub fn whole(&self, page: u32) -> bool {
        match self {
            Self::Rounds(_) | Self::Driven(..) => false,
            Self::Steps(s) => u64::from(page) >= u64::from(s.first) && u64::from(page) << 12 < s.memory(),
        }
    }

    /// The first page behind all that it writes.
    #[must_use]
    pub fn end(&self) -> u32 {
        match self {
            Self::Rounds(p) | Self::Driven(p, _) => p.cold.end.max(p.hot.end),
            Self::Steps(s) => (s.memory() >> 12) as u32,
        }
    }

    /// Writes what its pages hold before its first step.
    pub fn begin(&self, memory: &File) -> Result<()> {
        if let Self::Rounds(p) | Self::Driven(p, _) = self {
            for page in p.cold.clone().chain(p.hot.clone()) {
                memory.write_all_at(&UNWRITTEN.to_le_bytes(), u64::from(page) * PAGE as u64)?;
            }
        }
        Ok(())
    }

    /// Looks whether memory is what the work, having come to some step, must have made of the image; gives the step (of
    /// several processors the sum of theirs).
    pub fn model(&self, image: &File, memory: &[u8]) -> Result<u64> {
        let steps = match self {
            Self::Rounds(p) | Self::Driven(p, _) => rounds(p, memory)?,
            Self::Steps(s) => steps(s, memory)?,
        };
        let (zeros, perhaps) = match self {
            Self::Driven(_, d) => d.zeros(memory)?,
            _ => (0..0, None),
        };
        // The rest is as the real guest had it.
        let own = |page: u32| match self {
            Self::Rounds(p) | Self::Driven(p, _) if p.cold.contains(&page) || p.hot.contains(&page) => 4,
            _ if self.whole(page) => PAGE,
            _ => 0,
        };
        let mut want = vec![0; CHUNK];
        for (n, is) in memory.chunks(CHUNK).enumerate() {
            let want = &mut want[..is.len()];
            image.read_exact_at(want, (n * CHUNK) as u64)?;
            for (page, (is, want)) in (n * CHUNK / PAGE..).zip(is.chunks(PAGE).zip(want.chunks(PAGE))) {
                let page = u32::try_from(page)?;
                let empty = is.iter().all(|b| *b == 0);
                if zeros.contains(&page) || perhaps == Some(page) && empty {
                    ensure!(empty, "page {page:#x} was given away and is not zeros");
                    continue;
                }
                let skip = own(page);
                ensure!(page < LOW || is[skip..] == want[skip..], "page {page:#x} is not the guest's");
            }
        }
        Ok(steps)
    }
}

fn steps(s: &Steps, memory: &[u8]) -> Result<u64> {
    let mut sum = 0;
    for vcpu in 0..s.vcpus {
        let read = |page: u32, into: &mut crate::steps::Page| -> Result<(), &str> {
            let at = page as usize * PAGE;
            *into = *memory[at..].first_chunk().ok_or("memory ends early")?;
            Ok(())
        };
        sum += u64::from(s.check(vcpu, read).map_err(anyhow::Error::msg)?.step);
    }
    Ok(sum)
}

/// Looks whether memory is what the payload, having come to some step, must have made of the image; gives the step.
fn rounds(p: &Payload, memory: &[u8]) -> Result<u64> {
    let word = |page: u32| -> Result<u32> {
        let at = page as usize * PAGE;
        let bytes = memory.get(at..at + 4).context("memory ends early")?;
        Ok(u32::from_le_bytes(bytes.try_into()?))
    };
    let each = if p.hot.is_empty() { 1u64 } else { 2 };
    let mut last = 0;
    for (set, first) in [(&p.cold, 0u64), (&p.hot, 1)] {
        if set.is_empty() {
            continue;
        }
        let n = u64::from(set.end - set.start);
        let words = set.clone().map(word).collect::<Result<Vec<u32>>>()?;
        // How many of this set's writes there were, by the newest of them.
        let newest = words.iter().filter(|w| **w != UNWRITTEN).max();
        let writes = newest.map_or(0, |w| (u64::from(*w) - first) / each + 1);
        for (i, w) in (0u64..).zip(&words) {
            let rounds = writes.saturating_sub(i).div_ceil(n);
            let want = match rounds {
                0 => UNWRITTEN,
                r => u32::try_from(((r - 1) * n + i) * each + first)?,
            };
            let page = u64::from(set.start) + i;
            ensure!(*w == want, "page {page:#x} holds step {w}, not {want}, after {writes} writes");
        }
        if first == 0 {
            last = writes;
        } else {
            ensure!(
                last.abs_diff(writes) <= 1,
                "{last} writes to the cold pages and {writes} to the hot ones"
            );
        }
    }
    let counted = u64::from(word((COUNTER >> 12) as u32)?);
    ensure!(counted <= last * each, "the guest counted {counted} writes of {}", last * each);
    Ok(last)
}
