//! The sockets of the target rack's multicast: one that hears the group's address, and one of this host's own, which
//! sends everything and hears what is said to this host alone.
//!
//! Datagrams never leave the rack's network: their time to live is 1, whatever routes there are.

use rustix::net::{RecvFlags, recvfrom, sockopt};
use socket2::{Domain, Protocol, Socket, Type};
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

/// Datagrams that wait while one is hashed and stored: 60 ms of a 1 Gbit/s link. The kernel may give less.
pub const RECEIVE_BUFFER: usize = 8 << 20;
/// Bytes, as the kernel counts them, that wait to be sent: less than a port's queue, so that none is lost on this host.
const SEND_BUFFER: usize = 128 << 10;
/// Longest wait for the port to take a datagram.
const SEND_WAIT: Duration = Duration::from_millis(500);

/// Both sockets.
#[derive(Debug)]
pub struct Sockets {
    heard: UdpSocket,
    own: UdpSocket,
    group: SocketAddr,
}

/// Through which socket a datagram came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Way {
    /// The group's address.
    Group,
    /// This host's.
    Own,
}

impl Sockets {
    /// Joins `group` on the interface that has the address `local`. With `looped` this host hears itself, and others
    /// that stand for hosts on the same machine (tests).
    pub fn open(local: IpAddr, group: SocketAddr, looped: bool) -> io::Result<Self> {
        let (heard, own) = (socket(group)?, socket(group)?);
        // Several groups may move at once by the same address; each refuses what is another's.
        heard.set_reuse_address(true)?;
        let group = match (group, local) {
            (SocketAddr::V4(g), IpAddr::V4(ip)) => {
                heard.bind(&SocketAddr::V4(g).into())?;
                heard.join_multicast_v4(g.ip(), &ip)?;
                heard.set_multicast_all_v4(false)?;
                own.set_multicast_if_v4(&ip)?;
                own.set_multicast_ttl_v4(1)?;
                own.set_multicast_loop_v4(looped)?;
                SocketAddr::V4(g)
            }
            (SocketAddr::V6(g), IpAddr::V6(ip)) => {
                let index = interface_of(ip)?;
                let g = SocketAddrV6::new(*g.ip(), g.port(), 0, index);
                heard.set_only_v6(true)?;
                heard.bind(&SocketAddr::V6(g).into())?;
                heard.join_multicast_v6(g.ip(), index)?;
                own.set_multicast_if_v6(index)?;
                own.set_multicast_hops_v6(1)?;
                own.set_multicast_loop_v6(looped)?;
                SocketAddr::V6(g)
            }
            _ => {
                let what = "the multicast group's address and the host's data address are not of one family";
                return Err(io::Error::new(ErrorKind::InvalidInput, what));
            }
        };
        own.bind(&SocketAddr::new(local, 0).into())?;
        own.set_send_buffer_size(SEND_BUFFER)?;
        for s in [&heard, &own] {
            // With CAP_NET_ADMIN beyond the machine's limit for others.
            if sockopt::set_socket_recv_buffer_size_force(s, RECEIVE_BUFFER).is_err() {
                s.set_recv_buffer_size(RECEIVE_BUFFER)?;
            }
        }
        own.set_write_timeout(Some(SEND_WAIT))?;
        Ok(Self { heard: heard.into(), own: own.into(), group })
    }

    /// Where this host's datagrams come from, and where it hears what is for it alone.
    pub fn local(&self) -> io::Result<SocketAddr> {
        self.own.local_addr()
    }

    /// The group's address, as datagrams are sent to it.
    #[must_use]
    pub fn group(&self) -> SocketAddr {
        self.group
    }

    /// Sends to the group, or to one host. Waits while the port is busy.
    pub fn send(&self, bytes: &[u8], to: Option<SocketAddr>) -> io::Result<()> {
        self.own.send_to(bytes, to.unwrap_or(self.group)).map(drop)
    }

    /// Takes a datagram, if one is there: its length and where it came from.
    pub fn take(&self, way: Way, buf: &mut [u8]) -> io::Result<Option<(usize, SocketAddr)>> {
        match recvfrom(self.by(way), buf, RecvFlags::DONTWAIT) {
            Ok((n, _, from)) => {
                let from = from.and_then(|a| SocketAddr::try_from(a).ok());
                Ok(Some((n, from.ok_or(ErrorKind::InvalidData)?)))
            }
            Err(e) if matches!(io::Error::from(e).kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                Ok(None)
            }
            Err(e) => Err(e.into()),
        }
    }

    /// To be polled.
    #[must_use]
    pub fn by(&self, way: Way) -> BorrowedFd<'_> {
        match way {
            Way::Group => self.heard.as_fd(),
            Way::Own => self.own.as_fd(),
        }
    }
}

fn socket(like: SocketAddr) -> io::Result<Socket> {
    Socket::new(Domain::for_address(like), Type::DGRAM, Some(Protocol::UDP))
}

/// The number of the interface that has this address; IPv6 joins by number only.
fn interface_of(ip: Ipv6Addr) -> io::Result<u32> {
    // Address in hexadecimal, interface number in hexadecimal, … (proc(5)); of this thread's network.
    let table = std::fs::read_to_string("/proc/thread-self/net/if_inet6")?;
    let hex: String = ip.octets().iter().map(|b| format!("{b:02x}")).collect();
    table
        .lines()
        .find_map(|l| {
            let mut fields = l.split_whitespace();
            let here = fields.next()? == hex;
            u32::from_str_radix(fields.next()?, 16).ok().filter(|_| here)
        })
        .ok_or_else(|| io::Error::new(ErrorKind::AddrNotAvailable, format!("no interface has {ip}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Instant;

    fn wait(s: &Sockets, way: Way) -> Option<(Vec<u8>, SocketAddr)> {
        let (mut buf, start) = ([0; 2000], Instant::now());
        while start.elapsed() < Duration::from_millis(500) {
            if let Some((n, from)) = s.take(way, &mut buf).unwrap() {
                return Some((buf[..n].to_vec(), from));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }

    /// What is sent to the group is heard by all of it, what is sent to one host by that one only.
    fn talk(local: &str, group: &str) {
        let (local, group) = (local.parse().unwrap(), group.parse().unwrap());
        let open = || Sockets::open(local, group, true);
        let (a, b) = match (open(), open()) {
            (Ok(a), Ok(b)) => (a, b),
            (Err(e), _) | (_, Err(e)) => {
                println!("skipped: no multicast on {local}: {e}");
                return;
            }
        };
        if let Err(e) = a.send(b"all", None) {
            println!("skipped: {group} cannot be reached from {local}: {e}");
            return;
        }
        let (bytes, from) = wait(&b, Way::Group).expect("heard");
        assert_eq!((&bytes[..], from), (&b"all"[..], a.local().unwrap()));
        b.send(b"you", Some(from)).unwrap();
        assert_eq!(wait(&a, Way::Own).map(|x| x.0), Some(b"you".to_vec()));
        assert!(wait(&b, Way::Own).is_none());
    }

    #[test]
    fn a_group_is_heard_by_all_and_a_host_by_itself() {
        talk("127.0.0.1", "239.255.77.1:7721");
        talk("::1", "[ff01::7721]:7721");
    }

    #[test]
    fn families_are_not_mixed_and_addresses_must_be_the_hosts() {
        let open =
            |local: &str, group: &str| Sockets::open(local.parse().unwrap(), group.parse().unwrap(), true);
        assert_eq!(open("127.0.0.1", "[ff02::1]:7722").unwrap_err().kind(), ErrorKind::InvalidInput);
        assert!(open("203.0.113.7", "239.255.77.1:7722").is_err());
        assert!(open("2001:db8::7", "[ff02::1]:7722").is_err());
    }
}
