//! Types that both the eBPF programs and user space name. A type enters only if an eBPF program names it.
#![no_std]
