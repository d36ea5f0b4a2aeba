//! The port's class tree in a real kernel: set up, changed under a running flow, removed, taken over and given back.
//!
//! Everything happens in network namespaces that live as long as a thread of the test, so nothing can stay behind.
//! Without root or `ip` and `tc` (iproute2) the reason is printed and the test passes.

use irlm_user::control::policy;
use irlm_user::control::shape::error::ShapeError;
use irlm_user::control::shape::port::{Kernel, difference, make_again, read_tree};
use irlm_user::control::shape::{Shaper, Tagger};
use irlm_user::core::policy::{Class, HtbClass, Marks, Policy};
use irlm_user::host::netns::in_a_fresh_network;
use irlm_user::net::tc::{Tc, TcError, What, delete_root, htb_class, htb_root};
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

const MBIT: u64 = 1_000_000;

fn run(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let out = Command::new(words.next().ok_or("no command")?).args(words).output()?;
    if !out.status.success() {
        return Err(format!("{line}: {}", String::from_utf8_lossy(&out.stderr).trim()).into());
    }
    Ok(String::from_utf8(out.stdout)?)
}

/// Runs `work` in a network of its own with a veth pair `eth0`, `peer0`; without root, says so.
fn in_namespace(work: impl FnOnce() -> Result<()> + Send) -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return Ok(());
    }
    for tool in ["ip -V", "tc -V"] {
        if let Err(e) = run(tool) {
            println!("skipped: needs iproute2: {e}");
            return Ok(());
        }
    }
    let made = in_a_fresh_network(|| {
        run("ip link set lo up")?;
        run("ip link add eth0 type veth peer name peer0")?;
        run("ip link set eth0 up")?;
        run("ip link set peer0 up")?;
        work()
    });
    match made {
        Err(e) => {
            println!("skipped: no network namespace: {e}");
            Ok(())
        }
        Ok(r) => r,
    }
}

/// What `tc` says of eth0, without what it counted.
fn shown() -> Result<Value> {
    let mut all = Vec::new();
    for what in ["qdisc", "class"] {
        let text = run(&format!("tc -j {what} show dev eth0"))?;
        // Of no classes it says nothing, and of those that a kind makes by itself it speaks no JSON.
        let mut said = serde_json::from_str(&text).unwrap_or(Value::String(text));
        for qdisc in said.as_array_mut().into_iter().flatten() {
            // The kernel's own packets on a new link: htb counts them among its options.
            if let Some(options) = qdisc.get_mut("options").and_then(Value::as_object_mut) {
                options.remove("direct_packets_stat");
            }
        }
        all.push(said);
    }
    Ok(Value::Array(all))
}

/// A rate as `tc` writes it.
fn tc_rate(mut bits: u64) -> String {
    let mut units = ["bit", "Kbit", "Mbit", "Gbit", "Tbit"].into_iter();
    let mut unit = units.next();
    while bits >= 1000 && (bits.is_multiple_of(1000) || bits >= 1_000_000) {
        bits /= 1000;
        unit = units.next();
    }
    format!("{bits}{}", unit.unwrap_or("?"))
}

/// Remembers what it was told.
#[derive(Clone, Default, Debug)]
struct Tags(Arc<Mutex<Marks>>);

impl Tagger for Tags {
    fn off(&self) -> Option<String> {
        None
    }
    fn set(&mut self, marks: &Marks, _: &[(IpAddr, u8)]) -> std::result::Result<(), ShapeError> {
        *self.0.lock().expect("no other holder panicked") = *marks;
        Ok(())
    }
}

fn policy(shaping: &str, link: u64, others: u64) -> Policy {
    policy::parse(&text(shaping, link, others)).expect("a good policy")
}

fn text(shaping: &str, link: u64, others: u64) -> String {
    format!("[port]\nshaping = \"{shaping}\"\nlink_mbit = {link}\nothers_mbit = {others}\n")
}

fn start(dir: &Path, policy: Option<Policy>) -> Shaper {
    Shaper::start(Some("eth0"), dir, policy, Box::new(Tags::default()))
}

/// An agent's death: its record stays, and its tree.
fn crash(dir: &Path, policy: Policy) -> Result<()> {
    let s = start(dir, Some(policy));
    assert!(s.has_tree(), "{}", s.status().why);
    std::mem::forget(s);
    Ok(())
}

#[test]
fn the_kernel_has_the_tree_as_it_was_computed() -> Result<()> {
    in_namespace(|| {
        let dir = tempfile::tempdir()?;
        let before = shown()?;
        let p = policy("own", 80_000, 3000);
        let tree = p.tree(None);
        let s = start(dir.path(), Some(p));
        assert_eq!(s.status().mode, "own", "{}", s.status().why);
        let now = shown()?;
        let qdiscs = now[0].as_array().ok_or("no qdiscs")?;
        assert_eq!(qdiscs.iter().filter(|q| q["kind"] == "bfifo").count(), 6, "{now}");
        let root = qdiscs.iter().find(|q| q["root"] == true).ok_or("no root")?;
        assert_eq!((&root["kind"], &root["handle"]), (&"htb".into(), &"1f1a:".into()));
        assert_eq!(root["options"]["default"], "0xf0");
        let classes = run("tc class show dev eth0")?;
        assert_eq!(classes.lines().count(), tree.len(), "{classes}");
        for c in &tree {
            // 64-bit rates, above what the old field holds.
            let (id, rate, ceil) = (format!("1f1a:{:x}", c.minor), tc_rate(c.rate), tc_rate(c.ceil));
            let line = classes.lines().find(|l| l.starts_with(&format!("class htb {id} "))).unwrap_or("");
            assert!(line.contains(&format!(" rate {rate} ceil {ceil} ")), "{line}, not {rate} {ceil}");
            let place = if c.parent == 0 { " root ".into() } else { format!(" parent 1f1a:{:x} ", c.parent) };
            assert!(line.contains(&place), "{line}");
            if c.queue > 0 {
                assert!(line.contains(&format!(" prio {} ", c.prio)), "{line}");
                let queue = qdiscs.iter().find(|q| q["parent"] == *id).ok_or("no queue")?;
                assert_eq!(queue["options"]["limit"], c.queue, "{queue}");
            }
        }
        s.set_budget(Some(400 * MBIT))?;
        let classes = run("tc class show dev eth0")?;
        let core = classes.lines().find(|l| l.starts_with("class htb 1f1a:3 ")).ok_or("no class 3")?;
        assert!(core.contains(" ceil 400Mbit "), "{core}");
        drop(s);
        assert_eq!(shown()?, before);
        Ok(())
    })
}

#[test]
fn what_a_killed_agent_left_goes_whatever_the_next_one_is_told() -> Result<()> {
    in_namespace(|| {
        let before = shown()?;
        for next in [None, Some(policy("off", 1000, 0)), Some(policy("own", 1000, 300))] {
            let dir = tempfile::tempdir()?;
            crash(dir.path(), policy("own", 1000, 300))?;
            assert_ne!(shown()?, before);
            let wants = next.as_ref().is_some_and(|p| p.shaping.name() == "own");
            let s = start(dir.path(), next);
            assert_eq!(shown()? == before, !wants);
            drop(s);
            assert_eq!(shown()?, before);
        }
        Ok(())
    })
}

/// Trees as operators build them, by `tc`; what a kernel lacks is said and left out.
const OPERATORS: [(&str, &str); 6] = [
    ("tbf", "qdisc add dev eth0 root tbf rate 100mbit burst 32kb limit 100kb"),
    (
        "tbf with a queue",
        "qdisc add dev eth0 root handle 1: tbf rate 100mbit burst 32kb latency 20ms\n\
        qdisc add dev eth0 parent 1:1 handle 10: pfifo limit 77",
    ),
    (
        "htb",
        "qdisc add dev eth0 root handle 1: htb default 30 r2q 20\n\
        class add dev eth0 parent 1: classid 1:1 htb rate 900mbit burst 64k\n\
        class add dev eth0 parent 1:1 classid 1:10 htb rate 100mbit ceil 900mbit prio 1\n\
        class add dev eth0 parent 1:1 classid 1:30 htb rate 50mbit ceil 9gbit quantum 5000 prio 3 mpu 64 overhead 24\n\
        qdisc add dev eth0 parent 1:10 handle 100: pfifo limit 50\n\
        qdisc add dev eth0 parent 1:30 handle 300: htb default 1\n\
        class add dev eth0 parent 300: classid 300:1 htb rate 5mbit\n\
        class add dev eth0 parent 1: classid 1:2 htb rate 40gbit ceil 50gbit",
    ),
    (
        "htb with u32 filters",
        "qdisc add dev eth0 root handle 1: htb default 30\n\
        class add dev eth0 parent 1: classid 1:1 htb rate 90mbit\n\
        filter add dev eth0 parent 1: protocol ip prio 7 u32 match ip dport 80 0xffff flowid 1:1\n\
        filter add dev eth0 parent 1: protocol ip prio 9 u32 match ip src 10.0.0.0/8 flowid 1:1",
    ),
    (
        "prio",
        "qdisc add dev eth0 root handle 1: prio bands 4\n\
        qdisc add dev eth0 parent 1:2 handle 20: pfifo limit 9",
    ),
    ("fq_codel", "qdisc add dev eth0 root handle 7: fq_codel limit 500 target 3ms ecn"),
];

/// Builds one; `None` if this kernel has no such thing.
fn operators(lines: &str) -> Result<Option<Value>> {
    let _ = run("tc qdisc del dev eth0 root");
    for line in lines.lines() {
        match run(&format!("tc {}", line.trim())) {
            Ok(_) => {}
            Err(e) if e.to_string().contains("kind is unknown") || e.to_string().contains("No such file") => {
                println!("not tried: this kernel lacks it: {e}");
                return Ok(None);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(Some(Value::Array(vec![shown()?, filters()?])))
}

fn filters() -> Result<Value> {
    Ok(Value::String(run("tc filter show dev eth0")?))
}

#[test]
fn an_operators_tree_is_untouched_unless_taken_over_and_then_comes_back() -> Result<()> {
    in_namespace(|| {
        for (name, lines) in OPERATORS {
            let Some(before) = operators(lines)? else { continue };
            let same = |when: &str| -> Result<()> {
                let now = Value::Array(vec![shown()?, filters()?]);
                assert_eq!(now, before, "{name}, {when}");
                Ok(())
            };
            let dir = tempfile::tempdir()?;
            let s = start(dir.path(), Some(policy("own", 1000, 300)));
            assert_eq!(s.status().mode, "tag-only", "{name}");
            same("tag-only, running")?;
            s.set_policy(&text("own", 2000, 300))?;
            s.set_budget(Some(MBIT))?;
            drop(s);
            same("tag-only, ended")?;
            let s = start(dir.path(), Some(policy("take-over", 1000, 300)));
            assert_eq!(s.status().mode, "taken-over", "{name}: {}", s.status().why);
            assert!(shown()?.to_string().contains("1f1a:40"));
            drop(s);
            same("taken over and given back")?;
            crash(dir.path(), policy("take-over", 1000, 300))?;
            drop(start(dir.path(), None));
            same("after a crash, next start without a policy")?;
            crash(dir.path(), policy("take-over", 1000, 300))?;
            let s = start(dir.path(), Some(policy("take-over", 1000, 300)));
            assert_eq!(s.status().mode, "taken-over", "{name}");
            drop(s);
            same("after a crash, next start took over again")?;
            println!("{name}: came back");
        }
        Ok(())
    })
}

#[test]
fn what_the_kernel_would_not_make_again_is_not_taken_over() -> Result<()> {
    in_namespace(|| {
        // Its default: a class that is not there yet, under a qdisc that the record then lacks.
        run("tc qdisc add dev eth0 root handle 1: htb default 1")?;
        run("tc class add dev eth0 parent 1: classid 1:1 htb rate 9mbit")?;
        let mut kernel = Tc::open()?;
        let index = kernel.index("eth0")?;
        let mut tree = read_tree(&mut kernel, index)?;
        Kernel::rehearse(&mut kernel, &tree).unwrap();
        // Without its root the class has nothing to hang on.
        tree.remove(0);
        let e = Kernel::rehearse(&mut kernel, &tree).unwrap_err();
        assert!(!e.to_string().is_empty());
        // And the comparison sees a changed rate.
        let whole = read_tree(&mut kernel, index)?;
        run("tc class change dev eth0 parent 1: classid 1:1 htb rate 8mbit")?;
        let now = read_tree(&mut kernel, index)?;
        assert_eq!(difference(&whole, &now).as_deref(), Some("class htb 1:1"));
        make_again(&mut kernel, index, &whole)?;
        assert_eq!(difference(&whole, &read_tree(&mut kernel, index)?), None);
        Ok(())
    })
}

#[test]
fn refusals_carry_the_kernels_own_words() -> Result<()> {
    in_namespace(|| {
        let mut kernel = Tc::open()?;
        let e = kernel.index("nowhere0").unwrap_err();
        assert!(matches!(e, TcError::NoInterface(_)), "{e}");
        let index = kernel.index("eth0")?;
        let c = policy("own", 100, 0).tree(None)[0];
        let e = kernel.apply(&htb_class(index, &c)).unwrap_err();
        assert!(e.os_error().is_some() && e.to_string().contains("1f1a:1"), "{e}");
        kernel.apply(&htb_root(index))?;
        kernel.apply(&htb_class(index, &c))?;
        let e = kernel.apply(&htb_class(index, &HtbClass { minor: 0x99, rate: 0, ..c })).unwrap_err();
        assert!(e.to_string().contains("1f1a:99") && e.os_error() == Some(libc::EINVAL), "{e}");
        let e = kernel.apply(&delete_root(index, 0x7777_0000)).unwrap_err().to_string();
        assert!(e.contains("7777:") && e.contains('(') && !e.contains('\n'), "{e}");
        println!("the kernel's words: {e}");
        assert_eq!(kernel.dump(What::Class, index, 0)?.len(), 1);
        Ok(())
    })
}

/// Bytes a second that arrive within `time`.
fn rate(got: &AtomicU64, time: Duration) -> f64 {
    let (before, began) = (got.load(Ordering::Relaxed), Instant::now());
    std::thread::sleep(time);
    (got.load(Ordering::Relaxed) - before) as f64 / began.elapsed().as_secs_f64()
}

#[test]
fn a_running_flow_survives_a_change_of_policy_and_has_the_new_rate() -> Result<()> {
    in_namespace(|| {
        run("ip address add 10.77.0.1/24 dev eth0")?;
        run("ip link set eth0 gso_max_segs 1")?;
        let (tell, told) = mpsc::channel();
        let (moved, begin) = mpsc::channel();
        let (counted, ended) = (AtomicU64::new(0), AtomicBool::new(false));
        let (got, stop) = (&counted, &ended);
        std::thread::scope(|s| -> Result<()> {
            let far = s.spawn(move || {
                let inner = in_a_fresh_network(move || -> Result<()> {
                    tell.send(rustix::thread::gettid().as_raw_nonzero().get())?;
                    begin.recv()?;
                    run("ip link set peer0 up")?;
                    run("ip address add 10.77.0.2/24 dev peer0")?;
                    let l = TcpListener::bind("10.77.0.2:7701")?;
                    tell.send(0)?;
                    let (mut conn, _) = l.accept()?;
                    let mut buf = vec![0; 1 << 16];
                    while let n @ 1.. = conn.read(&mut buf)? {
                        got.fetch_add(n as u64, Ordering::Relaxed);
                    }
                    Ok(())
                });
                inner.map_err(|e| e.to_string().into()).and_then(|r| r)
            });
            let tid = told.recv()?;
            run(&format!("ip link set peer0 netns {tid}"))?;
            moved.send(())?;
            told.recv()?;
            let dir = tempfile::tempdir()?;
            let shaper = start(dir.path(), Some(policy("own", 40, 10)));
            assert!(shaper.has_tree(), "{}", shaper.status().why);
            let mut conn = TcpStream::connect("10.77.0.2:7701")?;
            // What the eBPF classifier gives packets of class bulk.
            socket2::SockRef::from(&conn).set_priority(Class::Bulk.classid())?;
            let sender = s.spawn(move || -> std::io::Result<()> {
                let block = vec![7; 1 << 16];
                while !stop.load(Ordering::Relaxed) {
                    conn.write_all(&block)?;
                }
                conn.shutdown(std::net::Shutdown::Write)
            });
            let look = Duration::from_millis(700);
            let payload = 1448.0 / 1514.0 / 8.0;
            let outcome = (|| -> Result<()> {
                let check = |what: &str, mbit: f64| {
                    std::thread::sleep(Duration::from_millis(300));
                    let (want, is) = (mbit * 1e6 * payload, rate(got, look));
                    println!("{what}: {:.3} of its rate", is / want);
                    assert!((0.85..1.1).contains(&(is / want)), "{what}: {is} B/s, not {want}");
                };
                for link in [40, 16, 80] {
                    shaper.set_policy(&text("own", link, 5))?;
                    check(&format!("link_mbit = {link}, others_mbit = 5"), link as f64 * 0.98 - 5.0);
                }
                shaper.set_budget(Some(12 * MBIT))?;
                check("share of 12 Mbit/s", 12.0);
                shaper.set_budget(None)?;
                check("no share", 80.0 * 0.98 - 5.0);
                let st = shaper.status();
                let of =
                    |name: &str| st.classes.iter().find(|c| c.name == name).cloned().ok_or("no such class");
                let (bulk, core, others) = (of("bulk")?, of("core")?, of("others")?);
                assert!(bulk.bytes > 1_000_000 && bulk.packets > 500, "{bulk:?}");
                assert!(core.bytes >= bulk.bytes && others.bytes < bulk.bytes / 100, "{core:?} {others:?}");
                Ok(())
            })();
            stop.store(true, Ordering::Relaxed);
            sender.join().map_err(|_| "the sender panicked")??;
            far.join().map_err(|_| "the far end panicked")??;
            outcome
        })
    })
}
