//! The records of a `Pages` frame: what each guest page of a batch is, in stream order. Page numbers are signed
//! distances from the page after the last one, so that a run of neighbours costs one byte a page.
//!
//! ```text
//! tag 1 Block    u16 block                    the block of all records up to the next Block
//! tag 2 Uniform  page, count, fill byte       a run of pages of one byte value
//! tag 3 Unique   page, count                  a run whose contents stand in the body
//! tag 4 Shared   page, id, digest             content in the body; goes to the store under digest, id names it
//! tag 5 Ref      page, id                     content this source host sent before
//! tag 6 Remote   page, id, digest             content another source host carries; binds id to digest
//! tag 7 Named    page, digest                 content in the body, with what it must hash to
//! tag 8 Keep     digest, slot                 that content, which others bring to this host, stands in the slot from now on
//!   +16 kept     slot                         of Unique, Shared: contents are kept, from this slot on
//!   +32 less     slot                         of Shared, Named: stands as its difference from what the slot holds
//! ```
//!
//! Keep records belong to no page and no block. They take effect before all other records of their frame, wherever they
//! stand; senders put them first.

use super::frame::{Kind, MetaReader, WireError, put_varint};
use super::limits::{MAX_FILLED, MAX_FRAME_PAGES, MAX_META, MAX_RECORDS, MAX_UNIFORM};
use crate::digest::Digest;
use crate::units::{BlockIx, PageAddr, PageId};

/// The longest encoded record, so that a builder knows when the meta part is full.
pub const MAX_RECORD_LEN: usize = 64;

/// How a record's contents stand in the body, and what becomes of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Form {
    /// As they are.
    #[default]
    Whole,
    /// As they are, and to be kept from this slot on for pages that refer to them.
    Kept(u32),
    /// As the difference from what this slot holds (`core::delta`).
    Less(u32),
}

/// Bits of a tag that stand for a [`Form`].
const KEPT: u8 = 0x10;
const LESS: u8 = 0x20;

/// One decoded record.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Record {
    /// `count` pages from `addr` on hold `fill` in every byte.
    Uniform {
        /// First page.
        addr: PageAddr,
        /// How many, at least 1.
        count: u32,
        /// The byte.
        fill: u8,
    },
    /// `count` pages from `addr` on, contents in the body.
    Unique {
        /// First page.
        addr: PageAddr,
        /// How many, at least 1.
        count: u32,
    },
    /// One page whose content (in the body) is shared.
    Shared {
        /// The page.
        addr: PageAddr,
        /// Its content's id.
        id: PageId,
        /// Its content's digest.
        digest: Digest,
    },
    /// One page whose content this source host sent before under `id`.
    Ref {
        /// The page.
        addr: PageAddr,
        /// Its content's id.
        id: PageId,
    },
    /// One page whose content is in the body, with what it must hash to.
    Named {
        /// The page.
        addr: PageAddr,
        /// Its content's digest.
        digest: Digest,
    },
    /// One page whose content another source host carries.
    Remote {
        /// The page.
        addr: PageAddr,
        /// Its content's id.
        id: PageId,
        /// Its content's digest.
        digest: Digest,
    },
    /// No page: a content that others bring to this host stands in a slot from now on, before all other records of its
    /// frame.
    Keep {
        /// The content's digest.
        digest: Digest,
        /// The slot.
        slot: u32,
    },
}

/// Builds the meta part of a `Pages` frame, merging runs. Reused from frame to frame: no allocation per page.
#[derive(Debug, Default)]
pub struct PagesBuilder {
    meta: Vec<u8>,
    block: Option<BlockIx>,
    next: u32,
    records: usize,
    contents: usize,
    zeros: u32,
    filled: u32,
    run: Option<Run>,
}

#[derive(Debug, Clone, Copy)]
struct Run {
    addr: PageAddr,
    count: u32,
    fill: Option<u8>,
    /// Where the first is kept.
    slot: Option<u32>,
}

impl PagesBuilder {
    /// Starts the next frame.
    pub fn clear(&mut self) {
        self.meta.clear();
        self.block = None;
        self.next = 0;
        self.records = 0;
        self.contents = 0;
        self.zeros = 0;
        self.filled = 0;
        self.run = None;
    }
    /// Whether nothing was put in yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.records == 0 && self.run.is_none()
    }
    /// Whether no further record may be put in.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.contents >= MAX_FRAME_PAGES
            || self.filled >= MAX_FILLED
            || self.zeros + self.filled >= MAX_UNIFORM
            // The pending run and the next record may each bring a change of block, and the latter a Keep.
            || self.records + 5 > MAX_RECORDS
            || self.meta.len() + 3 * MAX_RECORD_LEN >= MAX_META
    }
    /// Pages whose content must follow in the body.
    #[must_use]
    pub fn contents(&self) -> usize {
        self.contents
    }
    /// The finished meta part.
    pub fn meta(&mut self) -> &[u8] {
        self.flush_run();
        &self.meta
    }

    /// A page of `fill` bytes.
    pub fn uniform(&mut self, addr: PageAddr, fill: u8) {
        *(if fill == 0 { &mut self.zeros } else { &mut self.filled }) += 1;
        self.extend_run(addr, Some(fill), None);
    }
    /// A page with its content in the body, to be kept in `slot`.
    pub fn unique(&mut self, addr: PageAddr, slot: Option<u32>) {
        self.extend_run(addr, None, slot);
        self.contents += 1;
    }
    /// A page whose content in the body is shared.
    pub fn shared(&mut self, addr: PageAddr, id: PageId, digest: &Digest, form: Form) {
        self.single(4, addr, Some(id), Some(digest), form);
        self.contents += 1;
    }
    /// A page whose content in the body is to hash to `digest`: one that stands as a difference.
    pub fn named(&mut self, addr: PageAddr, digest: &Digest, slot: u32) {
        self.single(7, addr, None, Some(digest), Form::Less(slot));
        self.contents += 1;
    }
    /// A reference to content this host sent before.
    pub fn reference(&mut self, addr: PageAddr, id: PageId) {
        self.single(5, addr, Some(id), None, Form::Whole);
    }
    /// A reference to content another host carries.
    pub fn remote(&mut self, addr: PageAddr, id: PageId, digest: &Digest) {
        self.single(6, addr, Some(id), Some(digest), Form::Whole);
    }
    /// The content with this digest, which others bring to the receiver, stands in `slot` for this frame's records and
    /// those that follow.
    pub fn keep(&mut self, slot: u32, digest: &Digest) {
        self.flush_run();
        self.meta.push(8);
        self.meta.extend_from_slice(&digest.0);
        put_varint(&mut self.meta, slot);
        self.records += 1;
    }

    fn extend_run(&mut self, addr: PageAddr, fill: Option<u8>, slot: Option<u32>) {
        if let Some(run) = &mut self.run
            && run.fill == fill
            && run.slot.map(|s| s.checked_add(run.count)) == slot.map(Some)
            && run.addr.block == addr.block
            && run.addr.page.checked_add(run.count) == Some(addr.page)
        {
            run.count += 1;
            return;
        }
        self.flush_run();
        self.run = Some(Run { addr, count: 1, fill, slot });
    }

    fn flush_run(&mut self) {
        if let Some(Run { addr, count, fill, slot }) = self.run.take() {
            let kept = if slot.is_some() { KEPT } else { 0 };
            self.start(if fill.is_some() { 2 } else { 3 | kept }, addr);
            put_varint(&mut self.meta, count);
            self.meta.extend(fill);
            if let Some(slot) = slot {
                put_varint(&mut self.meta, slot);
            }
            self.next = addr.page.wrapping_add(count);
        }
    }

    fn single(&mut self, tag: u8, addr: PageAddr, id: Option<PageId>, digest: Option<&Digest>, form: Form) {
        self.flush_run();
        let flag = match form {
            Form::Whole => 0,
            Form::Kept(_) => KEPT,
            Form::Less(_) => LESS,
        };
        self.start(tag | flag, addr);
        if let Some(id) = id {
            put_id(&mut self.meta, id);
        }
        if let Some(d) = digest {
            self.meta.extend_from_slice(&d.0);
        }
        if let Form::Kept(slot) | Form::Less(slot) = form {
            put_varint(&mut self.meta, slot);
        }
        self.next = addr.page.wrapping_add(1);
    }

    fn start(&mut self, tag: u8, addr: PageAddr) {
        if self.block != Some(addr.block) {
            self.meta.push(1);
            self.meta.extend_from_slice(&addr.block.0.to_le_bytes());
            self.block = Some(addr.block);
            self.next = 0;
            self.records += 1;
        }
        self.meta.push(tag);
        // Zigzag of the 32-bit distance: wrapping on both sides, so every distance has one code.
        let d = addr.page.wrapping_sub(self.next).cast_signed();
        put_varint(&mut self.meta, ((d << 1) ^ (d >> 31)).cast_unsigned());
        self.records += 1;
    }
}

fn put_id(m: &mut Vec<u8>, id: PageId) {
    m.extend_from_slice(&id.bucket.to_le_bytes());
    put_varint(m, id.index);
}

/// A record, and where its contents stand in the body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Placed {
    /// The record.
    pub record: Record,
    /// How its contents stand there.
    pub form: Form,
    /// Number of its first content.
    pub first: usize,
    /// How many contents it has.
    pub contents: usize,
}

/// The records of one `Pages` frame, decoded once for all who act on them. It grows to one frame's records and no
/// further.
#[derive(Default, Debug)]
pub struct PageBatch {
    records: Vec<Placed>,
    contents: usize,
}

impl PageBatch {
    /// Decodes a frame's meta part, in the place of what was here. After an error there is nothing.
    pub fn read(&mut self, meta: &[u8]) -> Result<(), WireError> {
        self.records.clear();
        self.contents = 0;
        let mut records = Records::new(meta);
        let mut first = 0;
        while let Some(record) = records.next() {
            let record = record.inspect_err(|_| self.records.clear())?;
            let (form, upto) = (records.form(), records.contents());
            self.records.push(Placed { record, form, first, contents: upto - first });
            first = upto;
        }
        self.contents = first;
        Ok(())
    }
    /// The records, in the frame's order.
    #[must_use]
    pub fn records(&self) -> &[Placed] {
        &self.records
    }
    /// Contents that the body must have.
    #[must_use]
    pub fn contents(&self) -> usize {
        self.contents
    }
}

/// Iterates over the records of a `Pages` frame, checking each; stops after the first error.
#[derive(Debug)]
pub struct Records<'a> {
    r: MetaReader<'a>,
    block: Option<BlockIx>,
    next: u32,
    records: usize,
    contents: usize,
    zeros: u32,
    filled: u32,
    form: Form,
    done: bool,
}

impl<'a> Records<'a> {
    /// Records of a meta part.
    #[must_use]
    pub fn new(meta: &'a [u8]) -> Self {
        let r = MetaReader::new(Kind::Pages, meta);
        let form = Form::Whole;
        Self { r, block: None, next: 0, records: 0, contents: 0, zeros: 0, filled: 0, form, done: false }
    }
    /// Contents announced by the records read so far.
    #[must_use]
    pub fn contents(&self) -> usize {
        self.contents
    }
    /// How the contents of the record read last stand in the body.
    #[must_use]
    pub fn form(&self) -> Form {
        self.form
    }

    fn read(&mut self) -> Result<Record, WireError> {
        loop {
            self.records += 1;
            if self.records > MAX_RECORDS {
                return Err(self.r.bad("number of records"));
            }
            let byte = self.r.u8()?;
            let (tag, flags) = (byte & 0xF, byte & 0xF0);
            match (flags, tag) {
                (0, 1..=6 | 8) | (KEPT, 3 | 4) | (LESS, 4 | 7) => {}
                _ => return Err(self.r.bad("record tag")),
            }
            if tag == 1 {
                self.block = Some(BlockIx(self.r.u16()?));
                self.next = 0;
                continue;
            }
            if tag == 8 {
                self.form = Form::Whole;
                return Ok(Record::Keep { digest: Digest(self.r.array()?), slot: self.r.varint()? });
            }
            let block = self.block.ok_or_else(|| self.r.bad("record before any block"))?;
            let z = self.r.varint()?;
            let d = (z >> 1) ^ (z & 1).wrapping_neg();
            let page = self.next.wrapping_add(d);
            let addr = PageAddr { block, page };
            let mut count = 1;
            let rec = match tag {
                2 | 3 => {
                    count = self.r.varint()?;
                    if count == 0 || count > MAX_UNIFORM || page.checked_add(count - 1).is_none() {
                        return Err(self.r.bad("run length"));
                    }
                    if tag == 2 {
                        let fill = self.r.u8()?;
                        *(if fill == 0 { &mut self.zeros } else { &mut self.filled }) += count;
                        if self.filled > MAX_FILLED || self.zeros + self.filled > MAX_UNIFORM {
                            return Err(self.r.bad("number of uniform pages"));
                        }
                        Record::Uniform { addr, count, fill }
                    } else {
                        self.add_contents(count as usize)?;
                        Record::Unique { addr, count }
                    }
                }
                4 => {
                    self.add_contents(1)?;
                    Record::Shared { addr, id: self.id()?, digest: Digest(self.r.array()?) }
                }
                5 => Record::Ref { addr, id: self.id()? },
                6 => Record::Remote { addr, id: self.id()?, digest: Digest(self.r.array()?) },
                _ => {
                    self.add_contents(1)?;
                    Record::Named { addr, digest: Digest(self.r.array()?) }
                }
            };
            self.form = self.form_of(flags, count)?;
            self.next = page.wrapping_add(count);
            return Ok(rec);
        }
    }

    fn form_of(&mut self, flags: u8, count: u32) -> Result<Form, WireError> {
        match flags {
            KEPT => {
                let slot = self.r.varint()?;
                slot.checked_add(count).ok_or_else(|| self.r.bad("slot"))?;
                Ok(Form::Kept(slot))
            }
            LESS => Ok(Form::Less(self.r.varint()?)),
            _ => Ok(Form::Whole),
        }
    }

    fn add_contents(&mut self, n: usize) -> Result<(), WireError> {
        self.contents += n;
        if self.contents > MAX_FRAME_PAGES { Err(self.r.bad("number of contents")) } else { Ok(()) }
    }

    fn id(&mut self) -> Result<PageId, WireError> {
        Ok(PageId { bucket: self.r.u32()?, index: self.r.varint()? })
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, WireError>;
    fn next(&mut self) -> Option<Self::Item> {
        if self.done || self.r.is_empty() {
            return None;
        }
        let rec = self.read();
        self.done = rec.is_err();
        Some(rec)
    }
}
