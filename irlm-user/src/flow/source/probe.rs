//! What the link to a target host gives, measured before a group is prepared: more and more bytes, as long as it may still be fast
//! enough to matter. A slow link carries 256 KiB, a fast one 13 MiB.

use crate::core::wire::frame::Kind;
use crate::core::wire::limits::MAX_BODY;
use crate::net::conn::{FrameBuf, NetError, send};
use crate::net::connection::{Connection, Security};
use crate::net::greeting::{Greeting, dial, wait_hello_ok};
use std::io::IoSlice;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Bytes of each step. The last ones decide, the best of them: whatever else a host does can only make it slower.
const STEPS: [usize; 5] = [256 << 10, 1 << 20, 4 << 20, 4 << 20, 4 << 20];
/// Part of what is needed that a step must reach for the next to be worth its bytes.
const HOPE: f64 = 0.25;
/// Pause after a target host has declined: first, and at most.
const PAUSE: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// Bytes a second, if it may be `needed`; less if not. A target host that has not heard of the group yet, or has not made its VMs'
/// memory and would measure its own haste, declines: it is asked again as long as `ask_on`. `tag` is told of the connection's ends.
pub fn measure<T>(
    addr: SocketAddr,
    hello: &Greeting,
    patience: Duration,
    needed: f64,
    security: &Security,
    ask_on: &dyn Fn() -> bool,
    mut tag: impl FnMut(Option<(SocketAddr, SocketAddr)>) -> T,
) -> Result<f64, NetError> {
    let mut pause = PAUSE;
    let (conn, _tag, mut frames) = loop {
        let (conn, tag) = dial(addr, hello, patience, security, &mut tag)?;
        match wait_hello_ok(&conn, patience) {
            Ok((_, frames)) => break (conn, tag, frames),
            Err(e @ NetError::Declined { .. }) if !ask_on() => return Err(e),
            Err(NetError::Declined { .. }) => {}
            Err(e) => return Err(e),
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    };
    let mut step = |bytes: usize| step(&conn, &mut frames, bytes, patience);
    let trip = step(0)?.min(step(0)?);
    let mut best = 0.0f64;
    for bytes in STEPS {
        let took = step(bytes)?.saturating_sub(trip).max(Duration::from_micros(1));
        best = best.max(bytes as f64 / took.as_secs_f64());
        if best < HOPE * needed {
            break;
        }
    }
    Ok(best)
}

/// Until the last answer is here.
fn step(
    conn: &Connection,
    frames: &mut FrameBuf,
    bytes: usize,
    patience: Duration,
) -> Result<Duration, NetError> {
    let lost = |source| NetError::Lost { peer: crate::net::conn::peer_name(conn), source };
    let block = vec![0x5a; bytes.min(MAX_BODY)];
    let began = Instant::now();
    let n = bytes.div_ceil(MAX_BODY).max(1);
    for _ in 0..n {
        send(conn, Kind::Verbatim, &[], &[IoSlice::new(&block)]).map_err(lost)?;
    }
    for _ in 0..n {
        frames.wait(conn, patience)?;
    }
    Ok(began.elapsed())
}

#[cfg(test)]
mod tests;
