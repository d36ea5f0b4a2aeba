//! The shaper against a stand-in for the kernel that keeps qdiscs and classes as rtnetlink does, and can die or refuse
//! at any step. What real kernels do is in `irlm-user/tests/shape.rs`.

use super::*;
use crate::net::tc::{Change, Object, ROOT, htb_class, htb_root, payload};
use std::sync::Arc;

#[derive(Default, Debug)]
struct World {
    objects: Vec<Object>,
    /// Changes that are taken before one is refused; none: all.
    refuse_after: Option<usize>,
    changes: usize,
    gone: bool,
    rehearsal: Option<String>,
    marks: [crate::core::policy::Mark; 8],
    untagged: Option<String>,
    links: Vec<String>,
}

#[derive(Clone, Default, Debug)]
struct Fake(Arc<Mutex<World>>);

impl Fake {
    fn with<T>(&self, f: impl FnOnce(&mut World) -> T) -> T {
        f(&mut self.0.lock().unwrap())
    }
    fn roots(&self) -> Vec<(u32, String)> {
        self.with(|w| {
            let roots = w.objects.iter().filter(|o| o.what == What::Qdisc && o.parent() == ROOT);
            roots.map(|o| (o.handle(), o.kind().to_owned())).collect()
        })
    }
    fn ceil_of(&self, minor: u16) -> u32 {
        self.with(|w| {
            let c = w.objects.iter().find(|o| o.handle() == crate::core::policy::classid(minor)).unwrap();
            // HTB's parameters: nla header, ratespec rate, ratespec ceil; bytes a second at its end.
            let o = c.options().unwrap();
            u32::from_ne_bytes(o[4 + 20..4 + 24].try_into().unwrap()).wrapping_mul(8)
        })
    }
}

fn refused() -> TcError {
    TcError::Refused {
        what: "a change".into(),
        source: std::io::Error::from_raw_os_error(libc::EPERM),
        words: String::new(),
    }
}

impl Kernel for Fake {
    fn index(&mut self, iface: &str) -> Result<i32, TcError> {
        let gone = self.with(|w| w.gone || !["eth0", "lo"].contains(&iface));
        if gone { Err(TcError::NoInterface(iface.into())) } else { Ok(7) }
    }
    fn dump(&mut self, what: What, index: i32, parent: u32) -> Result<Vec<Object>, TcError> {
        assert_eq!(index, 7);
        Ok(self.with(|w| {
            let fits = |o: &&Object| o.what == what && (what != What::Filter || o.parent() == parent);
            w.objects.iter().filter(fits).cloned().collect()
        }))
    }
    fn apply(&mut self, change: &Change) -> Result<(), TcError> {
        let (what, delete, o) = payload(change);
        self.with(|w| {
            if w.refuse_after.is_some_and(|n| w.changes >= n) {
                return Err(refused());
            }
            w.changes += 1;
            if delete {
                assert!(w.objects.iter().any(|x| x.parent() == ROOT && x.handle() == o.handle()));
                w.objects.clear();
                return Ok(());
            }
            if what == What::Qdisc && o.parent() == ROOT {
                w.objects.clear();
            }
            w.objects.retain(|x| (x.what, x.handle()) != (what, o.handle()));
            w.objects.push(o);
            Ok(())
        })
    }
    fn rehearse(&mut self, _: &[Object]) -> Result<(), ShapeError> {
        self.with(|w| w.rehearsal.clone().map_or(Ok(()), |why| Err(ShapeError::NotRestored(why))))
    }
}

impl Tagger for Fake {
    fn off(&self) -> Option<String> {
        self.with(|w| w.untagged.clone())
    }
    fn set(&mut self, marks: &Marks, racks: &[(IpAddr, u8)]) -> Result<(), ShapeError> {
        self.with(|w| {
            w.marks = marks.core;
            w.links = racks.iter().map(|(a, n)| format!("{a}/{n}")).collect();
        });
        Ok(())
    }
}

const OWN: &str = "[port]\nlink_mbit = 1000\nothers_mbit = 300\nrack_prefixes = [\"10.77.1.0/24\"]\n";
const TAKE: &str = "[port]\nshaping = \"take-over\"\nlink_mbit = 1000\nothers_mbit = 300\n";

fn start(fake: &Fake, dir: &Path, text: Option<&str>) -> Shaper {
    let policy = text.map(|t| policy::parse(t).unwrap());
    let kernel: Box<dyn Kernel> = Box::new(fake.clone());
    Shaper::start_with(Some("eth0"), dir, policy, Box::new(fake.clone()), Ok(kernel))
}

/// As SIGKILL would: nothing is taken away.
fn die(fake: &Fake, s: Shaper) {
    fake.with(|w| w.refuse_after = Some(0));
    drop(s);
    fake.with(|w| w.refuse_after = None);
}

/// Somebody's HTB of two classes.
fn operators(fake: &Fake) -> Vec<Object> {
    let mut root = payload(&htb_root(7)).2.raw().to_vec();
    // Handle 1:.
    root[8..12].copy_from_slice(&0x1_0000u32.to_ne_bytes());
    let mut all = vec![Object::from_raw(What::Qdisc, root).unwrap()];
    for (minor, parent) in [(0x1u32, ROOT), (0x10, 0x1_0001)] {
        let tree = policy::parse(OWN).unwrap().tree(None);
        let mut raw = payload(&htb_class(7, &tree[0])).2.raw().to_vec();
        raw[8..12].copy_from_slice(&(0x1_0000 | minor).to_ne_bytes());
        raw[12..16].copy_from_slice(&parent.to_ne_bytes());
        all.push(Object::from_raw(What::Class, raw).unwrap());
    }
    fake.with(|w| w.objects.clone_from(&all));
    all
}

fn objects(fake: &Fake) -> Vec<Object> {
    fake.with(|w| w.objects.clone())
}

const OURS: (u32, &str) = (OUR_ROOT, "htb");

fn ours(fake: &Fake) -> bool {
    fake.roots() == [(OURS.0, OURS.1.to_owned())]
}

#[test]
fn a_free_port_gets_the_tree_and_is_free_again_after() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let s = start(&fake, dir.path(), Some(OWN));
    assert!(ours(&fake) && s.has_tree());
    // Root, nine classes, six queues.
    assert_eq!(objects(&fake).len(), 16);
    assert_eq!(fake.with(|w| (w.marks[1].priority, w.marks[4].dscp)), (Some(0x1f1a_0040), Some(46)));
    assert_eq!(fake.with(|w| w.links.clone()), ["10.77.1.0/24"]);
    let st = s.status();
    assert_eq!((&*st.mode, st.migration, st.live), ("own", Some(680_000_000), false));
    assert_eq!(st.classes.iter().find(|c| c.name == "bulk").unwrap().id, "1f1a:40");
    drop(s);
    assert!(objects(&fake).is_empty());
    assert!(!dir.path().join("port.shape").exists());
}

#[test]
fn what_a_killed_agent_left_goes_at_the_next_start_also_without_a_policy() {
    for next in [None, Some(OWN), Some("[port]\nshaping = \"off\"\nlink_mbit = 1000")] {
        let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
        let s = start(&fake, dir.path(), Some(OWN));
        die(&fake, s);
        assert!(ours(&fake));
        let s = start(&fake, dir.path(), next);
        assert_eq!(ours(&fake), next == Some(OWN), "{next:?}");
        drop(s);
        assert!(objects(&fake).is_empty(), "{next:?}");
        // Without its record, too: the handle tells.
        let s = start(&fake, dir.path(), Some(OWN));
        die(&fake, s);
        std::fs::remove_file(dir.path().join("port.shape")).unwrap();
        drop(start(&fake, dir.path(), None));
        assert!(objects(&fake).is_empty(), "{next:?}");
    }
}

#[test]
fn somebody_elses_tree_is_left_alone_and_said_so() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let before = operators(&fake);
    let s = start(&fake, dir.path(), Some(OWN));
    let st = s.status();
    assert_eq!(st.mode, "tag-only");
    assert!(st.why.contains("htb 1:") && st.why.contains("left alone"), "{}", st.why);
    assert_eq!(fake.with(|w| w.marks[5].dscp), Some(34));
    s.set_budget(Some(1_000_000)).unwrap();
    s.set_policy(&OWN.replace("300", "400")).unwrap();
    drop(s);
    assert_eq!((objects(&fake), fake.with(|w| w.changes)), (before, 0));
}

#[test]
fn a_taken_over_tree_comes_back_at_exit_and_after_a_crash_at_any_step() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let before = operators(&fake);
    let s = start(&fake, dir.path(), Some(TAKE));
    assert!(ours(&fake) && s.status().mode == "taken-over", "{}", s.status().why);
    drop(s);
    assert_eq!(port::difference(&objects(&fake), &before), None);
    // The agent dies after so many changes of setting up, or of restoring.
    for steps in 0..24 {
        let before = operators(&fake);
        fake.with(|w| (w.changes, w.refuse_after) = (0, Some(steps)));
        let s = start(&fake, dir.path(), Some(TAKE));
        drop(s);
        fake.with(|w| w.refuse_after = None);
        drop(start(&fake, dir.path(), None));
        assert_eq!(port::difference(&objects(&fake), &before), None, "{steps}");
        assert!(!dir.path().join("port.shape").exists(), "{steps}");
    }
}

#[test]
fn what_could_not_be_restored_is_not_taken_over() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let before = operators(&fake);
    fake.with(|w| w.rehearsal = Some("qdisc odd 1: did not come back as it was".into()));
    let s = start(&fake, dir.path(), Some(TAKE));
    let st = s.status();
    assert_eq!(st.mode, "tag-only");
    assert!(st.why.contains("not taken over") && st.why.contains("odd 1:"), "{}", st.why);
    drop(s);
    assert_eq!(objects(&fake), before);
}

#[test]
fn an_operator_who_replaced_our_tree_keeps_theirs() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let s = start(&fake, dir.path(), Some(OWN));
    let theirs = operators(&fake);
    drop(s);
    assert_eq!(objects(&fake), theirs);
    // Also if the agent was killed, and had taken over something else before.
    let s = start(&fake, dir.path(), Some(TAKE));
    die(&fake, s);
    let mut other = theirs[0].raw().to_vec();
    other[8..12].copy_from_slice(&0x2_0000u32.to_ne_bytes());
    let other = vec![Object::from_raw(What::Qdisc, other).unwrap()];
    fake.with(|w| w.objects.clone_from(&other));
    drop(start(&fake, dir.path(), None));
    assert_eq!(objects(&fake), other);
}

#[test]
fn changes_are_class_changes_only_and_a_bad_one_changes_nothing() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let s = start(&fake, dir.path(), Some(OWN));
    let made = fake.with(|w| w.changes);
    s.set_budget(Some(80_000_000)).unwrap();
    assert_eq!(fake.ceil_of(3), 80_000_000);
    assert_eq!(fake.ceil_of(0x40), 80_000_000);
    assert_eq!(fake.ceil_of(0x50), 680_000_000);
    s.set_budget(Some(80_000_000)).unwrap();
    s.set_budget(None).unwrap();
    assert_eq!(fake.ceil_of(3), 680_000_000);
    assert!(fake.with(|w| w.changes) - made < 20);
    s.set_policy(&OWN.replace("300", "500")).unwrap();
    assert_eq!((fake.ceil_of(2), s.status().live), (480_000_000, true));
    let whole = objects(&fake);
    for bad in ["", "[port]\nlink_mbit = 0", &OWN.replace("300", "5000")] {
        let e = s.set_policy(bad).unwrap_err().to_string();
        assert!(!e.contains('\n'), "{e}");
    }
    assert_eq!((objects(&fake), s.status().migration), (whole, Some(480_000_000)));
    // The kernel refuses in the middle: the old policy stays.
    fake.with(|w| w.refuse_after = Some(w.changes + 2));
    let e = s.set_policy(&OWN.replace("300", "100")).unwrap_err().to_string();
    assert!(e.contains("old policy stays"), "{e}");
    fake.with(|w| w.refuse_after = None);
    assert_eq!(s.status().migration, Some(480_000_000));
    fake.with(|w| w.refuse_after = Some(0));
    s.set_budget(Some(10_000_000)).unwrap_err().to_string();
    fake.with(|w| w.refuse_after = None);
    // It is not taken for done: the same again does it.
    s.set_budget(Some(10_000_000)).unwrap();
    assert_eq!((fake.ceil_of(2), fake.ceil_of(3)), (480_000_000, 10_000_000));
    // To tagging only, and back.
    s.set_policy("[port]\nshaping = \"off\"\nlink_mbit = 1000").unwrap();
    assert!(objects(&fake).is_empty() && !s.has_tree());
    s.set_policy(OWN).unwrap();
    assert!(ours(&fake) && fake.ceil_of(3) == 10_000_000);
}

#[test]
fn without_tags_or_without_the_port_there_is_no_tree_and_a_reason() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    fake.with(|w| w.untagged = Some("bpf = false in the configuration".into()));
    let s = start(&fake, dir.path(), Some(OWN));
    let st = s.status();
    assert_eq!(st.mode, "off");
    assert!(st.why.contains("told apart: bpf = false"), "{}", st.why);
    drop(s);
    fake.with(|w| (w.untagged, w.gone) = (None, true));
    let s = start(&fake, dir.path(), Some(OWN));
    assert!(s.status().why.contains("no interface \"eth0\""), "{}", s.status().why);
    assert!(!s.has_tree() && objects(&fake).is_empty());
}

#[test]
fn a_record_of_a_port_that_is_gone_is_dropped() {
    let (fake, dir) = (Fake::default(), tempfile::tempdir().unwrap());
    let s = start(&fake, dir.path(), Some(OWN));
    die(&fake, s);
    fake.with(|w| w.gone = true);
    drop(start(&fake, dir.path(), None));
    assert!(!dir.path().join("port.shape").exists());
}
