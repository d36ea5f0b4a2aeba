//! Lets user space read and write the shared types as map keys and values. Apart from the types, because the eBPF
//! build has no aya.

use crate::dirty::{DirtyConfig, PageEvent, RegionKey, SlotKey, SlotPlace, VmTotals};
use crate::filter::Word;
use crate::policy::{Policy, State};
use crate::{Counter, Events, Flow, FlowKey};

// SAFETY: repr(C), only integers and byte arrays, no padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for FlowKey {}
// SAFETY: repr(C), one u32.
unsafe impl aya::Pod for Flow {}
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
// SAFETY: repr(C), nine u64 without padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for Events {}
// SAFETY: repr(C), one u64.
unsafe impl aya::Pod for Word {}
// SAFETY: repr(C), u32 and structs of four u8 and two u32, no padding (sizes asserted), every bit pattern is valid.
unsafe impl aya::Pod for Policy {}
// SAFETY: repr(C), three u32 and bytes without padding (size asserted), every bit pattern is valid.
unsafe impl aya::Pod for State {}
