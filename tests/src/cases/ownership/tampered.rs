//! Somebody stands between the agents and changes what passes: no changed page ever runs. Each trial moves a guest of its own
//! whose memory stands still, so that both copies must be the same bytes afterwards.

use super::light::{Begin, Light};
use super::rig::{Duo, Rig, Spec, with};
use super::{CHOSEN, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::irlm::DATA;
use irlm_tests::middle::{Harm, Middle, Wound};
use irlm_tests::net::Host;
use irlm_tests::unmet::unmet;
use std::net::SocketAddr;
use std::os::unix::fs::FileExt as _;
use std::time::Duration;

pub(super) const CASES: &[Case] = &[
    Case { name: "tampered-plain", needs: CHOSEN, takes: Takes::Light, run: |b| few(b, Way::Plain) },
    Case { name: "tampered-tls", needs: CHOSEN, takes: Takes::Light, run: |b| few(b, Way::Tls) },
];

/// Trials of each harm in a case.
const FEW: u64 = 2;
/// Trials in one lab: each leaves dead QEMUs that are watched.
const A_LAB: usize = 25;
/// MiB of contents that a guest has and nobody else.
const FILL: u64 = 4;

/// How the agents speak.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    Plain,
    Tls,
}

/// What trials came to.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Outcome {
    /// The guest stayed at its source.
    pub(crate) caught: u64,
    /// It moved, and has the bytes that it had.
    pub(crate) right: u64,
    /// It moved, and has others.
    pub(crate) wrong: u64,
    /// The move needed fewer bytes than the place of the wound.
    pub(crate) missed: u64,
}

/// So many trials, in as many labs as they need; `of` says what each does.
pub(crate) fn trials(b: &Bench, way: Way, count: u64, of: impl Fn(u64) -> Wound) -> Result<Outcome> {
    let wounds: Vec<(u64, Wound)> = (0..count).map(|n| (n, of(n))).collect();
    let mut out = Outcome::default();
    for some in wounds.chunks(A_LAB) {
        let mut spec = Spec::of(Vec::new());
        spec.tls = way == Way::Tls;
        with(b, spec, |rig| {
            if let Some(ca) = rig.lab.net.ca() {
                // Whoever stands in the middle is dialled by his address, and cannot be told by it.
                ca.also(Host::Target(0), Host::Ctl)?;
                std::thread::sleep(Duration::from_secs(2));
            }
            let to = SocketAddr::new(Host::Target(0).ip().parse()?, DATA);
            let middle = Middle::start(&rig.lab.net, Host::Ctl, to)?;
            some.iter().try_for_each(|(n, wound)| trial(rig, &middle, *n, *wound, &mut out))
        })?;
    }
    Ok(out)
}

fn trial(rig: &mut Rig<'_>, middle: &Middle, n: u64, wound: Wound, out: &mut Outcome) -> Result<()> {
    let light = Light { fill: FILL, ..Light::new(&format!("t{n}")) };
    let source = rig.further(&light, Host::Source(0), "", Begin::Runs)?;
    let target = rig.further(&light, Host::Target(0), "", Begin::Waits)?;
    rig.vms = vec![Duo { light, host: 0, source, target }];
    let group = rig.group(PATH)?;
    let text = std::fs::read_to_string(&group)?;
    let data = format!("data = \"{}:{DATA}\"", Host::Target(0).ip());
    ensure!(text.contains(&data), "the group's file has no {data}");
    std::fs::write(&group, text.replace(&data, &format!("data = \"{}\"", middle.addr())))?;
    middle.arm(wound);
    let ended = rig.evacuate(&group, &[])?;
    let states = rig.vms[0].states();
    let how = match (states.0.as_str(), states.1.as_str()) {
        ("running", _) => {
            ensure!(ended.code != 0, "all moved, it says, and the guest runs at its source");
            ensure!(middle.has_struck(), "nothing was changed, and the guest stayed: {}", ended.said);
            out.caught += 1;
            "stayed"
        }
        (_, "running") if !middle.has_struck() => {
            out.missed += 1;
            "moved, untouched"
        }
        (_, "running") if same(rig)? => {
            out.right += 1;
            "moved as it was"
        }
        (_, "running") => {
            out.wrong += 1;
            "moved, CHANGED"
        }
        // A wound in the handover's last words leaves a guest in doubt, until its agents have talked.
        _ => {
            rig.comes_to(0, "running", "*", super::rig::SETTLE)
                .or_else(|_| rig.comes_to(0, "*", "running", Duration::ZERO))?;
            if rig.vms[0].states().1 == "running" && !same(rig)? {
                out.wrong += 1;
            } else {
                out.caught += 1;
            }
            "in doubt, and settled"
        }
    };
    say(&format!("{n}: {wound:?}: {how}"));
    let vm = &mut rig.vms[0];
    vm.source.kill();
    vm.target.kill();
    Ok(())
}

/// Whether both copies of the guest have the same memory.
fn same(rig: &Rig<'_>) -> Result<bool> {
    let vm = rig.vms.first().context("no guest")?;
    let (source, target) = (vm.source.memory()?, vm.target.memory()?);
    let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    loop {
        let n = source.read_at(&mut a, at)?;
        if n == 0 {
            return Ok(true);
        }
        target.read_exact_at(&mut b[..n], at)?;
        if a[..n] != b[..n] {
            return Ok(false);
        }
        at += n as u64;
    }
}

/// Where a wound lies: somewhere in the contents of the guest, which are nearly all of what passes.
pub(crate) fn somewhere(n: u64, harm: Harm) -> Wound {
    let h = blake3::hash(&n.to_le_bytes());
    let word = |at: usize| h.as_bytes()[at..at + 8].iter().fold(0u64, |w, b| w << 8 | u64::from(*b));
    // Past the hellos and the words about the guest's memory.
    Wound { harm, at: 100_000 + word(0) % ((FILL << 20) - 400_000), size: 2 + (word(8) % 3000) as usize }
}

fn few(b: &Bench, way: Way) -> Result<()> {
    let count = FEW * Harm::ALL.len() as u64;
    let out = trials(b, way, count, |n| somewhere(n, Harm::ALL[(n % Harm::ALL.len() as u64) as usize]))?;
    say(&format!("{out:?}"));
    ensure!(out.wrong == 0, "{} guests run with other bytes than they had", out.wrong);
    if out.missed > 0 {
        return unmet(format!("{} wounds lay behind the end of the move", out.missed));
    }
    ensure!(out.caught > 0, "nothing was found");
    Ok(())
}
