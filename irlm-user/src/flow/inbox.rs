//! A thread that waits for its sockets must also hear other threads: an inbox is a queue with an eventfd(2), so one
//! poll(2) covers both.
//!
//! Bound: an inbox has no cap of its own, because a full one could only be answered by blocking a thread that serves
//! others; each kind of message is bounded where it is made (wakes by the waiting list, needs by their frame cap and
//! by the TCP window, words by the handover).

use super::lock;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::Timespec;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Mutex;
use std::time::Duration;

/// A pollable queue.
#[derive(Debug)]
pub struct Inbox<T> {
    queue: Mutex<VecDeque<T>>,
    bell: OwnedFd,
}

impl<T> Inbox<T> {
    /// An empty inbox.
    pub fn new() -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self { queue: Mutex::new(VecDeque::new()), bell })
    }
    /// Leaves a message.
    pub fn post(&self, message: T) {
        lock(&self.queue).push_back(message);
        // The counter cannot overflow before 2^64 messages; any other failure would only delay to the next poll.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }
    /// Takes the oldest message.
    pub fn take(&self) -> Option<T> {
        lock(&self.queue).pop_front()
    }
    /// Silences the bell; call before draining with [`Self::take`].
    pub fn hush(&self) {
        let mut n = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut n);
    }
    /// Whether anything is there.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        lock(&self.queue).is_empty()
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.bell.as_fd()
    }
}

/// Waits until one of `fds` can be read (or is closed or broken), at most `timeout`. Returns which.
pub fn wait_readable<const N: usize>(
    fds: [Option<BorrowedFd<'_>>; N],
    timeout: Duration,
) -> io::Result<[bool; N]> {
    let mut set: Vec<PollFd<'_>> =
        fds.iter().flatten().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    let t = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: timeout.subsec_nanos().into() };
    match poll(&mut set, Some(&t)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let mut it = set.iter();
    Ok(fds.map(|fd| fd.is_some() && it.next().is_some_and(|p| !p.revents().is_empty())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn a_post_wakes_a_poll_and_nothing_is_lost() {
        let inbox = Arc::new(Inbox::new().unwrap());
        assert_eq!(
            wait_readable([Some(inbox.as_fd()), None], Duration::from_millis(1)).unwrap(),
            [false, false]
        );
        let posts = inbox.clone();
        let t = std::thread::spawn(move || (0..1000).for_each(|i| posts.post(i)));
        let mut got = vec![];
        while got.len() < 1000 {
            assert!(wait_readable([Some(inbox.as_fd())], Duration::from_secs(5)).unwrap()[0]);
            inbox.hush();
            while let Some(i) = inbox.take() {
                got.push(i);
            }
        }
        t.join().unwrap();
        assert_eq!(got, (0..1000).collect::<Vec<_>>());
    }
}
