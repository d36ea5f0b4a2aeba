//! Has the memory of a QEMU that waits be there before its VM comes, while the group is prepared: 262,144 page faults for each
//! GiB, with a page to be found and cleared at most of them, are then not in the way of the stream
//! (docs/decisions/0016-memory-before-the-stream.md).

use crate::flow::front::monitor;
use crate::flow::{Front, MoveError};
use crate::host::sched::memory_available;
use crate::net::qmp::memory::Backend;
use std::time::Duration;

/// Bytes a second that one thread makes, at the very least.
const RATE: u64 = 256 << 20;
/// QEMU answers nobody while it makes its memory, so it is only asked to if that takes no longer than this.
const MOST: Duration = Duration::from_secs(20);
/// Most threads.
const THREADS: u32 = 16;
/// Bytes that the host must have left.
const SPARE: u64 = 1 << 30;

/// What was made, bytes.
pub fn populate(front: &Front, setup: Duration) -> Result<u64, MoveError> {
    let Front::Qmp(path) = front else { return Ok(0) };
    let mut qmp = monitor(path, setup, None)?;
    // Another one's memory is its own business, and so is its time.
    let state = qmp.query_status()?;
    if state.status != "inmigrate" {
        let why = format!("{front}: it is {}, and does not wait for a VM", state.status);
        return Err(MoveError::Refused(why));
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = u32::try_from(processors / 2).unwrap_or(THREADS).clamp(1, THREADS);
    let mut made = 0;
    for b in qmp.memory_backends()? {
        let free = memory_available().map_err(MoveError::at("/proc/meminfo"))?;
        let Some(takes) = takes(&b, free, threads) else { continue };
        qmp.set_timeout(setup + takes);
        qmp.populate(&b.id, threads)?;
        made += b.size;
    }
    Ok(made)
}

/// How long it takes at most; none if it is to be left alone. Only a memfd is made: a hole in it is filled as soon as QEMU's loader
/// reads it, which it does before it clears a page, so in the end nothing is taken that would not be. Memory of QEMU's own
/// keeps its holes, and a file may be a disk's.
fn takes(b: &Backend, free: u64, threads: u32) -> Option<Duration> {
    let takes = Duration::from_secs(b.size / RATE / u64::from(threads));
    let fits = b.size.checked_add(SPARE).is_some_and(|n| n <= free);
    (b.kind == "memory-backend-memfd" && b.share && !b.prealloc && takes <= MOST && fits).then_some(takes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::qmp::tests::serve;

    #[test]
    fn the_memory_of_a_qemu_that_does_not_wait_is_left_alone() {
        let (_dir, path, fake) = serve(|c, _| {
            assert_eq!(c, "query-status", "nothing else is asked of it");
            Some(r#"{"return":{"running":false,"status":"paused"},"id":$ID}"#.to_owned())
        });
        let e = populate(&Front::Qmp(path), Duration::from_secs(5)).unwrap_err();
        assert!(e.to_string().contains("paused"), "{e}");
        fake.join().unwrap();
    }

    #[test]
    fn only_memory_that_would_be_taken_anyway_is_made_and_only_if_there_is_enough_of_it() {
        let kind = "memory-backend-memfd".to_owned();
        let m = Backend { id: "m0".into(), kind, size: 4 << 30, share: true, prealloc: false };
        assert_eq!(takes(&m, 64 << 30, 2), Some(Duration::from_secs(8)));
        assert_eq!(takes(&m, 5 << 30, 2), Some(Duration::from_secs(8)));
        for (what, b) in [
            ("is there already", Backend { prealloc: true, ..m.clone() }),
            ("is QEMU's own", Backend { share: false, ..m.clone() }),
            ("may be a disk's", Backend { kind: "memory-backend-file".into(), ..m.clone() }),
            ("would keep QEMU from answering for long", Backend { size: 11 << 30, ..m.clone() }),
            ("is more than there is", Backend { size: u64::MAX, ..m.clone() }),
        ] {
            assert_eq!(takes(&b, u64::MAX, 2), None, "{what}");
        }
        assert_eq!(takes(&m, (5 << 30) - 1, 2), None, "the host would be short of memory");
    }
}
