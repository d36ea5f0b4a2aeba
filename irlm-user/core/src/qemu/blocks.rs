//! The list of a VM's RAM blocks: checked once, so that a block number or page number taken from it needs no
//! further doubt anywhere else.

use super::{MAX_BLOCKS, MAX_NAME, MAX_RAM_BYTES};
use crate::units::{BlockIx, PAGE_BITS, PAGE_SIZE, PageAddr};

/// One RAM block as the stream announces it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RamBlock {
    /// QEMU's name for it, such as `pc.ram` or the memory backend's id.
    pub name: Box<str>,
    /// Bytes in use, a multiple of the page size; no page lies beyond.
    pub used_bytes: u64,
}

impl RamBlock {
    /// Pages in use.
    #[must_use]
    pub fn pages(&self) -> u32 {
        // BlockList::new has held used_bytes below MAX_RAM_BYTES for every block that is in a list.
        u32::try_from(self.used_bytes >> PAGE_BITS).unwrap_or(u32::MAX)
    }
}

/// Why a list of RAM blocks is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BlockListError {
    /// More than [`MAX_BLOCKS`].
    #[error("more than {MAX_BLOCKS} RAM blocks; give the VM fewer memory devices")]
    TooMany,
    /// An empty name, one over [`MAX_NAME`] bytes, not UTF-8, or with control characters.
    #[error(
        "RAM block {index} has an unusable name {name:?}; block names are 1 to {MAX_NAME} printable bytes"
    )]
    Name {
        /// Position in the list.
        index: usize,
        /// The name, made printable.
        name: String,
    },
    /// Two blocks with one name.
    #[error("RAM block name {name:?} is listed twice; give the memory backends different ids")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A length that is no multiple of the page size.
    #[error(
        "RAM block {name:?} has {bytes} bytes, which is no multiple of {PAGE_SIZE}; its guest cannot be moved page by page"
    )]
    Unaligned {
        /// The block.
        name: String,
        /// Its length.
        bytes: u64,
    },
    /// More than [`MAX_RAM_BYTES`] in all.
    #[error("the RAM blocks hold more than {MAX_RAM_BYTES} bytes, the most IRLM numbers in one VM")]
    TooLarge,
}

/// The RAM blocks of one VM, in the stream's order, with what an [`Emitter`](super::Emitter) must know besides.
///
/// Holds: at most [`MAX_BLOCKS`] blocks; names unique, nonempty, printable UTF-8; lengths multiples of the page size;
/// all pages together countable by a `u32`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BlockList {
    section_id: u32,
    footers: bool,
    blocks: Vec<RamBlock>,
    /// Block numbers sorted by name, for [`find`](Self::find).
    by_name: Vec<u16>,
    /// Pages before each block.
    first: Vec<u32>,
    pages: u32,
}

impl BlockList {
    /// Checks `blocks` and takes them. `section_id` is the stream's number for its RAM section; `footers` says
    /// whether sections end in a footer (false only for very old machine types).
    pub fn new(section_id: u32, footers: bool, blocks: Vec<RamBlock>) -> Result<Self, BlockListError> {
        if blocks.len() > MAX_BLOCKS {
            return Err(BlockListError::TooMany);
        }
        let mut first = Vec::with_capacity(blocks.len());
        let mut bytes = 0u64;
        for (index, b) in blocks.iter().enumerate() {
            if !name_is_usable(&b.name) {
                return Err(BlockListError::Name { index, name: b.name.to_string() });
            }
            if b.used_bytes % PAGE_SIZE as u64 != 0 {
                return Err(BlockListError::Unaligned { name: b.name.to_string(), bytes: b.used_bytes });
            }
            first.push((bytes >> PAGE_BITS) as u32);
            bytes = bytes
                .checked_add(b.used_bytes)
                .filter(|&b| b <= MAX_RAM_BYTES)
                .ok_or(BlockListError::TooLarge)?;
        }
        let mut by_name: Vec<u16> = (0..blocks.len() as u16).collect();
        by_name.sort_unstable_by(|&a, &b| blocks[usize::from(a)].name.cmp(&blocks[usize::from(b)].name));
        for pair in by_name.windows(2) {
            let name = &blocks[usize::from(pair[0])].name;
            if *name == blocks[usize::from(pair[1])].name {
                return Err(BlockListError::Duplicate { name: name.to_string() });
            }
        }
        Ok(Self { section_id, footers, blocks, by_name, first, pages: (bytes >> PAGE_BITS) as u32 })
    }

    /// The same list with the footer question settled anew.
    #[must_use]
    pub(super) fn with_footers(self, footers: bool) -> Self {
        Self { footers, ..self }
    }

    /// The stream's number for its RAM section.
    #[must_use]
    pub fn section_id(&self) -> u32 {
        self.section_id
    }

    /// Whether sections end in a footer.
    #[must_use]
    pub fn footers(&self) -> bool {
        self.footers
    }

    /// The blocks, in the stream's order: [`BlockIx`] counts along this slice.
    #[must_use]
    pub fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    /// The block with this number.
    #[must_use]
    pub fn get(&self, block: BlockIx) -> Option<&RamBlock> {
        self.blocks.get(usize::from(block.0))
    }

    /// The block with this name.
    #[must_use]
    pub fn find(&self, name: &[u8]) -> Option<BlockIx> {
        let at =
            self.by_name.binary_search_by(|&i| self.blocks[usize::from(i)].name.as_bytes().cmp(name)).ok()?;
        self.by_name.get(at).map(|&i| BlockIx(i))
    }

    /// Pages of all blocks together.
    #[must_use]
    pub fn pages(&self) -> u32 {
        self.pages
    }

    /// The page's number when all blocks are laid end to end, below [`pages`](Self::pages); none if there is no such
    /// page.
    #[must_use]
    pub fn linear(&self, addr: PageAddr) -> Option<u32> {
        let block = self.get(addr.block)?;
        let first = self.first.get(usize::from(addr.block.0))?;
        (addr.page < block.pages()).then(|| first + addr.page)
    }
}

/// Whether QEMU could have given this name, and a log line can hold it.
fn name_is_usable(name: &str) -> bool {
    (1..=MAX_NAME).contains(&name.len()) && !name.chars().any(char::is_control)
}
