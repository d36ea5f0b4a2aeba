//! The rack lab: two racks of real QEMU guests on one machine, with network namespaces as hosts, so that what IRLM
//! promises is measured and proven on the real thing. `irlm-lab` is its program; `cargo xtask lab` builds and runs it.

// Nanoseconds that the classifier costs a packet.
pub mod bpf_cost;
// Random moves with random faults.
pub mod campaign;
// What `cargo xtask setup` left in the cache.
pub mod cache;
// Ways to compress what crosses the core link, compared on saved guests.
pub mod codecs;
// Virtio devices, driven by a payload.
pub mod drivers;
// Packets made and read independently.
pub mod frames;
// IRLM's daemons and commands on the lab's hosts.
pub mod irlm;
// One run's leftovers, and how they always go away.
pub mod janitor;
// Certificates for the lab's hosts.
pub mod keys;
// Guests of our own VMM.
pub mod kvm;
// Two racks of guests, put together.
pub mod lab;
// A man in the middle.
pub mod middle;
// What the target rack's own links carry, with multicast or without.
pub mod multicast;
// Groups of both kinds of guests.
pub mod mixed;
// Hosts, switches and links.
pub mod net;
// Other people's traffic over the core link.
pub mod others;
// A guest whose writes are known.
pub mod payload;
// Plain QEMU migration, driven by the lab itself.
pub mod plain;
// Rates at ports, over short windows.
pub mod ports;
// Where processor time goes.
pub mod profile;
// One QEMU process.
pub mod qemu;
// QEMU's control socket.
pub mod qmp;
// The proof: guest memory compared byte by byte.
pub mod ram;
// The table, the JSON and the picture.
pub mod report;
// One method from start to end.
pub mod round;
// Sampling of dirtied pages, measured.
pub mod sampling;
// Questions to a guest's service.
pub mod service;
// Of every guest exactly one copy runs.
pub mod settle;
// Every method at several link speeds.
pub mod speeds;
// Compression of real guests' memory, measured.
pub mod squeezed;
// Booted guests, kept for later runs.
pub mod states;
// The lab's round trip.
pub mod echo;
// What TLS costs a byte.
pub mod tls_speed;
// A guest of several processors whose memory can be predicted.
pub mod steps;
// A distribution's kernel, unpacked.
pub mod vmlinux;
// A test's moment that did not come.
pub mod unmet;
// Two hosts and a captured wire.
pub mod wire;
// What guests of our own VMM do, and what their pages must hold.
pub mod workload;
