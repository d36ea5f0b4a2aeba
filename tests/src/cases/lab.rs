//! The lab must be right before anything measured in it is believed: plain QEMU, no IRLM.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, bail};
use irlm_tests::janitor;
use irlm_tests::keys::Keys;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::net::{Host, Rates};
use irlm_tests::plain;
use irlm_user::core::identity::Role;
use serde_json::json;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "lab-plain-7.2",
        needs: &[Need::Qemu("7.2")],
        takes: Takes::Heavy,
        run: |b| moved(b, "7.2", "7.2"),
    },
    Case {
        name: "lab-plain-10.0",
        needs: &[Need::Qemu("10.0")],
        takes: Takes::Heavy,
        run: |b| moved(b, "10.0", "10.0"),
    },
    Case {
        name: "lab-plain-7.2-to-10.0",
        needs: &[Need::Qemu("7.2"), Need::Qemu("10.0")],
        takes: Takes::Heavy,
        run: |b| moved(b, "7.2", "10.0"),
    },
    Case {
        name: "lab-plain-tls-7.2",
        needs: &[Need::Qemu("7.2")],
        takes: Takes::Heavy,
        run: |b| encrypted(b, "7.2"),
    },
    Case {
        name: "lab-plain-tls-10.0",
        needs: &[Need::Qemu("10.0")],
        takes: Takes::Heavy,
        run: |b| encrypted(b, "10.0"),
    },
    Case { name: "lab-compare-sees-one-byte", needs: &[], takes: Takes::Alone, run: one_byte },
    Case { name: "lab-rates", needs: &[], takes: Takes::Alone, run: rates },
    Case { name: "lab-core-cut", needs: &[], takes: Takes::Alone, run: core_cut },
    Case { name: "lab-crash-leaves-nothing", needs: &[], takes: Takes::Alone, run: crash },
    Case { name: "lab-interrupt-leaves-nothing", needs: &[], takes: Takes::Alone, run: interrupt },
];

/// A small lab without rates: one host, web and db.
fn small(b: &Bench, source: &str, target: &str) -> Result<Lab> {
    let mut spec = LabSpec::new(&b.cache, 1, 2, 256);
    spec.rates = Rates::NONE;
    spec.qemu_source = b.cache.qemu(source);
    spec.qemu_target = b.cache.qemu(target);
    Lab::new(b.cache.clone(), spec, &say)
}

/// Guests that keep writing move, are identical, and serve.
fn moved(b: &Bench, source: &str, target: &str) -> Result<()> {
    let lab = small(b, source, target)?;
    let mut guests = lab.start_guests()?;
    guests.start_writers(300, 2048)?;
    let before = lab.net.core_bytes()?;
    plain::migrate(&lab, &mut guests, false, Duration::from_secs(120))?;
    let bytes = lab.net.core_bytes()?.since(before).forward;
    // Two guests with at least 100 MB of content each, and never more than three times their memory.
    if !(200_000_000..1_600_000_000).contains(&bytes) {
        bail!("{bytes} bytes on the core link cannot be two guests of 256 MiB");
    }
    for p in &mut guests.pairs {
        lab.compare(p)?;
        p.resume_and_check()?;
    }
    Ok(())
}

/// QEMU takes the lab's certificates for its own TLS, and no others: a target lets nobody in whom another CA certified.
fn encrypted(b: &Bench, qemu: &str) -> Result<()> {
    let lab = small(b, qemu, qemu)?;
    let mut guests = lab.start_guests()?;
    plain::encrypt(&lab, &mut guests)?;
    let others = Keys::new()?;
    let stranger = others.somebody("stranger", Role::Operator, 30)?;
    // It believes the target, so that it is the target that must refuse.
    lab.net.ca().context("the lab speaks TLS")?.believed_by(&stranger)?;
    let p = guests.pairs.first_mut().context("no guest")?;
    plain::certify(&mut p.source, &stranger, "strange", Some(Host::Target(0)))?;
    let uri = format!("tcp:{}:4399", Host::Target(0).ip());
    p.target.qmp.run("migrate-incoming", &json!({"uri": uri}))?;
    p.source.qmp.run("migrate", &json!({"uri": uri}))?;
    match p.source.qmp.migrated(Duration::from_secs(60)) {
        Err(e) if e.to_string().contains("migration failed") => {}
        Err(e) => return Err(e.context("a source with another CA's certificate")),
        Ok(_) => bail!("a target with TLS let in a source that another CA certified"),
    }
    p.check_source()?;
    drop(guests);
    let mut guests = lab.start_guests()?;
    plain::encrypt(&lab, &mut guests)?;
    plain::migrate(&lab, &mut guests, false, Duration::from_secs(120))?;
    for p in &mut guests.pairs {
        lab.compare(p)?;
        p.resume_and_check()?;
    }
    Ok(())
}

/// The comparison is no proof unless it fails when it should.
fn one_byte(b: &Bench) -> Result<()> {
    use std::os::unix::fs::FileExt as _;
    let lab = small(b, "7.2", "7.2")?;
    let mut guests = lab.start_guests()?;
    plain::migrate(&lab, &mut guests, false, Duration::from_secs(120))?;
    let pair = guests.pairs.first_mut().context("no guest")?;
    lab.compare(pair)?;
    let memory = pair.target.memory_for_writing()?;
    let mut byte = [0];
    memory.read_exact_at(&mut byte, 0x123_4567)?;
    memory.write_all_at(&[byte[0] ^ 1], 0x123_4567)?;
    match lab.compare(pair) {
        Err(e) if format!("{e:#}").contains("page 0x1234") => Ok(()),
        Err(e) => Err(e.context("another difference than the one that was made")),
        Ok(_) => bail!("one changed byte was not seen"),
    }
}

/// The edge link holds its rate: 256 MiB cannot pass 100 Mbit/s faster, nor much slower.
fn rates(b: &Bench) -> Result<()> {
    let spec = LabSpec::new(&b.cache, 1, 1, 256);
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let mut guests = lab.start_guests()?;
    let before = lab.net.core_bytes()?;
    let (_, time) = plain::migrate(&lab, &mut guests, false, Duration::from_secs(120))?;
    let core = lab.net.core_bytes()?.since(before);
    let mbit = core.forward as f64 * 8e-6 / time.as_secs_f64();
    if !(60.0..=101.0).contains(&mbit) {
        bail!("{mbit:.1} Mbit/s through an edge link of 100");
    }
    if core.forward / core.forward_packets.max(1) > 1514 {
        bail!("packets are larger than a wire would carry: {core:?}");
    }
    Ok(())
}

/// With the core link cut, plain QEMU gets nowhere; mended, the source still runs and serves.
fn core_cut(b: &Bench) -> Result<()> {
    let mut spec = LabSpec::new(&b.cache, 1, 1, 256);
    spec.rates = Rates::default();
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let mut guests = lab.start_guests()?;
    let p = guests.pairs.first_mut().context("no guest")?;
    let uri = format!("tcp:{}:4400", Host::Target(0).ip());
    p.target.qmp.run("migrate-incoming", &json!({"uri": uri}))?;
    p.source.qmp.run("migrate", &json!({"uri": uri}))?;
    std::thread::sleep(Duration::from_secs(2));
    lab.net.cut_core()?;
    std::thread::sleep(Duration::from_millis(500));
    let cut = lab.net.core_bytes()?;
    std::thread::sleep(Duration::from_secs(2));
    let later = lab.net.core_bytes()?;
    if later.since(cut).forward > 0 {
        bail!("{} bytes passed the cut link", later.since(cut).forward);
    }
    p.source.qmp.run("migrate_cancel", &json!({}))?;
    p.target.kill();
    lab.net.mend_core()?;
    p.check_source()
}

/// A killed lab leaves processes, namespaces and a directory; the next one removes them, and nothing else.
fn crash(_: &Bench) -> Result<()> {
    let mut child = another()?;
    let pid = child.id();
    janitor::sweep()?;
    if !janitor::leftovers(pid) {
        bail!("the sweep removed a living lab");
    }
    child.kill()?;
    child.wait()?;
    if !janitor::leftovers(pid) {
        bail!("a killed lab left nothing, so this test shows nothing");
    }
    janitor::sweep()?;
    if janitor::leftovers(pid) {
        bail!("something of lab {pid} is still there after the sweep");
    }
    Ok(())
}

/// ^C removes everything before the lab ends.
fn interrupt(_: &Bench) -> Result<()> {
    use rustix::process::{Pid, Signal, kill_process};
    let mut child = another()?;
    let pid = child.id();
    kill_process(Pid::from_raw(i32::try_from(pid)?).context("pid")?, Signal::INT)?;
    let ended = child.wait()?;
    if janitor::leftovers(pid) {
        bail!("something of lab {pid} is still there after ^C");
    }
    if ended.code() != Some(130) {
        bail!("an interrupted lab ends with 130, not {ended}");
    }
    Ok(())
}

/// Another lab, held by a process of its own.
fn another() -> Result<Child> {
    let me = std::env::current_exe()?;
    let mut child = Command::new(me).arg("hold").stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no output")?).read_line(&mut line)?;
    if line.trim() != "holding" {
        bail!("the other lab did not start: {line}");
    }
    Ok(child)
}
