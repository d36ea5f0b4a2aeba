//! `irlm-lab selftest`: the lab must be right before anything measured in it is believed.

use crate::opts::SpecArgs;
use anyhow::{Result, bail};
use irlm_tests::cache::Cache;
use irlm_tests::lab::Lab;
use irlm_tests::plain;
use std::time::{Duration, Instant};

#[derive(clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    spec: SpecArgs,
    /// Pages a second that each guest writes while it is moved
    #[arg(long, default_value_t = 0)]
    writers: u32,
    /// Plain pre-copy only, without multifd and zstd
    #[arg(long)]
    plain_only: bool,
}

pub(crate) fn run(a: &Args) -> Result<()> {
    let cache = Cache::open()?;
    let spec = a.spec.spec(&cache)?;
    let lab = Lab::new(cache, spec, &|line| println!("{line}"))?;
    let mut failed = 0;
    for multifd in [false, true] {
        if multifd && a.plain_only {
            continue;
        }
        let start = Instant::now();
        let mut guests = lab.start_guests()?;
        println!("{} guests restored and running in {:.1?}", guests.pairs.len(), start.elapsed());
        if !multifd {
            let c = guests.census()?;
            let share = |n: u64| n as f64 / c.content as f64;
            println!(
                "memory: {} pages, {} with content; distinct by host {:.3} of them, in the rack {:.3}",
                c.pages,
                c.content,
                share(c.per_host),
                share(c.rack)
            );
        }
        if a.writers > 0 {
            guests.start_writers(a.writers, 2048)?;
        }
        let before = lab.net.core_bytes()?;
        let (moved, group) = plain::migrate(&lab, &mut guests, multifd, Duration::from_secs(600))?;
        let wire = lab.net.core_bytes()?.since(before);
        println!(
            "{}: group {:.1?}, core link {:.1} MB forward in {} packets, {:.1} MB back",
            if multifd { "multifd+zstd" } else { "plain" },
            group,
            wire.forward as f64 / 1e6,
            wire.forward_packets,
            wire.back as f64 / 1e6
        );
        if wire.forward < 1_000_000 || wire.forward / wire.forward_packets.max(1) > 1514 {
            bail!("the core link's counters cannot be right: {wire:?}");
        }
        for m in &moved {
            println!("  {}: {} ms, downtime {} ms", m.name, m.total_ms, m.downtime_ms);
        }
        for p in &mut guests.pairs {
            let start = Instant::now();
            let c = match lab.compare(p) {
                Ok(c) => c,
                Err(e) => {
                    failed += 1;
                    println!("  {e:#}");
                    continue;
                }
            };
            let compared = start.elapsed();
            p.resume_and_check()?;
            println!(
                "  {}: {} bytes of memory identical ({compared:.1?}); the service answers",
                p.name, c.bytes
            );
        }
    }
    if failed > 0 {
        bail!("the memory of {failed} guests differs after plain QEMU's migration");
    }
    println!("selftest passed");
    Ok(())
}
