//! Every reason to refuse a migration stream, each in one line that says what was found, at which byte, and what
//! the operator can do: the refusal comes before the VM has moved, so the source simply runs on.

use super::{BlockListError, MAX_MACHINE_NAME};

/// Why a stream is refused. `at` is the byte offset in the stream.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The first four bytes are not QEMU's.
    #[error(
        "stream offset 0: not a QEMU migration stream (first bytes {found:02x?}); check that `migrate` names this \
         socket, that tls-creds is unset, and that this is no post-copy recovery"
    )]
    NotMigration {
        /// The first four bytes.
        found: [u8; 4],
    },
    /// The first four bytes are those of a multifd channel.
    #[error("stream offset 0: a multifd channel; turn the capability multifd off")]
    Multifd,
    /// A stream version other than 3.
    #[error("stream offset 4: stream version {found} is not 3; use QEMU 7.2 to 10.x")]
    Version {
        /// What was found.
        found: u32,
    },
    /// The machine name is too long, empty or not text.
    #[error(
        "stream offset {at}: the machine name ({len} bytes) is not 1 to {MAX_MACHINE_NAME} bytes of text; the stream \
         is damaged or not QEMU's"
    )]
    MachineName {
        /// Where.
        at: u64,
        /// Announced length.
        len: u32,
    },
    /// A configuration subsection whose layout is not known.
    #[error(
        "stream offset {at}: configuration subsection {name:?} version {version} is not known; this QEMU is newer \
         than this irlm: update irlm or migrate this VM with --method oc"
    )]
    ConfigSubsection {
        /// Where.
        at: u64,
        /// Its name.
        name: String,
        /// Its version.
        version: u32,
    },
    /// A guest whose page size is not 4096.
    #[error("stream offset {at}: guest pages of 2^{bits} bytes; only 4096-byte pages (x86) are carried")]
    TargetPageBits {
        /// Where.
        at: u64,
        /// log2 of the page size.
        bits: u32,
    },
    /// A capability that changes the stream is on (`x-ignore-shared`, `mapped-ram`, or one not known).
    #[error("stream offset {at}: the stream depends on the capability {name:?}; turn it off on both sides")]
    Capability {
        /// Where.
        at: u64,
        /// Its name.
        name: String,
    },
    /// A record that cannot be here.
    #[error("stream offset {at}: record type {byte:#04x} cannot stand here; the stream is damaged")]
    Record {
        /// Where.
        at: u64,
        /// The type byte.
        byte: u8,
    },
    /// End-of-stream record before the RAM section was ended.
    #[error(
        "stream offset {at}: the stream ends before its RAM section does; turn the capability background-snapshot off"
    )]
    EndBeforeRam {
        /// Where.
        at: u64,
    },
    /// A command number that is not known.
    #[error(
        "stream offset {at}: command {number} is not known; this QEMU is newer than this irlm: update irlm or \
         migrate this VM with --method oc"
    )]
    Command {
        /// Where.
        at: u64,
        /// The number.
        number: u16,
    },
    /// A known command with a length it never has.
    #[error("stream offset {at}: command {name} with {len} payload bytes; the stream is damaged")]
    CommandLength {
        /// Where.
        at: u64,
        /// The command.
        name: &'static str,
        /// Its payload's length.
        len: u16,
    },
    /// Post-copy has begun, or is being recovered.
    #[error(
        "stream offset {at}: command {name}: post-copy streams are not carried; do not use migrate-start-postcopy \
         with irlm"
    )]
    Postcopy {
        /// Where.
        at: u64,
        /// The command.
        name: &'static str,
    },
    /// COLO is on.
    #[error("stream offset {at}: command ENABLE_COLO: COLO is not carried; turn the capability x-colo off")]
    Colo {
        /// Where.
        at: u64,
    },
    /// A section other than RAM before the end of RAM.
    #[error(
        "stream offset {at}: section {name:?} comes before the end of RAM and is not understood; remove the device \
         or turn the capability off that makes it (dirty-bitmaps, block, VFIO, virtio-mem), or migrate this VM with \
         --method oc"
    )]
    ForeignSection {
        /// Where.
        at: u64,
        /// The section's idstr.
        name: String,
    },
    /// A RAM section that is not the one version 4 instance that QEMU has.
    #[error(
        "stream offset {at}: RAM section of instance {instance}, version {version}, not 0 and 4; use QEMU 7.2 to 10.x"
    )]
    RamVersion {
        /// Where.
        at: u64,
        /// Instance id.
        instance: u32,
        /// Version id.
        version: u32,
    },
    /// RAM is started a second time.
    #[error("stream offset {at}: the RAM section is started twice; the stream is damaged")]
    SecondStart {
        /// Where.
        at: u64,
    },
    /// A PART or END of a section that was not started.
    #[error("stream offset {at}: section id {id} was never started; the stream is damaged")]
    SectionId {
        /// Where.
        at: u64,
        /// The id.
        id: u32,
    },
    /// The block list breaks a rule.
    #[error("stream offset {at}: {error}")]
    Blocks {
        /// Where.
        at: u64,
        /// Which rule.
        #[source]
        error: BlockListError,
    },
    /// The lengths in the block list do not add up to the announced total.
    #[error(
        "stream offset {at}: RAM block {name:?} of {bytes} bytes exceeds the {left} bytes left of the announced total; \
         the stream is damaged"
    )]
    BlockTotal {
        /// Where.
        at: u64,
        /// The block.
        name: String,
        /// Its length.
        bytes: u64,
        /// What was left.
        left: u64,
    },
    /// The RAM section's START holds something other than the block list.
    #[error(
        "stream offset {at}: word {word:#x} in the RAM section's START, where only the block list belongs; this \
         QEMU or a capability of it is not known: migrate this VM with --method oc"
    )]
    SetupWord {
        /// Where.
        at: u64,
        /// The word.
        word: u64,
    },
    /// A RAM record of a capability that is not carried.
    #[error("stream offset {at}: a RAM record of {name}, which is not carried; turn it off on both sides")]
    RamFeature {
        /// Where.
        at: u64,
        /// The capability.
        name: &'static str,
    },
    /// A RAM word with an impossible combination of flags.
    #[error("stream offset {at}: RAM word {word:#x} is not known; the stream is damaged or cut")]
    Word {
        /// Where.
        at: u64,
        /// The word.
        word: u64,
    },
    /// A zero-page record that fills with something else.
    #[error("stream offset {at}: a zero page with fill byte {fill:#04x}; the stream is damaged")]
    Fill {
        /// Where.
        at: u64,
        /// The byte.
        fill: u8,
    },
    /// The first page says it lies in the same block as the one before.
    #[error(
        "stream offset {at}: a page without a block name before any block was named; the stream is damaged"
    )]
    NoBlock {
        /// Where.
        at: u64,
    },
    /// A page in a block that is not in the list.
    #[error(
        "stream offset {at}: page in RAM block {name:?}, which is not in the block list; the stream is damaged"
    )]
    UnknownBlock {
        /// Where.
        at: u64,
        /// The name.
        name: String,
    },
    /// A page beyond its block's end.
    #[error(
        "stream offset {at}: page at offset {offset:#x} of RAM block {name:?}, which has {used:#x} bytes; the stream \
         is damaged"
    )]
    Offset {
        /// Where.
        at: u64,
        /// The block.
        name: String,
        /// Byte offset in the block.
        offset: u64,
        /// Bytes in use.
        used: u64,
    },
    /// A section footer that is missing.
    #[error(
        "stream offset {at}: byte {found:#04x} where the RAM section's footer belongs; the stream is damaged"
    )]
    NoFooter {
        /// Where.
        at: u64,
        /// What stands there.
        found: u8,
    },
    /// A section footer of another section.
    #[error("stream offset {at}: footer of section {found} after section {section}; the stream is damaged")]
    Footer {
        /// Where.
        at: u64,
        /// The id in the footer.
        found: u32,
        /// The section's id.
        section: u32,
    },
    /// The stream ended too early.
    #[error(
        "stream offset {at}: the stream ends in {within}; the source QEMU failed or was cancelled: see its \
         query-migrate"
    )]
    Truncated {
        /// Where.
        at: u64,
        /// In which part.
        within: &'static str,
    },
    /// [`Parser::parse`](super::Parser::parse) was called again after it, or its sink, had failed.
    #[error("stream offset {at}: the stream was refused before; start a new migration")]
    Refused {
        /// Where.
        at: u64,
    },
}
