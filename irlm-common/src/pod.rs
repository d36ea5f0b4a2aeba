//! Lets user space read and write the shared types as map keys and values. Apart from the types, because the eBPF
//! build has no aya.

use crate::dirty::{DirtyConfig, PageEvent, RegionKey, SlotKey, SlotPlace, VmTotals};
use crate::{Counter, FlowKey};

// SAFETY: repr(C), only integers and byte arrays, padding explicit (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for FlowKey {}
// SAFETY: repr(C), four u64 without padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for Counter {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for DirtyConfig {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for VmTotals {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for RegionKey {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for SlotKey {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for SlotPlace {}
// SAFETY: repr(C), only integers, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for PageEvent {}
