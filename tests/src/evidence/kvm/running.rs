//! Guests that run before their pages are there: how soon they run, and how long they wait for a page.

use super::super::{Only, Point, at_most, unmeasured};
use super::{Rack, STRIDE, WAIT, like, say};
use anyhow::{Context as _, Result, ensure};
use clap::Parser as _;
use irlm_tests::echo;
use irlm_tests::kvm::{Image, KvmGuest};
use irlm_tests::lab::Lab;
use irlm_tests::mixed::{Mixed, Moved};
use irlm_tests::net::{Host, Rates};
use irlm_tests::payload::Payload;
use irlm_tests::qemu::Role;
use irlm_tests::report::{Panel, panels};
use irlm_tests::steps::Steps;
use irlm_tests::workload::Workload;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Sizes of the guests that are resumed, MiB.
const SIZES: [u32; 4] = [64, 256, 1024, 2048];
const RUNS: usize = 3;
/// Moves until a guest touches a page that is to be forwarded.
const TRIES: usize = 4;

/// How soon a guest ran.
#[derive(Clone, Copy, Debug)]
struct Resumed {
    /// From the moment the source was asked to stop it until the source heard that it runs, milliseconds.
    told: f64,
    /// Until the first write of its own at the target, which waits for the pages it takes.
    wrote: f64,
}

impl Rack<'_> {
    pub(super) fn resume(&self, points: &mut Vec<Point>, out: &Path, only: &Only) -> Result<()> {
        let lab = self.lab(&[])?;
        let mut rows = Vec::new();
        for mib in SIZES {
            let work = Steps { vcpus: 1, first: 4096, pages: 503, stride: STRIDE % 503, spin: 500 };
            let image = self.sized(&lab, mib, work)?;
            let images = [(0, image)];
            let mut runs =
                (0..RUNS).map(|_| self.resumed(&lab, &images, work)).collect::<Result<Vec<_>>>()?;
            runs.sort_by(|a, b| a.told.total_cmp(&b.told));
            say(&format!("  {mib} MiB: {runs:?}"));
            rows.push((mib, runs));
        }
        let median = |runs: &[Resumed], of: fn(&Resumed) -> f64| {
            let mut v: Vec<f64> = runs.iter().map(of).collect();
            v.sort_by(f64::total_cmp);
            v[v.len() / 2]
        };
        let told: Vec<f64> = rows.iter().map(|(_, r)| median(r, |r| r.told)).collect();
        let wrote: Vec<f64> = rows.iter().map(|(_, r)| median(r, |r| r.wrote)).collect();
        let names: Vec<String> = SIZES.iter().map(|s| format!("{s} MiB")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let file = out.join("resume.svg");
        let panel = |title, values| Panel { title, names: &names, values, digits: 1, line: Some(30.0) };
        panels(
            &[
                panel("until it runs at the target, ms", &told),
                panel("until its first write there, ms", &wrote),
            ],
            &file,
        )?;
        let list = |v: &[f64]| v.iter().map(|x| format!("{x:.1}")).collect::<Vec<_>>().join(", ");
        let how = format!(
            "post-copy of one guest that writes throughout, {RUNS} moves a size, medians for 64, 256, 1024, 2048 MiB: from the \
             request to stop it until the source heard that it runs {} ms; until the guest's first own write at the target \
             {} ms; drawn in {}",
            list(&told),
            list(&wrote),
            file.display()
        );
        if only.wants("2-resume-256") {
            at_most(
                points,
                "2-resume-256",
                "ms until a 256 MiB guest's first write at the target",
                &how,
                wrote[1],
                30.0,
            )?;
        }
        if only.wants("2-resume-sizes") {
            let most = wrote.iter().copied().fold(0.0, f64::max);
            at_most(
                points,
                "2-resume-sizes",
                "ms until the first write, slowest of the sizes",
                &how,
                most,
                30.0,
            )?;
        }
        Ok(())
    }

    fn sized(&self, lab: &Lab, mib: u32, work: Steps) -> Result<Image> {
        let guest =
            KvmGuest { work: Workload::Steps(work), mib: Some(mib), ..KvmGuest::new(like(Role::Db, 0), 0) };
        let _ = std::fs::remove_file(lab.top().join(format!("{}.memory", guest.name())));
        guest.image(lab, &self.cache, &say)
    }

    /// Moves the guest and watches its own count at the target.
    fn resumed(&self, lab: &Lab, images: &[(usize, Image)], work: Steps) -> Result<Resumed> {
        let mut m = Mixed::start(lab, self.irlm, images, "migration = \"post-copy\"", vec![])?;
        let memory = m.kvm[0].target.memory()?;
        let mut evacuate = m.evacuate(false)?;
        let until = Instant::now() + WAIT;
        let mut first = None;
        let wrote = loop {
            let mut page = [0; 4096];
            memory.read(work.control_page(0), &mut page)?;
            let seen = Steps::seen(&page);
            let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64;
            if seen.started {
                match first {
                    None => first = Some(seen.step),
                    Some(step) if seen.step > step => break at,
                    Some(_) => {}
                }
            }
            ensure!(Instant::now() < until, "the guest does not run at its target: {}", m.said());
            std::thread::sleep(Duration::from_micros(if first.is_some() { 50 } else { 200 }));
        };
        let code = evacuate.wait(WAIT)?;
        ensure!(code == 0, "irlm evacuate ended with {code}: {}\n{}", evacuate.said(), m.said());
        m.kvm[0].check_running(&images[0].1)?;
        let report = m.report()?;
        let vm = &report["vms"][0];
        let stopped = vm["source_status"]["stopped_ns"].as_u64().context("no stopped_ns")?;
        Ok(Resumed {
            told: vm["downtime_ms"].as_f64().context("no downtime_ms")?,
            wrote: wrote.saturating_sub(stopped) as f64 / 1e6,
        })
    }

    pub(super) fn faults(&self, points: &mut Vec<Point>, only: &Only) -> Result<()> {
        if only.wants("3-source") {
            self.source_waits(points)?;
        }
        if only.wants("3-forward") {
            self.forward_waits(points)?;
        }
        if only.wants("3-store") {
            self.store_waits(points)?;
        }
        Ok(())
    }

    fn idle(&self, hosts: usize) -> Result<Lab> {
        let base = super::Spec::parse_from(["lab"]).spec.spec(&self.cache)?;
        let spec = irlm_tests::lab::LabSpec { hosts: vec![vec![]; hosts], rates: Rates::NONE, ..base };
        Lab::new(self.cache.clone(), spec, &say)
    }

    /// Nothing but what is asked for crosses the link.
    fn source_waits(&self, points: &mut Vec<Point>) -> Result<()> {
        let lab = self.idle(1)?;
        let trip = echo::round_trip(&lab.net, Host::Target(0), Host::Source(0))?;
        let images = [(0, self.stepping(&lab, 1, 500)?)];
        let args = vec!["--drill-hold-filling".to_owned(), "6000".to_owned()];
        let moved =
            Mixed::start(&lab, self.irlm, &images, "migration = \"post-copy\"", args)?.move_running(WAIT)?;
        let waits = waits(&moved, 0, "source")?;
        let bound = 1.5 * trip + 100.0;
        let how = format!(
            "unshaped links, median round trip of one byte over TCP {trip:.0} µs, so at most {bound:.0} µs; the filling held \
             for 6 s, one guest touching pages in no order: {waits}"
        );
        let median = waits["p50_us"].as_f64().context("no p50_us")?;
        at_most(
            points,
            "3-source",
            "median wait for a page of the source by its bound",
            &how,
            median / bound,
            1.0,
        )
    }

    /// Edge links of 100 Mbit/s, full of what target hosts pass on.
    fn forward_waits(&self, points: &mut Vec<Point>) -> Result<()> {
        let what =
            "median wait of a vCPU for a page that is to be forwarded, by that of a page nobody waits for";
        let lab = self.lab(&[])?;
        let images = self.sharing(&lab)?;
        let p50 = |w: &Value| w["p50_us"].as_f64().unwrap_or(0.0);
        // Where a guest is in its round when it is moved decides whether it touches such pages at all.
        for _ in 0..TRIES {
            let extra = "migration = \"post-copy\"";
            let moved = Mixed::start(&lab, self.irlm, &images, extra, vec![])?.move_running(WAIT)?;
            let both = |vm| Some((waits(&moved, vm, "held").ok()?, waits(&moved, vm, "behind").ok()?));
            let seen: Vec<(Value, Value)> = (0..2).filter_map(both).collect();
            if seen.is_empty() {
                continue;
            }
            // Of the guest to whose favour it was least.
            let worst = seen.iter().map(|(h, b)| p50(h) / p50(b).max(1.0)).fold(0.0, f64::max);
            let list: Vec<String> = seen
                .iter()
                .map(|(h, b)| format!("vCPUs {h}, of such pages that no vCPU waited for {b}"))
                .collect();
            let how = format!(
                "two hosts with 100 Mbit/s edges, full of the filling and of what target hosts pass on: waits for pages that another \
                 target host was to bring: {}",
                list.join("; ")
            );
            return at_most(points, "3-forward", what, &how, worst, 0.5);
        }
        unmeasured(points, "3-forward", what, &format!("in {TRIES} moves no guest touched such a page"))
    }

    /// A guest on each of two hosts, with much that both have in pages not written yet.
    fn sharing(&self, lab: &Lab) -> Result<Vec<(usize, Image)>> {
        let mut images = Vec::new();
        for (host, seed) in [(0, 0), (1, 1)] {
            let payload = Payload { cold: 4096..40_000, hot: 0..0, ticks: 1_000_000, spin: 0 };
            let guest = KvmGuest {
                work: Workload::Rounds(payload),
                ..KvmGuest::new(irlm_tests::qemu::Guest { role: Role::Web, seed, mem_mib: 256 }, 0)
            };
            images.push((host, guest.image(lab, &self.cache, &say)?));
        }
        Ok(images)
    }

    /// Contents that were pushed before, placed only where a vCPU waits.
    fn store_waits(&self, points: &mut Vec<Point>) -> Result<()> {
        let lab = self.idle(2)?;
        let images = self.sharing(&lab)?;
        let args = vec!["--drill-hold-placing".to_owned(), "6000".to_owned()];
        let moved =
            Mixed::start(&lab, self.irlm, &images, "migration = \"post-copy\"", args)?.move_running(WAIT)?;
        let both = [waits(&moved, 0, "store")?, waits(&moved, 1, "store")?];
        let slowest = both.iter().filter_map(|w| w["p50_us"].as_f64()).fold(0.0, f64::max);
        let count: u64 = both.iter().filter_map(|w| w["count"].as_u64()).sum();
        ensure!(count > 0, "no fault was answered from the store: {}", moved.report);
        let how = format!(
            "two hosts, contents that both have pushed before; for 6 s pages are placed only where a vCPU waits: {} and {}",
            both[0], both[1]
        );
        at_most(points, "3-store", "median wait for a page in the store, µs", &how, slowest, 50.0)
    }
}

/// How long a VM's vCPUs waited for pages of this origin.
fn waits(moved: &Moved, vm: usize, origin: &str) -> Result<Value> {
    let mut waits = moved.report["vms"][vm]["target_status"]["faults"][origin].clone();
    ensure!(waits["count"].as_u64() > Some(0), "VM {vm}: no fault of origin {origin}: {}", moved.report);
    if let Some(w) = waits.as_object_mut() {
        w.remove("histogram");
    }
    Ok(waits)
}
