//! Agents, groups and what they say to each other: configuration, the control protocol, the per-VM journal, the
//! plain-QEMU methods and the group's coordinator. Control never touches pages.

// The per-host daemon.
pub mod agent;
// What an agent touches for a caller.
pub mod allow;
// The words of the control protocol.
pub mod api;
// The caller's side of the control protocol.
pub mod client;
// Configuration files, parsed once into typed values.
pub mod config;
// What the group's coordinator does.
pub mod coordinator;
// The per-VM record that survives a crash.
pub mod journal;
// Who owns a VM, by all records of this host.
pub mod registry;
// Lines of JSON on a socket, capped and with a deadline.
pub mod lines;
// The methods `oc` and `qemu-multifd-zstd`: plain QEMU, nobody in the path.
pub mod plain;
// How a group moves, resolved once.
pub mod recipe;
// The port's policy file.
pub mod policy;
// The port's class tree and tags.
pub mod shape;
// What files, protocol and records have in common.
pub mod terms;
// Control connections, in plain text or under TLS.
mod socket;
// A VMM's control socket, its side.
pub mod vmm;
