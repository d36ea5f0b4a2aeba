//! Why bytes are no saved state that is taken.

/// Of this layout. Another layout is another number, and is refused.
pub const VERSION: u32 = 1;

/// Why bytes are no saved state that is taken.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SnapshotError {
    /// Something else.
    #[error("these bytes are no saved state of `irlm vmm`")]
    Magic,
    /// Another program version's.
    #[error(
        "layout version {found} is not understood here (this is {VERSION}); use the same irlm on both hosts"
    )]
    Version {
        /// What it says.
        found: u64,
    },
    /// Cut or padded.
    #[error("it says {said} bytes and has {has}: it was cut or has grown on its way")]
    Length {
        /// By its header.
        said: u64,
        /// In truth.
        has: u64,
    },
    /// Changed on its way.
    #[error("its checksum is wrong: it was changed on its way")]
    Hash,
    /// Well kept, and still not right.
    #[error("section {kind} of {of}: {what}")]
    Section {
        /// Which.
        kind: u16,
        /// Whose.
        of: String,
        /// What is wrong.
        what: &'static str,
    },
    /// For a machine of another shape.
    #[error("it is of a VM with {there}, and this one has {here}: start `irlm vmm --incoming` with the same")]
    Shape {
        /// Saved.
        there: String,
        /// Made here.
        here: String,
    },
}
