//! The one TCP option std, socket2 and rustix have no call for.

use std::io;
use std::net::TcpStream;
use std::os::fd::AsRawFd;

/// Lets at most `bytes` wait unsent in the kernel (`TCP_NOTSENT_LOWAT`, tcp(7)): the send buffer may still grow to
/// what is in flight, but what a VM sends last never queues behind seconds of older bytes.
pub fn set_notsent_lowat(stream: &TcpStream, bytes: u32) -> io::Result<()> {
    // SAFETY: the fd is open for the call's duration, and the option's value is a u32 that the kernel only reads.
    let rc = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_NOTSENT_LOWAT,
            (&raw const bytes).cast(),
            size_of::<u32>() as libc::socklen_t,
        )
    };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
