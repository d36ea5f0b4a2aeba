//! Writes migration streams record by record, from the facts in docs/qemu-stream.md and with numbers of its own.

use crate::units::PAGE_SIZE;

/// The section number of RAM in built streams.
pub(super) const RAM_ID: u32 = 2;
/// A stream tail: a device section, EOF, description.
pub(super) const TAIL: &[u8] =
    b"\x04\x00\x00\x00\x00\x05timer\0\0\0\0\0\0\0\x02device state\x7e\0\0\0\0\0\x06\0\0\0\x02{}";

/// A stream being written.
pub(super) struct Build {
    pub(super) out: Vec<u8>,
    pub(super) footers: bool,
    last: Option<String>,
}

/// A page whose bytes depend on `seed`.
pub(super) fn content(seed: u64) -> Vec<u8> {
    let mut x = seed | 1;
    (0..PAGE_SIZE)
        .map(|_| {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (x >> 56) as u8
        })
        .collect()
}

impl Build {
    /// Magic and version.
    pub(super) fn new() -> Self {
        Self { out: b"QEVM\0\0\0\x03".to_vec(), footers: true, last: None }
    }

    /// A usual stream up to where the START of RAM comes.
    pub(super) fn usual() -> Self {
        let mut b = Self::new();
        b.configuration("pc-q35-7.2").command(1, &[]).command(2, &[0, 0, 0, 1]);
        b
    }

    pub(super) fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.out.extend_from_slice(bytes);
        self
    }

    pub(super) fn word(&mut self, word: u64) -> &mut Self {
        self.raw(&word.to_be_bytes())
    }

    pub(super) fn name(&mut self, name: &str) -> &mut Self {
        self.out.push(u8::try_from(name.len()).expect("a short name"));
        self.raw(name.as_bytes())
    }

    pub(super) fn configuration(&mut self, machine: &str) -> &mut Self {
        self.raw(&[7]).raw(&(machine.len() as u32).to_be_bytes()).raw(machine.as_bytes())
    }

    pub(super) fn subsection(&mut self, name: &str, version: u32, fields: &[u8]) -> &mut Self {
        self.raw(&[5]).name(name).raw(&version.to_be_bytes()).raw(fields)
    }

    pub(super) fn command(&mut self, number: u16, payload: &[u8]) -> &mut Self {
        self.raw(&[8]).raw(&number.to_be_bytes()).raw(&(payload.len() as u16).to_be_bytes()).raw(payload)
    }

    /// A START or FULL section's header.
    pub(super) fn section(&mut self, kind: u8, id: u32, name: &str, version: u32) -> &mut Self {
        self.raw(&[kind]).raw(&id.to_be_bytes()).name(name).raw(&[0; 4]).raw(&version.to_be_bytes())
    }

    /// The START section of RAM; a block may carry a page size.
    pub(super) fn start_sized(&mut self, blocks: &[(&str, u64, Option<u64>)]) -> &mut Self {
        let total: u64 = blocks.iter().map(|b| b.1).sum();
        self.section(1, RAM_ID, "ram", 4).word(total | 4);
        for (name, used, page_size) in blocks {
            self.name(name).word(*used);
            if let Some(size) = page_size {
                self.word(*size);
            }
        }
        self.eos()
    }

    pub(super) fn start(&mut self, blocks: &[(&str, u64)]) -> &mut Self {
        let blocks: Vec<_> = blocks.iter().map(|&(n, u)| (n, u, None)).collect();
        self.start_sized(&blocks)
    }

    pub(super) fn part(&mut self) -> &mut Self {
        self.raw(&[2]).raw(&RAM_ID.to_be_bytes())
    }

    pub(super) fn end(&mut self) -> &mut Self {
        self.raw(&[3]).raw(&RAM_ID.to_be_bytes())
    }

    /// EOS word and footer.
    pub(super) fn eos(&mut self) -> &mut Self {
        self.word(0x10);
        if self.footers {
            self.raw(&[0x7e]).raw(&RAM_ID.to_be_bytes());
        }
        self
    }

    fn record(&mut self, flag: u64, block: &str, page: u64) -> &mut Self {
        if self.last.as_deref() == Some(block) {
            return self.word(page << 12 | flag | 0x20);
        }
        self.last = Some(block.to_owned());
        self.word(page << 12 | flag).name(block)
    }

    pub(super) fn page(&mut self, block: &str, page: u64, bytes: &[u8]) -> &mut Self {
        self.record(0x8, block, page).raw(bytes)
    }

    pub(super) fn zero(&mut self, block: &str, page: u64) -> &mut Self {
        self.record(0x2, block, page).raw(&[0])
    }

    /// Names the block in the next record again, though it need not be.
    pub(super) fn forget(&mut self) -> &mut Self {
        self.last = None;
        self
    }
}
