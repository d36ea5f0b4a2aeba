//! The door to the eBPF build, so that the other tasks need not know how (or whether) this tree builds it.

use crate::ctx::Ctx;
use anyhow::Result;
use std::path::PathBuf;

/// The built eBPF object; `None`, with the reason printed, where there is nothing to build.
pub(crate) fn object(ctx: &Ctx) -> Result<Option<PathBuf>> {
    if !ctx.root.join("irlm-ebpf/Cargo.toml").is_file() {
        println!("ebpf: skipped, this tree has no irlm-ebpf crate; flows are not counted by eBPF");
        return Ok(None);
    }
    crate::task_ebpf::ensure(!ctx.install).map(Some)
}
