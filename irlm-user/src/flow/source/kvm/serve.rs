//! Pages of a VM that stands still here and runs at its target: asked for on the demand connection, answered on it by a
//! thread of its own, so that what a vCPU waits for never waits behind the filling of the VM connection.
//!
//! Both threads take what they send next from one [`Serve`]; its lock is held to pick pages, never over a read or a send.

use super::super::{SourceGroup, SourceVmShared};
use crate::core::digest::uniform;
use crate::core::page_set::PageSet;
use crate::core::postcopy::Serve;
use crate::core::postcopy::source::NoSuchPage;
use crate::core::units::{PAGE_SIZE, PageAddr, PageBytes};
use crate::core::wire::frame::Kind;
use crate::core::wire::pages::PagesBuilder;
use crate::core::wire::paging::Demand;
use crate::flow::inbox::wait_readable;
use crate::flow::{Tagged, lock};
use crate::host::ram::GuestRam;
use crate::net::conn::{FrameBuf, NetError, send_while};
use crate::net::connection::Connection;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// Pages in one answer that nobody waits for.
const ANSWER: usize = 16;
/// How often a thread that hears nothing looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

/// What is still to be sent, and from where.
#[derive(Debug)]
pub(in super::super) struct Serving {
    name: String,
    pages: Vec<u32>,
    ram: Arc<GuestRam>,
    serve: Mutex<Serve>,
    /// Of the VM and demand connections at hand; each reconnection has the next.
    epoch: AtomicU64,
    /// Whether a demand connection stands: who asks is answered there.
    elsewhere: AtomicBool,
    /// Pages sent because they were asked for.
    answered: AtomicU64,
}

impl Serving {
    pub(super) fn new(name: &str, pages: &[u32], ram: Arc<GuestRam>, to_come: PageSet) -> Self {
        Self {
            name: name.to_owned(),
            pages: pages.to_vec(),
            ram,
            serve: Mutex::new(Serve::new(to_come)),
            epoch: AtomicU64::new(0),
            elsewhere: AtomicBool::new(false),
            answered: AtomicU64::new(0),
        }
    }

    /// Pages of each block.
    pub(in super::super) fn pages(&self) -> &[u32] {
        &self.pages
    }

    /// Pages that nothing has been sent for.
    pub(super) fn left(&self) -> u64 {
        lock(&self.serve).left()
    }

    /// The target asks.
    pub(in super::super) fn demand(&self, demand: &Demand) -> Result<(), NoSuchPage> {
        lock(&self.serve).demand(demand)
    }

    /// The target says, on a new connection, what it lacks.
    pub(in super::super) fn resume(&self, lacks: PageSet) {
        self.epoch.fetch_add(1, Ordering::Relaxed);
        self.elsewhere.store(false, Ordering::Relaxed);
        lock(&self.serve).resume(lacks);
    }

    /// Whether [`Self::take_wanted`] is for whoever fills, because there is no demand connection.
    pub(super) fn must_answer(&self) -> bool {
        !self.elsewhere.load(Ordering::Relaxed) && lock(&self.serve).wanted()
    }

    /// Pages sent because they were asked for.
    pub(super) fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// The next pages that were asked for. The caller sends them now.
    pub(super) fn take_wanted(&self, out: &mut Vec<PageAddr>) {
        let mut serve = lock(&self.serve);
        while out.len() < ANSWER
            && let Some((addr, urgent)) = serve.next_wanted()
        {
            out.push(addr);
            // It is placed when its frame is whole: nothing else shall be in it.
            if urgent {
                break;
            }
        }
        self.answered.fetch_add(out.len() as u64, Ordering::Relaxed);
    }

    /// The next pages of the filling.
    pub(super) fn take_filling(&self, most: usize, out: &mut Vec<PageAddr>) {
        lock(&self.serve).fill(most, out);
    }

    /// Pages that nothing has been sent for, from `from` on, and where to go on.
    pub(super) fn peek(&self, from: PageAddr, most: usize, out: &mut Vec<PageAddr>) -> Option<PageAddr> {
        lock(&self.serve).peek(from, most, out)
    }

    /// A reference leaves for these now.
    pub(super) fn by_name(&self, addrs: &[PageAddr]) {
        let mut serve = lock(&self.serve);
        addrs.iter().for_each(|a| serve.by_name(*a));
    }

    /// These go first when nothing is asked for.
    pub(super) fn begin_with(&self, order: impl IntoIterator<Item = PageAddr>) {
        lock(&self.serve).begin_with(order);
    }

    /// Of these only a reference left.
    pub(super) fn left_by_name(&self, addrs: &[PageAddr]) {
        if !addrs.is_empty() {
            let mut serve = lock(&self.serve);
            addrs.iter().for_each(|a| serve.left_by_name(*a));
        }
    }

    /// Reads pages into a frame whose contents have no names; returns those.
    pub(super) fn gather(&self, addrs: &[PageAddr], frame: &mut PagesBuilder) -> io::Result<Vec<PageBytes>> {
        frame.clear();
        let mut pages: Vec<PageBytes> = Vec::with_capacity(addrs.len());
        for addr in addrs {
            let mut page = [0; PAGE_SIZE];
            self.ram.read_at(usize::from(addr.block.0), addr.page, &mut page)?;
            match uniform(&page) {
                Some(fill) => frame.uniform(*addr, fill),
                None => {
                    frame.unique(*addr, None);
                    pages.push(page);
                }
            }
        }
        Ok(pages)
    }

    /// Sends pages as they are, in one frame; returns its bytes.
    fn send(&self, conn: &Connection, addrs: &[PageAddr], go_on: impl FnMut() -> bool) -> io::Result<u64> {
        let mut frame = PagesBuilder::default();
        let pages = self.gather(addrs, &mut frame)?;
        let body = [IoSlice::new(pages.as_flattened())];
        let meta = frame.meta();
        let bytes = meta.len() + pages.len() * PAGE_SIZE;
        send_while(conn, Kind::Pages, meta, &body[..usize::from(!pages.is_empty())], go_on)?;
        Ok(bytes as u64)
    }
}

/// Answers what is asked for on a demand connection until it ends, and then ends the VM connection too: what had been
/// sent on either may be lost, and the target says what.
pub(in super::super) fn answer(
    serving: Arc<Serving>,
    group: &SourceGroup,
    shared: Arc<SourceVmShared>,
    (conn, tag): (Connection, Tagged),
    frames: FrameBuf,
    vm_conn: Connection,
) -> io::Result<()> {
    let epoch = serving.epoch.load(Ordering::Relaxed);
    let silence = group.timeouts.peer;
    serving.elsewhere.store(true, Ordering::Relaxed);
    std::thread::Builder::new()
        .name(format!("irlm-demand-{}", serving.name))
        .spawn(move || {
            let _tag = tag;
            let why = until_over(&serving, &shared, &conn, frames, epoch, silence);
            tracing::debug!("{}: demand connection: {why}", serving.name);
            let _ = conn.shutdown(Shutdown::Both);
            // Another connection may stand by now.
            if serving.epoch.load(Ordering::Relaxed) == epoch {
                serving.elsewhere.store(false, Ordering::Relaxed);
                let _ = vm_conn.shutdown(Shutdown::Both);
            }
        })
        .map(drop)
}

fn until_over(
    serving: &Serving,
    shared: &SourceVmShared,
    conn: &Connection,
    mut frames: FrameBuf,
    epoch: u64,
    silence: Duration,
) -> String {
    let current = || serving.epoch.load(Ordering::Relaxed) == epoch && !shared.lost.load(Ordering::Relaxed);
    let go_on = || {
        let heard = shared.heard.load(Ordering::Relaxed);
        current() && crate::flow::now().0.saturating_sub(heard) < silence.as_nanos() as u64
    };
    let mut picked = Vec::with_capacity(ANSWER);
    loop {
        // What is asked for meanwhile may be more urgent than the rest of what was asked for before.
        let idle = !lock(&serving.serve).wanted();
        if idle
            || frames.ready()
            || conn.is_pending()
            || matches!(wait_readable([Some(conn.as_fd())], Duration::ZERO), Ok([true]))
        {
            match frames.wait(conn, LOOK) {
                Ok(f) if f.kind == Kind::Demand => {
                    let asked = Demand::decode(f.meta).map_err(|e| e.to_string());
                    if let Err(e) = asked.and_then(|d| serving.demand(&d).map_err(|e| e.to_string())) {
                        return e;
                    }
                }
                Ok(f) => return format!("{:?} is not expected", f.kind),
                Err(NetError::Silent { .. }) if current() => {}
                Err(e) => return e.to_string(),
            }
            continue;
        }
        picked.clear();
        serving.take_wanted(&mut picked);
        if picked.is_empty() {
            // All of it had left by other ways.
            continue;
        }
        match serving.send(conn, &picked, go_on) {
            Ok(n) => {
                shared.wire_bytes.fetch_add(n, Ordering::Relaxed);
            }
            Err(e) => return e.to_string(),
        }
    }
}
