//! What compression leaves of real guests' memory, and how fast: the guests' saved states, dealt out to push and VM
//! connections as a move deals them out, and put through the very code of the agents. No network, no QEMU.

use crate::states::State;
use anyhow::{Context as _, Result, ensure};
use irlm_user::core::digest::{Algorithm, Digest, Hasher, uniform};
use irlm_user::core::qemu::{Event, Parser, StreamError};
use irlm_user::core::squeeze::{Squeezer, Unsqueezer};
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use irlm_user::core::wire::frame::Kind;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

/// Bytes of a state read at a time.
const READ: usize = 1 << 20;

/// What each connection over the core link carries, in order.
#[derive(Debug)]
pub struct Streams {
    /// Pages with content, all guests: what plain QEMU sends.
    pub content: usize,
    streams: Vec<Vec<PageBytes>>,
    /// The last so many of them are pushes.
    pushes: usize,
}

/// One way of compressing them.
#[derive(Clone, Copy, Debug)]
pub struct Squeeze {
    /// Window, as a power of two; 0: each frame by itself.
    pub window_log: u8,
    /// zstd's.
    pub level: i32,
    /// Contents in a frame.
    pub frame: usize,
    /// What is left, as a share.
    pub leaves: f64,
    /// The same of pushed contents alone.
    pub leaves_pushed: f64,
    /// MB a second, compressing and unpacking.
    pub packs: f64,
    /// See `packs`.
    pub unpacks: f64,
    /// Bytes of memory held at the sending and at the receiving end of one connection.
    pub memory: [usize; 2],
}

impl Streams {
    /// Guests by source host. `run` shared contents in a row get one carrier.
    pub fn load(hosts: &[Vec<State>], run: usize) -> Result<Self> {
        let mut pages: Vec<Vec<Vec<PageBytes>>> = Vec::new();
        for guests in hosts {
            pages.push(guests.iter().map(contents).collect::<Result<_>>()?);
        }
        let content = pages.iter().flatten().map(Vec::len).sum();
        let hasher = Hasher::new(Algorithm::Blake3, &[7; 32], "");
        let mut at: HashMap<Digest, HashSet<usize>> = HashMap::new();
        for (h, guests) in pages.iter().enumerate() {
            for p in guests.iter().flatten() {
                at.entry(hasher.page(p)).or_default().insert(h);
            }
        }
        // A content of several hosts is pushed by one of them, in turns; one of a single host goes once with its first VM.
        let (mut pushes, mut streams) = (vec![Vec::new(); hosts.len()], Vec::new());
        let (mut sent, mut turn) = (HashSet::new(), 0usize);
        for (h, guests) in pages.into_iter().enumerate() {
            for guest in guests {
                let mut own = Vec::new();
                for p in guest {
                    let d = hasher.page(&p);
                    if !sent.insert(d) {
                        continue;
                    }
                    if at[&d].len() == 1 {
                        own.push(p);
                    } else {
                        turn += 1;
                        let carrier = turn / run % hosts.len();
                        pushes[if at[&d].contains(&carrier) { carrier } else { h }].push(p);
                    }
                }
                streams.push(own);
            }
        }
        let n = pushes.len();
        streams.extend(pushes);
        Ok(Self { content, streams, pushes: n })
    }

    /// Pages that cross the core link.
    #[must_use]
    pub fn pages(&self) -> usize {
        self.streams.iter().map(Vec::len).sum()
    }

    /// Compresses and unpacks all of them; what comes out must be what went in.
    pub fn squeeze(&self, window_log: u8, level: i32, frame: usize) -> Result<Squeeze> {
        let (mut small, mut pushed) = (0, (0, 0));
        let (mut packing, mut unpacking, mut memory) = (0.0, 0.0, [0; 2]);
        for (n, stream) in self.streams.iter().enumerate() {
            let before = small;
            let mut squeezer = Squeezer::new(window_log).context("no memory")?;
            let mut unsqueezer = Unsqueezer::new(window_log);
            for frame in stream.chunks(frame) {
                let contents: Vec<&PageBytes> = frame.iter().collect();
                let mut body = Vec::new();
                let start = Instant::now();
                let made = squeezer.squeeze(&contents, level, &mut body);
                packing += start.elapsed().as_secs_f64();
                let Some(made) = made else {
                    small += frame.len() * PAGE_SIZE;
                    continue;
                };
                let body = body.concat();
                small += body.len();
                let start = Instant::now();
                let back = unsqueezer.contents(Kind::Contents, made.codec, &body, frame.len())?;
                unpacking += start.elapsed().as_secs_f64();
                ensure!(back == frame, "contents came back as others");
            }
            if n >= self.streams.len() - self.pushes {
                pushed = (pushed.0 + small - before, pushed.1 + stream.len() * PAGE_SIZE);
            }
            memory = [memory[0].max(squeezer.memory()), memory[1].max(unsqueezer.memory())];
        }
        let raw = (self.pages() * PAGE_SIZE) as f64;
        let (packs, unpacks) = (raw / packing / 1e6, raw / unpacking / 1e6);
        let leaves_pushed = pushed.0 as f64 / pushed.1.max(1) as f64;
        Ok(Squeeze {
            window_log,
            level,
            frame,
            leaves: small as f64 / raw,
            leaves_pushed,
            packs,
            unpacks,
            memory,
        })
    }
}

/// A state's pages with content, in the order in which QEMU sends them.
fn contents(state: &State) -> Result<Vec<PageBytes>> {
    let data = std::fs::read(state.file()).with_context(|| format!("read {}", state.file().display()))?;
    let (mut parser, mut pages, mut from, mut to) = (Parser::new(), Vec::new(), 0, 0);
    while to < data.len() {
        to = data.len().min(to + READ);
        from += parser
            .parse::<StreamError>(&data[from..to], &mut |event| {
                if let Event::Page { bytes, .. } = event
                    && uniform(bytes).is_none()
                {
                    pages.push(*bytes);
                }
                Ok(())
            })
            .with_context(|| state.file().display().to_string())?;
    }
    Ok(pages)
}
