//! Keeps a group's connections over the core link below a rate, where no class tree does: TCP's own pacing
//! (SO_MAX_PACING_RATE), the rate divided among the connections that have something to send.
//!
//! Coarser than a class tree: retransmissions are paced as new data is, control is not, and a connection that wakes up
//! gets its part only at the next look.

use super::lock;
use crate::host::sockopt;
use std::net::TcpStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Thousandths of the rate on the wire that are payload: 1448 of 1514 bytes a packet, and 1 % for what is not paced.
const PAYLOAD_PERMILLE: u64 = 946;
/// A connection that had nothing to send for so long gives its part to the others.
const IDLE: Duration = Duration::from_millis(300);
/// Hundredths that all idle connections have between them, so that one that wakes up is not at a stand.
const IDLE_PERCENT: u64 = 2;

/// The connections of one group at this host.
#[derive(Debug, Default)]
pub struct Pacer(Mutex<Inner>);

#[derive(Debug, Default)]
struct Inner {
    /// Bytes a second on the wire.
    rate: Option<u64>,
    next: u64,
    sockets: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    id: u64,
    stream: TcpStream,
    busy: Instant,
    /// What the kernel was told, bytes/s.
    pace: Option<u64>,
}

/// A connection's membership; ends when dropped.
#[derive(Debug)]
pub struct Paced {
    pacer: Arc<Pacer>,
    id: u64,
}

impl Drop for Paced {
    fn drop(&mut self) {
        let mut inner = lock(&self.pacer.0);
        inner.sockets.retain(|s| s.id != self.id);
        inner.share_out();
    }
}

impl Pacer {
    /// Puts `stream` under the rate, for as long as the guard lives.
    pub fn join(self: &Arc<Self>, stream: &TcpStream) -> Option<Paced> {
        let stream = stream.try_clone().inspect_err(|e| tracing::debug!("not paced: {e}")).ok()?;
        let mut inner = lock(&self.0);
        inner.next += 1;
        let id = inner.next;
        inner.sockets.push(Slot { id, stream, busy: Instant::now(), pace: None });
        inner.share_out();
        Some(Paced { pacer: self.clone(), id })
    }

    /// Most that all connections together put on the wire, bytes a second; none: no limit.
    pub fn set(&self, rate: Option<u64>) {
        let mut inner = lock(&self.0);
        if inner.rate != rate {
            inner.rate = rate;
            inner.share_out();
        }
    }

    /// Looks who has something to send. To be called a few times a second.
    pub fn look(&self) {
        let mut inner = lock(&self.0);
        if inner.rate.is_none() {
            return;
        }
        let now = Instant::now();
        for s in &mut inner.sockets {
            if sockopt::unsent_or_unacknowledged(&s.stream).is_ok_and(|n| n > 0) {
                s.busy = now;
            }
        }
        inner.share_out();
    }
}

impl Inner {
    /// Tells the kernel each connection's part; parts that shrink first.
    fn share_out(&mut self) {
        let now = Instant::now();
        let idle: Vec<bool> = self.sockets.iter().map(|s| now.duration_since(s.busy) > IDLE).collect();
        let parts = parts(self.rate, &idle);
        for shrink in [true, false] {
            for (s, part) in self.sockets.iter_mut().zip(&parts) {
                let lower = part.unwrap_or(u64::MAX) < s.pace.unwrap_or(u64::MAX);
                if s.pace == *part || lower != shrink {
                    continue;
                }
                match sockopt::set_max_pacing_rate(&s.stream, part.unwrap_or(u64::MAX)) {
                    Ok(()) => s.pace = *part,
                    Err(e) => tracing::debug!("not paced: {e}"),
                }
            }
        }
    }
}

/// Bytes of payload a second for each connection.
fn parts(rate: Option<u64>, idle: &[bool]) -> Vec<Option<u64>> {
    let Some(rate) = rate else { return vec![None; idle.len()] };
    let rate = rate / 1000 * PAYLOAD_PERMILLE;
    let sleeping = idle.iter().filter(|i| **i).count() as u64;
    let awake = idle.len() as u64 - sleeping;
    let reserve = if sleeping == 0 { 0 } else { rate / 100 * IDLE_PERCENT };
    let part = |i: &bool| match i {
        true => reserve.checked_div(sleeping),
        false => (rate - reserve).checked_div(awake),
    };
    // The kernel takes 0 for a stand-still that no look ends.
    idle.iter().map(|i| part(i).map(|p| p.max(1500))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    #[test]
    fn busy_connections_share_the_rate_and_idle_ones_hold_little() {
        let p =
            |idle: &[bool]| parts(Some(1_000_000), idle).into_iter().map(Option::unwrap).collect::<Vec<_>>();
        assert_eq!(p(&[false, false]), [473_000, 473_000]);
        assert_eq!(p(&[false, true]), [927_080, 18_920]);
        assert_eq!(p(&[true, true]), [9460, 9460]);
        assert_eq!(parts(None, &[false]), [None]);
        assert_eq!(p(&[]), [0u64; 0]);
    }

    #[test]
    fn the_kernel_keeps_a_connection_at_its_pace_and_lets_it_go_again() {
        let l = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut a = TcpStream::connect(l.local_addr().unwrap()).unwrap();
        let mut b = l.accept().unwrap().0;
        let reader = std::thread::spawn(move || {
            let (mut n, mut buf) = (0, vec![0; 1 << 16]);
            while let Ok(got @ 1..) = b.read(&mut buf) {
                n += got;
            }
            n
        });
        let pacer = Arc::new(Pacer::default());
        pacer.set(Some(4_000_000));
        let paced = pacer.join(&a).unwrap();
        let block = vec![7u8; 1 << 16];
        let began = Instant::now();
        // Half a second at 3.8 MB/s, beyond what buffers swallow at once.
        for _ in 0..64 {
            a.write_all(&block).unwrap();
            pacer.look();
        }
        while sockopt::unsent_or_unacknowledged(&a).unwrap() > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let rate = f64::from(64 << 16) / began.elapsed().as_secs_f64();
        assert!(rate < 4_400_000.0, "{rate} bytes/s");
        pacer.set(None);
        let began = Instant::now();
        for _ in 0..64 {
            a.write_all(&block).unwrap();
        }
        assert!(began.elapsed() < Duration::from_millis(700), "{:?}", began.elapsed());
        drop(paced);
        drop(a);
        assert_eq!(reader.join().unwrap(), 128 << 16);
    }
}
