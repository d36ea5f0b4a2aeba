//! What QEMU's human monitor and /proc/PID/maps say about memory, as values. The monitor's text is no stable
//! interface, so tables are read by their header words, and what is not understood is an error or left out, never
//! guessed.

/// Most RAM blocks one QEMU may show; a real one has a dozen, and a few hundred with many memory
/// devices.
pub const MAX_BLOCKS: usize = 4096;

/// A line of `info ramblock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Block {
    /// The block's name in the migration stream.
    pub(super) name: String,
    /// Used length, bytes.
    pub(super) bytes: u64,
    /// Address in QEMU, where the table has it.
    pub(super) hva: Option<u64>,
}

impl Block {
    /// Whether a memory region of that name is this block's: blocks of devices carry the device's path before it.
    pub(super) fn is_region(&self, region: &str) -> bool {
        self.name == region || self.name.rsplit_once('/').is_some_and(|(_, last)| last == region)
    }
}

/// A line of `info mtree -f` that shows RAM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Region {
    /// Guest physical address.
    pub(super) gpa: u64,
    /// Bytes.
    pub(super) bytes: u64,
    /// Where in the region that is, bytes.
    pub(super) offset: u64,
    /// The memory region's name.
    pub(super) name: String,
}

/// A mapping of the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Vma {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) offset: u64,
    pub(super) read: bool,
    pub(super) shared: bool,
    /// As stat() gives it.
    pub(super) device: u64,
    /// 0 for anonymous memory.
    pub(super) inode: u64,
}

fn hex(s: &str) -> Option<u64> {
    u64::from_str_radix(s.strip_prefix("0x").unwrap_or(s), 16).ok()
}

/// Reads `info ramblock` of QEMU 7.2 (`Block Name PSize Offset Used Total`) and later (`… HVA RO`).
pub(super) fn ramblocks(text: &str) -> Result<Vec<Block>, String> {
    let mut lines = text.lines().filter(|l| !l.trim().is_empty());
    let header = lines.next().ok_or("it is empty")?;
    let columns = header
        .trim()
        .strip_prefix("Block Name")
        .ok_or_else(|| format!("header {header:?} does not start with Block Name"))?;
    let columns: Vec<&str> = columns.split_whitespace().collect();
    // A name may be long or hold blanks: count from the right. PSize is two words ("4 KiB").
    let mut from_right = 0;
    let (mut used, mut hva, mut left) = (None, None, 0);
    for c in columns.iter().rev() {
        match *c {
            "Used" => used = Some(from_right),
            "HVA" => hva = Some(from_right),
            _ => {}
        }
        from_right += if *c == "PSize" { 2 } else { 1 };
        left = from_right;
    }
    let used = used.ok_or_else(|| format!("header {header:?} has no column Used"))?;
    let mut out = Vec::new();
    for l in lines {
        let bad = || format!("line {:?}", l.trim());
        let words: Vec<&str> = l.split_whitespace().collect();
        if words.len() <= left || out.len() >= MAX_BLOCKS {
            return Err(bad());
        }
        let at = |n: usize| words.get(words.len() - 1 - n).and_then(|w| hex(w));
        let bytes = at(used).ok_or_else(bad)?;
        let hva = match hva {
            Some(n) => at(n).filter(|v| *v != 0),
            None => None,
        };
        // The name as it stands, inner blanks and all: up to where the column words begin.
        let mut name = l.trim();
        for _ in 0..left {
            name = name.rsplit_once(char::is_whitespace).ok_or_else(bad)?.0.trim_end();
        }
        out.push(Block { name: name.to_owned(), bytes, hva });
    }
    Ok(out)
}

/// The RAM and ROM lines of the address space `memory` in `info mtree -f`; other lines are skipped.
pub(super) fn mtree(text: &str) -> Vec<Region> {
    let mut out = Vec::new();
    let mut in_memory = false;
    for l in text.lines() {
        let t = l.trim();
        if t.starts_with("FlatView") {
            in_memory = false;
        } else if t.starts_with("AS \"memory\"") {
            in_memory = true;
        } else if in_memory && let Some(r) = mtree_line(t) {
            out.push(r);
        }
    }
    out
}

/// `0000000000100000-0000000003ffffff (prio 0, ram): m0 @0000000000100000`
fn mtree_line(t: &str) -> Option<Region> {
    let (range, rest) = t.split_once(" (prio ")?;
    let (gpa, last) = range.split_once('-')?;
    let gpa = hex(gpa)?;
    let bytes = hex(last)?.checked_sub(gpa)?.checked_add(1)?;
    let (kind, name) = rest.split_once("): ")?;
    if !(kind.ends_with(" ram") || kind.ends_with(" rom")) {
        return None;
    }
    // With KVM a suffix " KVM" follows.
    let name = name.trim_end().strip_suffix(" KVM").unwrap_or(name).trim_end();
    let (name, offset) = match name.rsplit_once(" @") {
        Some((n, o)) => (n, hex(o)?),
        None => (name, 0),
    };
    Some(Region { gpa, bytes, offset, name: name.to_owned() })
}

/// `Host virtual address for 0x100000 (m0) is 0x7f81fc0ff000`; anything else is a refusal.
pub(super) fn gpa2hva(text: &str) -> Option<u64> {
    let (_, at) = text.trim().rsplit_once(" is 0x")?;
    hex(at).filter(|a| *a != 0)
}

/// Reads /proc/PID/maps.
pub(super) fn maps(text: &str) -> Vec<Vma> {
    text.lines()
        .filter_map(|l| {
            let mut w = l.split_whitespace();
            let (start, end) = w.next()?.split_once('-')?;
            let perms = w.next()?.as_bytes();
            let offset = hex(w.next()?)?;
            let (major, minor) = w.next()?.split_once(':')?;
            let inode = w.next()?.parse().ok()?;
            let device = |s| u32::try_from(hex(s)?).ok();
            Some(Vma {
                start: hex(start)?,
                end: hex(end)?,
                offset,
                read: perms.first() == Some(&b'r'),
                shared: perms.get(3) == Some(&b's'),
                device: rustix::fs::makedev(device(major)?, device(minor)?),
                inode,
            })
        })
        .collect()
}
