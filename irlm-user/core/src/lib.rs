//! The pure floor of IRLM: everything that is decided. It has no sockets, no clock and no unsafe code, so two whole
//! racks run in one process under a virtual clock.
#![forbid(unsafe_code)]

// Every page of a VM accounted for, at both ends of its move.
pub mod account;
// The group's budget on the core link, divided among its source hosts.
pub mod budget;
// Multicast in the target rack: who sends what when, what is lost, and how it is made up for.
pub mod cast;
// Durations where one moment was stamped by somebody else's wall clock.
pub mod clock;
// A page as its difference from another one.
pub mod delta;
// Whether QEMUs stream to each other.
pub mod direct;
// Content hashes and the zero/uniform test.
pub mod digest;
// How a migration will go, and in which order VMs leave.
pub mod forecast;
// Who owns a VM: the handover between its two agents.
pub mod handover;
// Where a guest writes, and how often.
pub mod heat;
// Pages of a QEMU stream that are worth sending only once.
pub mod hold;
// Who a peer is by its certificate, and what it may ask for.
pub mod identity;
// The rack index: digest to holders, and the page ids it gives out.
pub mod index;
// Digests of pages that have not been written since.
pub mod kept;
// When a VM runs at its target.
pub mod migration;
// Contents of one source host that pages of others resemble, and who lends them to whom.
pub mod models;
// Where a connection comes from.
pub mod origin;
// A set of pages of one VM.
pub mod page_set;
// Source host's dedup table towards one target host.
pub mod pair;
// The share plan: who carries which shared content, to whom.
pub mod plan;
// What a port's packets may use: the policy and its class tree.
pub mod policy;
// Rounds of a VM whose dirty log is at hand.
pub mod precopy;
// A VM that runs at its target while pages still come.
pub mod postcopy;
// QEMU's migration stream: taken apart at the source, re-made at the target.
pub mod qemu;
// What a VM's memory comes to while it stands still.
pub mod ram;
// Frames in plain text that cannot be changed unseen.
pub mod seal;
// Similar pages, found by a few numbers.
pub mod sketch;
// One VM's departure.
pub mod source;
// Compressing contents on their way.
pub mod squeeze;
// When a further VM leaves beside others.
pub mod stagger;
// Content-addressed pages of a target host.
pub mod store;
// One VM's arrival and the target host's shared state.
pub mod arrival;
// How much of what all share one caller may have.
pub mod quota;
// Page size, page addresses, host and VM numbers.
pub mod units;
// How the state of a VM of our own front travels.
pub mod vm_state;
// The wire between agents, and to the index.
pub mod wire;
