//! What a QEMU says of itself.

use super::facts::{Facts, Identity};
use super::reach::process_of;
use crate::net::qmp::{Qmp, QmpError};

/// What can be seen of a QEMU and its VM.
pub(in crate::flow) fn facts(qmp: &mut Qmp) -> Result<Facts, QmpError> {
    let state = qmp.query_status()?.status;
    let migration = qmp.query_migrate()?;
    let memory = qmp.memory()?;
    let jobs = qmp.jobs()?.into_iter().map(|j| format!("{} {}", j.kind, j.id)).collect();
    let identity = Identity {
        uuid: qmp.vm_uuid()?,
        name: qmp.vm_name()?,
        machine: qmp.machine()?,
        memory: memory.bytes,
    };
    Ok(Facts {
        at: format!("QMP {}", qmp.path().display()),
        qemu: true,
        process: process_of(&*qmp),
        identity,
        state,
        migrating: migration.status.is_busy(),
        migration: migration.word,
        blocked: migration.blocked,
        jobs,
        virtio_mem: memory.virtio_mem,
        fetching: false,
    })
}

#[cfg(test)]
mod tests {
    use crate::flow::Front;
    use crate::flow::front::facts::Identity;
    use crate::net::qmp::tests::serve;
    use serde_json::{Value, json};
    use std::time::Duration;

    fn ask(answer: impl Fn(&str) -> Value + Send + 'static) -> super::Facts {
        let (_dir, path, fake) =
            serve(move |c, _| Some(answer(c).to_string().replacen('{', r#"{"id":$ID,"#, 1)));
        let facts = Front::Qmp(path).facts(Duration::from_secs(5)).unwrap();
        fake.join().unwrap();
        facts
    }

    #[test]
    fn a_qemu_says_who_its_vm_is_and_what_it_is_busy_with() {
        let f = ask(|c| {
            let answer = match c {
                "query-status" => json!({ "running": false, "status": "io-error" }),
                "query-migrate" => json!({ "status": "failing", "blocked-reasons": ["no"] }),
                "query-memory-size-summary" => json!({ "base-memory": 1000, "plugged-memory": 77 }),
                "query-memory-devices" => json!([
                    { "type": "dimm", "data": { "size": 200 } },
                    { "type": "virtio-mem", "data": { "size": 7, "max-size": 30 } },
                    { "type": "virtio-pmem", "data": { "size": 4096 } },
                ]),
                "query-jobs" => json!([
                    { "id": "s", "type": "snapshot-save", "status": "running" },
                    { "id": "old", "type": "mirror", "status": "concluded" },
                ]),
                "query-uuid" => json!({ "UUID": "u-u" }),
                "query-name" => json!({ "name": "web1" }),
                "qom-get" => json!("pc-q35-7.2-machine"),
                _ => panic!("{c}"),
            };
            json!({ "return": answer })
        });
        let identity =
            Identity { uuid: "u-u".into(), name: "web1".into(), machine: "pc-q35-7.2".into(), memory: 1230 };
        assert_eq!(f.identity, identity, "of virtio-mem what it could give counts, and disks do not");
        assert_eq!((f.state.as_str(), f.migration.as_str(), f.migrating), ("io-error", "failing", true));
        assert_eq!(
            (f.blocked, f.jobs, f.virtio_mem),
            (vec!["no".into()], vec!["snapshot-save s".into()], true)
        );
    }

    #[test]
    fn a_qemu_that_does_not_know_a_question_has_nothing_of_it() {
        let f = ask(|c| {
            let answer = match c {
                "query-jobs" | "query-memory-devices" => {
                    return json!({ "error": { "class": "CommandNotFound", "desc": "what?" } });
                }
                "query-status" => json!({ "running": true, "status": "running" }),
                "query-memory-size-summary" => json!({ "base-memory": 1000 }),
                "query-uuid" => json!({ "UUID": "0" }),
                "qom-get" => json!("microvm-machine"),
                _ => json!({}),
            };
            json!({ "return": answer })
        });
        assert_eq!((f.migration.as_str(), f.migrating, f.jobs.len()), ("none", false, 0));
        assert_eq!((f.identity.name.as_str(), f.identity.memory), ("", 1000));
    }
}
