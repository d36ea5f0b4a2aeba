//! Somebody between two agents who reads frames, and does to those of the first VM connection what a test says.

use super::PAGES;
use crate::core::seal::{SEAL_LEN, Sealer};
use crate::core::wire::frame::{HEADER_LEN, Header, Kind};
use crate::core::wire::keys;
use crate::core::wire::messages::{Hello, Purpose, Word};
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// What is done to the `Pages` frames of the VM connection, counted from 0.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Harm {
    None,
    /// A bit of this byte of its body is flipped.
    Flip {
        frame: usize,
        at: usize,
    },
    /// It never comes.
    Lose {
        frame: usize,
    },
    /// It comes once more, after all others.
    Repeat {
        frame: usize,
    },
    /// The last one, with the newest versions of pages, comes before all others.
    LastFirst,
    /// Its header says that more of it comes than does.
    Longer {
        frame: usize,
    },
    /// The target says that it has loaded all, and nothing of its pages.
    Unaccounted,
}

pub(super) struct Middle {
    pub(super) addr: SocketAddr,
    thread: Option<JoinHandle<()>>,
    open: Arc<Mutex<Vec<TcpStream>>>,
}

impl Middle {
    /// Passes on to `to`. With the group's secret, what is passed on is sealed anew.
    pub(super) fn start(to: SocketAddr, harm: Harm, secret: Option<[u8; 32]>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        let open = Arc::new(Mutex::new(Vec::new()));
        let all = open.clone();
        let thread = std::thread::spawn(move || {
            let mut passing = Vec::new();
            for caller in listener.incoming() {
                let (Ok(caller), Ok(taker)) = (caller, TcpStream::connect(to)) else { break };
                // Whoever says nothing ends it.
                if caller.peek(&mut [0]).is_ok_and(|n| n == 0) {
                    break;
                }
                let both = [caller.try_clone().unwrap(), taker.try_clone().unwrap()];
                all.lock().unwrap_or_else(PoisonError::into_inner).extend(both);
                passing.push(std::thread::spawn(move || pass(caller, taker, harm, secret)));
            }
            passing.into_iter().for_each(|p| p.join().unwrap());
        });
        Self { addr, thread: Some(thread), open }
    }

    pub(super) fn end(mut self) {
        let last = TcpStream::connect(self.addr).unwrap();
        last.shutdown(Shutdown::Both).unwrap();
        for conn in &*self.open.lock().unwrap_or_else(PoisonError::into_inner) {
            let _ = conn.shutdown(Shutdown::Both);
        }
        self.thread.take().unwrap().join().unwrap();
    }
}

/// A frame as it came, without its seal.
#[derive(Clone)]
struct Frame {
    header: [u8; HEADER_LEN],
    meta: Vec<u8>,
    body: Vec<u8>,
    seal: Option<[u8; SEAL_LEN]>,
}

impl Frame {
    fn read(from: &mut TcpStream, sealed: bool) -> Option<Self> {
        let mut header = [0; HEADER_LEN];
        from.read_exact(&mut header).ok()?;
        let h = Header::decode(&header).ok()?;
        let (mut meta, mut body) = (vec![0; h.meta_len as usize], vec![0; h.body_len as usize]);
        from.read_exact(&mut meta).ok()?;
        from.read_exact(&mut body).ok()?;
        let mut seal = [0; SEAL_LEN];
        if sealed {
            from.read_exact(&mut seal).ok()?;
        }
        Some(Self { header, meta, body, seal: sealed.then_some(seal) })
    }

    fn kind(&self) -> Option<Kind> {
        Kind::from_tag(self.header[0]).ok()
    }

    /// Passes it on, with a seal that fits if somebody has the key.
    fn write(&self, to: &mut TcpStream, sealer: &mut Option<Sealer>) -> bool {
        let seal = match sealer {
            Some(s) => s.seal(&self.header, &self.meta, [&self.body[..]]).to_vec(),
            None => self.seal.map(|s| s.to_vec()).unwrap_or_default(),
        };
        [&self.header[..], &self.meta, &self.body, &seal].iter().all(|part| to.write_all(part).is_ok())
    }
}

fn pass(mut caller: TcpStream, mut taker: TcpStream, harm: Harm, secret: Option<[u8; 32]>) {
    let Some(hello) = Frame::read(&mut caller, false) else { return };
    let is_vm = Hello::decode(&hello.meta).is_ok_and(|h| matches!(h.purpose, Purpose::Vm { .. }));
    if !hello.write(&mut taker, &mut None) {
        return;
    }
    let Some(mut ok) = Frame::read(&mut taker, false) else { return };
    let mut sealers = (None, None);
    if ok.kind() == Some(Kind::HelloOk) {
        let mut seal = [0; SEAL_LEN];
        if taker.read_exact(&mut seal).is_err() {
            return;
        }
        ok.seal = Some(seal);
        if let Some(secret) = secret {
            let (own, other) = keys::seals(&secret, &hello.meta, &ok.meta);
            sealers = (Some(Sealer::new(own)), Some(Sealer::new(other)));
        }
    }
    if !ok.write(&mut caller, &mut sealers.1) {
        return;
    }
    let harm = if is_vm { harm } else { Harm::None };
    let (mut from_taker, mut to_caller) = (taker.try_clone().unwrap(), caller.try_clone().unwrap());
    let back = std::thread::spawn(move || {
        let mut sealer = sealers.1;
        while let Some(mut frame) = Frame::read(&mut from_taker, true) {
            let says = (frame.kind() == Some(Kind::Word)).then(|| Word::decode(&frame.meta));
            if let (Harm::Unaccounted, Some(Ok(Word::Loaded(_)))) = (harm, says) {
                frame.meta = Word::Loaded(None).encode();
                frame.header = Header::new(Kind::Word, frame.meta.len(), 0).encode();
            }
            if !frame.write(&mut to_caller, &mut sealer) {
                break;
            }
        }
        let _ = to_caller.shutdown(Shutdown::Both);
    });
    forward(&mut caller, &mut taker, harm, sealers.0);
    let _ = taker.shutdown(Shutdown::Write);
    back.join().unwrap();
}

fn forward(caller: &mut TcpStream, taker: &mut TcpStream, harm: Harm, mut sealer: Option<Sealer>) {
    let (mut n, mut seen): (usize, Vec<Frame>) = (0, Vec::new());
    while let Some(mut frame) = Frame::read(caller, true) {
        if frame.kind() == Some(Kind::RamEnd) {
            match harm {
                Harm::Repeat { frame } => {
                    let again = seen.get(frame).is_some_and(|f| f.write(taker, &mut sealer));
                    assert!(again, "so many frames did not come");
                }
                Harm::LastFirst => {
                    seen.rotate_right(1);
                    seen.iter().all(|f| f.write(taker, &mut sealer));
                }
                _ => {}
            }
        }
        if frame.kind() == Some(Kind::Pages) {
            let this = n;
            n += 1;
            match harm {
                Harm::Flip { frame: at, at: byte } if this == at => {
                    let byte = byte % frame.body.len();
                    frame.body[byte] ^= 0x10;
                }
                Harm::Lose { frame: at } if this == at => continue,
                Harm::Longer { frame: at } if this == at => frame.header[9] ^= 0x10,
                Harm::Repeat { .. } => seen.push(frame.clone()),
                Harm::LastFirst => {
                    seen.push(frame);
                    continue;
                }
                _ => {}
            }
        }
        if !frame.write(taker, &mut sealer) {
            return;
        }
    }
}

// Frames of 64 contents: one more for what is written meanwhile.
const _: () = assert!(PAGES >= 4 * 64);
