//! A VM from its source's flow to its target's, over a real connection, with somebody on the way who changes, loses, repeats
//! or moves frames: with seals and with the account, and without each of them, when what was changed runs.

use super::arrival::peers::Peers;
use super::arrival::{self, ArrivalOptions, Member, TargetGroup, TargetSpec, TargetVmShared};
use super::door::{self, Door};
use super::source::kvm::guest::Guest;
use super::source::prepare::PreparedVm;
use super::source::{self, DepartureOptions, Phase, SourceGroup, SourceSpec, SourceStatus, SourceVmShared};
use super::{FlowTags, Front, NoTags, Timeouts, lock};
use crate::core::account::{Pages, Proof};
use crate::core::arrival::TargetHost;
use crate::core::digest::{Algorithm, Hasher};
use crate::core::handover::GuestState;
use crate::core::pair::PairTable;
use crate::core::units::{HostIx, PAGE_SIZE, PageBytes, VmIx};
use crate::net::vmm::State;
use middle::{Harm, Middle};
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use vms::{Leaving, Waiting};

// Who is on the way.
mod middle;
// The VM at both ends.
mod vms;

/// Pages of the VM.
const PAGES: u32 = 256;
/// A page that the guest writes while the others leave, and until then it holds this.
const WRITTEN: u32 = 5;
/// A page that whoever loads the VM may change.
const LOADED: u32 = 9;
const SECRET: [u8; 32] = [1; 32];
/// Some moves end only by a time that is over. All of them come before the move is given up here.
const TIMEOUTS: Timeouts =
    Timeouts { setup: Duration::from_secs(20), peer: Duration::from_secs(3), stall: Duration::from_secs(5) };
const WAIT: Duration = Duration::from_secs(60);

fn content(n: u64) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().fill(&mut page);
    page
}

/// What became of a move.
#[derive(Debug)]
struct Outcome {
    source: SourceStatus,
    /// Whether the guest runs at its source, and whether it was let run at its target.
    runs_here: bool,
    ran_there: bool,
    /// Whether the target's memory is the source's.
    same: bool,
}

impl Outcome {
    /// The VM runs on where it was, and a line says why it did not move.
    fn stayed(&self, why: &str) {
        assert_eq!(self.source.phase, Phase::Stayed, "{self:?}");
        assert!(self.runs_here && !self.ran_there, "{self:?}");
        assert!(self.source.reason.contains(why), "{self:?}");
        assert!(!matches!(self.source.proof, Some(Proof::Pages(_) | Proof::Ram(_))), "{self:?}");
    }

    fn moved(&self) {
        assert_eq!(self.source.phase, Phase::Moved, "{self:?}");
        assert!(!self.runs_here && self.ran_there, "{self:?}");
    }
}

fn target_group(dir: &std::path::Path, verify: Pages) -> TargetGroup {
    TargetGroup::new(
        Member {
            name: "g".into(),
            token: SECRET,
            me: HostIx(0),
            hashers: vec![Hasher::new(Algorithm::Blake3, &SECRET, "")],
        },
        TargetHost::new(1000, 1000),
        Peers::new(vec!["127.0.0.1:1".parse().unwrap()]),
        TIMEOUTS,
        Arc::new(NoTags),
        ArrivalOptions { socket_dir: dir.to_owned(), verify, ..ArrivalOptions::default() },
    )
}

/// Moves a VM whose every page has a content of its own, and one of them another one in the end. `resealed`: whoever is on
/// the way knows the group's secret, as does an agent whose memory is at fault.
fn moves(harm: Harm, resealed: bool, verify: Pages) -> Outcome {
    moves_and_loads(harm, resealed, verify, None)
}

/// The same; whoever loads the VM makes that of a page which held the other at its source.
fn moves_and_loads(
    harm: Harm,
    resealed: bool,
    verify: Pages,
    loads: Option<(PageBytes, PageBytes)>,
) -> Outcome {
    let leaving = Leaving::new();
    for page in 0..PAGES {
        leaving.fill(page, &content(page.into()));
    }
    if let Some((held, _)) = &loads {
        leaving.fill(LOADED, held);
    }
    let waiting = Waiting::start(loads.map(|(_, becomes)| becomes));
    let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
    let (door_port, stop, door) = (listen(), AtomicBool::new(false), Arc::new(Door::default()));
    let middle = Middle::start(door_port.local_addr().unwrap(), harm, resealed.then_some(SECRET));
    let group = Arc::new(target_group(waiting.dir(), verify));
    let (vm, name) = (VmIx(0), "v".to_owned());
    let spec = TargetSpec {
        vm,
        name: name.clone(),
        source: HostIx(0),
        domain: 0,
        front: Front::Vmm(waiting.socket()),
    };
    let arrives = Arc::new(TargetVmShared::new().unwrap());
    group.expect(vm, &arrives);
    door.admit(group.clone());
    let sources = Arc::new(SourceGroup {
        token: SECRET,
        targets: vec![middle.addr],
        tables: vec![Mutex::new(PairTable::new(HostIx(0), 1 << 20))],
        options: DepartureOptions { verify, ..SourceGroup::bare().options },
        timeouts: TIMEOUTS,
        ..SourceGroup::bare()
    });
    let leaves = SourceSpec { vm, name, target: HostIx(0), domain: 0, front: Front::Vmm("/nowhere".into()) };
    let departs = Arc::new(SourceVmShared::new().unwrap());
    let file = leaving.memory();
    let blocks = vec![("slot0".to_owned(), u64::from(PAGES) * PAGE_SIZE as u64, file)];
    let guest = Guest::new(leaving.control(), blocks, None, GuestState::Running).unwrap();
    let mut prepared = PreparedVm::default();
    prepared.guest = Some(Arc::new(guest));
    std::thread::scope(|s| {
        let tags: Arc<dyn FlowTags> = Arc::new(NoTags);
        let (door, stop) = (&door, &stop);
        s.spawn(move || door::serve(&door_port, door, &tags, TIMEOUTS, stop));
        s.spawn(|| arrival::vm::run(&group, &spec, &arrives, Box::new(|_| Ok(()))));
        s.spawn(|| source::vm::run(&sources, &leaves, (prepared, None), &departs, Box::new(|_| Ok(()))));
        let until = Instant::now() + WAIT;
        while !matches!(departs.status().phase, Phase::Moved | Phase::Stayed) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        departs.forget();
        arrives.forget();
        stop.store(true, Ordering::Relaxed);
    });
    middle.end();
    let state = waiting.state();
    Outcome {
        source: departs.status(),
        runs_here: leaving.runs(),
        ran_there: state == State::Running,
        same: (0..PAGES).all(|p| leaving.page(p) == waiting.page(p)),
    }
}

/// A page with what KVM writes into guest memory: the guest's time, of this version.
fn clock(version: u32) -> PageBytes {
    let mut page = [0; PAGE_SIZE];
    let parts = (u64::from(version), 1u64 << 40, 1u64 << 30, 0x1ff_c537_56f3u64);
    for (at, part) in [parts.0, parts.1, parts.2, parts.3].into_iter().enumerate() {
        page[64 + 8 * at..72 + 8 * at].copy_from_slice(&part.to_le_bytes());
    }
    page
}

#[test]
fn a_vm_whose_memory_is_the_same_at_both_ends_moves_and_that_is_proven() {
    for (loads, clocks) in [(None, 0), (Some((clock(4), clock(6))), 1)] {
        let o = moves_and_loads(Harm::None, false, Pages::Ram, loads);
        o.moved();
        assert_eq!(o.same, clocks == 0);
        let Some(Proof::Ram(ram)) = o.source.proof else { panic!("{o:?}") };
        let pages = u64::from(PAGES);
        assert_eq!((ram.pages, ram.passed, ram.clocks, ram.unread), (pages, pages, clocks, 0));
    }
}

/// All that passed the agents is what was sent, so that only the memory shows it.
#[test]
fn a_vm_that_its_loader_has_changed_stays_and_the_page_is_named() {
    let changed = |n| Some((content(LOADED.into()), content(n)));
    let o = moves_and_loads(Harm::None, false, Pages::Ram, changed(7777));
    o.stayed("page 0x9 of slot0");
    // The counterpart: nobody looks.
    let o = moves_and_loads(Harm::None, false, Pages::Stream, changed(7777));
    o.moved();
    assert!(!o.same);
    assert_eq!(o.source.proof, Some(Proof::Pages(PAGES.into())));
}

/// Everything that is done to frames, once to the connection's early frames and once to its last ones.
fn harms() -> Vec<Harm> {
    let mut all = Vec::new();
    for frame in [0, 1, 3] {
        all.extend([Harm::Flip { frame, at: 0 }, Harm::Flip { frame, at: 70_001 }, Harm::Lose { frame }]);
    }
    all.extend([Harm::Repeat { frame: 0 }, Harm::LastFirst]);
    all
}

#[test]
fn a_vm_whose_frames_come_as_they_were_sent_moves_and_that_is_proven() {
    for verify in [Pages::Stream, Pages::Off] {
        let o = moves(Harm::None, false, verify);
        o.moved();
        assert!(o.same);
        let proof = if verify == Pages::Off { Proof::Off } else { Proof::Pages(PAGES.into()) };
        assert_eq!(o.source.proof, Some(proof));
    }
}

#[test]
fn a_frame_changed_lost_repeated_or_moved_is_named_when_it_comes() {
    for harm in harms() {
        let o = moves(harm, false, Pages::Off);
        o.stayed("is not what was sent");
        assert!(o.source.reason.contains("frame "), "{harm:?}: {o:?}");
    }
    // A length that is wrong makes the target wait for what does not come; the next frames are not what is due.
    moves(Harm::Longer { frame: 1 }, false, Pages::Off).stayed("");
}

#[test]
fn what_no_seal_can_see_is_seen_before_the_vm_may_run() {
    for harm in harms() {
        let o = moves(harm, true, Pages::Stream);
        o.stayed("the pages that arrived are not those that were sent");
    }
}

/// The counterpart: the very same harm, and nobody looks.
#[test]
fn without_seal_and_account_what_was_changed_runs() {
    for harm in harms() {
        let o = moves(harm, true, Pages::Off);
        o.moved();
        assert!(!o.same, "{harm:?} did no harm");
        assert_eq!(o.source.proof, Some(Proof::Off));
    }
}

#[test]
fn a_target_that_does_not_account_gets_no_vm() {
    // Its agent has another idea of what was agreed on.
    let o = moves(Harm::Unaccounted, true, Pages::Stream);
    o.stayed("does not account");
}
