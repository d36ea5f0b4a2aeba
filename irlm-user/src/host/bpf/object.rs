//! The programs that this build carries.

/// The eBPF object of this build; empty if it was built without one.
pub static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/irlm-ebpf"));
