//! QEMU's precopy migration stream (QEMU 7.2 to 10.x), as far as IRLM rewrites it: the source agent takes the pages
//! out of it, the target agent puts them back in, and QEMU notices nothing.
//!
//! ```text
//! header, configuration, commands, START ram (block list)   verbatim
//! PART ram …, END ram                                       taken apart: Page and Zero events; re-made by Emitter
//! device state, EOF, description                            verbatim, to the last byte
//! ```
//!
//! Only what is fully understood before the end of RAM is let through; everything else is one clear [`StreamError`],
//! raised before the VM has moved. docs/qemu-stream.md says what is parsed, passed and refused, and what was seen
//! with which QEMU.

mod blocks;
mod emit;
mod error;
// Numbers of the format.
mod format;
// What no stream exceeds.
mod limits;
mod parse;
mod return_path;
#[cfg(test)]
mod tests;

pub use blocks::{BlockList, BlockListError, RamBlock};
pub use emit::{EmitError, Emitter};
pub use error::StreamError;
pub use limits::{
    MAX_BLOCKS, MAX_COMMAND, MAX_LOOKAHEAD, MAX_MACHINE_NAME, MAX_NAME, MAX_RAM_BYTES, MAX_RECORD_HEADER,
    MAX_RP_PAYLOAD,
};
pub use parse::{Event, Parser};
pub use return_path::{RpError, RpKind, RpMessage, RpParser, shut};
