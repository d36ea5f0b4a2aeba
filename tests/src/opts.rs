//! Options that several commands of the lab share.

use anyhow::{Result, bail};
use irlm_tests::cache::Cache;
use irlm_tests::lab::LabSpec;
use irlm_tests::net::Rates;
use std::path::PathBuf;

/// The size and the rates of a lab.
#[derive(clap::Args, Clone, Debug)]
pub(crate) struct SpecArgs {
    /// Source hosts; as many target hosts are made
    #[arg(long, default_value_t = 2)]
    pub(crate) hosts: usize,
    /// Guests on each source host
    #[arg(long, default_value_t = 2)]
    pub(crate) guests: usize,
    /// Memory of a guest, MiB
    #[arg(long, default_value_t = 256)]
    pub(crate) mem: u32,
    /// Rate between a host and its switch, Mbit/s
    #[arg(long, default_value_t = 100)]
    pub(crate) edge: u64,
    /// Rate of the core link, Mbit/s
    #[arg(long, default_value_t = 1000)]
    pub(crate) core: u64,
    /// No rates at all
    #[arg(long)]
    pub(crate) unshaped: bool,
    /// QEMU on both sides: 7.2, 10.0, or the path of a program
    #[arg(long, default_value = "7.2")]
    pub(crate) qemu: String,
    /// QEMU on the target side, if another one
    #[arg(long)]
    pub(crate) qemu_target: Option<String>,
}

impl SpecArgs {
    /// What the lab is made of.
    pub(crate) fn spec(&self, cache: &Cache) -> Result<LabSpec> {
        if self.hosts == 0 || self.guests == 0 || !(128..=4096).contains(&self.mem) {
            bail!("a lab has at least one host and one guest, and guests have 128 to 4096 MiB");
        }
        let mut spec = LabSpec::new(cache, self.hosts, self.guests, self.mem);
        let rate = |mbit: u64| (!self.unshaped).then_some(mbit.max(1) * 1_000_000);
        spec.rates = Rates { edge: rate(self.edge), core: rate(self.core) };
        spec.qemu_source = qemu(cache, &self.qemu);
        spec.qemu_target = qemu(cache, self.qemu_target.as_deref().unwrap_or(&self.qemu));
        Ok(spec)
    }
}

/// The program that `--qemu` means.
pub(crate) fn qemu(cache: &Cache, which: &str) -> PathBuf {
    match which {
        "7.2" | "10.0" => cache.qemu(which),
        path => path.into(),
    }
}
