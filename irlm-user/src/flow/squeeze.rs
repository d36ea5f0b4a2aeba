//! Frames with page contents, out and in: compressed where that pays (`core::squeeze`), counted and timed. Every
//! connection that carries contents sends them by a `Lane` and takes them by a `Landing`; what leaves otherwise is made smaller by
//! a `Packer`.
//!
//! The thread that sends also compresses: the kernel goes on sending what it was given before ([`super::NOTSENT_LOWAT`]),
//! so the link idles only if a frame takes longer than that lasts, and then the level is lowered (decision 0009). Where a
//! processor is to spare, a second thread compresses (`worker`), one frame ahead (decision 0018).

// Compressing beside the thread that sends.
mod worker;

pub use worker::Workers;

use super::lock;
use super::work::{Laps, Stage, Work};
use crate::core::squeeze::{Control, Learnt, Mode, Sample, Squeezer, Unsqueezer};
use crate::core::units::{PAGE_SIZE, PageBytes};
use crate::core::wire::frame::{CODEC_RAW, CODEC_ZSTD, Header, Kind, WireError};
use crate::core::wire::limits::WINDOW_LOG;
use crate::host::sockopt::way;
use crate::net::conn::{Frame, frame_len, send_frame_while};
use crate::net::connection::Connection;
use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use worker::{Permit, Worker};

/// Windows of zstd streams that one agent holds at a time, at either end: 1 GiB, for 1024 connections. Beyond it frames
/// are compressed one by one, which costs bandwidth only.
pub const MAX_WINDOWS: u64 = 1 << 30;

/// What is left of [`MAX_WINDOWS`].
#[derive(Debug, Default)]
pub struct Windows(AtomicU64);

/// A connection's window; given back when dropped.
#[derive(Debug, Default)]
pub struct Window {
    log: u8,
    of: Option<Arc<Windows>>,
}

impl Windows {
    /// A window of two to the power of `most`, at most [`WINDOW_LOG`]; none if that is too much by now.
    #[must_use]
    pub fn take(self: &Arc<Self>, most: u8) -> Window {
        let log = most.min(WINDOW_LOG);
        let fits = |used: u64| used.checked_add(1 << log).filter(|n| *n <= MAX_WINDOWS);
        if log == 0 || self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_err() {
            return Window::default();
        }
        Window { log, of: Some(self.clone()) }
    }

    /// Bytes held.
    #[must_use]
    pub fn held(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Window {
    /// Its size as a power of two; 0: none.
    #[must_use]
    pub fn log(&self) -> u8 {
        self.log
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(all) = &self.of {
            all.0.fetch_sub(1 << self.log, Ordering::Relaxed);
        }
    }
}

/// What the connections of one side of a group have seen of this host's link, which they share, and learnt of what it takes to
/// fill it.
#[derive(Debug, Default)]
pub struct Edge {
    rate: AtomicU64,
    learnt: Mutex<Learnt>,
    /// When a connection last began to send raw to find out the rate.
    tried: Mutex<Option<Instant>>,
}

/// How long another connection waits for what that one finds.
const TRIAL: Duration = Duration::from_secs(1);

impl Edge {
    /// Bytes of a frame of which TCP's figure says something: less may go out in one burst, as a shaper lets pass.
    const TELLS: usize = 128 << 10;

    /// Whether one more connection may send raw to see what the link gives: any, once that is known, and until then one at a time.
    fn may_try(&self) -> bool {
        if self.rate() > 0.0 {
            return true;
        }
        let mut tried = lock(&self.tried);
        let free = tried.is_none_or(|at| at.elapsed() > TRIAL);
        if free {
            *tried = Some(Instant::now());
        }
        free
    }

    /// TCP's figure after a frame of `wire` bytes.
    fn saw(&self, wire: usize, rate: u64) {
        if wire >= Self::TELLS && rate > 0 {
            // A link seems faster than it is after a pause, where a shaper lets a burst pass; it never seems slower for long.
            let mean = |old: u64| {
                Some(match old {
                    0 => rate,
                    old if rate < old => old / 2 + rate / 2,
                    old => old - old / 16 + rate / 16,
                })
            };
            tracing::debug!("the link gives {rate} B/s after {wire} bytes");
            let _ = self.rate.fetch_update(Ordering::Relaxed, Ordering::Relaxed, mean);
        }
    }

    /// Bytes a second that a connection gets of it; 0: not known yet.
    fn rate(&self) -> f64 {
        self.rate.load(Ordering::Relaxed) as f64
    }
}

/// Compresses contents, as hard as gets most through. One thread uses it.
#[derive(Debug)]
pub(super) struct Packer {
    control: Control,
    squeezer: Option<Squeezer>,
    laps: Laps,
    /// Processor time since then that was not for compressing, seconds.
    rest: f64,
}

impl Packer {
    /// For the calling thread. Without a window each frame can be unpacked without another one.
    pub(super) fn new(control: Control, window_log: u8) -> Self {
        let squeezer = if control.mode() == Mode::Off { None } else { Squeezer::new(window_log) };
        Self { control, squeezer, laps: Laps::begin(), rest: 0.0 }
    }

    fn lap(&mut self, work: &Work, stage: Stage) -> Duration {
        let used = self.laps.lap(work, stage);
        self.rest += used.as_secs_f64();
        used
    }

    /// Puts the pieces of the body for `contents` into `body`. Returns how it is coded and what is known by then.
    pub(super) fn pack<'a>(
        &'a mut self,
        contents: &[&'a PageBytes],
        work: &Work,
        body: &mut Vec<&'a [u8]>,
    ) -> (u8, Sample) {
        self.lap(work, Stage::Other);
        let began = Instant::now();
        let level = self.control.level().filter(|_| !contents.is_empty());
        let squeezed = match (&mut self.squeezer, level) {
            (Some(s), Some(level)) => s.squeeze(contents, level, body),
            _ => None,
        };
        if squeezed.is_none() {
            body.extend(contents.iter().map(|p| &p[..]));
        }
        let work_cpu = level.map_or(0.0, |_| self.laps.lap(work, Stage::Compress).as_secs_f64());
        let sample = Sample {
            level,
            raw: contents.len() * PAGE_SIZE,
            squeezed: squeezed.map_or(0, |s| s.raw),
            small: squeezed.map_or(0, |s| s.small),
            work: began.elapsed().as_secs_f64(),
            work_cpu,
            rest_cpu: std::mem::take(&mut self.rest),
            ..Sample::default()
        };
        (squeezed.map_or(CODEC_RAW, |s| s.codec), sample)
    }

    /// The packed contents have gone out, in a body of `body` bytes.
    pub(super) fn sent(&mut self, sample: &Sample, body: usize, work: &Work) {
        self.control.told(sample);
        if sample.raw > 0 {
            work.sent(sample.level.unwrap_or(0), sample.squeezed, sample.raw, body);
        }
    }
}

/// The sending half of a connection, for contents. One thread sends on it.
#[derive(Debug)]
pub(super) struct Lane {
    packer: Packer,
    _window: Window,
    edge: Arc<Edge>,
    /// The shortest round trip seen, seconds: that of a link without a queue.
    shortest: f64,
    /// When the frame before this had gone out.
    ended: Instant,
    worker: Option<Worker>,
    /// The frame that it works on.
    ahead: Option<Ahead>,
}

/// A frame whose contents are being compressed.
#[derive(Debug)]
struct Ahead {
    kind: Kind,
    meta: Vec<u8>,
    contents: usize,
    level: i32,
}

impl Lane {
    /// For the calling thread. `window` is what the receiver granted and this host has.
    pub(super) fn new(mode: Mode, window: Window, edge: &Arc<Edge>) -> Self {
        Self {
            packer: Packer::new(Control::knowing(mode, *lock(&edge.learnt)), window.log),
            _window: window,
            edge: edge.clone(),
            shortest: f64::INFINITY,
            ended: Instant::now(),
            worker: None,
            ahead: None,
        }
    }

    /// The same, with a thread that compresses one frame ahead, if there is a processor for it. Whoever sends on the same
    /// connection otherwise calls [`Self::drain`] before, and so does who has nothing to send for now.
    pub(super) fn beside(mode: Mode, window: Window, edge: &Arc<Edge>, permit: Option<Permit>) -> Self {
        let mut lane = Self::new(mode, window, edge);
        if let Some(permit) = permit
            && let Some(squeezer) = lane.packer.squeezer.take()
        {
            match Worker::start(squeezer, permit) {
                Ok(worker) => {
                    lane.worker = Some(worker);
                    lane.packer.control.work_beside();
                }
                Err(e) => {
                    tracing::warn!("no thread to compress on: {e}");
                    lane.packer.squeezer = Squeezer::new(lane._window.log);
                }
            }
        }
        lane
    }

    /// Whether the next frame is to be compressed.
    pub(super) fn squeezes(&self) -> bool {
        let can = self.packer.squeezer.is_some() || self.worker.is_some();
        can && self.packer.control.level().is_some()
    }

    /// Whether a frame has been given that has not gone out yet.
    pub(super) fn is_ahead(&self) -> bool {
        self.ahead.is_some()
    }

    /// Sends what has been given and has not gone out yet; returns the bytes that went out. `go_on` as in
    /// [`crate::net::conn::send_while`].
    pub(super) fn drain(
        &mut self,
        conn: &Connection,
        work: &Work,
        go_on: impl FnMut() -> bool,
    ) -> io::Result<usize> {
        match self.ahead.take() {
            Some(frame) => self.finish(&frame, conn, work, go_on),
            None => Ok(0),
        }
    }

    /// Sends a frame that the worker has made, or makes now.
    fn finish(
        &mut self,
        frame: &Ahead,
        conn: &Connection,
        work: &Work,
        go_on: impl FnMut() -> bool,
    ) -> io::Result<usize> {
        self.packer.lap(work, Stage::Other);
        let Some(worker) = &mut self.worker else { return Ok(0) };
        let job = worker.end()?;
        work.spent(Stage::Compress, job.cpu);
        let made = Instant::now();
        let codec = job.squeezed.map_or(CODEC_RAW, |s| s.codec);
        let header = Header::new(frame.kind, frame.meta.len(), job.body.len()).coded(codec);
        send_frame_while(conn, header, &frame.meta, &[IoSlice::new(&job.body)], go_on)?;
        let sample = Sample {
            level: Some(frame.level),
            raw: frame.contents * PAGE_SIZE,
            squeezed: job.squeezed.map_or(0, |s| s.raw),
            small: job.squeezed.map_or(0, |s| s.small),
            work: job.took.as_secs_f64(),
            work_cpu: job.cpu.as_secs_f64(),
            rest_cpu: std::mem::take(&mut self.packer.rest),
            ..Sample::default()
        };
        let body = job.body.len();
        worker.reuse(job);
        Ok(self.told(conn, sample, (frame.meta.len(), body), made, work))
    }

    /// All processor time since the last lap was for `stage`; how much that was.
    pub(super) fn lap(&mut self, work: &Work, stage: Stage) -> Duration {
        self.packer.lap(work, stage)
    }

    /// Sends a frame whose body is `contents`; returns the bytes that went out, which with a worker are those of the frame
    /// before. `go_on` as in [`crate::net::conn::send_while`].
    pub(super) fn send(
        &mut self,
        conn: &Connection,
        (kind, meta): (Kind, &[u8]),
        contents: &[&PageBytes],
        work: &Work,
        mut go_on: impl FnMut() -> bool,
    ) -> io::Result<usize> {
        if self.packer.control.tries() && !self.edge.may_try() {
            self.packer.control.postpone();
        }
        let level = self.packer.control.level().filter(|_| !contents.is_empty());
        if let (Some(worker), Some(level)) = (&mut self.worker, level) {
            worker.begin(contents, level)?;
            let frame = Ahead { kind, meta: meta.to_vec(), contents: contents.len(), level };
            return match self.ahead.replace(frame) {
                Some(before) => self.finish(&before, conn, work, go_on),
                None => Ok(0),
            };
        }
        let before = self.drain(conn, work, &mut go_on)?;
        let mut body: Vec<&[u8]> = Vec::with_capacity(contents.len() + 2);
        let (codec, sample) = self.packer.pack(contents, work, &mut body);
        let made = Instant::now();
        let body: Vec<IoSlice<'_>> = body.into_iter().map(IoSlice::new).collect();
        let body_len = body.iter().map(|b| b.len()).sum::<usize>();
        let header = Header::new(kind, meta.len(), body_len).coded(codec);
        send_frame_while(conn, header, meta, &body, go_on)?;
        Ok(before + self.told(conn, sample, (meta.len(), body_len), made, work))
    }

    /// A frame has gone out whose body was `made` then; returns its bytes.
    fn told(
        &mut self,
        conn: &Connection,
        mut sample: Sample,
        (meta, body): (usize, usize),
        made: Instant,
        work: &Work,
    ) -> usize {
        let now = Instant::now();
        let way = way(conn).unwrap_or_default();
        let trip = way.round_trip.as_secs_f64();
        self.shortest = self.shortest.min(trip);
        sample.wire = frame_len(conn, meta, body);
        sample.cycle = (now - self.ended).as_secs_f64();
        sample.held = (now - made).as_secs_f64();
        sample.queued = trip - self.shortest;
        self.edge.saw(sample.wire, way.rate);
        sample.rate = self.edge.rate();
        let wire = sample.wire;
        work.took(sample.cycle, sample.held);
        self.packer.sent(&sample, body, work);
        if let Some(learnt) = self.packer.control.learnt() {
            *lock(&self.edge.learnt) = learnt;
        }
        self.ended = now;
        wire
    }

    /// Sends a frame whose body was made by another host, as it came; returns the bytes that went out. `go_on` as in
    /// [`crate::net::conn::send_while`].
    pub(super) fn pass_on(
        &mut self,
        conn: &Connection,
        (kind, meta): (Kind, &[u8]),
        body: &Body,
        work: &Work,
        go_on: impl FnMut() -> bool,
    ) -> io::Result<usize> {
        let header = Header::new(kind, meta.len(), body.bytes.len()).coded(CODEC_ZSTD);
        send_frame_while(conn, header, meta, &[IoSlice::new(&body.bytes)], go_on)?;
        work.passed_on(body.contents * PAGE_SIZE, body.bytes.len());
        // What it took says nothing of what this sender's own frames would.
        self.ended = Instant::now();
        Ok(frame_len(conn, meta.len(), body.bytes.len()))
    }
}

/// The body of a compressed frame that can be unpacked without any other one.
#[derive(Debug)]
pub(super) struct Body {
    contents: usize,
    bytes: Box<[u8]>,
}

impl Body {
    /// The body of `frame`, which holds so many contents, if it is such a one.
    pub(super) fn of(frame: &Frame<'_>, contents: usize) -> Option<Self> {
        (frame.codec == CODEC_ZSTD).then(|| Self { contents, bytes: frame.body.into() })
    }

    /// Bytes held.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }
}

/// The receiving half of a connection, for contents.
#[derive(Debug, Default)]
pub(super) struct Landing {
    unsqueezer: Unsqueezer,
    window: Window,
}

impl Landing {
    pub(super) fn new(window: Window) -> Self {
        Self { unsqueezer: Unsqueezer::new(window.log), window }
    }

    /// What the sender is told of the window.
    pub(super) fn window_log(&self) -> u8 {
        self.window.log
    }

    /// The `n` contents that a frame's meta announces.
    pub(super) fn contents<'a>(
        &'a mut self,
        frame: &Frame<'a>,
        n: usize,
        work: &Work,
        laps: &mut Laps,
    ) -> Result<&'a [PageBytes], WireError> {
        if frame.codec == CODEC_RAW {
            return self.unsqueezer.contents(frame.kind, frame.codec, frame.body, n);
        }
        laps.lap(work, Stage::Other);
        let contents = self.unsqueezer.contents(frame.kind, frame.codec, frame.body, n);
        laps.lap(work, Stage::Decompress);
        contents
    }
}

#[cfg(test)]
mod tests;
