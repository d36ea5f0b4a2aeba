//! Sockets and what is spoken on them, below any decision: blocking, with deadlines, and with a cap on every length.

// Frames over TCP.
pub mod conn;
// A TCP connection, in plain text or under TLS.
pub mod connection;
// How many strangers a port holds, and who makes room.
pub mod gate;
// How a connection between agents begins.
pub mod greeting;
// What whoever calls says first.
pub mod hello;
// UDP multicast.
pub mod mcast;
// QEMU's monitor.
pub mod qmp;
// A connection's end for a process that knows nothing of TLS.
pub mod relay;
// Qdiscs and classes, by rtnetlink.
pub mod tc;
// Certificates, and what TLS connections stand on.
pub mod tls;
// A VM of our own front.
pub mod vmm;
