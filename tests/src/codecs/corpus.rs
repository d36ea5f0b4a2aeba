//! The contents of saved guests, and the order in which IRLM would send them: each distinct content once, from the
//! carrier's push connection if several hosts hold it, else in the stream of the VM where it is met first.

use anyhow::{Context as _, Result};
use irlm_user::core::digest::uniform;
use irlm_user::core::qemu::{Event, MAX_LOOKAHEAD, Parser, StreamError};
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

/// Contents in one frame.
pub(super) const FRAME: usize = 64;

/// A frame's place: its source host and the connection it travels on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Lane {
    /// Number of the source host; its VMs go to the target host of the same number.
    pub(super) host: usize,
    /// Number of the connection, over all hosts.
    pub(super) conn: usize,
    /// Whether it is a push connection.
    pub(super) push: bool,
}

/// Contents that leave together.
#[derive(Debug)]
pub(super) struct Frame {
    pub(super) lane: Lane,
    pub(super) contents: Vec<u32>,
}

/// Distinct contents, who holds them, and how they leave.
#[derive(Debug)]
pub struct Corpus {
    bytes: Vec<u8>,
    /// By content: bit `h` is set if source host `h` holds it.
    pub(super) held: Vec<u32>,
    pub(super) frames: Vec<Frame>,
    /// Connections in all.
    pub(super) conns: usize,
    pub(super) hosts: usize,
    /// Pages with content of all guests: what plain QEMU sends.
    pub oc_pages: u64,
}

impl Corpus {
    /// Reads the saved guests in `hosts`, one list a source host. Carriers are chosen for `run` contents at a time that
    /// follow each other in a guest and have the same holders.
    pub fn load(hosts: &[Vec<PathBuf>], run: usize) -> Result<Self> {
        anyhow::ensure!(!hosts.is_empty() && hosts.len() <= 32, "1 to 32 hosts");
        let mut c = Self {
            bytes: Vec::new(),
            held: Vec::new(),
            frames: Vec::new(),
            conns: 0,
            hosts: hosts.len(),
            oc_pages: 0,
        };
        let mut known: HashMap<[u8; 32], u32> = HashMap::new();
        let mut vms: Vec<Vec<Vec<u32>>> = Vec::new();
        for (h, guests) in hosts.iter().enumerate() {
            let mut of_host = Vec::new();
            for file in guests {
                let mut pages = Vec::new();
                read(file, &mut |page| {
                    let ix = *known.entry(*blake3::hash(page).as_bytes()).or_insert_with(|| {
                        c.bytes.extend_from_slice(page);
                        c.held.push(0);
                        (c.held.len() - 1) as u32
                    });
                    c.held[ix as usize] |= 1 << h;
                    pages.push(ix);
                })
                .with_context(|| format!("read the saved guest {}", file.display()))?;
                c.oc_pages += pages.len() as u64;
                of_host.push(pages);
            }
            vms.push(of_host);
        }
        c.assign(&vms, run.max(1));
        Ok(c)
    }

    /// Pushes by the least loaded holder, in guest order; then the VMs of a host side by side.
    fn assign(&mut self, vms: &[Vec<Vec<u32>>], run: usize) {
        let shared = |held: u32| held.count_ones() > 1;
        let mut loads = vec![0u64; self.hosts];
        for held in self.held.iter().filter(|h| !shared(**h)) {
            loads[held.trailing_zeros() as usize] += 1;
        }
        let mut carrier = vec![usize::MAX; self.held.len()];
        // Contents are numbered as they are first met, so those of one set of holders are in a guest's order.
        let mut sets: BTreeMap<(u32, u32), Vec<usize>> = BTreeMap::new();
        for (i, held) in self.held.iter().enumerate().filter(|(_, h)| shared(**h)) {
            sets.entry((held.count_ones(), *held)).or_default().push(i);
        }
        for ((_, held), contents) in sets {
            for part in contents.chunks(run) {
                let holders = (0..self.hosts).filter(|h| held & (1 << h) != 0);
                if let Some(h) = holders.min_by_key(|h| loads[*h]) {
                    loads[h] += part.len() as u64;
                    part.iter().for_each(|i| carrier[*i] = h);
                }
            }
        }
        for (h, guests) in vms.iter().enumerate() {
            let lane = Lane { host: h, conn: self.conns, push: true };
            self.conns += 1;
            let mut sent = vec![false; self.held.len()];
            let mut push = Vec::new();
            let mut streams = Vec::new();
            for pages in guests {
                let mut own = Vec::new();
                for ix in pages {
                    if std::mem::replace(&mut sent[*ix as usize], true) {
                        continue;
                    }
                    if !shared(self.held[*ix as usize]) {
                        own.push(*ix);
                    } else if carrier[*ix as usize] == h {
                        push.push(*ix);
                    }
                }
                streams.push((Lane { host: h, conn: self.conns, push: false }, own));
                self.conns += 1;
            }
            self.frames.extend(push.chunks(FRAME).map(|p| Frame { lane, contents: p.to_vec() }));
            let most = streams.iter().map(|(_, p)| p.len().div_ceil(FRAME)).max().unwrap_or(0);
            for n in 0..most {
                for (lane, pages) in &streams {
                    if let Some(p) = pages.chunks(FRAME).nth(n) {
                        self.frames.push(Frame { lane: *lane, contents: p.to_vec() });
                    }
                }
            }
        }
    }

    /// Distinct contents.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Contents that are pushed.
    #[must_use]
    pub fn pushed(&self) -> usize {
        self.frames.iter().filter(|f| f.lane.push).map(|f| f.contents.len()).sum()
    }

    pub(super) fn page(&self, ix: u32) -> &PageBytes {
        let at = ix as usize * PAGE_SIZE;
        self.bytes[at..at + PAGE_SIZE].first_chunk().unwrap_or(&[0; PAGE_SIZE])
    }
}

/// Calls `sink` with every page of a saved guest that has content.
fn read(file: &Path, sink: &mut dyn FnMut(&PageBytes)) -> Result<()> {
    let mut from = File::open(file)?;
    let mut parser = Parser::new();
    let mut buf = vec![0; 4 * MAX_LOOKAHEAD.max(1 << 18)];
    let mut filled = 0;
    loop {
        let n = from.read(&mut buf[filled..])?;
        if n == 0 {
            parser.finish()?;
            return Ok(());
        }
        filled += n;
        let used = parser.parse::<StreamError>(&buf[..filled], &mut |event| {
            if let Event::Page { bytes, .. } = event
                && uniform(bytes).is_none()
            {
                sink(bytes);
            }
            Ok(())
        })?;
        buf.copy_within(used..filled, 0);
        filled -= used;
    }
}
