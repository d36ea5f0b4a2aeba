//! What `cargo xtask mutate` is made of.

// The patches.
pub(crate) mod patch;
// What a run of tests came to.
pub(crate) mod seen;
// The copy of the tree.
pub(crate) mod tree;
