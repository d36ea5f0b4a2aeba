//! The socket options std, socket2 and rustix have no call for.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::time::Duration;

/// Lets at most `bytes` wait unsent in the kernel (`TCP_NOTSENT_LOWAT`, tcp(7)): the send buffer may still grow to
/// what is in flight, but what a VM sends last never queues behind seconds of older bytes.
pub fn set_notsent_lowat(stream: &impl AsFd, bytes: u32) -> io::Result<()> {
    // SAFETY: the fd is open for the call's duration, and the option's value is a u32 that the kernel only reads.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Wakes a reader only when `bytes` have come, the peer has closed, or the receive buffer is as good as full
/// (`SO_RCVLOWAT`, socket(7); Linux makes the buffer large enough). At most `i32::MAX`.
pub fn set_receive_lowat(stream: &impl AsFd, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the fd is open for the call's duration, and the option's value is an int that the kernel only reads.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Most that TCP sends, bytes of payload a second (`SO_MAX_PACING_RATE`, socket(7)); `u64::MAX`: no limit. TCP paces by
/// itself where the port has no fq qdisc.
pub fn set_max_pacing_rate(stream: &impl AsFd, rate: u64) -> io::Result<()> {
    // SAFETY: the fd is open for the call's duration, and the option's value is a u64 (since Linux 4.20) that the kernel
    // only reads.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MAX_PACING_RATE,
            (&raw const rate).cast(),
            size_of::<u64>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Bytes written to the socket that its peer has not acknowledged (`SIOCOUTQ`, tcp(7)).
pub fn unsent_or_unacknowledged(stream: &impl AsFd) -> io::Result<usize> {
    let mut n: libc::c_int = 0;
    // SAFETY: the fd is open for the call's duration, and SIOCOUTQ (the same number as TIOCOUTQ) writes one int, which
    // `n` is.
    let rc = unsafe { libc::ioctl(stream.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut n) };
    if rc == 0 { Ok(usize::try_from(n).unwrap_or(0)) } else { Err(io::Error::last_os_error()) }
}

/// What TCP has seen of the way to its peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Way {
    /// The round trip, smoothed.
    pub round_trip: Duration,
    /// Bytes a second that were acknowledged of late, 0 if none were. While there is little to send that counts only where
    /// it was faster than before, so it is what the link gives and not what it was given.
    pub rate: u64,
}

/// The way to the peer as TCP sees it (`TCP_INFO`, tcp(7); `tcpi_delivery_rate` since Linux 4.9).
pub fn way(stream: &impl AsFd) -> io::Result<Way> {
    // SAFETY: a plain C struct of integers, for which all zeros is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the fd is open for the call's duration, and the kernel writes at most `len` bytes, which `info` has.
    let rc = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(Way { round_trip: Duration::from_micros(info.tcpi_rtt.into()), rate: info.tcpi_delivery_rate })
}
