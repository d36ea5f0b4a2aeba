//! A monitor that misbehaves on purpose, on a real socket: what QEMU rarely does and must not break us.

use super::*;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "x"}, "capabilities": ["oob"]}}"#;
const CAPS: &str = r#"[{"capability":"events","state":false},{"capability":"multifd","state":true}]"#;

/// Serves one client: greets, then answers each command with the lines `answer` gives (`$ID` is replaced).
pub(crate) fn serve(
    answer: impl Fn(&str, &Value) -> Option<String> + Send + 'static,
) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let listener = UnixListener::bind(&path).unwrap();
    let t = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        writeln!(s, "{GREETING}").unwrap();
        let mut lines = BufReader::new(s.try_clone().unwrap()).lines();
        while let Some(Ok(l)) = lines.next() {
            let v: Value = serde_json::from_str(&l).unwrap();
            let command = v["execute"].as_str().unwrap();
            let reply = match command {
                "qmp_capabilities" => Some(r#"{"return":{},"id":$ID}"#.to_owned()),
                c => answer(c, &v["arguments"]),
            };
            let Some(reply) = reply else { return };
            if s.write_all((reply.replace("$ID", &v["id"].to_string()) + "\n").as_bytes()).is_err() {
                return;
            }
        }
    });
    (dir, path, t)
}

fn short() -> Duration {
    Duration::from_millis(200)
}

#[test]
fn replies_events_and_late_replies_are_told_apart() {
    let (_d, p, t) = serve(|c, _| {
        Some(match c {
            "query-status" => concat!(
                r#"{"timestamp":{"seconds":5,"microseconds":7},"event":"STOP"}"#,
                "\n",
                r#"{"return":{"running":true,"status":"stale"},"id":999}"#,
                "\n",
                r#"{"return":{"running":false,"status":"paused"},"id":$ID}"#,
                "\n",
                r#"{"timestamp":{"seconds":-1,"microseconds":-1},"event":"MIGRATION","data":{"status":"failed"}}"#,
            )
            .to_owned(),
            _ => r#"{"error":{"class":"GenericError","desc":"no"},"id":$ID}"#.to_owned(),
        })
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    assert_eq!(q.version(), Version { major: 7, minor: 2, micro: 22 });
    assert_eq!(q.query_status().unwrap(), RunState { running: false, status: "paused".into() });
    let e = q.next_event(short()).unwrap().unwrap();
    assert_eq!((e.name.as_str(), e.at_ns), ("STOP", 5_000_007_000));
    let e = q.next_event(Duration::from_secs(2)).unwrap().unwrap();
    assert_eq!((e.migration_status(), e.at_ns), (Some(MigrateStatus::Failed), 0));
    assert_eq!(q.next_event(Duration::from_millis(20)).unwrap(), None);
    let e = q.cont().unwrap_err().to_string();
    assert!(e.contains("refuses cont: no") && e.contains(p.to_str().unwrap()), "{e}");
    drop(q);
    t.join().unwrap();
}

#[test]
fn unknown_capabilities_may_be_off_but_not_on() {
    let (_d, p, t) = serve(|c, a| {
        Some(match c {
            "query-migrate-capabilities" => format!(r#"{{"return":{CAPS},"id":$ID}}"#),
            "migrate-set-capabilities" => {
                assert_eq!(a["capabilities"].as_array().unwrap().len(), 2);
                r#"{"return":{},"id":$ID}"#.to_owned()
            }
            _ => return None,
        })
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    q.set_capabilities(&[("events", true), ("multifd", false), ("compress", false)]).unwrap();
    let e = q.set_capabilities(&[("switchover-ack", true)]).unwrap_err();
    assert!(matches!(e, QmpError::NoCapability { .. }), "{e}");
    assert_eq!(q.enabled_capabilities().unwrap(), ["multifd"]);
    // The fake dies on the next command, as a killed QEMU does.
    assert!(q.cont().unwrap_err().is_closed());
    assert!(q.next_event(short()).unwrap_err().is_closed());
    t.join().unwrap();
}

#[test]
fn a_monitor_held_by_another_client_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let p = dir.path().join("q");
    let _nobody_accepts = UnixListener::bind(&p).unwrap();
    let t = Instant::now();
    let e = Qmp::connect(&p, short()).unwrap_err();
    assert!(matches!(e, QmpError::Busy { .. }), "{e}");
    assert!(t.elapsed() < Duration::from_secs(2));
    let e = Qmp::connect(dir.path().join("none"), short()).unwrap_err();
    assert!(matches!(e, QmpError::Connect { .. }), "{e}");
    let long = dir.path().join("x".repeat(200));
    assert!(matches!(Qmp::connect(long, short()).unwrap_err(), QmpError::Connect { .. }));
}

#[test]
fn silence_garbage_and_endless_lines_end_in_errors() {
    let (_d, p, _t) = serve(|c, _| {
        Some(match c {
            "cont" => String::new(),
            "stop" => r#"{"return":"#.to_owned(),
            "quit" => "x".repeat(MAX_LINE + (64 << 10)),
            _ => "[]".to_owned(),
        })
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    q.set_timeout(short());
    assert!(matches!(q.cont().unwrap_err(), QmpError::Grammar { .. }), "an empty line is no object");
    assert!(matches!(q.stop().unwrap_err(), QmpError::Grammar { .. }));
    assert!(matches!(q.query_status().unwrap_err(), QmpError::Grammar { .. }));
    q.set_timeout(Duration::from_secs(5));
    let e = q.quit().unwrap_err().to_string();
    assert!(e.contains("more than"), "{e}");
}

#[test]
fn a_command_that_is_never_answered_times_out_and_the_next_one_works() {
    use std::sync::atomic::{AtomicU32, Ordering};
    let calls = AtomicU32::new(0);
    let (_d, p, _t) = serve(move |_, _| {
        if calls.fetch_add(1, Ordering::Relaxed) == 0 {
            std::thread::sleep(Duration::from_millis(300));
        }
        Some(r#"{"return":{"running":true,"status":"running"},"id":$ID}"#.to_owned())
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    q.set_timeout(Duration::from_millis(50));
    assert!(matches!(q.query_status().unwrap_err(), QmpError::Timeout { .. }));
    q.set_timeout(Duration::from_secs(2));
    assert!(q.query_status().unwrap().running);
}

#[test]
fn events_nobody_asks_for_are_bounded_and_counted() {
    let (_d, p, t) = serve(|c, _| {
        let one = r#"{"timestamp":{"seconds":1,"microseconds":0},"event":"E"}"#.to_owned() + "\n";
        (c == "cont").then(|| one.repeat(MAX_EVENTS + 5) + r#"{"return":{},"id":$ID}"#)
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    q.cont().unwrap();
    assert_eq!((q.dropped_events(), q.drain_events().unwrap().len()), (5, MAX_EVENTS));
    drop(q);
    t.join().unwrap();
}

#[test]
fn query_migrate_takes_what_either_version_gives() {
    let i = MigrateInfo::parse(&json!({}));
    assert_eq!((i.status, i.transferred, i.listen_port), (MigrateStatus::None, 0, None));
    let i = MigrateInfo::parse(&json!({"status":"completed","total-time":9,"downtime":3,
        "ram":{"total":4096,"remaining":0,"transferred":77,"duplicate":1,"normal":2,"dirty-sync-count":4},
        "socket-address":[{"type":"unix","path":"x"},{"type":"inet","host":"127.0.0.1","port":"4711"}]}));
    assert_eq!((i.total_ms, i.downtime_ms, i.listen_port), (9, Some(3), Some(4711)));
    assert_eq!((i.transferred, i.zero_pages, i.normal_pages, i.sync_count), (77, 1, 2, 4));
    assert!(i.status.is_final());
    assert_eq!(MigrateInfo::parse(&json!({"status":"postcopy-active"})).status, MigrateStatus::Other);
}

#[test]
fn a_connection_is_given_under_a_name_and_rides_on_that_command_only() {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
    use std::io::IoSliceMut;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("q");
    let listener = UnixListener::bind(&path).unwrap();
    let qemu = std::thread::spawn(move || {
        let (mut s, _) = listener.accept().unwrap();
        writeln!(s, "{GREETING}").unwrap();
        let mut seen = Vec::new();
        for _ in 0..3 {
            let mut chunk = [0; 4096];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let got =
                recvmsg(&s, &mut [IoSliceMut::new(&mut chunk)], &mut control, RecvFlags::empty()).unwrap();
            let fds: Vec<OwnedFd> = control
                .drain()
                .flat_map(|m| match m {
                    RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
                    _ => Vec::new(),
                })
                .collect();
            let v: Value = serde_json::from_slice(&chunk[..got.bytes]).unwrap();
            writeln!(s, "{}", json!({ "return": {}, "id": v["id"] })).unwrap();
            seen.push((v["execute"].as_str().unwrap().to_owned(), v["arguments"]["fdname"].clone(), fds));
        }
        seen
    });
    let mut q = Qmp::connect(&path, Duration::from_secs(2)).unwrap();
    let (mut mine, given) = UnixStream::pair().unwrap();
    q.give("stream", given.as_fd()).unwrap();
    drop(given);
    q.cont().unwrap();
    let seen = qemu.join().unwrap();
    let names: Vec<_> = seen.iter().map(|(c, name, fds)| (c.as_str(), name.as_str(), fds.len())).collect();
    assert_eq!(names, [("qmp_capabilities", None, 0), ("getfd", Some("stream"), 1), ("cont", None, 0)]);
    let mut taken = UnixStream::from(seen.into_iter().nth(1).unwrap().2.remove(0));
    taken.write_all(b"x").unwrap();
    drop(taken);
    let mut all = Vec::new();
    mine.read_to_end(&mut all).unwrap();
    assert_eq!(all, b"x", "no copy of the connection is kept");
}

#[test]
fn memory_backends_are_told_and_made_and_their_threads_put_back() {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};
    let threads = Arc::new(AtomicU64::new(0));
    let seen = threads.clone();
    let (_d, p, t) = serve(move |c, args| {
        Some(match c {
            "query-memdev" => concat!(
                r#"{"return":[{"id":"m0","size":268435456,"share":true,"prealloc":false,"policy":"default"},"#,
                r#"{"size":4096,"share":true}],"id":$ID}"#
            )
            .to_owned(),
            "qom-get" if args["property"] == "type" => {
                r#"{"return":"memory-backend-memfd","id":$ID}"#.to_owned()
            }
            "qom-get" if args["path"] == "/objects/m0" => r#"{"return":5,"id":$ID}"#.to_owned(),
            "qom-set" if args["path"] == "/objects/m0" => {
                if args["property"] == "prealloc-threads" {
                    seen.fetch_add(args["value"].as_u64().unwrap(), Ordering::Relaxed);
                }
                let known = args["property"] == "prealloc-threads";
                assert!(known || args["property"] == "prealloc" && args["value"] == true, "{args}");
                r#"{"return":{},"id":$ID}"#.to_owned()
            }
            _ => r#"{"error":{"class":"GenericError","desc":"no such object"},"id":$ID}"#.to_owned(),
        })
    });
    let mut q = Qmp::connect(&p, Duration::from_secs(2)).unwrap();
    let kind = "memory-backend-memfd".to_owned();
    let m0 = memory::Backend { id: "m0".into(), kind, size: 256 << 20, share: true, prealloc: false };
    assert_eq!(q.memory_backends().unwrap(), [m0], "one without a name cannot be made");
    q.populate("m0", 3).unwrap();
    assert_eq!(threads.load(Ordering::Relaxed), 3 + 5, "three for this, then as many as were found");
    assert!(q.populate("m1", 3).unwrap_err().to_string().contains("no such object"));
    drop(q);
    t.join().unwrap();
}

#[test]
fn settings_are_put_back_as_they_were_found_and_no_others_are_touched() {
    let (qemu, _dir, path) = fake::FakeQemu::start("running");
    let caps = qemu.is().capabilities.clone();
    let params = qemu.is().parameters.clone();
    let mut q = Qmp::connect(&path, Duration::from_secs(2)).unwrap();
    let wanted = [("events", true), ("multifd", false), ("xbzrle", false), ("compress", false)];
    let found = q.found(&wanted, &["max-bandwidth", "downtime-limit", "no-such"]).unwrap();
    let text = serde_json::to_string(&found).unwrap();
    assert_eq!(serde_json::from_str::<settings::Settings>(&text).unwrap(), found);
    let names: Vec<_> = found.capabilities.keys().chain(found.parameters.keys()).collect();
    assert_eq!(names, ["events", "multifd", "downtime-limit", "max-bandwidth"], "what changes, no more");
    q.set_capabilities(&wanted).unwrap();
    for limit in [300, 40] {
        let set = json!({ "max-bandwidth": 1u64 << 40, "downtime-limit": limit });
        q.set_parameters(set.as_object().unwrap().clone()).unwrap();
    }
    // Somebody else's, meanwhile.
    qemu.is().parameters["multifd-channels"] = json!(7);
    q.put_back(&found).unwrap();
    assert_eq!(qemu.is().capabilities, caps);
    assert_eq!(std::mem::replace(&mut qemu.is().parameters["multifd-channels"], json!(2)), 7);
    assert_eq!(qemu.is().parameters, params);
    qemu.is().told.clear();
    q.put_back(&found).unwrap();
    assert!(qemu.is().told.is_empty(), "what is as it was is not set again");
}

#[test]
fn a_qemu_that_cannot_stay_after_a_failed_load_is_told_to_load_all_the_same() {
    for knows in [true, false] {
        let tries = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
        let seen = tries.clone();
        let (_d, path, t) = serve(move |_, args| {
            seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if !knows && args.get("exit-on-error").is_some() {
                let error = r#"{"class":"GenericError","desc":"Parameter 'exit-on-error' is unexpected"}"#;
                return Some(format!(r#"{{"error":{error},"id":$ID}}"#));
            }
            assert_eq!(args["uri"], "fd:irlm");
            Some(r#"{"return":{},"id":$ID}"#.to_owned())
        });
        let mut q = Qmp::connect(&path, Duration::from_secs(2)).unwrap();
        q.migrate_incoming_and_stay("fd:irlm").unwrap();
        assert_eq!(tries.load(std::sync::atomic::Ordering::Relaxed), if knows { 1 } else { 2 });
        drop(q);
        t.join().unwrap();
    }
}
