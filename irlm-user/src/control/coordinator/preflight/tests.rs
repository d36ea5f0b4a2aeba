//! What is concluded from both ends' facts: what starts, what is refused, and with which lines.

use super::*;
use crate::control::api::{Moved, OnRecord};
use crate::control::config::GroupConfig;
use crate::host::sched::Process;

/// Two VMs from host s to host t.
fn plan() -> Plan {
    let text = "name='g'\nmethod='gm'\n[[source]]\nname='s'\nagent='127.0.0.1:1'\n[[target]]\nname='t'\nagent='127.0.0.1:2'\n\
                data='127.0.0.1:3'\n[[vm]]\nname='v0'\nsource='s'\ntarget='t'\nsource_qmp='/a'\ntarget_qmp='/b'\n\
                [[vm]]\nname='v1'\nsource='s'\ntarget='t'\nsource_qmp='/c'\ntarget_qmp='/d'\n";
    Plan::new(GroupConfig::parse(text).unwrap(), None).unwrap()
}

fn who(name: &str) -> Identity {
    Identity { uuid: format!("u-{name}"), name: name.into(), machine: "pc".into(), memory: 1 << 30 }
}

/// What the two agents find where all is well, the target's first, as the plan has them.
fn well() -> Vec<Preflight> {
    let side = |role: Role, state: &str, pid: u32| {
        let one = |ix: u16| {
            let name = format!("v{ix}");
            VmFacts {
                identity: Some(who(&name)),
                process: Some(Process {
                    pid: pid + u32::from(ix),
                    started: 1,
                    boot_id: crate::host::sched::BootId::UNKNOWN,
                }),
                state: state.into(),
                resident: 600 << 20,
                ..VmFacts::new(ix, &name, role)
            }
        };
        Preflight { vms: vec![one(0), one(1)], problems: vec![], available: Some(8 << 30), agent_of: None }
    };
    vec![side(Role::Target, "inmigrate", 20), side(Role::Source, "running", 10)]
}

#[test]
fn where_all_is_well_each_agent_is_told_who_the_other_end_has_seen() {
    let (p, found) = (plan(), well());
    let j = judge(&p, &found);
    assert_eq!(j.refused, Vec::<String>::new());
    let p = cleared(&p, &j.moved, &j.identities);
    for a in &p.agents {
        assert_eq!(a.spec.vms[1].identity, Some(who("v1")), "host {}", a.name);
    }
}

#[test]
fn swapped_target_sockets_are_refused_with_every_reason() {
    let (p, mut found) = (plan(), well());
    let [a, b] = &mut found[0].vms[..] else { panic!() };
    std::mem::swap(&mut a.identity, &mut b.identity);
    found[1].vms[0].refusals = vec!["no".into(), "nor so".into()];
    found[0].problems = vec!["the journal is full".into()];
    let refused = judge(&p, &found).refused;
    let has = |what: &str| refused.iter().any(|l| l.contains(what));
    assert!(has("vm v0 (s to t): its UUID") && has("vm v1 (s to t): its name"), "{refused:?}");
    assert!(has("vm v0 at host s: no") && has("vm v0 at host s: nor so"), "{refused:?}");
    assert!(has("host t: the journal is full"), "{refused:?}");
    assert_eq!(refused.len(), 7, "{refused:?}");
}

#[test]
fn one_process_in_two_rows_is_refused_and_a_common_starter_is_not() {
    let (p, mut found) = (plan(), well());
    found[1].vms[1].process = found[1].vms[0].process;
    assert_eq!(
        judge(&p, &found).refused,
        Vec::<String>::new(),
        "two VMs whose sockets somebody else has made"
    );
    found[1].vms[1].identity = found[1].vms[0].identity.clone();
    let refused = judge(&p, &found).refused;
    assert!(
        refused.iter().any(|l| l.contains("vm v0 (source) and vm v1 (source) are one process, 10")),
        "{refused:?}"
    );
}

/// Its source would say Hello as host s, which no target takes from whoever has the certificate of s9.
#[test]
fn an_agent_with_another_hosts_certificate_is_refused_beforehand() {
    let (p, mut found) = (plan(), well());
    let says = |found: &[Preflight]| judge(&p, found).refused;
    found[1].agent_of = Some(vec!["s9".into()]);
    let lines = says(&found);
    assert_eq!(lines.len(), 1, "{lines:?}");
    has(
        &lines[0],
        &["host s: its agent's certificate", "that of the agent of s9", "irlm:agent/s ", "--host s "],
    );
    found[1].agent_of = Some(vec![]);
    let lines = says(&found);
    assert!(lines.len() == 1 && lines[0].contains("is no agent's"), "{lines:?}");
    // A certificate of two hosts, and plain text.
    found[1].agent_of = Some(vec!["s9".into(), "s".into()]);
    found[0].agent_of = None;
    assert_eq!(says(&found), Vec::<String>::new());
    found[0].agent_of = Some(vec!["s".into()]);
    assert!(says(&found).iter().any(|l| l.starts_with("host t: ")), "the target's agent, too");
}

/// The first VM has left with group g, and its target's process has it.
fn moved() -> Vec<Preflight> {
    let mut found = well();
    let record = |role| OnRecord {
        group: "g".into(),
        vm: "v0".into(),
        run: 7,
        says: "so".into(),
        left_for: (role == Role::Source).then(|| "127.0.0.1:3".parse().unwrap()),
        ..OnRecord::default()
    };
    let s = &mut found[1].vms[0];
    s.moved = Some(Moved { group: "g".into(), to: "127.0.0.1:3".parse().unwrap(), at_ns: 5 });
    s.refusals = vec!["postmigrate".into()];
    (s.record, s.state) = (Some(record(Role::Source)), "postmigrate".into());
    let t = &mut found[0].vms[0];
    t.refusals = vec!["it runs".into()];
    (t.state, t.arrived) = ("running".into(), Some("g".into()));
    (t.record, t.history) = (Some(record(Role::Target)), Some("arrived".into()));
    found
}

/// The one line with which this is refused.
fn refused(found: &[Preflight]) -> String {
    let j = judge(&plan(), found);
    assert_eq!((j.refused.len(), j.moved.len()), (1, 0), "{j:?}");
    assert!(j.refused[0].starts_with("vm v0 (s to t): ") && !j.refused[0].contains('\n'), "{j:?}");
    j.refused[0].clone()
}

fn has(line: &str, words: &[&str]) {
    assert!(words.iter().all(|w| line.contains(w)), "{words:?}: {line}");
}

#[test]
fn a_vm_that_has_moved_is_taken_out_if_its_target_has_it_and_refused_if_not() {
    let (p, mut found) = (plan(), moved());
    let j = judge(&p, &found);
    assert_eq!((j.refused, j.moved.len()), (vec![], 1));
    let p2 = cleared(&p, &j.moved, &j.identities);
    assert!(p2.agents.iter().all(|a| a.spec.vms.len() == 1 && a.spec.vms[0].name == "v1"));
    for other in [None, Some("h".to_owned())] {
        found[0].vms[0].arrived = other;
        has(&refused(&found), &["take its row out"]);
    }
    // Agents of an earlier version tell no record: then it counts where it went.
    let mut found = moved();
    (found[0].vms[0].record, found[1].vms[0].record) = (None, None);
    assert_eq!(judge(&p, &found).moved.len(), 1);
    found[1].vms[0].moved.as_mut().unwrap().to = "127.0.0.1:4".parse().unwrap();
    has(&refused(&found), &["take its row out"]);
}

#[test]
fn a_vm_whose_old_process_was_ended_counts_as_moved_and_the_rest_moves() {
    let mut found = moved();
    (found[1].vms[0].process, found[1].vms[0].state) = (None, "ended".into());
    found[0].vms[0].state = "paused".into();
    let j = judge(&plan(), &found);
    assert_eq!(j.refused, Vec::<String>::new());
    assert_eq!(j.moved, [AlreadyMoved { ix: 0, state: "paused".into() }]);
}

#[test]
fn a_moved_vm_is_known_by_its_records_and_not_by_an_address_of_the_file() {
    let mut found = moved();
    found[1].vms[0].moved.as_mut().unwrap().to = "127.0.0.1:9".parse().unwrap();
    assert_eq!(judge(&plan(), &found).moved.len(), 1);
    // Nor is another run, or another VM, of a group of that name this one, at whatever address.
    let mut found = moved();
    found[0].vms[0].record.as_mut().unwrap().run = 8;
    has(&refused(&found), &["take its row out"]);
    let mut found = moved();
    found[0].vms[0].record.as_mut().unwrap().vm = "other".into();
    has(&refused(&found), &["vm other of group g"]);
}

#[test]
fn two_running_copies_are_refused_and_it_is_said_which_one_to_pause() {
    let mut found = moved();
    found[1].vms[0].state = "running".into();
    let line = refused(&found);
    has(&line, &["TWO COPIES RUN, at s (process 10) and at t (process 20)", "the VM is at t", "at once"]);
    has(&line, &["pause the copy at s by hand", "/a"]);
    found[0].vms[0].state = "paused".into();
    has(&refused(&found), &["its old copy runs at s", "at t it is paused", "pause the copy at s by hand"]);
    // It was continued and paused again.
    found[1].vms[0].state = "paused".into();
    assert_eq!(judge(&plan(), &found).moved.len(), 1);
}

#[test]
fn a_vm_that_somebody_continued_at_its_source_is_said_to_run_there() {
    let mut found = moved();
    let t = &mut found[0].vms[0];
    (t.process, t.arrived, t.history, t.identity) = (None, None, None, None);
    t.state.clear();
    t.record.as_mut().unwrap().ended = true;
    found[1].vms[0].state = "running".into();
    has(&refused(&found), &["the process that had it at host t has ended", "IT RUNS AT s now (process 10)"]);
    found[1].vms[0].state = "postmigrate".into();
    has(&refused(&found), &["has ended", "its old copy at s is postmigrate", "no copy of it runs"]);
    found[1].vms[0].state = "ended".into();
    has(&refused(&found), &["had it at host t has ended", "its old process at s has ended"]);
    found[0].vms[0].record = None;
    found[1].vms[0].state = "running".into();
    has(&refused(&found), &["knows nothing of it", "IT RUNS AT s now"]);
}

#[test]
fn a_vm_that_is_being_handed_over_is_waited_for() {
    let mut found = moved();
    let t = &mut found[0].vms[0];
    t.arrived = None;
    t.record.as_mut().unwrap().open = true;
    found[1].vms[0].record.as_mut().unwrap().open = true;
    let line = refused(&found);
    has(&line, &["group g is moving it right now", "wait", "irlm status"]);
    assert!(!line.contains("take its row out"), "{line}");
}

#[test]
fn a_vm_that_its_target_has_no_record_of_is_said_to_be_seen_there() {
    let mut found = moved();
    let t = &mut found[0].vms[0];
    (t.arrived, t.record, t.history) = (None, None, None);
    let line = refused(&found);
    has(
        &line,
        &["host t has no record of it", "(process 20) a VM is running", "this one", "leave that process"],
    );
    found[1].vms[0].state = "running".into();
    has(&refused(&found), &["two copies may run"]);
}

#[test]
fn a_vm_that_went_on_from_its_target_is_said_to_be_there() {
    let mut found = moved();
    let t = &mut found[0].vms[0];
    (t.arrived, t.history, t.state) = (None, Some("moved".into()), "postmigrate".into());
    let r = t.record.as_mut().unwrap();
    (r.group, r.left_for) = ("next".into(), Some("127.0.0.1:5".parse().unwrap()));
    has(&refused(&found), &["went on from host t to 127.0.0.1:5 with group next", "take its row out"]);
}

#[test]
fn a_targets_data_address_must_be_where_its_agent_listens_for_data() {
    let door = |text: &str| Some(text.parse().unwrap());
    let mut p = plan();
    // The plan has the target's agent first.
    let says = |p: &Plan, doors: [Option<SocketAddr>; 2]| data_addresses(p, &doors);
    assert_eq!(says(&p, [door("127.0.0.1:3"), door("127.0.0.1:4")]), Vec::<String>::new());
    assert_eq!(says(&p, [None, None]), Vec::<String>::new(), "agents of an earlier version do not say");
    let lines = says(&p, [door("127.0.0.1:9722"), None]);
    let line = "target t: data = 127.0.0.1:3, but its agent listens for data on port 9722";
    assert_eq!(lines, [line]);
    let lines = says(&p, [door("127.0.0.2:3"), door("127.0.0.1:3")]);
    assert!(lines.len() == 1 && lines[0].contains("that is the agent of host s"), "{lines:?}");
    // A data network of its own, or an agent that listens at all its addresses.
    assert_eq!(says(&p, [door("10.0.0.1:3"), door("10.0.0.2:3")]), Vec::<String>::new());
    p.config.index = Some("127.0.0.1:3".parse().unwrap());
    assert_eq!(says(&p, [door("10.0.0.1:3"), None]).len(), 1);
    p.recipe = crate::control::recipe::Recipe::Plain { multifd: false };
    assert_eq!(says(&p, [door("127.0.0.1:9722"), None]), Vec::<String>::new(), "QEMUs listen themselves");
}

#[test]
fn a_target_host_without_the_memory_for_what_comes_is_refused() {
    let (p, mut found) = (plan(), well());
    found[0].available = Some(100 << 20);
    assert_eq!(judge(&p, &found).refused, Vec::<String>::new(), "it is there already");
    found[0].vms.iter_mut().for_each(|f| f.resident = 50 << 20);
    let refused = judge(&p, &found).refused;
    assert!(refused.len() == 1 && refused[0].contains("need 1100 MiB"), "{refused:?}");
    found[0].available = None;
    assert!(judge(&p, &found).refused.is_empty());
}
