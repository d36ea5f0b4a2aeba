//! What can be known beforehand is said beforehand, a line a reason, by `--dry-run` and by the run alike: exit code 4, and no
//! QEMU is touched.

use super::identity::ways;
use super::light::{Begin, Light, state};
use super::rig::{Disk, Rig, Spec, with};
use super::{CHOSEN, PATH};
use crate::cases::say;
use crate::cmd_test::{Bench, Case, Takes};
use anyhow::{Result, ensure};
use irlm_tests::irlm::DATA;
use irlm_tests::net::Host;
use serde_json::json;

pub(super) const CASES: &[Case] = &[
    Case { name: "own-dry-run-good", needs: CHOSEN, takes: Takes::Light, run: good },
    Case {
        name: "own-dry-run-target-missing",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| refused(b, &MISSING),
    },
    Case {
        name: "own-dry-run-target-running",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| refused(b, &RUNNING),
    },
    Case { name: "own-dry-run-index-down", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, &INDEX) },
    Case { name: "own-dry-run-data-port", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, &PORT) },
    Case { name: "own-dry-run-swapped", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, &SWAPPED) },
    Case {
        name: "own-dry-run-journal-full-source",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| refused(b, &FULL_SOURCE),
    },
    Case {
        name: "own-dry-run-journal-full-target",
        needs: CHOSEN,
        takes: Takes::Light,
        run: |b| refused(b, &FULL_TARGET),
    },
    Case { name: "own-dry-run-job", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, &JOB) },
    Case { name: "own-dry-run-name", needs: CHOSEN, takes: Takes::Light, run: |b| refused(b, &NAME) },
];

/// A group file, and what has to be held meanwhile.
type Made = (String, Option<Disk>);

/// What is wrong: makes it so, and gives the group file.
struct Wrong {
    make: fn(&mut Rig<'_>) -> Result<Made>,
    /// Each of these is in some line that is said.
    says: &'static [&'static str],
    /// Whether it makes the first VM's target another QEMU, which is not looked at then.
    other_target: bool,
}

const MISSING: Wrong = Wrong {
    make: |rig| {
        let mut all = ways(rig, [0, 1]);
        all[0].target_qmp.set_extension("nobody");
        Ok((rig.group_of("own", PATH, &all)?, None))
    },
    says: &["alpha", "t0", "nobody"],
    other_target: true,
};

const RUNNING: Wrong = Wrong {
    make: |rig| {
        rig.vms[0].target.kill();
        let other = Light { own_disk: true, ..rig.vms[0].light.clone() };
        rig.vms[0].target =
            other.start(rig.lab, &rig.b.qemu_target, Host::Target(0), "-free", Begin::Runs)?;
        Ok((rig.group(PATH)?, None))
    },
    says: &["alpha", "t0", "running"],
    other_target: true,
};

const INDEX: Wrong = Wrong {
    make: |rig| {
        if let Some(mut index) = rig.irlm.index.take() {
            index.kill();
        }
        Ok((rig.group(PATH)?, None))
    },
    says: &["index"],
    other_target: false,
};

const PORT: Wrong = Wrong {
    make: |rig| {
        let group = rig.group(PATH)?;
        let text = std::fs::read_to_string(&group)?;
        std::fs::write(&group, text.replace(&format!(":{DATA}\""), ":7999\""))?;
        Ok((group, None))
    },
    says: &["7999"],
    other_target: false,
};

const SWAPPED: Wrong = Wrong {
    make: |rig| {
        let all = ways(rig, [1, 0]);
        Ok((rig.group_of("own", PATH, &all)?, None))
    },
    says: &["alpha", "beta"],
    other_target: false,
};

const FULL_SOURCE: Wrong = Wrong {
    make: |rig| Ok((rig.group(PATH)?, Some(Disk::full(rig.lab, Host::Source(0))?))),
    says: &["s0", "journal"],
    other_target: false,
};

const FULL_TARGET: Wrong = Wrong {
    make: |rig| Ok((rig.group(PATH)?, Some(Disk::full(rig.lab, Host::Target(0))?))),
    says: &["t0", "journal"],
    other_target: false,
};

const NAME: Wrong = Wrong {
    make: |rig| {
        rig.vms[0].target.kill();
        // The later of two names counts.
        let other = Light { args: vec!["-name", "aleph"], ..rig.vms[0].light.clone() };
        rig.vms[0].target = other.start(rig.lab, &rig.b.qemu_target, Host::Target(0), "", Begin::Waits)?;
        Ok((rig.group(PATH)?, None))
    },
    says: &["alpha", "aleph"],
    other_target: false,
};

/// Its owner has its disk copied meanwhile, slowly.
const JOB: Wrong = Wrong {
    make: |rig| {
        let copy = rig.lab.dir(Host::Source(0)).join("copy.raw");
        let job = json!({ "job-id": "copy", "device": "d0", "target": copy, "format": "raw", "sync": "full", "speed": 1 });
        rig.vms[0].source.qmp.run("drive-mirror", &job)?;
        Ok((rig.group(PATH)?, None))
    },
    says: &["alpha", "job", "copy"],
    other_target: false,
};

fn spec() -> Spec {
    let small = vec![Host::Source(0), Host::Target(0)];
    Spec { small, ..Spec::of(vec![Light::new("alpha"), Light::new("beta")]) }
}

/// Nothing is wrong: the dry run says so and touches nothing, and then all move.
fn good(b: &Bench) -> Result<()> {
    with(b, spec(), |rig| {
        let group = rig.group(PATH)?;
        let (code, said) = rig.irlm.command(&["evacuate", &group, "--dry-run", "--observe", "0"])?;
        ensure!(code == 0, "--dry-run ended with {code}: {said}");
        rig.untouched(0)?;
        rig.untouched(1)?;
        rig.evacuate(&group, &[])?.code(0)
    })
}

fn refused(b: &Bench, wrong: &Wrong) -> Result<()> {
    with(b, spec(), |rig| {
        let (group, held) = (wrong.make)(rig)?;
        let before = state(&mut rig.vms[0].target);
        let (code, said) = rig.irlm.command(&["evacuate", &group, "--dry-run", "--observe", "0"])?;
        say(&format!("--dry-run: exit code {code}: {}", said.trim().replace('\n', "; ")));
        let missing: Vec<_> = wrong.says.iter().filter(|s| !said.contains(**s)).collect();
        let dry = (code, said);
        let ended = rig.evacuate(&group, &[])?;
        drop(held);
        let after = state(&mut rig.vms[0].target);
        ensure!(before == after, "the target's QEMU was {before} and is {after}");
        if !wrong.other_target {
            rig.untouched(0)?;
        }
        rig.untouched(1)?;
        ensure!(
            dry.0 == 4,
            "--dry-run ended with {}, and the run with {}: {}",
            dry.0,
            ended.code,
            dry.1.trim()
        );
        ensure!(missing.is_empty(), "--dry-run does not say {missing:?}: {}", dry.1.trim());
        ended.code(4)?;
        let missing: Vec<_> = wrong.says.iter().filter(|s| !ended.said.contains(**s)).collect();
        ensure!(missing.is_empty(), "the run does not say {missing:?}: {}", ended.said);
        Ok(())
    })
}
