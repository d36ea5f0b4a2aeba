//! What can be known of a VM before anything is done to it, and what it says about moving it. The judging is
//! pure, so that a preflight and the move itself refuse for the same reasons, in the same words.

use crate::core::handover::GuestState;
use crate::host::sched::Process;
use serde::{Deserialize, Serialize};

/// Who a VM is. What its front does not tell is empty, and equal only to what another one does not tell.
#[derive(Clone, PartialEq, Eq, Debug, Default, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// QEMU's `-uuid`.
    pub uuid: String,
    /// QEMU's `-name`.
    pub name: String,
    /// The machine type, with its version.
    pub machine: String,
    /// Bytes.
    pub memory: u64,
}

impl Identity {
    /// What is different in `other`, as one line; nothing if it is the same VM, as far as can be seen.
    #[must_use]
    pub fn differs(&self, other: &Self) -> Option<String> {
        let bytes = |n: u64| {
            if n.is_multiple_of(1 << 20) { format!("{} MiB", n >> 20) } else { format!("{n} bytes") }
        };
        let texts = [
            ("UUID", self.uuid.clone(), other.uuid.clone()),
            ("name", self.name.clone(), other.name.clone()),
            ("machine", self.machine.clone(), other.machine.clone()),
            ("memory", bytes(self.memory), bytes(other.memory)),
        ];
        let named = |s: &str| if s.is_empty() { "none".to_owned() } else { s.to_owned() };
        let unlike = texts.iter().filter(|(_, a, b)| a != b);
        let lines: Vec<String> =
            unlike.map(|(what, a, b)| format!("{what} {} here, {} there", named(a), named(b))).collect();
        (!lines.is_empty()).then(|| lines.join("; "))
    }
}

/// What was seen of a VM and of whoever runs it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Facts {
    /// The socket by which it was asked.
    pub at: String,
    /// Whether a QEMU runs it.
    pub qemu: bool,
    /// The process that runs it, if it can be seen from here.
    pub process: Option<Process>,
    /// Who it is.
    pub identity: Identity,
    /// QEMU's word for its run state (`query-status`); of a VM of our own VMM the one that means the same.
    pub state: String,
    /// QEMU's word for its migration; `none` if there never was one.
    pub migration: String,
    /// Whether a migration is under way.
    pub migrating: bool,
    /// Why QEMU would not migrate it.
    pub blocked: Vec<String>,
    /// What else QEMU is doing with it: kind and name of each job.
    pub jobs: Vec<String>,
    /// Whether it has virtio-mem devices.
    pub virtio_mem: bool,
    /// Whether pages of it are still to come from where it was before (post-copy).
    pub fetching: bool,
}

impl Facts {
    /// How its owner, or the guest, has left it; none if a migration has a hand in its state.
    #[must_use]
    pub fn guest(&self) -> Option<GuestState> {
        GuestState::parse(&self.state)
    }
}

/// Why this VM cannot leave now, a line each; none if it can.
#[must_use]
pub fn source_refusals(f: &Facts) -> Vec<String> {
    let mut out = Vec::new();
    let mut no = |why: String| out.push(format!("{}: {why}", f.at));
    if f.migrating {
        no(format!(
            "another migration of it is under way ({}): let it end, or cancel it there, then start again",
            f.migration
        ));
    } else if f.guest().is_none() {
        no(match f.state.as_str() {
            "postmigrate" => {
                "it has completed a migration that IRLM knows nothing of: see where the VM runs now, \
                              and end this copy"
                    .to_owned()
            }
            "inmigrate" => {
                "it waits for a VM to arrive, and holds none: name the socket of the VM that is to leave"
                    .to_owned()
            }
            "prelaunch" => {
                "its VM has never run (QEMU was started with -S): let it run (cont), or start one that waits"
                    .to_owned()
            }
            "save-vm" | "restore-vm" => {
                format!("a snapshot is being saved or loaded ({}): wait for its end", f.state)
            }
            other => {
                format!("it is in the state {other}, out of which QEMU moves no VM: bring it to run or pause")
            }
        });
    }
    for why in &f.blocked {
        no(format!("QEMU cannot migrate it: {why}"));
    }
    for job in &f.jobs {
        no(format!("a job is under way ({job}): wait for its end, or cancel it"));
    }
    if f.fetching {
        no("pages of it are still to come from where it was before: wait until it is whole".to_owned());
    }
    out
}

/// Why this QEMU or VMM cannot take a VM in now, a line each; none if it can.
#[must_use]
pub fn target_refusals(f: &Facts) -> Vec<String> {
    let how = if f.qemu { "-incoming defer -S" } else { "--incoming" };
    let mut out = Vec::new();
    if f.state != "inmigrate" {
        // Whoever is there is never to be replaced on this program's word.
        let other = format!("name the socket of one that was started with {how} for this VM");
        out.push(match (f.state.as_str(), f.guest()) {
            ("running", _) => format!("{}: a VM runs there already: {other}", f.at),
            (state, Some(_)) => format!("{}: a VM is there already, and is {state}: {other}", f.at),
            (state, None) => format!("{}: it is {state}, and does not wait for a VM: {other}", f.at),
        });
    } else if f.migration != "none" {
        out.push(format!(
            "{}: it has been told already where its VM comes from ({}): name the socket of one that was \
             told nothing ({how})",
            f.at, f.migration
        ));
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(state: &str) -> Facts {
        Facts {
            at: "/run/q".into(),
            qemu: true,
            state: state.into(),
            migration: "none".into(),
            ..Facts::default()
        }
    }

    #[test]
    fn a_vm_leaves_in_every_state_that_is_its_owners_and_in_no_other() {
        for s in GuestState::ALL {
            assert_eq!(source_refusals(&facts(s.name())), Vec::<String>::new());
        }
        for (state, word) in [
            ("postmigrate", "knows nothing of"),
            ("inmigrate", "waits"),
            ("prelaunch", "never run"),
            ("finish-migrate", "finish-migrate"),
            ("save-vm", "snapshot"),
        ] {
            let lines = source_refusals(&facts(state));
            assert!(lines.len() == 1 && lines[0].contains(word) && lines[0].contains("/run/q"), "{lines:?}");
        }
    }

    #[test]
    fn what_others_are_doing_with_a_vm_is_a_refusal_each() {
        let busy = Facts {
            migrating: true,
            migration: "active".into(),
            blocked: vec!["The vhost-user device cannot move".into()],
            jobs: vec!["snapshot-save s0".into(), "mirror d0".into()],
            fetching: true,
            ..facts("running")
        };
        let lines = source_refusals(&busy);
        let words = ["active", "vhost-user", "snapshot-save s0", "mirror d0", "still to come"];
        assert_eq!(lines.len(), words.len(), "{lines:?}");
        for (line, word) in lines.iter().zip(words) {
            assert!(line.contains(word) && !line.contains('\n'), "{line}");
        }
    }

    #[test]
    fn only_what_waits_and_was_told_nothing_takes_a_vm_in() {
        assert_eq!(target_refusals(&facts("inmigrate")), Vec::<String>::new());
        let told = Facts { migration: "setup".into(), ..facts("inmigrate") };
        for (f, word) in [
            (facts("running"), "runs there already"),
            (facts("paused"), "is paused"),
            (facts("postmigrate"), "postmigrate"),
            (told, "told already"),
        ] {
            let lines = target_refusals(&f);
            assert!(lines.len() == 1 && lines[0].contains(word), "{lines:?}");
            // No word that could be read as: end the one that is there.
            assert!(lines[0].contains("name the socket") && !lines[0].contains("start it"), "{lines:?}");
        }
    }

    #[test]
    fn two_vms_are_told_apart_by_each_part_of_who_they_are() {
        let a =
            Identity { uuid: "u".into(), name: "n".into(), machine: "pc-q35-7.2".into(), memory: 64 << 20 };
        assert_eq!(a.differs(&a), None);
        for (b, word) in [
            (Identity { uuid: "v".into(), ..a.clone() }, "UUID u here, v there"),
            (Identity { name: String::new(), ..a.clone() }, "name n here, none there"),
            (Identity { machine: "pc-i440fx-7.2".into(), ..a.clone() }, "machine"),
            (Identity { memory: 65 << 20, ..a.clone() }, "memory 64 MiB here, 65 MiB there"),
        ] {
            let line = a.differs(&b).unwrap();
            assert!(line.contains(word), "{line}");
        }
    }
}
