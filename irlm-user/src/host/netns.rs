//! A network of one's own for a moment: what is tried in there is seen by nobody and gone with the thread.

use std::io;

/// Runs `work` on a thread in a fresh network namespace, whose only interface is a loopback `lo` that is down. Needs
/// CAP_SYS_ADMIN.
pub fn in_a_fresh_network<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|s| {
        let worker = std::thread::Builder::new().name("irlm-rehearsal".into()).spawn_scoped(s, || {
            // SAFETY: CLONE_NEWNET changes only which network this thread's later sockets belong to; no memory, file
            // table or other state that safe code relies on is unshared, and the thread ends here.
            match unsafe { libc::unshare(libc::CLONE_NEWNET) } {
                0 => Ok(work()),
                _ => Err(io::Error::last_os_error()),
            }
        })?;
        worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
