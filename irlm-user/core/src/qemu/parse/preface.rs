//! The pieces that come before the first page and are passed on as they are: header, configuration, block list.

use super::{Input, Parser, Piece, Ram, State, feature, text};
use crate::qemu::{BlockList, MAX_BLOCKS, MAX_MACHINE_NAME, MAX_RAM_BYTES, RamBlock, StreamError, format};
use crate::units::{PAGE_BITS, PAGE_SIZE};

impl Parser {
    /// Header, configuration and block list: checks the next piece and moves on behind it.
    pub(super) fn preface(&mut self, input: &Input<'_>) -> Result<Piece, StreamError> {
        Ok(match self.state {
            State::Header => {
                let Some(magic) = input.peek::<4>(0) else { return Ok(Piece::Starved) };
                if magic == format::MULTIFD_MAGIC {
                    return Err(StreamError::Multifd);
                }
                if magic != format::MAGIC {
                    return Err(StreamError::NotMigration { found: magic });
                }
                let Some(found) = input.peek_u32(4) else { return Ok(Piece::Starved) };
                if found != format::VERSION {
                    return Err(StreamError::Version { found });
                }
                self.state = State::Configuration;
                Piece::Verbatim(8)
            }
            State::Configuration => {
                let Some([kind]) = input.peek(0) else { return Ok(Piece::Starved) };
                if kind != format::CONFIGURATION {
                    self.state = State::Record;
                    return Ok(Piece::None);
                }
                let Some(len) = input.peek_u32(1) else { return Ok(Piece::Starved) };
                let refuse = StreamError::MachineName { at: input.at, len };
                let size = len as usize;
                if size == 0 || size > MAX_MACHINE_NAME {
                    return Err(refuse);
                }
                let Some(name) = input.rest.get(5..5 + size) else { return Ok(Piece::Starved) };
                let name = str::from_utf8(name).map_err(|_| refuse)?;
                self.machine = Some(name.into());
                self.state = State::Subsection;
                Piece::Verbatim(5 + size)
            }
            State::Subsection => return self.subsection(input),
            State::Capability => {
                let Some((name, _)) = input.peek_name(0) else { return Ok(Piece::Starved) };
                return Err(StreamError::Capability { at: input.at, name: text(name) });
            }
            _ => return self.setup(input),
        })
    }

    fn subsection(&mut self, input: &Input<'_>) -> Result<Piece, StreamError> {
        let Some([kind]) = input.peek(0) else { return Ok(Piece::Starved) };
        if kind != format::SUBSECTION {
            self.state = State::Record;
            return Ok(Piece::None);
        }
        let Some((name, end)) = input.peek_name(1) else { return Ok(Piece::Starved) };
        let Some(version) = input.peek_u32(end) else { return Ok(Piece::Starved) };
        let fields = end + 4;
        match (name, version) {
            (b"configuration/target-page-bits", 1) => {
                let Some(bits) = input.peek_u32(fields) else { return Ok(Piece::Starved) };
                if bits != PAGE_BITS {
                    return Err(StreamError::TargetPageBits { at: input.at, bits });
                }
                Ok(Piece::Verbatim(fields + 4))
            }
            // It lists only capabilities that change the stream (x-ignore-shared, mapped-ram); none is carried.
            (b"configuration/capabilities", 1) => {
                let Some(count) = input.peek_u32(fields) else { return Ok(Piece::Starved) };
                if count != 0 {
                    self.state = State::Capability;
                }
                Ok(Piece::Verbatim(fields + 4))
            }
            (b"configuration/uuid", 1) => match input.peek::<16>(fields) {
                Some(_) => Ok(Piece::Verbatim(fields + 16)),
                None => Ok(Piece::Starved),
            },
            _ => Err(StreamError::ConfigSubsection { at: input.at, name: text(name), version }),
        }
    }

    /// The RAM section's START, up to its EOS word.
    fn setup(&mut self, input: &Input<'_>) -> Result<Piece, StreamError> {
        let at = input.at;
        match self.state {
            State::SetupSize => {
                let Some(word) = input.peek_u64(0) else { return Ok(Piece::Starved) };
                if word & format::FLAG_BITS != format::MEM_SIZE {
                    return Err(feature(at, word).unwrap_or(StreamError::SetupWord { at, word }));
                }
                self.state = State::SetupBlock { left: word & !format::FLAG_BITS };
                Ok(Piece::Verbatim(8))
            }
            State::SetupBlock { left: 0 } => {
                let Some(word) = input.peek_u64(0) else { return Ok(Piece::Starved) };
                if word != format::EOS {
                    return Err(feature(at, word).unwrap_or(StreamError::SetupWord { at, word }));
                }
                if let Ram::Listing { section_id, blocks } = std::mem::replace(&mut self.ram, Ram::Unknown) {
                    let list = BlockList::new(section_id, true, blocks)
                        .map_err(|error| StreamError::Blocks { at, error })?;
                    self.ram = Ram::Listed(list);
                }
                self.state = State::SetupFooter;
                Ok(Piece::Verbatim(8))
            }
            State::SetupBlock { left } => {
                let Some((name, end)) = input.peek_name(0) else { return Ok(Piece::Starved) };
                let Some(used_bytes) = input.peek_u64(end) else { return Ok(Piece::Starved) };
                self.add_block(at, name, used_bytes, left)?;
                let left = left - used_bytes;
                // Only post-copy's advice lets blocks carry a page size, and only ones of another size do.
                self.state = if self.page_sizes & !(PAGE_SIZE as u64) == 0 {
                    State::SetupBlock { left }
                } else {
                    State::SetupPageSize { left }
                };
                Ok(Piece::Verbatim(end + 8))
            }
            State::SetupPageSize { left } => {
                // A page size starts with a zero byte; a name never does, and the EOS word is no page size.
                let Some([lead]) = input.peek(0) else { return Ok(Piece::Starved) };
                let size = if lead == 0 {
                    let Some(size) = input.peek_u64(0) else { return Ok(Piece::Starved) };
                    size
                } else {
                    0
                };
                self.state = State::SetupBlock { left };
                let known = size > PAGE_SIZE as u64 && size.is_power_of_two() && size & self.page_sizes != 0;
                Ok(if known { Piece::Verbatim(8) } else { Piece::None })
            }
            // `step` and `preface` have dealt with every other state.
            _ => Err(StreamError::Refused { at }),
        }
    }

    fn add_block(&mut self, at: u64, name: &[u8], used_bytes: u64, left: u64) -> Result<(), StreamError> {
        use crate::qemu::BlockListError::{Name, TooLarge, TooMany};
        let Ram::Listing { blocks, .. } = &mut self.ram else { return Err(StreamError::Refused { at }) };
        let refuse = |error| StreamError::Blocks { at, error };
        if blocks.len() == MAX_BLOCKS {
            return Err(refuse(TooMany));
        }
        let name = match str::from_utf8(name) {
            Ok(name) if !name.is_empty() => name,
            _ => return Err(refuse(Name { index: blocks.len(), name: text(name) })),
        };
        if left > MAX_RAM_BYTES {
            return Err(refuse(TooLarge));
        }
        if used_bytes > left {
            return Err(StreamError::BlockTotal { at, name: name.to_owned(), bytes: used_bytes, left });
        }
        blocks.push(RamBlock { name: name.into(), used_bytes });
        Ok(())
    }
}
