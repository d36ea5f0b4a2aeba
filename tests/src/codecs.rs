//! What crosses the core link once, and how small coders make it: from saved guests alone, without a lab, so that the
//! figures of docs/decisions/0010 can be repeated in a minute on any machine that has booted the guests once.

// Which contents leave which host in which order.
mod corpus;
// Ways to put frames of contents into bytes.
mod coders;
// Ways to find a similar page, against the most similar one there is.
mod finders;

pub use coders::{Coder, Coding, Scope, all, measure};
pub use corpus::Corpus;
pub use finders::{Finder, Recall, recall};
