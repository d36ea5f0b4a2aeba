//! The control socket of `irlm vmm`, both ends: requests as the VMM reads them, and answers as an agent takes them, over
//! a real socket. No bytes make a reader panic or wait for more once the other end has closed.

use irlm_user::core::vm_state::{Gather, wrap};
use irlm_user::net::vmm::Vmm;
use irlm_user::net::vmm::line::FdLines;
use irlm_user::net::vmm::words::{Answer, HarvestWords, MemoryWords, Request, Status};
use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// What fits the socket's buffer, so that nobody has to read meanwhile.
pub(super) const FITS: usize = 64 << 10;

/// A socket from which `data` comes and then nothing, and its other end.
pub(super) fn said(data: &[u8]) -> (UnixStream, UnixStream) {
    let (mut there, here) = UnixStream::pair().expect("a pair of sockets");
    there.write_all(&data[..data.len().min(FITS)]).expect("it fits");
    there.shutdown(Shutdown::Write).expect("it is open");
    (here, there)
}

fn same<T>(line: &[u8])
where
    T: serde::Serialize + serde::de::DeserializeOwned + PartialEq + std::fmt::Debug,
{
    let Ok(word) = serde_json::from_slice::<T>(line) else { return };
    let again = serde_json::to_string(&word).expect("it is plain words");
    assert_eq!(serde_json::from_str::<T>(&again).ok().as_ref(), Some(&word), "{again}");
}

pub(crate) fn target(data: &[u8]) {
    let soon = || Instant::now() + Duration::from_secs(5);
    let (here, _there) = said(data);
    let mut lines = FdLines::new(here);
    while let Ok(Some((line, fds))) = lines.read(Some(soon())) {
        assert!(fds.is_empty());
        same::<Request>(&line);
        same::<Answer<Status>>(&line);
        same::<Answer<MemoryWords>>(&line);
        same::<Answer<HarvestWords>>(&line);
    }
    let (here, _there) = said(data);
    if let Ok(mut vmm) = Vmm::over(here, "fuzz".into(), Duration::from_secs(5)) {
        let _ = vmm.memory();
        let _ = vmm.dirty_start();
        let _ = vmm.dirty_harvest(&mut Vec::new());
        let _ = vmm.save_state();
        let _ = vmm.userfault().map(drop);
        let _ = vmm.pause();
    }
    state(data);
}

/// The saved state behind a VM's pages, in pieces.
fn state(data: &[u8]) {
    let piece = 1 + data.first().map_or(0, |b| usize::from(*b));
    for bytes in [data.to_vec(), wrap(data)] {
        let mut gather = Gather::default();
        for part in bytes.chunks(piece) {
            match gather.take(part) {
                Ok(Some(whole)) => assert_eq!(wrap(whole), bytes[..16 + whole.len()]),
                Ok(None) => {}
                Err(e) => {
                    assert!(!e.to_string().contains('\n'));
                    break;
                }
            }
        }
    }
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let words = ["status", "memory", "pause", "give-up", "dirty-harvest", "load-state", "userfault-end"];
    let requests: String = words.iter().map(|w| format!("{{\"command\":\"{w}\"}}\n")).collect();
    let status = "{\"ok\":{\"state\":\"running\",\"why\":null,\"vcpus\":2,\"ram_bytes\":35651584,\"dirty\":\"ring\",\
                  \"dirty_on\":false,\"ring_full\":0,\"ring_lost\":0,\"uffd\":false,\"pid\":7,\"version\":\"0.1.0\"}}\n";
    let memory = "{\"ok\":{\"slots\":[{\"guest_phys\":0,\"bytes\":35651584,\"page_bytes\":4096,\"name\":\"slot0\"}]}}\n";
    let rest = "{\"ok\":{}}\n{\"ok\":{\"pages\":3}}\n{\"ok\":{\"bytes\":9}}\n{\"error\":\"why\"}\n";
    let user = "{\"ok\":{\"mode\":\"minor\",\"bases\":[139637976727552]}}\n";
    let balloon = "{\"command\":\"balloon\",\"bytes\":4096}\n";
    let talk = format!("{status}{memory}{rest}{user}{rest}");
    [requests, talk, balloon.to_owned(), status.to_owned()]
        .into_iter()
        .map(String::into_bytes)
        .chain([wrap(&[1, 2, 3])])
        .collect()
}
