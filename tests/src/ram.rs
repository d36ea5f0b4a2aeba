//! The proof that a migration moved the guest and nothing else: memory compared byte by byte while both sides are
//! paused; and the count of what could have been shared, to judge a result by.

use crate::qemu::Vm;
use anyhow::{Context as _, Result, bail};
use serde_json::json;
use std::collections::HashSet;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

const PAGE: usize = 4096;
const CHUNK: usize = 1 << 20;

/// What a comparison looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Compared {
    /// Bytes that were compared, all equal.
    pub bytes: u64,
}

/// Compares all guest memory of two paused QEMUs: main memory through the shared memory files, the firmware regions
/// below 1 MiB and 4 GiB through QEMU (`pmemsave` into `dir`).
pub fn compare(source: &mut Vm, target: &mut Vm, dir: &Path) -> Result<Compared> {
    for (side, vm) in [("source", &mut *source), ("target", &mut *target)] {
        let status = vm.qmp.status()?;
        if status == "running" {
            bail!("the {side} runs; memory can be compared only while both sides are paused");
        }
    }
    let (a, b) = (source.memory()?, target.memory()?);
    let (len, other) = (a.metadata()?.len(), b.metadata()?.len());
    if len != other {
        bail!("source has {len} bytes of memory, target {other}");
    }
    let (mut x, mut y) = (vec![0; CHUNK], vec![0; CHUNK]);
    let mut differ = Vec::new();
    for at in (0..len).step_by(CHUNK) {
        let n = CHUNK.min(usize::try_from(len - at)?);
        a.read_exact_at(&mut x[..n], at).context("read the source's memory")?;
        b.read_exact_at(&mut y[..n], at).context("read the target's memory")?;
        if x[..n] != y[..n] {
            let pages = x[..n].chunks(PAGE).zip(y[..n].chunks(PAGE)).zip(at / PAGE as u64..);
            differ.extend(pages.filter(|((p, q), _)| p != q).map(|((p, q), page)| describe(page, p, q)));
        }
    }
    if !differ.is_empty() {
        let some = differ[..differ.len().min(8)].join("; ");
        bail!("{} of {} pages differ: {some}", differ.len(), len / PAGE as u64);
    }
    let mut bytes = len;
    // What of the firmware the guest can reach: the legacy area and the top of the low 4 GiB.
    for (start, size) in [(0xc_0000u64, 0x4_0000u64), (0xfffc_0000, 0x4_0000)] {
        let of = |vm: &mut Vm, side: &str| -> Result<Vec<u8>> {
            let file = dir.join(format!("firmware.{side}"));
            vm.qmp.run("pmemsave", &json!({"val": start, "size": size, "filename": file}))?;
            std::fs::read(&file).context("read the firmware's copy")
        };
        if of(source, "source")? != of(target, "target")? {
            bail!("the firmware region at {start:#x} differs");
        }
        bytes += size;
    }
    Ok(Compared { bytes })
}

/// Where and how two versions of a page differ, short enough for an error.
fn describe(page: u64, source: &[u8], target: &[u8]) -> String {
    let at: Vec<usize> = (0..source.len().min(target.len())).filter(|&i| source[i] != target[i]).collect();
    let (first, n) = (at.first().copied().unwrap_or_default() & !7, at.len());
    let word = |p: &[u8]| p[first..].iter().take(8).map(|b| format!("{b:02x}")).collect::<String>();
    format!("page {page:#x}: {n} bytes, at {first:#x} source {} target {}", word(source), word(target))
}

/// What plain QEMU, sharing within a host and sharing among all hosts would at least have to send, in pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
pub struct Census {
    /// All pages.
    pub pages: u64,
    /// Pages that are not one byte repeated: what plain QEMU sends (OC).
    pub content: u64,
    /// Distinct contents of each host, summed (GM's bound).
    pub per_host: u64,
    /// Distinct contents of the whole rack (IRLM's bound).
    pub rack: u64,
}

/// Counts distinct pages; each inner slice is one host.
pub fn census(hosts: &[Vec<&Vm>]) -> Result<Census> {
    let mut c = Census::default();
    let mut rack = HashSet::new();
    let mut chunk = vec![0; CHUNK];
    for host in hosts {
        let mut here = HashSet::new();
        for vm in host {
            let memory = vm.memory()?;
            let len = memory.metadata()?.len();
            for at in (0..len).step_by(CHUNK) {
                let n = CHUNK.min(usize::try_from(len - at)?);
                memory.read_exact_at(&mut chunk[..n], at)?;
                for page in chunk[..n].chunks(PAGE) {
                    c.pages += 1;
                    if page.iter().any(|&b| b != page[0]) {
                        c.content += 1;
                        here.insert(*blake3::hash(page).as_bytes());
                    }
                }
            }
        }
        c.per_host += here.len() as u64;
        rack.extend(here);
    }
    c.rack = rack.len() as u64;
    Ok(c)
}
