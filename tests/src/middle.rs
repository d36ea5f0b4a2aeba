//! A man in the middle: connections that are made to him go on to whom they are meant for, and what the caller says is changed
//! at one place, with good TCP checksums on both sides.

use crate::net::{Host, Net};
use anyhow::{Context as _, Result};
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Most that one wound loses, repeats or exchanges, bytes.
const LONGEST: usize = 4096;
/// Connections of which what was said is kept, and how much of each, bytes.
const RECORDED: (usize, usize) = (64, 256 << 10);

/// What is done to what passes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Harm {
    /// One bit is another.
    Flip,
    /// Some bytes are missing.
    Drop,
    /// Some bytes come twice.
    Repeat,
    /// Two pieces that follow each other come in the other order.
    Exchange,
    /// The connection ends.
    Cut,
}

impl Harm {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Flip, Self::Drop, Self::Repeat, Self::Exchange, Self::Cut];
}

/// One wound.
#[derive(Clone, Copy, Debug)]
pub struct Wound {
    /// What.
    pub harm: Harm,
    /// After so many bytes of all connections.
    pub at: u64,
    /// How many bytes it is about; of a flip the bit.
    pub size: usize,
}

#[derive(Debug, Default)]
struct State {
    passed: u64,
    wound: Option<Wound>,
    struck: Option<Wound>,
    heard: Vec<Vec<u8>>,
}

impl State {
    /// What goes on for this piece, and whether the connection ends after it.
    fn pass(&mut self, piece: &[u8]) -> (Vec<u8>, bool) {
        let from = self.passed;
        self.passed += piece.len() as u64;
        let mut out = piece.to_vec();
        let Some(w) = self.wound.filter(|w| w.at < self.passed && !piece.is_empty()) else {
            return (out, false);
        };
        // Where the wound is due; of a place that has passed already, the first one there is.
        let at = usize::try_from(w.at.saturating_sub(from)).unwrap_or(0).min(piece.len() - 1);
        let end = piece.len().min(at + w.size.clamp(1, LONGEST));
        let middle = at + (end - at) / 2;
        match w.harm {
            Harm::Flip => out[at] ^= 1 << (w.size % 8),
            Harm::Drop => drop(out.drain(at..end)),
            Harm::Repeat => drop(out.splice(at..at, piece[at..end].iter().copied())),
            // One byte alone has no order.
            Harm::Exchange if end - at < 2 => return (out, false),
            Harm::Exchange => out[at..end].rotate_left(middle - at),
            Harm::Cut => out.truncate(at),
        }
        if out == piece {
            // Zeros may be exchanged for zeros: the next piece, then.
            return (out, false);
        }
        self.struck = self.wound.take();
        (out, w.harm == Harm::Cut)
    }
}

/// The man; he leaves when this is dropped.
#[derive(Debug)]
pub struct Middle {
    addr: SocketAddr,
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Middle {
    /// Listens at a host's address, on the port of `to`, to which all goes on.
    pub fn start(net: &Net, host: Host, to: SocketAddr) -> Result<Self> {
        let addr = SocketAddr::new(host.ip().parse()?, to.port());
        let state = Arc::<Mutex<State>>::default();
        let stop = Arc::<AtomicBool>::default();
        let (theirs, over) = (Arc::clone(&state), Arc::clone(&stop));
        net.within(host, move || {
            let listener = TcpListener::bind(addr).context("a place in the middle")?;
            listener.set_nonblocking(true)?;
            // Threads that are made here are in this network, too.
            std::thread::spawn(move || {
                while !over.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((caller, _)) => {
                            let state = Arc::clone(&theirs);
                            std::thread::spawn(move || drop(between(&caller, to, &state)));
                        }
                        Err(_) => std::thread::sleep(Duration::from_millis(1)),
                    }
                }
            });
            Ok(())
        })?;
        Ok(Self { addr, state, stop })
    }

    /// Where he listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on bytes are counted, until this is done once.
    pub fn arm(&self, wound: Wound) {
        let mut state = lock(&self.state);
        (state.passed, state.wound, state.struck) = (0, Some(wound), None);
    }

    /// Bytes that have passed since then.
    #[must_use]
    pub fn passed(&self) -> u64 {
        lock(&self.state).passed
    }

    /// Whether something was changed since then.
    #[must_use]
    pub fn has_struck(&self) -> bool {
        lock(&self.state).struck.is_some()
    }

    /// The beginnings of what callers have said, a connection each.
    #[must_use]
    pub fn heard(&self) -> Vec<Vec<u8>> {
        lock(&self.state).heard.clone()
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn between(caller: &TcpStream, to: SocketAddr, state: &Mutex<State>) -> io::Result<()> {
    let taker = TcpStream::connect(to)?;
    for s in [caller, &taker] {
        s.set_nodelay(true)?;
        s.set_nonblocking(false)?;
    }
    let (back_from, back_to) = (taker.try_clone()?, caller.try_clone()?);
    let back = std::thread::spawn(move || {
        let _ = io::copy(&mut &back_from, &mut &back_to);
        let _ = back_to.shutdown(Shutdown::Write);
    });
    let done = forward(caller, &taker, state);
    let _ = taker.shutdown(if done.is_ok() { Shutdown::Write } else { Shutdown::Both });
    if done.is_err() {
        let _ = caller.shutdown(Shutdown::Both);
    }
    let _ = back.join();
    done
}

fn forward(mut caller: &TcpStream, mut taker: &TcpStream, state: &Mutex<State>) -> io::Result<()> {
    let mut buf = vec![0; 64 << 10];
    let mut mine = None;
    loop {
        let n = caller.read(&mut buf)?;
        if n == 0 {
            return Ok(());
        }
        let (out, ends) = {
            let mut state = lock(state);
            record(&mut state.heard, &mut mine, &buf[..n]);
            state.pass(&buf[..n])
        };
        taker.write_all(&out)?;
        if ends {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
    }
}

fn record(heard: &mut Vec<Vec<u8>>, mine: &mut Option<usize>, piece: &[u8]) {
    let (connections, bytes) = RECORDED;
    if mine.is_none() && heard.len() < connections {
        heard.push(Vec::new());
        *mine = Some(heard.len() - 1);
    }
    if let Some(all) = mine.and_then(|at| heard.get_mut(at)) {
        all.extend_from_slice(&piece[..piece.len().min(bytes.saturating_sub(all.len()))]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_harm_changes_one_place_once() {
        let text: Vec<u8> = (0..100).collect();
        for harm in Harm::ALL {
            let mut s = State { wound: Some(Wound { harm, at: 150, size: 10 }), ..State::default() };
            assert_eq!(s.pass(&text), (text.clone(), false), "{harm:?}");
            let (got, ends) = s.pass(&text);
            assert_eq!(&got[..50], &text[..50]);
            match harm {
                Harm::Flip => assert_eq!((got.len(), got[50], &got[51..]), (100, 50 ^ 4, &text[51..])),
                Harm::Drop => assert_eq!(&got[50..], &text[60..]),
                Harm::Repeat => assert_eq!(&got[50..], &[&text[50..60], &text[50..]].concat()),
                Harm::Exchange => {
                    assert_eq!(&got[50..], &[&text[55..60], &text[50..55], &text[60..]].concat());
                }
                Harm::Cut => assert_eq!(got.len(), 50),
            }
            assert_eq!((ends, s.struck.is_some()), (harm == Harm::Cut, true));
            assert_eq!(s.pass(&text), (text.clone(), false), "once");
        }
    }
}
