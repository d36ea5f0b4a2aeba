//! The source agent's side of the grammar: an incremental parser that may be fed in pieces of any size, borrows
//! page contents from the caller's buffer, and allocates nothing once the block list is known.

mod preface;

use super::{BlockList, MAX_COMMAND, RamBlock, StreamError, format};
use crate::units::{BlockIx, PAGE_BITS, PAGE_SIZE, PageAddr, PageBytes};
use std::sync::Arc;

/// What the stream says, in order. Slices borrow from the buffer given to [`Parser::parse`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event<'a> {
    /// Bytes to hand over as they are, in order: header, configuration, commands, the whole START section of RAM,
    /// and everything after the END section. Between RAM sections they are whole commands, so the target closes its
    /// open section first.
    Verbatim(&'a [u8]),
    /// The RAM blocks. Once, right after the last verbatim bytes of the START section, its footer included; as QEMU
    /// may keep that footer back, this comes at the latest with the next record's first byte.
    Blocks(Arc<BlockList>),
    /// A page's content. A later one of the same page replaces it.
    Page {
        /// Which page.
        addr: PageAddr,
        /// Its content.
        bytes: &'a PageBytes,
    },
    /// A page is all zeroes. A later event of the same page replaces it.
    Zero {
        /// Which page.
        addr: PageAddr,
    },
    /// A PART section of RAM ended (its EOS word; the footer may be late).
    SectionEnd,
    /// The VM is stopped: the END section of RAM was begun, or, from QEMU 10.0 on, the switchover command came. Once.
    Stopped,
    /// The END section's EOS word: all pages have come. All that follows is [`Event::Verbatim`].
    RamEnd,
}

/// What [`Parser::preface`] found next.
enum Piece {
    /// So many bytes to pass on.
    Verbatim(usize),
    /// Nothing to pass on; the state has changed.
    None,
    Starved,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    Header,
    /// A configuration section may come.
    Configuration,
    /// A subsection of the configuration may come.
    Subsection,
    /// The list of capabilities of the configuration, of which none is carried.
    Capability,
    /// Any record.
    Record,
    /// The RAM section's first word.
    SetupSize,
    /// The block list, of whose announced total `left` bytes are missing.
    SetupBlock {
        left: u64,
    },
    /// A block's page size may come.
    SetupPageSize {
        left: u64,
    },
    SetupFooter,
    /// RAM words of a PART or (`end`) the END section.
    Words {
        end: bool,
    },
    Footer {
        end: bool,
    },
    Tail,
    Refused,
}

/// What has been learnt of the RAM section.
#[derive(Debug)]
enum Ram {
    Unknown,
    Listing {
        section_id: u32,
        blocks: Vec<RamBlock>,
    },
    /// The list is whole; whether it has a footer is not known yet.
    Listed(BlockList),
    Known(Arc<BlockList>),
}

/// Parses one precopy stream. Memory: the block list (at most `MAX_BLOCKS` entries) and the machine's name.
#[derive(Debug)]
pub struct Parser {
    state: State,
    offset: u64,
    machine: Option<Box<str>>,
    /// The OR of all RAM page sizes, from post-copy's advice; 0 without one.
    page_sizes: u64,
    ram: Ram,
    /// Block named last on this connection, and its pages.
    last: Option<(BlockIx, u32)>,
    stopped: bool,
    tail: bool,
}

impl Default for Parser {
    fn default() -> Self {
        Self::new()
    }
}

/// What a step did.
enum Step {
    /// It consumed bytes or changed the state: go on.
    On,
    /// It needs bytes that are not there.
    Starved,
}
use Step::{On, Starved};

/// The unread part of the caller's buffer.
struct Input<'a> {
    rest: &'a [u8],
    /// Stream offset of `rest`.
    at: u64,
}

impl<'a> Input<'a> {
    /// Takes the next `n` bytes; callers have looked at them before.
    fn take(&mut self, n: usize) -> &'a [u8] {
        let (taken, rest) = self.rest.split_at(n.min(self.rest.len()));
        self.rest = rest;
        self.at += taken.len() as u64;
        taken
    }

    /// The bytes `from..from + N`, if they are there.
    fn peek<const N: usize>(&self, from: usize) -> Option<[u8; N]> {
        self.rest.get(from..)?.first_chunk::<N>().copied()
    }

    fn peek_u32(&self, from: usize) -> Option<u32> {
        self.peek(from).map(u32::from_be_bytes)
    }

    fn peek_u64(&self, from: usize) -> Option<u64> {
        self.peek(from).map(u64::from_be_bytes)
    }

    /// The string at `from` that is led by its length in one byte, and where it ends.
    fn peek_name(&self, from: usize) -> Option<(&'a [u8], usize)> {
        let len = usize::from(*self.rest.get(from)?);
        let end = from + 1 + len;
        Some((self.rest.get(from + 1..end)?, end))
    }
}

impl Parser {
    /// A parser at the start of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self {
            state: State::Header,
            offset: 0,
            machine: None,
            page_sizes: 0,
            ram: Ram::Unknown,
            last: None,
            stopped: false,
            tail: false,
        }
    }

    /// Parses as much of `buf` as is complete, tells `sink` what it says, and returns how many bytes were consumed.
    /// The caller keeps the rest and calls again with more behind it. A buffer of
    /// [`MAX_LOOKAHEAD`](super::MAX_LOOKAHEAD) bytes is always enough to make progress.
    ///
    /// After an error, of the stream or of `sink`, the parser is of no further use and says so.
    pub fn parse<'a, E: From<StreamError>>(
        &mut self,
        buf: &'a [u8],
        sink: &mut impl FnMut(Event<'a>) -> Result<(), E>,
    ) -> Result<usize, E> {
        let mut input = Input { rest: buf, at: self.offset };
        loop {
            match self.step(&mut input, sink) {
                Ok(On) => {}
                Ok(Starved) => {
                    self.offset = input.at;
                    return Ok(buf.len() - input.rest.len());
                }
                Err(e) => {
                    self.offset = input.at;
                    self.state = State::Refused;
                    return Err(e);
                }
            }
        }
    }

    /// The RAM blocks, once [`Event::Blocks`] has been delivered.
    #[must_use]
    pub fn blocks(&self) -> Option<&Arc<BlockList>> {
        match &self.ram {
            Ram::Known(list) => Some(list),
            _ => None,
        }
    }

    /// Bytes of the stream consumed so far.
    #[must_use]
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The machine type, such as `pc-q35-7.2`, once the configuration section has come.
    #[must_use]
    pub fn machine(&self) -> Option<&str> {
        self.machine.as_deref()
    }

    /// Whether the stream may end here: only in the tail, of which something must have come. The tail itself is not
    /// read, so one that is cut is noticed by the target QEMU.
    pub fn finish(&self) -> Result<(), StreamError> {
        let within = match self.state {
            State::Header => "its header",
            State::Configuration | State::Subsection | State::Capability => "its configuration",
            State::Record => "its RAM phase",
            State::SetupSize
            | State::SetupBlock { .. }
            | State::SetupPageSize { .. }
            | State::SetupFooter => "the RAM block list",
            State::Words { end: false } | State::Footer { end: false } => "a RAM section",
            State::Words { end: true } => "the last RAM section",
            State::Footer { end: true } => "the footer of the last RAM section",
            State::Tail if self.tail => return Ok(()),
            State::Tail => "the device state",
            State::Refused => return Err(StreamError::Refused { at: self.offset }),
        };
        Err(StreamError::Truncated { at: self.offset, within })
    }

    fn step<'a, E: From<StreamError>>(
        &mut self,
        input: &mut Input<'a>,
        sink: &mut impl FnMut(Event<'a>) -> Result<(), E>,
    ) -> Result<Step, E> {
        match self.state {
            State::Words { end } => self.words(input, end, sink),
            State::Tail => {
                if !input.rest.is_empty() {
                    self.tail = true;
                    sink(Event::Verbatim(input.take(input.rest.len())))?;
                }
                Ok(Starved)
            }
            State::Footer { end } => self.footer(input, end).map_err(E::from),
            State::Record => self.record(input, sink),
            State::SetupFooter => self.setup_footer(input, sink),
            State::Refused => Err(StreamError::Refused { at: input.at }.into()),
            // What is left is passed on as it is, a piece at a time.
            _ => match self.preface(input)? {
                Piece::Verbatim(len) => {
                    sink(Event::Verbatim(input.take(len)))?;
                    Ok(On)
                }
                Piece::None => Ok(On),
                Piece::Starved => Ok(Starved),
            },
        }
    }

    fn setup_footer<'a, E: From<StreamError>>(
        &mut self,
        input: &mut Input<'a>,
        sink: &mut impl FnMut(Event<'a>) -> Result<(), E>,
    ) -> Result<Step, E> {
        let Some([kind]) = input.peek(0) else { return Ok(Starved) };
        let Ram::Listed(list) = &self.ram else { return Err(StreamError::Refused { at: input.at }.into()) };
        let footers = kind == format::FOOTER;
        if footers {
            let Some(found) = input.peek_u32(1) else { return Ok(Starved) };
            check_footer(input.at, found, list.section_id())?;
            sink(Event::Verbatim(input.take(5)))?;
        }
        let list = Arc::new(list.clone().with_footers(footers));
        self.ram = Ram::Known(Arc::clone(&list));
        self.state = State::Record;
        sink(Event::Blocks(list))?;
        Ok(On)
    }

    /// Any record before the end of RAM.
    fn record<'a, E: From<StreamError>>(
        &mut self,
        input: &mut Input<'a>,
        sink: &mut impl FnMut(Event<'a>) -> Result<(), E>,
    ) -> Result<Step, E> {
        let at = input.at;
        let Some([kind]) = input.peek(0) else { return Ok(Starved) };
        match kind {
            format::PART | format::END => {
                let Some(id) = input.peek_u32(1) else { return Ok(Starved) };
                match &self.ram {
                    Ram::Known(list) if list.section_id() == id => {}
                    _ => return Err(StreamError::SectionId { at, id }.into()),
                }
                input.take(5);
                let end = kind == format::END;
                self.state = State::Words { end };
                if end {
                    self.stop(sink)?;
                }
                Ok(On)
            }
            format::START | format::FULL => {
                let Some(section_id) = input.peek_u32(1) else { return Ok(Starved) };
                let Some((name, end)) = input.peek_name(5) else { return Ok(Starved) };
                if kind == format::FULL || name != format::RAM {
                    return Err(StreamError::ForeignSection { at, name: text(name) }.into());
                }
                let (Some(instance), Some(version)) = (input.peek_u32(end), input.peek_u32(end + 4)) else {
                    return Ok(Starved);
                };
                if instance != 0 || version != format::RAM_VERSION {
                    return Err(StreamError::RamVersion { at, instance, version }.into());
                }
                if !matches!(self.ram, Ram::Unknown) {
                    return Err(StreamError::SecondStart { at }.into());
                }
                self.ram = Ram::Listing { section_id, blocks: Vec::new() };
                self.state = State::SetupSize;
                sink(Event::Verbatim(input.take(end + 8)))?;
                Ok(On)
            }
            format::COMMAND => {
                let (Some(number), Some(len)) = (input.peek(1), input.peek(3)) else { return Ok(Starved) };
                let (number, len) = (u16::from_be_bytes(number), u16::from_be_bytes(len));
                check_command(at, number, len)?;
                let size = 5 + usize::from(len);
                let Some(bytes) = input.rest.get(..size) else { return Ok(Starved) };
                if let (command::POSTCOPY_ADVISE, Some(sizes)) = (number, bytes[5..].first_chunk::<8>()) {
                    self.page_sizes = u64::from_be_bytes(*sizes);
                }
                sink(Event::Verbatim(input.take(size)))?;
                if number == command::SWITCHOVER_START {
                    self.stop(sink)?;
                }
                Ok(On)
            }
            format::EOF => Err(StreamError::EndBeforeRam { at }.into()),
            byte => Err(StreamError::Record { at, byte }.into()),
        }
    }

    fn stop<'a, E>(&mut self, sink: &mut impl FnMut(Event<'a>) -> Result<(), E>) -> Result<(), E> {
        if std::mem::replace(&mut self.stopped, true) { Ok(()) } else { sink(Event::Stopped) }
    }

    /// RAM words: the path that every page takes.
    fn words<'a, E: From<StreamError>>(
        &mut self,
        input: &mut Input<'a>,
        end: bool,
        sink: &mut impl FnMut(Event<'a>) -> Result<(), E>,
    ) -> Result<Step, E> {
        let Ram::Known(list) = &self.ram else { return Err(StreamError::Refused { at: input.at }.into()) };
        while let Some((word, after)) = input.rest.split_first_chunk::<8>() {
            let at = input.at;
            let word = u64::from_be_bytes(*word);
            let kind = word & format::FLAG_BITS & !format::CONTINUE;
            if kind != format::PAGE && kind != format::ZERO {
                if word != format::EOS {
                    return Err(feature(at, word).unwrap_or(StreamError::Word { at, word }).into());
                }
                input.take(8);
                self.state = match (list.footers(), end) {
                    (true, end) => State::Footer { end },
                    (false, true) => State::Tail,
                    (false, false) => State::Record,
                };
                sink(if end { Event::RamEnd } else { Event::SectionEnd })?;
                return Ok(On);
            }
            let (block, pages, after) = if word & format::CONTINUE == 0 {
                let Some((&len, after)) = after.split_first() else { break };
                let Some((name, after)) = after.split_at_checked(usize::from(len)) else { break };
                let block =
                    list.find(name).ok_or_else(|| StreamError::UnknownBlock { at, name: text(name) })?;
                (block, list.get(block).map_or(0, RamBlock::pages), after)
            } else {
                let (block, pages) = self.last.ok_or(StreamError::NoBlock { at })?;
                (block, pages, after)
            };
            let page = word >> PAGE_BITS;
            if page >= u64::from(pages) {
                return Err(beyond(at, list, block, word).into());
            }
            let addr = PageAddr { block, page: page as u32 };
            let (event, after) = if kind == format::PAGE {
                let Some((bytes, after)) = after.split_first_chunk::<PAGE_SIZE>() else { break };
                (Event::Page { addr, bytes }, after)
            } else {
                let Some((&fill, after)) = after.split_first() else { break };
                if fill != 0 {
                    return Err(StreamError::Fill { at, fill }.into());
                }
                (Event::Zero { addr }, after)
            };
            self.last = Some((block, pages));
            input.at += (input.rest.len() - after.len()) as u64;
            input.rest = after;
            sink(event)?;
        }
        Ok(Starved)
    }

    /// The footer of a PART or END section. It is not passed on: the emitter makes its own.
    fn footer(&mut self, input: &mut Input<'_>, end: bool) -> Result<Step, StreamError> {
        let at = input.at;
        let Some([found]) = input.peek(0) else { return Ok(Starved) };
        if found != format::FOOTER {
            return Err(StreamError::NoFooter { at, found });
        }
        let Some(id) = input.peek_u32(1) else { return Ok(Starved) };
        let Ram::Known(list) = &self.ram else { return Err(StreamError::Refused { at }) };
        check_footer(at, id, list.section_id())?;
        input.take(5);
        self.state = if end { State::Tail } else { State::Record };
        Ok(On)
    }
}

mod command {
    pub(super) const OPEN_RETURN_PATH: u16 = 1;
    pub(super) const PING: u16 = 2;
    pub(super) const POSTCOPY_ADVISE: u16 = 3;
    pub(super) const POSTCOPY_LISTEN: u16 = 4;
    pub(super) const POSTCOPY_RUN: u16 = 5;
    pub(super) const POSTCOPY_RAM_DISCARD: u16 = 6;
    pub(super) const PACKAGED: u16 = 7;
    pub(super) const ENABLE_COLO: u16 = 8;
    pub(super) const POSTCOPY_RESUME: u16 = 9;
    pub(super) const RECV_BITMAP: u16 = 10;
    pub(super) const SWITCHOVER_START: u16 = 11;
}

/// Lets the commands of a precopy stream through.
fn check_command(at: u64, number: u16, len: u16) -> Result<(), StreamError> {
    let (name, fits) = match number {
        command::OPEN_RETURN_PATH => ("OPEN_RETURN_PATH", len == 0),
        command::PING => ("PING", len == 4),
        // Without RAM post-copy (dirty bitmaps only) it has no payload.
        command::POSTCOPY_ADVISE => ("POSTCOPY_ADVISE", len == 0 || usize::from(len) == MAX_COMMAND),
        command::SWITCHOVER_START => ("SWITCHOVER_START", len == 0),
        command::ENABLE_COLO => return Err(StreamError::Colo { at }),
        command::POSTCOPY_LISTEN => return Err(StreamError::Postcopy { at, name: "POSTCOPY_LISTEN" }),
        command::POSTCOPY_RUN => return Err(StreamError::Postcopy { at, name: "POSTCOPY_RUN" }),
        command::POSTCOPY_RAM_DISCARD => {
            return Err(StreamError::Postcopy { at, name: "POSTCOPY_RAM_DISCARD" });
        }
        command::PACKAGED => return Err(StreamError::Postcopy { at, name: "PACKAGED" }),
        command::POSTCOPY_RESUME => return Err(StreamError::Postcopy { at, name: "POSTCOPY_RESUME" }),
        command::RECV_BITMAP => return Err(StreamError::Postcopy { at, name: "RECV_BITMAP" }),
        _ => return Err(StreamError::Command { at, number }),
    };
    if fits { Ok(()) } else { Err(StreamError::CommandLength { at, name, len }) }
}

fn check_footer(at: u64, found: u32, section: u32) -> Result<(), StreamError> {
    if found == section { Ok(()) } else { Err(StreamError::Footer { at, found, section }) }
}

/// The error for a word of a capability that is not carried.
fn feature(at: u64, word: u64) -> Option<StreamError> {
    let name = match word & format::FLAG_BITS & !format::CONTINUE {
        format::XBZRLE => "xbzrle",
        format::HOOK => "the RDMA transport",
        format::COMPRESS_PAGE => "compress",
        format::MULTIFD_FLUSH => "multifd",
        _ => return None,
    };
    Some(StreamError::RamFeature { at, name })
}

/// The error for a page beyond its block's end.
#[cold]
fn beyond(at: u64, list: &BlockList, block: BlockIx, word: u64) -> StreamError {
    let (name, used) = list.get(block).map_or(("", 0), |b| (&b.name, b.used_bytes));
    StreamError::Offset { at, name: name.to_owned(), offset: word & !format::FLAG_BITS, used }
}

/// A name from the stream (at most 255 bytes) for an error message.
fn text(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}
