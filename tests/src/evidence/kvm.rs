//! The KVM front's points: identity while guests write, what hashing costs, and groups of both kinds.

use super::{Only, Point, at_most, unmeasured};
use crate::opts::SpecArgs;
use anyhow::{Context as _, Result};
use clap::Parser as _;
use irlm_tests::cache::Cache;
use irlm_tests::kvm::{Image, KvmGuest};
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::mixed::{Mixed, Moved};
use irlm_tests::qemu::{Guest, Role};
use irlm_tests::steps::Steps;
use irlm_tests::workload::Workload;
use std::path::Path;
use std::time::Duration;

// Every party killed in every phase.
mod killing;
// The sampler and the dirty ring.
mod sampled;
// Guests that run before their pages are there.
mod running;

/// Ticks of the time stamp counter between two writes of a guest that hardly writes, as QEMU's guests here: idle servers.
const CALM: u32 = 100_000_000;
/// Pages that each processor of a stepping guest writes, how far it jumps from one to the next, and how long it idles between.
const SET: u32 = 2003;
const STRIDE: u32 = 701;
const SPIN: u32 = 2000;
const WAIT: Duration = Duration::from_secs(240);

#[derive(clap::Parser)]
struct Spec {
    #[command(flatten)]
    spec: SpecArgs,
}

pub(super) fn points(irlm: &Path, out: &Path, only: &Only) -> Result<Vec<Point>> {
    let mut points = Vec::new();
    if let Err(why) = irlm_tests::kvm::usable(irlm) {
        unmeasured(&mut points, "1-identical", "guests of our own VMM", &why)?;
        return Ok(points);
    }
    let rack = Rack { irlm, cache: Cache::open()? };
    for vcpus in [1, 2, 4] {
        if only.wants_some(&format!("1-{vcpus}-")) {
            rack.identical(&mut points, vcpus, only)?;
        }
    }
    if only.wants_some("2-") {
        rack.resume(&mut points, out, only)?;
    }
    if only.wants_some("3-") {
        rack.faults(&mut points, only)?;
    }
    if only.wants_some("4-") {
        rack.hashing(&mut points, only)?;
    }
    if only.wants_some("5-") {
        rack.both_kinds(&mut points, only)?;
    }
    if only.wants("7-sampling") {
        sampled::same_set(&mut points, irlm)?;
    }
    if only.wants("6-table") {
        killing::table(&mut points, irlm, out)?;
    }
    Ok(points)
}

struct Rack<'a> {
    irlm: &'a Path,
    cache: Cache,
}

fn say(line: &str) {
    eprintln!("{line}");
}

fn like(role: Role, seed: u32) -> Guest {
    Guest { role, seed, mem_mib: 256 }
}

/// The four guests of a 2×2 rack, by host.
fn four() -> [(usize, Guest); 4] {
    [(0, like(Role::Web, 0)), (0, like(Role::Db, 0)), (1, like(Role::Web, 1)), (1, like(Role::Idle, 0))]
}

impl Rack<'_> {
    fn lab(&self, qemu: &[(usize, Guest)]) -> Result<Lab> {
        let base = Spec::parse_from(["lab"]).spec.spec(&self.cache)?;
        let of = |h: usize| qemu.iter().filter(|(host, _)| *host == h).map(|(_, g)| g.clone()).collect();
        Lab::new(self.cache.clone(), LabSpec { hosts: vec![of(0), of(1)], ..base }, &say)
    }

    fn images(
        &self,
        lab: &Lab,
        kvm: &[(usize, Guest)],
        ticks: u32,
        args: &[String],
    ) -> Result<Vec<(usize, Image)>> {
        let image = |(host, g): &(usize, Guest)| {
            let guest = KvmGuest { args: args.to_vec(), ..KvmGuest::new(g.clone(), ticks) };
            Ok((*host, guest.image(lab, &self.cache, &say)?))
        };
        kvm.iter().map(image).collect()
    }

    /// Moves a rack of these guests and looks at all of it.
    fn moved(&self, qemu: &[(usize, Guest)], kvm: &[(usize, Guest)]) -> Result<Moved> {
        let lab = self.lab(qemu)?;
        let images = self.images(&lab, kvm, CALM, &[])?;
        Mixed::start(&lab, self.irlm, &images, "", vec![])?.move_all(WAIT)
    }

    /// A guest with the memory of a real one whose processors write and check pages throughout.
    fn stepping(&self, lab: &Lab, vcpus: u32, spin: u32) -> Result<Image> {
        let work = Steps { vcpus, first: 4096, pages: SET, stride: STRIDE, spin };
        let guest = KvmGuest {
            work: Workload::Steps(work),
            args: vec!["--vcpus".to_owned(), vcpus.to_string()],
            ..KvmGuest::new(like(Role::Db, 0), 0)
        };
        guest.image(lab, &self.cache, &say)
    }

    fn identical(&self, points: &mut Vec<Point>, vcpus: u32, only: &Only) -> Result<()> {
        let lab = self.lab(&[])?;
        let images = [(0, self.stepping(&lab, vcpus, SPIN)?)];
        for migration in ["pre-copy", "post-copy", "hybrid"] {
            let id = format!("1-{vcpus}-{migration}");
            if !only.wants(&id) {
                continue;
            }
            let start = || {
                let extra = format!("migration = {migration:?}");
                Mixed::start(&lab, self.irlm, &images, &extra, vec![])
            };
            let moved = start()?.move_all(WAIT)?;
            let mut how = format!(
                "a guest with the memory of a real one and {vcpus} vCPUs that write and check pages throughout, {migration}: \
                 {} bytes of target memory compared with the source's and with the model of what each page must hold at \
                 each vCPU's step, and all other state with the source's; then it ran on without missing a step",
                moved.compared
            );
            if migration != "pre-copy" {
                let ran = start()?.move_running(WAIT)?;
                let vm = &ran.report["vms"][0];
                how.push_str(&format!(
                    "; moved again, running at its target while its pages came ({} faults in {:.0} ms): the model holds",
                    vm["target_status"]["faults"]["all"]["count"],
                    vm["fill_ms"].as_f64().unwrap_or(0.0)
                ));
            }
            // A guest that is not as it must be is an error, so that this point is here is the proof.
            let what = "guests whose memory, state or work was not what it must be";
            at_most(points, &id, what, &how, 0.0, 0.0)?;
        }
        Ok(())
    }

    /// The same memory, once under QEMU and once under our VMM.
    fn hashing(&self, points: &mut Vec<Point>, only: &Only) -> Result<()> {
        if only.wants("4-hashing") {
            let spent =
                |m: &Moved| m.report["totals"]["hash_ms"].as_f64().context("the report has no hash_ms");
            let pages = |m: &Moved, what: &str| m.report["totals"]["pages"][what].as_u64().unwrap_or(0);
            let qemu = self.moved(&four(), &[])?;
            let kvm = self.moved(&[], &four())?;
            let (q, k) = (spent(&qemu)?, spent(&kvm)?);
            let how = format!(
                "2x2 guests of 256 MiB with the same memory, method irlm; processor time of hashing at the source hosts \
                 after preparation, pushes included: QEMU {q:.0} ms ({} pages hashed as they left), our VMM {k:.1} ms ({} \
                 hashed, {} under a kept digest)",
                pages(&qemu, "hashed"),
                pages(&kvm, "hashed"),
                pages(&kvm, "kept")
            );
            at_most(
                points,
                "4-hashing",
                "hashing time of the KVM front by QEMU's",
                &how,
                k / q.max(1e-9),
                0.1,
            )?;
        }
        if only.wants("4-stale") {
            self.stale(points)?;
        }
        Ok(())
    }

    /// A page changes behind the dirty log's back between preparation and departure.
    fn stale(&self, points: &mut Vec<Point>) -> Result<()> {
        let lab = self.lab(&[])?;
        let images = self.images(&lab, &four()[..1], CALM, &[])?;
        let args = vec!["--drill-prove-digests".to_owned()];
        let m = Mixed::start(&lab, self.irlm, &images, "", args)?;
        let why = m.plant_stale_pages(WAIT)?;
        let how = format!(
            "a page of a prepared guest was changed through its memory file, which no dirty log sees; \
             --drill-prove-digests then said: {why}"
        );
        let caught = why.contains("is stale");
        at_most(
            points,
            "4-stale",
            "planted stale digests that were not caught",
            &how,
            f64::from(u8::from(!caught)),
            0.0,
        )
    }

    fn both_kinds(&self, points: &mut Vec<Point>, only: &Only) -> Result<()> {
        if !only.wants("5-bytes") {
            return Ok(());
        }
        let [a, b, c, d] = four();
        let (qemu, kvm) = ([a, c], [b, d]);
        let alone = [self.moved(&qemu, &[])?, self.moved(&[], &kvm)?];
        let both = self.moved(&qemu, &kvm)?;
        let apart: u64 = alone.iter().map(|m| m.core.forward).sum();
        let how = format!(
            "2x2 guests of 256 MiB, one of QEMU's and one of our VMM's on each host, moved in one go: {} bytes on the core \
             link; the two halves moved by themselves: {apart}; {} bytes of memory compared",
            both.core.forward, both.compared
        );
        let ratio = both.core.forward as f64 / apart as f64;
        at_most(
            points,
            "5-bytes",
            "core-link bytes of the mixed group by those of its halves",
            &how,
            ratio,
            0.9,
        )
    }
}
