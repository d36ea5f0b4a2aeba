//! Pages of a departing VM into `Pages` frames, wherever they come from: hashed where that is needed, decided for a
//! whole batch under one lock of the host's table, and sent with the contents from where they were read.

use super::out::Out;
use crate::core::digest::Digest;
use crate::core::pair::PairTable;
use crate::core::sketch::{Lane as From, Sketch};
use crate::core::source::{Leaving, Outgoing, SourceVm, Way};
use crate::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::limits::{MAX_META, MAX_RECORDS};
use crate::core::wire::pages::{Form, MAX_RECORD_LEN, PagesBuilder};
use crate::flow::work::Stage;
use crate::flow::{lock, now};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::Ordering;

/// Contents in one frame: 256 KiB, so that a switchover never waits long behind a frame and caches are kept warm.
const BATCH_PAGES: usize = 64;
/// Pages of any kind in one batch.
const BATCH_EVENTS: usize = 1024;
// Each page may bring a change of block, and each content a word of what stands in its slot.
const _: () = assert!(2 * BATCH_EVENTS + BATCH_PAGES <= MAX_RECORDS);
const _: () = assert!((BATCH_EVENTS + BATCH_PAGES) * MAX_RECORD_LEN <= MAX_META);

/// How the pages of a batch leave. Reused from batch to batch.
#[derive(Default)]
pub(super) struct Leave {
    /// One a page of the batch.
    ways: Vec<(Way, Form)>,
    /// Of the pages with content.
    sketches: Vec<Sketch>,
    /// Bodies of those that leave as differences.
    less: Vec<PageBytes>,
    /// What the target is told of what slots hold.
    tell: Vec<(u32, Digest)>,
    /// Slots that the target could not fill.
    unkept: Vec<u32>,
    /// `Pages` frames sent.
    frames: u32,
    /// If asked for: pages of which something else left than their content ([`Leave::list_named`]).
    named: Option<Vec<PageAddr>>,
}

impl Leave {
    /// From now on, lists pages that leave by the name of their content, or as a difference from another one.
    pub(super) fn list_named(&mut self) {
        self.named = Some(Vec::new());
    }

    /// A `Pages` frame leaves that no batch made.
    pub(super) fn count_frame(&mut self) {
        self.frames = self.frames.wrapping_add(1);
    }

    /// Those of the batches since the last call.
    pub(super) fn named(&mut self) -> impl Iterator<Item = PageAddr> + '_ {
        self.named.iter_mut().flat_map(|n| n.drain(..))
    }
}

/// Pages on their way out.
pub(super) struct Batch<'a, 'f> {
    /// Pages; how one leaves is known beforehand only if it is uniform.
    pages: Vec<Outgoing<'a>>,
    contents: usize,
    frame: &'f mut PagesBuilder,
    plan: &'f mut Leave,
}

impl<'a, 'f> Batch<'a, 'f> {
    pub(super) fn new(frame: &'f mut PagesBuilder, plan: &'f mut Leave) -> Self {
        Self { pages: Vec::with_capacity(BATCH_EVENTS), contents: 0, frame, plan }
    }

    pub(super) fn add(&mut self, addr: PageAddr, leaving: Option<Leaving>, bytes: Option<&'a PageBytes>) {
        self.contents += usize::from(leaving.is_none());
        self.pages.push((addr, leaving, bytes));
    }

    /// Sends, if there is enough for a frame.
    pub(super) fn flush_if_full(
        &mut self,
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> io::Result<()> {
        if self.contents >= BATCH_PAGES || self.pages.len() >= BATCH_EVENTS {
            return self.flush(vm, table, out);
        }
        Ok(())
    }

    /// Sends these pages, which lie elsewhere. Flush before: what was added may hold older versions of them.
    pub(super) fn send(
        &mut self,
        pages: &[(PageAddr, Box<PageBytes>)],
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> io::Result<()> {
        debug_assert!(self.pages.is_empty());
        let mut batch = Batch { pages: Vec::new(), contents: 0, frame: self.frame, plan: self.plan };
        for (addr, bytes) in pages {
            batch.add(*addr, None, Some(bytes));
            batch.flush_if_full(vm, table, out)?;
        }
        batch.flush(vm, table, out)
    }

    /// Hashes, decides under one lock, sends without it.
    pub(super) fn flush(
        &mut self,
        vm: &mut SourceVm,
        table: &Mutex<PairTable>,
        out: &mut Out<'_>,
    ) -> io::Result<()> {
        if self.pages.is_empty() {
            return Ok(());
        }
        // Timed by the batch: a look at the clock costs as much as a good part of a page's hash.
        out.lane.lap(&out.shared.work, Stage::Other);
        vm.look(&mut self.pages);
        vm.stats.hash_ns += out.lane.lap(&out.shared.work, Stage::Hash).as_nanos() as u64;
        self.frame.clear();
        let Leave { ways, less, tell, .. } = &mut *self.plan;
        ways.clear();
        less.clear();
        tell.clear();
        {
            let mut table = lock(table);
            for (_, leaving, _) in &self.pages {
                let way = leaving.map_or(Way::Uniform(0), |l| vm.decide(&mut table, l));
                ways.push((way, Form::Whole));
            }
        }
        // What is sent raw is as long as a difference from it.
        if out.lane.squeezes() {
            self.differ(vm, out);
            out.lane.lap(&out.shared.work, Stage::Similar);
        }
        let mut contents = Vec::with_capacity(self.contents);
        let Leave { ways, less, tell, named, .. } = &mut *self.plan;
        tell.iter().for_each(|(slot, digest)| self.frame.keep(*slot, digest));
        let mut differences = less.iter();
        for ((addr, _, bytes), (way, form)) in self.pages.iter().zip(&*ways) {
            way.put(*addr, *form, self.frame);
            if let Some(named) = &mut *named
                && (matches!(way, Way::Ref(_) | Way::Remote(..)) || matches!(form, Form::Less(_)))
            {
                named.push(*addr);
            }
            if matches!(form, Form::Less(_)) {
                contents.extend(differences.next());
            } else {
                contents.extend(bytes.filter(|_| way.has_content()));
            }
        }
        self.pages.clear();
        self.contents = 0;
        let sent = out.contents(Kind::Pages, self.frame.meta(), &contents);
        self.plan.frames = self.plan.frames.wrapping_add(1);
        sent
    }

    /// Looks for contents that are similar to what the target host keeps, and has it keep the others.
    fn differ(&mut self, vm: &mut SourceVm, out: &Out<'_>) {
        let Some(table) = out.group.similar.table(out.spec.target, out.spec.domain) else { return };
        let Leave { ways, sketches, less, tell, unkept, frames, .. } = &mut *self.plan;
        let pages = || self.pages.iter().map(|(addr, _, bytes)| (*addr, *bytes));
        let contents = pages().zip(&*ways).filter(|(_, (way, _))| way.has_content());
        sketches.clear();
        sketches.extend(contents.filter_map(|((_, bytes), _)| bytes.map(Sketch::of)));
        let mut sketches = sketches.iter();
        let mut table = lock(table);
        let Some(references) = &mut *table else { return };
        let vm_ix = out.spec.vm.0;
        // In this order: what was taken in by then, and could not be kept, is among `unkept`.
        references.taken(vm_ix, out.shared.taken.load(Ordering::Acquire));
        unkept.append(&mut lock(&out.shared.unkept));
        references.forget(unkept);
        unkept.clear();
        let when = (From { vm: vm_ix, frame: *frames }, now());
        let mut difference = [0; PAGE_SIZE];
        for ((addr, bytes), (way, form)) in pages().zip(ways) {
            let (true, Some(bytes)) = (way.has_content(), bytes) else { continue };
            let Some(sketch) = sketches.next() else { break };
            *form = vm.form(references, when, addr, way, *sketch, bytes, &mut difference, tell);
            if matches!(form, Form::Less(_)) {
                less.push(difference);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::digest::{Algorithm, Hasher};
    use crate::core::source::BlockInfo;
    use crate::core::squeeze::Mode;
    use crate::core::units::{BlockIx, HostIx, VmIx};
    use crate::core::wire::pages::{Record, Records};
    use crate::flow::Front;
    use crate::flow::source::similar::Similar;
    use crate::flow::source::{DepartureOptions, SourceGroup, SourceSpec, SourceVmShared};
    use crate::flow::squeeze::{Lane, Window};
    use crate::net::conn::FrameBuf;
    use std::net::TcpListener;
    use std::sync::Arc;
    use std::time::Duration;

    fn noise(seed: u32) -> PageBytes {
        let mut p = [0; PAGE_SIZE];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut p);
        p
    }

    /// A frame's records, of contents with their forms.
    fn records(meta: &[u8]) -> Vec<(Record, Form)> {
        let mut records = Records::new(meta);
        std::iter::from_fn(|| records.next().map(|r| (r.unwrap(), records.form()))).collect()
    }

    #[test]
    fn what_stands_in_a_models_slot_is_told_first_and_a_lost_model_is_not_referred_to_again() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (conn, far) = crate::net::connection::pair();
        let hasher = Hasher::new(Algorithm::Blake3, &[1; 32], "");
        let group = SourceGroup {
            targets: vec![listener.local_addr().unwrap()],
            options: DepartureOptions { compress: Mode::Level(1), ..SourceGroup::bare().options },
            similar: Similar::new([(HostIx(0), 0)], 8 << 20),
            ..SourceGroup::bare()
        };
        let models: Vec<Digest> = (0..3).map(|n| hasher.page(&noise(n))).collect();
        for (n, digest) in (0..).zip(&models) {
            assert!(group.similar.model(0, *digest, &[HostIx(0)], &noise(n)));
        }
        group.similar.granted(HostIx(0), 0, 1000);
        let front = Front::Vmm("/nonexistent".into());
        let spec = SourceSpec { vm: VmIx(0), name: "v".into(), target: HostIx(0), domain: 0, front };
        let shared = SourceVmShared::new().unwrap();
        shared.heard.store(now().0, Ordering::Relaxed);
        let mut lane = Lane::new(Mode::Level(1), Window::default(), &Arc::default());
        let mut out = Out { conn: &conn, lane: &mut lane, shared: &shared, spec: &spec, group: &group };
        let table = Mutex::new(PairTable::new(HostIx(0), 1000));
        let mut vm = SourceVm::new(hasher.clone(), vec![BlockInfo::new(true)]);
        let (mut frame, mut plan, mut frames) = (PagesBuilder::default(), Leave::default(), FrameBuf::new());
        let mut leaves = |near: &[u32], turn: u32| {
            let at = |n: usize| PageAddr { block: BlockIx(0), page: turn * 1000 + n as u32 };
            let pages: Vec<PageBytes> = near
                .iter()
                .map(|n| {
                    let mut page = noise(*n);
                    page[turn as usize] ^= 1;
                    page
                })
                .collect();
            let mut batch = Batch::new(&mut frame, &mut plan);
            pages.iter().enumerate().for_each(|(n, page)| batch.add(at(n), None, Some(page)));
            batch.flush(&mut vm, &table, &mut out).unwrap();
            let told = records(frames.wait(&far, Duration::from_secs(20)).unwrap().meta);
            (told, vm.stats.modelled)
        };
        let (told, modelled) = leaves(&[9, 0, 2], 0);
        let keep = |n: usize| (Record::Keep { digest: models[n], slot: n as u32 }, Form::Whole);
        assert_eq!(told[..2], [keep(0), keep(2)], "before all others");
        let forms = |told: &[(Record, Form)]| told.iter().map(|(_, form)| *form).collect::<Vec<_>>();
        assert_eq!(forms(&told[2..]), [Form::Kept(3), Form::Less(0), Form::Less(2)]);
        assert_eq!(modelled, 2);
        // Once told, no more; but for one that was not.
        let (told, _) = leaves(&[0, 1], 1);
        assert_eq!((told[0], forms(&told[1..])), (keep(1), vec![Form::Less(0), Form::Less(1)]));
        // The target has no such content.
        lock(&shared.unkept).extend([0, 2]);
        let (told, modelled) = leaves(&[0, 1, 2], 2);
        assert_eq!(forms(&told), [Form::Kept(4), Form::Less(1), Form::Kept(5)]);
        assert_eq!(modelled, 5);
        assert!(lock(&shared.unkept).is_empty());
        // As many contents as a batch has, each from a model of its own, fit one frame.
        let many: Vec<u32> = (100..100 + BATCH_PAGES as u32).collect();
        for n in &many {
            assert!(group.similar.model(0, hasher.page(&noise(*n)), &[HostIx(0)], &noise(*n)));
        }
        let (told, _) = leaves(&many, 3);
        let keeps = told.iter().filter(|(r, _)| matches!(r, Record::Keep { .. })).count();
        assert_eq!((keeps, told.len()), (BATCH_PAGES, 2 * BATCH_PAGES));
    }
}
