//! What can be seen without a kernel that takes programs; the rest is in `tests/bpf.rs`.

use super::{BpfError, Classifier, Counters, Direction, FlowClass, TagPolicy, default_pin_dir, key};
use irlm_common::{COUNT_ENTRIES, Counter, Events, PROTO_TCP, Scope, count_index};

#[test]
fn a_disabled_handle_takes_every_call() {
    let off = Classifier::disabled("no root");
    let end = "10.0.0.1:1".parse().unwrap();
    off.add_flow(end, end, FlowClass::Bulk).unwrap();
    off.remove_flow(end, end).unwrap();
    off.set_class(end, end, FlowClass::Switchover).unwrap();
    off.set_policy(&TagPolicy::default()).unwrap();
    off.shut_down();
    drop(off.track_ends(end, end, FlowClass::Bulk));
    let counters = off.counters().unwrap();
    assert!(!counters.counted());
    assert_eq!(counters.total(Direction::Egress), Counter::default());
    assert_eq!(off.disabled_reason(), Some("no root"));
    assert_eq!((off.hook(), off.pinned(), off.pin_error()), (None, None, None));
}

#[test]
fn the_handle_crosses_threads() {
    fn check<T: Send + Sync + Clone>() {}
    check::<Classifier>();
}

#[test]
fn a_mapped_peer_is_the_same_flow_as_its_ipv4_address() {
    let v4 = key(PROTO_TCP, "10.0.0.1:1".parse().unwrap(), "10.0.0.2:2".parse().unwrap());
    let mapped =
        key(PROTO_TCP, "[::ffff:10.0.0.1]:1".parse().unwrap(), "[::ffff:10.0.0.2]:2".parse().unwrap());
    assert_eq!(v4, mapped);
}

#[test]
fn an_object_without_the_mark_is_refused_before_it_is_loaded() {
    assert!(matches!(Classifier::options("lo").object(b"").attach(), Err(BpfError::NoObject)));
    assert!(matches!(Classifier::options("lo").object(b"\x7fELF").attach(), Err(BpfError::Abi)));
    // The mark alone makes no object, and a broken one must not panic.
    assert!(matches!(
        Classifier::options("lo").object(b"irlm-abi-0002").attach(),
        Err(BpfError::Load { .. })
    ));
}

#[test]
fn names_that_would_leave_the_pin_root_are_refused() {
    assert!(default_pin_dir("host-1.rack_2").unwrap().ends_with("irlm/host-1_rack_2"));
    for bad in ["", ".", "..", ".x", "a/b", "/", "a\0b", "ä", &"x".repeat(65)] {
        assert!(matches!(default_pin_dir(bad), Err(BpfError::Name(_))), "{bad:?}");
    }
}

#[test]
fn rows_and_differences_follow_direction_scope_and_slot() {
    let mut sums = [Counter::default(); COUNT_ENTRIES as usize];
    let bulk = Counter { packets: 2, bytes: 100, wire_packets: 3, wire_bytes: 166 };
    let slot = FlowClass::Bulk.slot();
    sums[count_index(Direction::Ingress, Scope::Core, slot) as usize] = bulk;
    sums[count_index(Direction::Ingress, Scope::Rack, slot) as usize] = bulk;
    let cpu = Events { dscp_not_written: 3, log_suppressed: 4, ..Events::default() };
    let now = Counters::new(sums, &[cpu, cpu]);
    assert_eq!(now.scoped(Direction::Ingress, Scope::Rack, FlowClass::Bulk), bulk);
    let both = Counter { packets: 4, bytes: 200, wire_packets: 6, wire_bytes: 332 };
    assert_eq!(now.get(Direction::Ingress, FlowClass::Bulk), both);
    assert_eq!(now.total(Direction::Ingress), both);
    assert_eq!(now.total(Direction::Egress), Counter::default());
    assert_eq!((now.oddities().dscp_not_written, now.oddities().log_suppressed), (6, 8));
    let rows: Vec<_> = now.rows().filter(|row| row.packets != 0).collect();
    assert_eq!(rows.len(), 2);
    assert_eq!((rows[0].direction, rows[0].scope, rows[0].class), ("ingress", "core", "bulk"));
    assert_eq!((rows[1].scope, rows[1].wire_bytes), ("rack", 166));
    assert_eq!(now.since(&now).total(Direction::Ingress), Counter::default());
    assert_eq!(now.since(&now).oddities(), Counters::default().oddities());
    assert_eq!(now.since(&Counters::default()), now);
}
