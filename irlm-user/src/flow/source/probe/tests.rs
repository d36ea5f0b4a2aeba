//! A link to a door on loopback: what it gives, who may measure it, and what a slow one costs.

use super::*;
use crate::core::identity::Mapping;
use crate::core::units::HostIx;
use crate::core::wire::messages::Purpose;
use crate::flow::door::{self, Door};
use crate::flow::hosts::Hosts;
use crate::flow::{FlowTags, NoTags, Timeouts};
use crate::net::connection::Security;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A door at which group `g` is expected, until the second is set.
fn door() -> (SocketAddr, Arc<AtomicBool>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (addr, stop) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let door = Arc::new(Door::default());
    door.expect("g", [1; 32], Arc::default());
    let (halt, tags): (_, Arc<dyn FlowTags>) = (stop.clone(), Arc::new(NoTags));
    std::thread::spawn(move || door::serve(&listener, &door, &tags, Timeouts::default(), &halt));
    (addr, stop)
}

fn hello(group: &str, token: u8) -> Greeting {
    Greeting::new(group, [token; 32], Purpose::Probe { source: HostIx(0) })
}

const PATIENCE: Duration = Duration::from_secs(5);

#[test]
fn a_link_is_measured_by_whoever_is_expected_and_by_nobody_else() {
    let (addr, stop) = door();
    let rate = measure(addr, &hello("g", 1), PATIENCE, 1.0, &Security::Plain, &|| false, |_| ()).unwrap();
    assert!(rate > 1e6, "loopback gives {rate} bytes a second");
    for stranger in [hello("other", 1), hello("g", 2)] {
        let refused =
            measure(addr, &stranger, PATIENCE, 1.0, &Security::Plain, &|| false, |_| ()).unwrap_err();
        assert!(matches!(refused, NetError::Declined { .. }), "{refused}");
    }
    stop.store(true, Ordering::Relaxed);
}

/// Under TLS a connection is made in the name of a host only by that host's agent.
#[test]
fn nobody_calls_in_the_name_of_another_host() {
    let security = crate::net::connection::tests::keys();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (addr, stop) = (listener.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
    let door = Arc::new(Door::secured(security.clone(), Mapping::default()));
    // The certificate is that of the agent of `h`.
    let hosts = |sources: [&str; 2]| {
        Arc::new(Hosts { sources: sources.map(str::to_owned).to_vec(), targets: vec!["h".into()] })
    };
    door.expect("own", [1; 32], hosts(["other", "h"]));
    door.expect("others", [1; 32], hosts(["h", "other"]));
    door.expect("nobody", [1; 32], Arc::default());
    let (halt, tags): (_, Arc<dyn FlowTags>) = (stop.clone(), Arc::new(NoTags));
    std::thread::spawn(move || door::serve(&listener, &door, &tags, Timeouts::default(), &halt));
    let call = |group: &str| {
        let hello = Greeting::new(group, [1; 32], Purpose::Probe { source: HostIx(1) });
        measure(addr, &hello, PATIENCE, 1.0, &security, &|| false, |_| ())
    };
    assert!(call("own").unwrap() > 1e6);
    for group in ["others", "nobody"] {
        let e = call(group).unwrap_err();
        assert!(matches!(e, NetError::Declined { .. }) && e.to_string().contains("in the name of"), "{e}");
    }
    // Nor does anybody who speaks no TLS, or has a certificate of another CA.
    for stranger in [Security::Plain, crate::net::connection::tests::keys()] {
        let hello = Greeting::new("own", [1; 32], Purpose::Probe { source: HostIx(1) });
        assert!(measure(addr, &hello, PATIENCE, 1.0, &stranger, &|| false, |_| ()).is_err());
    }
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_host_that_has_not_heard_of_the_group_is_asked_again() {
    let (addr, stop) = door();
    let asked = AtomicU64::new(0);
    let ask_on = || asked.fetch_add(1, Ordering::Relaxed) < 3;
    assert!(measure(addr, &hello("late", 1), PATIENCE, 1.0, &Security::Plain, &ask_on, |_| ()).is_err());
    assert_eq!(asked.load(Ordering::Relaxed), 4);
    stop.store(true, Ordering::Relaxed);
}

#[test]
fn a_link_that_is_far_too_slow_carries_little() {
    // A wire of 16 MB/s: what comes is passed on so fast, and counted.
    let (addr, stop) = door();
    let slow = TcpListener::bind("127.0.0.1:0").unwrap();
    let (at, passed) = (slow.local_addr().unwrap(), Arc::new(AtomicU64::new(0)));
    let counted = passed.clone();
    std::thread::spawn(move || {
        let (mut from, _) = slow.accept().unwrap();
        let mut to = TcpStream::connect(addr).unwrap();
        let (mut back, mut home) = (to.try_clone().unwrap(), from.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut back, &mut home));
        let mut chunk = vec![0; 16 << 10];
        while let Ok(n) = from.read(&mut chunk)
            && n > 0
        {
            counted.fetch_add(n as u64, Ordering::Relaxed);
            std::thread::sleep(Duration::from_micros(n as u64 / 16));
            if to.write_all(&chunk[..n]).is_err() {
                break;
            }
        }
    });
    let rate = measure(at, &hello("g", 1), PATIENCE, 1e9, &Security::Plain, &|| false, |_| ()).unwrap();
    assert!(rate < 250e6, "{rate}");
    let n = passed.load(Ordering::Relaxed);
    assert!((STEPS[0] as u64..STEPS[0] as u64 + 4096).contains(&n), "{n} bytes");
    stop.store(true, Ordering::Relaxed);
}
