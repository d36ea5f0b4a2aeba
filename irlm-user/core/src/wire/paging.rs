//! What post-copy adds to the wire: sets of pages (`Switch`, `Lacks`), pages wanted now (`Demand`), contents wanted
//! now (`Hurry`, `NotHere`).
//!
//! A set travels as spans of at most 8192 pages of one block, each in the shorter of two forms, so that a set of any
//! shape costs about a bit a page at worst: it crosses the link while the VM is stopped.
//!
//! ```text
//! meta:  u8 last (0, 1), varint n, n × span
//! span:  u16 block, u32 first page, varint pages, u8 form
//!        form 0 runs     varint n, n × (varint gap since the last run's end, varint count)
//!        form 1 bitmap   ⌈pages / 8⌉ bytes, page 0 in bit 0 of byte 0
//! ```

use super::frame::{Kind, MetaReader, WireError, put_varint};
use super::limits::{MAX_DEMAND, MAX_HURRY, MAX_META, MAX_SPANS, SPAN_PAGES};
use super::messages::{put_addr, read_addr};
use crate::digest::{DIGEST_LEN, Digest};
use crate::page_set::{PageSet, Run};
use crate::units::{BlockIx, PageAddr};

const RUNS: u8 = 0;
const BITMAP: u8 = 1;
/// Longest head of a span: block, first page, pages, form.
const SPAN_HEAD: usize = 2 + 4 + 5 + 1;
/// Bytes before the first span.
const SET_HEAD: usize = 1 + 5;

/// The meta parts of the frames that carry `set`, in order; at least one, and the last says so.
#[must_use]
pub fn encode_set(set: &PageSet) -> Vec<Vec<u8>> {
    let (mut frames, mut spans, mut n) = (Vec::new(), Vec::new(), 0u32);
    let (mut runs, mut bits) = (Vec::new(), Vec::new());
    let finish = |spans: &mut Vec<u8>, n: &mut u32, last: bool| {
        let mut m = vec![u8::from(last)];
        put_varint(&mut m, *n);
        m.append(spans);
        *n = 0;
        m
    };
    for (block, &size) in (0u16..).zip(set.pages()) {
        for first in (0..size).step_by(SPAN_PAGES as usize) {
            let pages = SPAN_PAGES.min(size - first);
            if !span(
                set,
                Run { addr: PageAddr { block: BlockIx(block), page: first }, count: pages },
                &mut runs,
                &mut bits,
            ) {
                continue;
            }
            let (form, data) = if runs.len() <= bits.len() { (RUNS, &runs) } else { (BITMAP, &bits) };
            if n as usize >= MAX_SPANS || SET_HEAD + spans.len() + SPAN_HEAD + data.len() > MAX_META {
                frames.push(finish(&mut spans, &mut n, false));
            }
            spans.extend_from_slice(&block.to_le_bytes());
            spans.extend_from_slice(&first.to_le_bytes());
            put_varint(&mut spans, pages);
            spans.push(form);
            spans.extend_from_slice(data);
            n += 1;
        }
    }
    frames.push(finish(&mut spans, &mut n, true));
    frames
}

/// Both forms of one span; whether it holds any page.
fn span(set: &PageSet, all: Run, runs: &mut Vec<u8>, bits: &mut Vec<u8>) -> bool {
    runs.clear();
    bits.clear();
    bits.resize((all.count as usize).div_ceil(8), 0);
    let (first, end) = (all.addr.page, all.addr.page + all.count);
    let (mut at, mut n, mut list) = (first, 0u32, Vec::new());
    while let Some(next) = set.next(PageAddr { page: at, ..all.addr }) {
        if next.block != all.addr.block || next.page >= end {
            break;
        }
        let run = set.run_at(next, end - next.page);
        put_varint(&mut list, next.page - at);
        put_varint(&mut list, run.count);
        for page in run.pages() {
            let bit = (page.page - first) as usize;
            bits[bit / 8] |= 1 << (bit % 8);
        }
        at = next.page + run.count;
        n += 1;
    }
    put_varint(runs, n);
    runs.append(&mut list);
    n > 0
}

/// Takes one frame of a set into `set`; whether it was the last. A page that the VM does not have is an error.
pub fn decode_set(kind: Kind, meta: &[u8], set: &mut PageSet) -> Result<bool, WireError> {
    let mut r = MetaReader::new(kind, meta);
    let last = match r.u8()? {
        0 => false,
        1 => true,
        _ => return Err(r.bad("last flag")),
    };
    let n = r.count("spans", MAX_SPANS)?;
    for _ in 0..n {
        let addr = PageAddr { block: BlockIx(r.u16()?), page: r.u32()? };
        let pages = r.count("pages of a span", SPAN_PAGES as usize)? as u32;
        if pages == 0 || !set.covers_run(Run { addr, count: pages }) {
            return Err(r.bad("span"));
        }
        match r.u8()? {
            RUNS => decode_runs(&mut r, addr, pages, set)?,
            BITMAP => decode_bitmap(&mut r, addr, pages, set)?,
            _ => return Err(r.bad("form of a span")),
        }
    }
    r.end()?;
    Ok(last)
}

fn decode_runs(
    r: &mut MetaReader<'_>,
    addr: PageAddr,
    pages: u32,
    set: &mut PageSet,
) -> Result<(), WireError> {
    let n = r.count("runs", SPAN_PAGES as usize)?;
    let mut at = 0u32;
    for _ in 0..n {
        let (gap, count) = (r.varint()?, r.varint()?);
        let end = at.checked_add(gap).and_then(|s| s.checked_add(count)).filter(|e| *e <= pages);
        let end = end.filter(|_| count > 0).ok_or_else(|| r.bad("run"))?;
        set.insert_run(Run { addr: PageAddr { page: addr.page + end - count, ..addr }, count });
        at = end;
    }
    Ok(())
}

fn decode_bitmap(
    r: &mut MetaReader<'_>,
    addr: PageAddr,
    pages: u32,
    set: &mut PageSet,
) -> Result<(), WireError> {
    let bytes = r.bytes((pages as usize).div_ceil(8))?;
    for (i, byte) in (0u32..).zip(bytes) {
        for bit in (0..8).filter(|b| byte & (1 << b) != 0) {
            let page = i * 8 + bit;
            if page >= pages {
                return Err(r.bad("bits past the end of a span"));
            }
            set.insert(PageAddr { page: addr.page + page, ..addr });
        }
    }
    Ok(())
}

/// Pages that the target wants next.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Demand {
    /// A vCPU waits for the first so many.
    pub urgent: usize,
    /// The pages, in the order of their urgency.
    pub pages: Vec<PageAddr>,
}

impl Demand {
    /// Its meta part.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut m = Vec::with_capacity(8 + 6 * self.pages.len());
        put_varint(&mut m, self.urgent as u32);
        put_varint(&mut m, self.pages.len() as u32);
        self.pages.iter().for_each(|a| put_addr(&mut m, *a));
        m
    }
    /// Reads a meta part.
    pub fn decode(meta: &[u8]) -> Result<Self, WireError> {
        let mut r = MetaReader::new(Kind::Demand, meta);
        let urgent = r.count("urgent pages", MAX_DEMAND)?;
        let n = r.count("pages", MAX_DEMAND)?;
        if urgent > n {
            return Err(r.bad("number of urgent pages"));
        }
        let pages = (0..n).map(|_| read_addr(&mut r)).collect::<Result<_, _>>()?;
        r.end()?;
        Ok(Self { urgent, pages })
    }
}

/// Meta part of a `Hurry` or `NotHere` frame.
#[must_use]
pub fn encode_digests(digests: &[Digest]) -> Vec<u8> {
    let mut m = Vec::with_capacity(5 + DIGEST_LEN * digests.len());
    put_varint(&mut m, digests.len() as u32);
    digests.iter().for_each(|d| m.extend_from_slice(&d.0));
    m
}

/// Reads a `Hurry` or `NotHere` frame.
pub fn decode_digests(kind: Kind, meta: &[u8]) -> Result<Vec<Digest>, WireError> {
    let mut r = MetaReader::new(kind, meta);
    let n = r.count("digests", MAX_HURRY)?;
    let list = (0..n).map(|_| r.array::<DIGEST_LEN>().map(Digest)).collect::<Result<_, _>>()?;
    r.end()?;
    Ok(list)
}

#[cfg(test)]
mod tests;
