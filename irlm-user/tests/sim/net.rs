//! Connections between agents: frames in order with random delays, cut at a random point when a connection breaks,
//! after which each end learns of it at its own time.

use crate::world::{Ev, World};
use irlm_user::core::squeeze::{Squeezer, Unsqueezer};
use irlm_user::core::units::{PAGE_SIZE, PageBytes};
use irlm_user::core::wire::frame::{CODEC_RAW, HEADER_LEN, Header, Kind};
use irlm_user::core::wire::keys::pass;
use irlm_user::core::wire::messages::{Hello, HelloOk, Purpose, decode_entries};
use irlm_user::core::wire::pages::Records;

pub(crate) const US: u64 = 1_000;
pub(crate) const MS: u64 = 1_000_000;

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Agent {
    Source(u16),
    Target(u16),
}

/// Which end: the one that called or the one that took the call.
pub(crate) const CALLER: usize = 0;
pub(crate) const TAKER: usize = 1;

pub(crate) struct Conn {
    pub(crate) purpose: Purpose,
    pub(crate) ends: [Agent; 2],
    /// The life of the agent at each end; none at the taker's before it has said HelloOk.
    lives: [Option<u32>; 2],
    /// The caller has heard HelloOk.
    pub(crate) ok: bool,
    pub(crate) opened: u64,
    /// By sending end: when the last frame arrives, and from when on nothing does.
    last: [u64; 2],
    cut: [Option<u64>; 2],
    /// The end has closed it or knows that it is lost.
    closed: [bool; 2],
    broken: bool,
    pub(crate) undelivered: usize,
    /// By sending end, once something was compressed there. A smaller window than in earnest: contents here are few.
    squeezers: [Option<Squeezer>; 2],
    unsqueezers: [Unsqueezer; 2],
}

const WINDOW_LOG: u8 = 16;

impl Conn {
    pub(crate) fn core(&self) -> bool {
        !matches!(self.purpose, Purpose::Peer { .. })
    }
    pub(crate) fn live(&self) -> bool {
        !self.broken
    }
}

pub(crate) fn frame(kind: Kind, meta: &[u8], body: &[u8]) -> Vec<u8> {
    let mut f = Header::new(kind, meta.len(), body.len()).encode().to_vec();
    f.extend_from_slice(meta);
    f.extend_from_slice(body);
    f
}

const TOKEN: [u8; 32] = [0x42; 32];

impl World {
    pub(crate) fn open(&mut self, from: Agent, to: Agent, purpose: Purpose) -> usize {
        let life = self.life(from);
        self.conns.push(Conn {
            purpose,
            ends: [from, to],
            lives: [Some(life), None],
            ok: false,
            opened: self.now,
            last: [0; 2],
            cut: [None; 2],
            closed: [false; 2],
            broken: false,
            undelivered: 0,
            squeezers: [None, None],
            unsqueezers: [Unsqueezer::new(WINDOW_LOG), Unsqueezer::new(WINDOW_LOG)],
        });
        let c = self.conns.len() - 1;
        if !self.up(to) || (self.conns[c].core() && !self.core_up) {
            self.break_conn(c);
        } else {
            self.send(c, CALLER, Kind::Hello, &Hello::new("sim", &TOKEN, purpose).encode(&[0; 16]), &[]);
        }
        c
    }

    pub(crate) fn send(&mut self, c: usize, from: usize, kind: Kind, meta: &[u8], body: &[u8]) {
        let f = frame(kind, meta, body);
        self.send_frame(c, from, f);
    }

    /// Compresses a frame's contents at one level or another, or not: what the controller would do, and more wildly.
    fn squeezed(&mut self, c: usize, from: usize, f: Vec<u8>) -> Vec<u8> {
        let head = Header::decode(f.first_chunk().expect("whole frames")).expect("good header");
        let (meta, body) = f[HEADER_LEN..].split_at(head.meta_len as usize);
        if !matches!(head.kind, Kind::Pages | Kind::Contents) || body.is_empty() {
            return f;
        }
        let level = *self.rng.pick(&[0, 0, 1, 1, 1, 3, -1]);
        if level == 0 {
            return f;
        }
        let contents: Vec<&PageBytes> = body.as_chunks::<PAGE_SIZE>().0.iter().collect();
        // Some connections have no window.
        let window = if c.is_multiple_of(3) { 0 } else { WINDOW_LOG };
        let s = &mut self.conns[c].squeezers[from];
        let s = s.get_or_insert_with(|| Squeezer::new(window).expect("memory"));
        let mut pieces = Vec::new();
        let Some(made) = s.squeeze(&contents, level, &mut pieces) else { return f };
        let body = pieces.concat();
        let head = Header::new(head.kind, meta.len(), body.len()).coded(made.codec);
        self.tally.squeezed += 1;
        [&head.encode()[..], meta, &body].concat()
    }

    pub(crate) fn send_frame(&mut self, c: usize, from: usize, f: Vec<u8>) {
        let core = self.conns[c].core();
        let mut wait =
            if core { self.rng.range(800 * US, 2 * MS) } else { self.rng.range(50 * US, 300 * US) };
        if self.cfg.jitter && self.rng.one_in(25) {
            wait += self.rng.range(0, 30 * MS);
        }
        if self.conns[c].closed[from] {
            return;
        }
        let f = self.squeezed(c, from, f);
        let conn = &mut self.conns[c];
        // 100 MB/s.
        let at = conn.last[from].max(self.now + wait) + f.len() as u64 * 10;
        // Nothing sent later arrives if this does not.
        conn.last[from] = at;
        if conn.cut[from].is_some_and(|cut| at >= cut) {
            return;
        }
        conn.undelivered += 1;
        self.at(at, Ev::Deliver { conn: c, from, bytes: f });
    }

    /// How far behind the wire is, as a full socket would tell the sender.
    pub(crate) fn backlog(&self, c: usize, from: usize) -> u64 {
        self.conns[c].last[from].saturating_sub(self.now)
    }

    pub(crate) fn deliver(&mut self, c: usize, from: usize, bytes: &[u8]) {
        let to = 1 - from;
        let conn = &mut self.conns[c];
        conn.undelivered -= 1;
        if conn.cut[from].is_some_and(|cut| self.now >= cut) || conn.closed[to] {
            return;
        }
        let (agent, life) = (conn.ends[to], conn.lives[to]);
        if !self.up(agent) || life.is_some_and(|l| l != self.life(agent)) {
            return;
        }
        let head = Header::decode(bytes.first_chunk().expect("whole frames travel")).expect("good header");
        assert_eq!(head.payload_len(), bytes.len() - HEADER_LEN);
        let (meta, body) = bytes[HEADER_LEN..].split_at(head.meta_len as usize);
        match (head.kind, life) {
            (Kind::Hello, None) => {
                let hello = Hello::decode(meta).expect("good hello");
                assert_eq!((&*hello.group, hello.pass), ("sim", pass(&TOKEN)));
                let version = hello.choose().expect("same build");
                self.conns[c].lives[TAKER] = Some(self.life(agent));
                self.conns[c].purpose = hello.purpose;
                if self.accepted(c) {
                    self.send(
                        c,
                        TAKER,
                        Kind::HelloOk,
                        &HelloOk { version, window_log: 0, slots: 0 }.encode(&[0; 16]),
                        &[],
                    );
                } else {
                    self.close(c, TAKER);
                }
            }
            (Kind::HelloOk, _) => {
                HelloOk::decode(meta).expect("our version");
                self.conns[c].ok = true;
                self.opened(c);
            }
            (kind, Some(_)) if head.codec != CODEC_RAW => {
                let n = match kind {
                    Kind::Pages => {
                        let mut all = Records::new(meta);
                        all.by_ref().for_each(|r| assert!(r.is_ok(), "good records"));
                        all.contents()
                    }
                    _ => decode_entries(kind, meta).expect("good entries").len(),
                };
                let u = &mut self.conns[c].unsqueezers[from];
                let body = u.contents(kind, head.codec, body, n).expect("good body").as_flattened().to_vec();
                self.received(c, to, kind, meta, &body);
            }
            (kind, Some(_)) => self.received(c, to, kind, meta, body),
            (kind, None) => panic!("{kind:?} before Hello"),
        }
    }

    /// The connection breaks: what was in flight arrives up to a random point.
    pub(crate) fn break_conn(&mut self, c: usize) {
        if std::mem::replace(&mut self.conns[c].broken, true) {
            return;
        }
        for from in [CALLER, TAKER] {
            let cut = self.now + self.rng.range(0, 6 * MS);
            self.conns[c].cut[from] = Some(cut);
            let at = cut + self.rng.range(0, 100 * MS);
            self.at(at, Ev::Lost { conn: c, end: 1 - from });
        }
    }

    /// One end closes: what it has sent arrives, then the other end learns of it.
    pub(crate) fn close(&mut self, c: usize, end: usize) {
        let graceful = self.conns[c].last[end].max(self.now) + 1;
        self.end_closes(c, end, graceful);
    }

    fn end_closes(&mut self, c: usize, end: usize, cut: u64) {
        let conn = &mut self.conns[c];
        conn.closed[end] = true;
        if std::mem::replace(&mut conn.broken, true) {
            return;
        }
        conn.cut[end] = Some(cut);
        conn.cut[1 - end] = Some(self.now);
        let at = cut + self.rng.range(0, 20 * MS);
        self.at(at, Ev::Lost { conn: c, end: 1 - end });
    }

    /// An agent has died: its kernel closes everything.
    pub(crate) fn close_all_of(&mut self, agent: Agent) {
        for c in 0..self.conns.len() {
            for end in [CALLER, TAKER] {
                if self.conns[c].ends[end] == agent && !self.conns[c].closed[end] {
                    let cut = self.now + self.rng.range(0, 4 * MS);
                    self.end_closes(c, end, cut);
                }
            }
        }
    }

    pub(crate) fn lost(&mut self, c: usize, end: usize) {
        let conn = &mut self.conns[c];
        if std::mem::replace(&mut conn.closed[end], true) {
            return;
        }
        let (agent, life) = (conn.ends[end], conn.lives[end]);
        if self.up(agent) && life == Some(self.life(agent)) {
            match agent {
                Agent::Source(_) => self.source_lost(c),
                Agent::Target(t) => self.target_lost(t, c),
            }
        }
    }
}
