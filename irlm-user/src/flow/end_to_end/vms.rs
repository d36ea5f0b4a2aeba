//! The VM that leaves, whose guest writes to one page meanwhile, and the VMM that waits for it, on false control sockets.

use super::{LOADED, PAGES, WRITTEN, content, lock};
use crate::core::units::{PAGE_SIZE, PageBytes};
use crate::flow::source::kvm::guest::Control;
use crate::net::vmm::fds::tests::sealed;
use crate::net::vmm::line::FdLines;
use crate::net::vmm::words::{Answer, MemoryWords, Request, SlotWords};
use crate::net::vmm::{DirtyMode, State, Status, VmmError};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

fn memory() -> File {
    sealed(u64::from(PAGES) * PAGE_SIZE as u64)
}

fn page_of(file: &File, page: u32) -> PageBytes {
    let mut bytes = [0; PAGE_SIZE];
    file.read_exact_at(&mut bytes, u64::from(page) * PAGE_SIZE as u64).unwrap();
    bytes
}

/// The VM at its source.
pub(super) struct Leaving(Arc<Mutex<Source>>);

#[derive(Debug)]
struct Source {
    file: File,
    running: bool,
    given_up: bool,
    harvests: u32,
}

impl Leaving {
    pub(super) fn new() -> Self {
        let source = Source { file: memory(), running: true, given_up: false, harvests: 0 };
        Self(Arc::new(Mutex::new(source)))
    }
    pub(super) fn fill(&self, page: u32, bytes: &PageBytes) {
        let at = u64::from(page) * PAGE_SIZE as u64;
        lock(&self.0).file.write_all_at(bytes, at).unwrap();
    }
    pub(super) fn memory(&self) -> File {
        lock(&self.0).file.try_clone().unwrap()
    }
    pub(super) fn page(&self, page: u32) -> PageBytes {
        page_of(&lock(&self.0).file, page)
    }
    pub(super) fn runs(&self) -> bool {
        lock(&self.0).running
    }
    pub(super) fn control(&self) -> Box<dyn Control> {
        Box::new(Fake(self.0.clone()))
    }
}

#[derive(Debug)]
struct Fake(Arc<Mutex<Source>>);

impl Control for Fake {
    fn state(&mut self) -> Result<State, VmmError> {
        let s = lock(&self.0);
        Ok(match (s.running, s.given_up) {
            (true, _) => State::Running,
            (false, true) => State::GivenUp,
            (false, false) => State::Paused,
        })
    }
    /// The guest writes once, when its page has left already.
    fn harvest(&mut self, bits: &mut Vec<Vec<u64>>) -> Result<u64, VmmError> {
        let mut s = lock(&self.0);
        s.harvests += 1;
        if s.harvests != 3 {
            return Ok(0);
        }
        s.file.write_all_at(&content(9999), u64::from(WRITTEN) * PAGE_SIZE as u64).unwrap();
        bits[0][WRITTEN as usize / 64] |= 1 << (WRITTEN % 64);
        Ok(1)
    }
    fn stop_log(&mut self) -> Result<(), VmmError> {
        Ok(())
    }
    fn pause_for_move(&mut self) -> Result<(), VmmError> {
        lock(&self.0).running = false;
        Ok(())
    }
    fn release(&mut self) -> Result<(), VmmError> {
        let mut s = lock(&self.0);
        assert!(!s.given_up, "resumed although it was given up");
        s.running = true;
        Ok(())
    }
    fn give_up(&mut self) -> Result<(), VmmError> {
        lock(&self.0).given_up = true;
        Ok(())
    }
    fn take_back(&mut self) -> Result<(), VmmError> {
        lock(&self.0).given_up = false;
        Ok(())
    }
    fn save(&mut self) -> Result<Vec<u8>, VmmError> {
        Ok(b"the state".to_vec())
    }
}

/// The VMM at its target.
pub(super) struct Waiting {
    is: Arc<Mutex<(State, File)>>,
    dir: tempfile::TempDir,
}

impl Waiting {
    /// `loads`: what it makes of a page when it is given the VM's state.
    pub(super) fn start(loads: Option<PageBytes>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("v")).unwrap();
        let is = Arc::new(Mutex::new((State::Incoming, memory())));
        let served = is.clone();
        std::thread::spawn(move || {
            while let Ok((client, _)) = listener.accept() {
                let served = served.clone();
                std::thread::spawn(move || {
                    let mut lines = FdLines::new(client);
                    while let Ok(Some((line, _))) = lines.read(None) {
                        let request: Request = serde_json::from_slice(&line).unwrap();
                        let (value, fd) = answer(&mut lock(&served), &request);
                        if let (Request::LoadState, Some(page)) = (&request, &loads) {
                            let at = u64::from(LOADED) * PAGE_SIZE as u64;
                            lock(&served).1.write_all_at(page, at).unwrap();
                        }
                        let fds: Vec<_> = fd.iter().map(|f| f.as_fd()).collect();
                        let text = serde_json::to_string(&Answer::Ok(value)).unwrap();
                        if lines.write(text, &fds, Instant::now() + Duration::from_secs(5)).is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { is, dir }
    }
    pub(super) fn dir(&self) -> &Path {
        self.dir.path()
    }
    pub(super) fn socket(&self) -> PathBuf {
        self.dir.path().join("v")
    }
    pub(super) fn state(&self) -> State {
        lock(&self.is).0
    }
    pub(super) fn page(&self, page: u32) -> PageBytes {
        page_of(&lock(&self.is).1, page)
    }
}

fn answer((state, file): &mut (State, File), request: &Request) -> (serde_json::Value, Option<File>) {
    let bytes = u64::from(PAGES) * PAGE_SIZE as u64;
    match request {
        Request::Status => {
            let status = Status {
                state: *state,
                why: None,
                vcpus: 1,
                ram_bytes: bytes,
                dirty: DirtyMode::Bitmap,
                dirty_on: false,
                ring_full: 0,
                ring_lost: 0,
                uffd: false,
                balloon: None,
                pid: 1,
                version: String::new(),
            };
            (serde_json::to_value(status).unwrap(), None)
        }
        Request::Memory => {
            let slot = SlotWords { guest_phys: 0, bytes, page_bytes: 4096, name: "slot0".into() };
            let words = serde_json::to_value(MemoryWords { slots: vec![slot] }).unwrap();
            (words, Some(file.try_clone().unwrap()))
        }
        other => {
            match other {
                Request::Resume => *state = State::Running,
                Request::Pause | Request::LoadState => *state = State::Paused,
                _ => {}
            }
            (serde_json::json!({}), None)
        }
    }
}
