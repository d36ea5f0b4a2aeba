//! A second thread for a connection whose host has a processor to spare: it compresses a frame's contents while the
//! connection's own thread sends the frame before, and reads and hashes what the next one brings.
//!
//! Bound: two frames' contents a connection, which go to and fro in the same buffers, and one thread for each processor
//! that [`Workers`] was made with.

use crate::core::squeeze::{Squeezed, Squeezer};
use crate::core::units::PageBytes;
use crate::host::sched::thread_cpu;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Processors that the threads of departing VMs leave free.
#[derive(Debug, Default)]
pub struct Workers(AtomicUsize);

/// The right to one more thread; given back when dropped.
#[derive(Debug)]
pub struct Permit(Arc<Workers>);

impl Workers {
    /// So many.
    #[must_use]
    pub fn new(spare: usize) -> Self {
        Self(AtomicUsize::new(spare))
    }

    /// One of them, if there is one left.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Permit> {
        let taken = self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1));
        taken.ok().map(|_| Permit(self.clone()))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// A frame's contents on their way to the thread and back.
#[derive(Debug, Default)]
pub(super) struct Job {
    pages: Vec<PageBytes>,
    level: i32,
    /// The frame's body.
    pub(super) body: Vec<u8>,
    /// What was compressed of it; none: the body is raw.
    pub(super) squeezed: Option<Squeezed>,
    /// How long it took, and processor time of that.
    pub(super) took: Duration,
    pub(super) cpu: Duration,
}

/// The thread, as its connection sees it.
#[derive(Debug)]
pub(super) struct Worker {
    jobs: SyncSender<Job>,
    done: Receiver<Job>,
    spare: Vec<Job>,
    _permit: Permit,
}

impl Worker {
    /// Has `squeezer` work on a thread of its own.
    pub(super) fn start(mut squeezer: Squeezer, permit: Permit) -> io::Result<Self> {
        // No more jobs are ever under way than fit, so nobody waits to put one in.
        let (jobs, todo) = sync_channel::<Job>(2);
        let (finished, done) = sync_channel::<Job>(2);
        std::thread::Builder::new().name("irlm-squeeze".into()).spawn(move || {
            for mut job in todo {
                let (began, cpu) = (Instant::now(), thread_cpu());
                job.squeeze(&mut squeezer);
                (job.took, job.cpu) = (began.elapsed(), thread_cpu() - cpu);
                if finished.send(job).is_err() {
                    return;
                }
            }
        })?;
        let spare = vec![Job::default(), Job::default()];
        Ok(Self { jobs, done, spare, _permit: permit })
    }

    /// Begins with the contents of the next frame. At most one frame before it may still be waited for.
    pub(super) fn begin(&mut self, contents: &[&PageBytes], level: i32) -> io::Result<()> {
        let mut job = self.spare.pop().unwrap_or_default();
        job.pages.clear();
        job.pages.extend(contents.iter().copied());
        job.level = level;
        self.jobs.send(job).map_err(|_| gone())
    }

    /// Waits for the frame that was begun first. To be given back by [`Self::reuse`].
    pub(super) fn end(&mut self) -> io::Result<Job> {
        self.done.recv().map_err(|_| gone())
    }

    pub(super) fn reuse(&mut self, job: Job) {
        self.spare.push(job);
    }
}

fn gone() -> io::Error {
    io::Error::other("the thread that compresses has ended")
}

impl Job {
    fn squeeze(&mut self, squeezer: &mut Squeezer) {
        let contents: Vec<&PageBytes> = self.pages.iter().collect();
        let mut parts: Vec<&[u8]> = Vec::with_capacity(contents.len() + 2);
        self.squeezed = squeezer.squeeze(&contents, self.level, &mut parts);
        if self.squeezed.is_none() {
            parts.extend(contents.iter().map(|p| &p[..]));
        }
        self.body.clear();
        parts.iter().for_each(|p| self.body.extend_from_slice(p));
    }
}
