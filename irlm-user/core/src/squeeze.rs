//! Compression of page contents on their way between agents: how a body is laid out (`body`), and whether and how hard
//! a connection compresses (`control`). Decisions 0006 and 0009 say why it is done so.
//!
//! One [`Squeezer`] at the sending end of a connection and one [`Unsqueezer`] at the receiving end, frame by frame in the
//! same order. `flow::squeeze` is the only caller in the program.

// The body of a compressed frame.
mod body;
// The level, chosen as it goes.
mod control;
// What a group wants.
mod mode;

pub use body::{Squeezed, Squeezer, Unsqueezer, compressible};
pub use control::{Control, Learnt, Sample};
pub use mode::{LEVELS, Mode};

#[cfg(test)]
mod tests;
