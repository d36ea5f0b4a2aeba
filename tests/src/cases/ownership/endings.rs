//! Every wait ends, with a reason in the report.

use super::journal::{kvm_images, kvm_lab};
use super::light::{Light, migration, until};
use super::rig::{Spec, WAIT, with};
use super::{CHOSEN, DIRECT, KVM, OC, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::irlm::{CONTROL, DATA};
use irlm_tests::kvm::KvmVm;
use irlm_tests::mixed::Mixed;
use irlm_tests::net::Host;
use irlm_user::net::vmm::State;
use std::time::{Duration, Instant};

pub(super) const CASES: &[Case] = &[
    Case { name: "own-endings-target-vmm-killed", needs: KVM, takes: Takes::Light, run: target_vmm },
    Case { name: "own-fetching-again", needs: KVM, takes: Takes::Light, run: fetching_again },
    Case { name: "own-endings-rewriting", needs: CHOSEN, takes: Takes::Light, run: |b| rewriting(b, PATH) },
    Case {
        name: "own-endings-rewriting-direct",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| rewriting(b, DIRECT),
    },
    Case { name: "own-endings-rewriting-oc", needs: CHOSEN, takes: Takes::Light, run: |b| rewriting(b, OC) },
    Case { name: "own-endings-agent-restarted-early", needs: CHOSEN, takes: Takes::Light, run: early },
];

/// The VMM dies in which a guest ran while its pages still came: lost, and the evacuation ends and says so.
fn target_vmm(b: &Bench) -> Result<()> {
    let lab = kvm_lab(b, 1, 20, None)?;
    let images = kvm_images(&lab)?;
    let mut m =
        Mixed::start(&lab, &b.irlm, &images, "migration = \"post-copy\"\ncompress = \"off\"", Vec::new())?;
    let mut going = m.evacuate(false)?;
    until("the guest runs at its target", WAIT, || {
        Ok(m.irlm.status(Host::Target(0))?.to_string().contains("\"phase\":\"fetching\""))
    })?;
    m.kvm[0].target.kill();
    let killed = Instant::now();
    let code = going.wait(Duration::from_secs(60));
    m.sides()?;
    let said = going.said();
    let Ok(code) = code else {
        anyhow::bail!("irlm evacuate does not end after a minute: {said}\n{}", m.said())
    };
    let report = m.report()?;
    let vm = &report["vms"][0];
    say(&format!(
        "ended {:.1?} after the death, exit code {code}: {} {}",
        killed.elapsed(),
        vm["verdict"],
        vm["error"]
    ));
    ensure!(code == 5, "irlm evacuate ended with {code}, not 5: {said}");
    ensure!(vm["verdict"] == "lost", "the report says {}, not lost", vm["verdict"]);
    ensure!(vm["state"] == "ended", "the report says state {}, not ended", vm["state"]);
    ensure!(vm["error"].as_str().is_some_and(|e| !e.is_empty()), "the report does not say why");
    std::thread::sleep(Duration::from_secs(2));
    let sides = m.sides()?;
    ensure!(sides == [(false, false)], "the old copy runs: {sides:?}");
    Ok(())
}

/// A VM is to move on while its pages still come: refused, and it comes to be whole where it is.
fn fetching_again(b: &Bench) -> Result<()> {
    let lab = kvm_lab(b, 2, 20, None)?;
    let images = kvm_images(&lab)?;
    let extra = "migration = \"post-copy\"\ncompress = \"off\"";
    let mut m = Mixed::start(&lab, &b.irlm, &images, extra, Vec::new())?;
    let mut going = m.evacuate(false)?;
    until("the guest runs at its target", WAIT, || {
        Ok(m.irlm.status(Host::Target(0))?.to_string().contains("\"phase\":\"fetching\""))
    })?;
    let (from, to) = (Host::Target(0), Host::Target(1));
    let mut next = KvmVm::start(&lab, to, &b.irlm, &images[0].1, true)?;
    let file = lab.dir(Host::Ctl).join("own-2.toml");
    let text = format!(
        "name = \"own-2\"\nmethod = \"gm\"\n[[source]]\nname = \"t0\"\nagent = \"{}:{CONTROL}\"\n[[target]]\nname = \"t1\"\n\
         agent = \"{}:{CONTROL}\"\ndata = \"{}:{DATA}\"\n[[vm]]\nname = \"kvm-db0\"\nsource = \"t0\"\ntarget = \"t1\"\n\
         source_vmm = {:?}\ntarget_vmm = {:?}\n",
        from.ip(),
        to.ip(),
        to.ip(),
        m.kvm[0].target.control,
        next.control
    );
    std::fs::write(&file, text)?;
    let (code, said) = m.irlm.command(&["evacuate", &file.display().to_string(), "--quiet"])?;
    say(&format!("the second move: exit code {code}"));
    let states = (m.kvm[0].target.state(), next.state());
    ensure!(code == 4, "moved on while its pages came: exit code {code}, {states:?}: {said}");
    ensure!(next.state() != Some(State::Running), "it runs where it must not: {states:?}");
    ensure!(going.wait(Duration::from_secs(60))? == 0, "the first move: {}", going.said());
    m.kvm[0].check_running(&images[0].1).map(drop)
}

/// A guest writes faster than the link takes it: after as long as the group may take the guest stays, and the reason is told.
fn rewriting(b: &Bench, route: &str) -> Result<()> {
    let guest = Light { busy: true, fill: 12, ..Light::new("alpha") };
    with(b, Spec { edge: 20, ..Spec::of(vec![guest]) }, |rig| {
        let extra = format!("{route}\ndowntime_ms = 20\nhold_back = false\n[timeouts]\nmove_ms = 12000");
        let group = rig.group(&extra)?;
        let began = Instant::now();
        let ended = rig.evacuate(&group, &[])?;
        let took = began.elapsed();
        rig.stays(0, "running", "*")?;
        ended.code(2)?;
        ensure!(took < Duration::from_secs(40), "12 s were given, and it took {took:?}");
        ended.row("alpha", "state", "running")?;
        let why = ended.cell("alpha", "error")?;
        ensure!(why.contains("move_ms") || why.contains("12"), "the reason does not name the time: {why:?}");
        Ok(())
    })
}

/// The source's agent dies while one guest streams and the other's stream is still to begin, and comes back: both run on, and
/// their rows say why; the one that never began is not called in doubt, and its target does not wait for it for ever.
fn early(b: &Bench) -> Result<()> {
    let guest = |name: &str| Light { fill: 20, ..Light::new(name) };
    let spec = Spec { edge: 40, ..Spec::of(vec![guest("alpha"), guest("beta")]) };
    with(b, spec, |rig| {
        let group = rig.group(&format!("{PATH}\nparallel = 1"))?;
        let mut going = rig.begin(&group, &[])?;
        let mut streams = None;
        until("one guest streams", WAIT, || {
            for (i, d) in rig.vms.iter_mut().enumerate() {
                streams = streams.or((migration(&mut d.source)? == "active").then_some(i));
            }
            Ok(streams.is_some())
        })?;
        let waits = usize::from(streams == Some(0));
        let name = rig.vms[waits].light.name.clone();
        say(&format!("{name} has not begun"));
        rig.untouched(waits)?;
        rig.restart(Host::Source(0), Duration::from_millis(100))?;
        let mut doubt = None;
        while going.proc.ended()?.is_none() {
            let said = going.proc.said();
            doubt = doubt
                .or(said.lines().find(|l| l.contains(&*name) && l.contains("in doubt")).map(str::to_owned));
            std::thread::sleep(Duration::from_millis(20));
        }
        let ended = going.end()?;
        for i in [0, 1] {
            rig.comes_to(i, "running", "*", Duration::from_secs(2))?;
        }
        ensure!(
            rig.vms[waits].states().1 == "inmigrate",
            "the QEMU that was never fed does not wait any more"
        );
        ensure!(doubt.is_none(), "{name} was called in doubt while it ran: {}", doubt.unwrap_or_default());
        for name in ["alpha", "beta"] {
            ended.row(name, "verdict", "stayed")?;
            ensure!(!ended.cell(name, "error")?.is_empty(), "the row of {name} does not say why it stayed");
        }
        ended.code(2)?;
        let mut phase = (String::new(), String::new());
        let over = until("the target lets it go", Duration::from_secs(15), || {
            phase = rig.phase(Host::Target(0), &name)?;
            Ok(phase.0 != "prepared")
        });
        ensure!(over.is_ok(), "the target's agent says {phase:?} of {name} for ever");
        ended.row(&name, "state", "running")
    })
}
