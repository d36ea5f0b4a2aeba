//! What TLS costs a byte: frames over loopback from one thread to another, in plain text and sealed, without anything else.

use crate::keys::Keys;
use crate::profile::thread_spent;
use anyhow::{Context as _, Result};
use irlm_user::core::identity::Role;
use irlm_user::core::wire::frame::Kind;
use irlm_user::net::conn::send;
use irlm_user::net::connection::Security;
use irlm_user::net::tls::{Credentials, Use};
use std::io::{IoSlice, Read as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes sent in one measurement.
const BYTES: usize = 1 << 30;
/// Contents of a frame.
const FRAME: usize = 256 << 10;
const LONG: Duration = Duration::from_secs(60);

/// What one measurement came to.
#[derive(Clone, Copy, Debug)]
pub struct Speed {
    /// MiB a second.
    pub rate: f64,
    /// Processor seconds a GiB of the sender's thread.
    pub sender: f64,
    /// The same of the receiver's.
    pub receiver: f64,
}

/// Measures one connection.
pub fn measure(security: &Security) -> Result<Speed> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let taker = security.clone();
    let receiver = std::thread::spawn(move || -> Result<f64> {
        let conn = taker.answer(listener.accept()?.0, LONG)?;
        let mut buf = vec![0; FRAME];
        let before = thread_spent();
        loop {
            let n = (&conn).read(&mut buf)?;
            if n == 0 {
                return Ok(thread_spent() - before);
            }
        }
    });
    let conn = security.call(TcpStream::connect(addr)?, addr, LONG)?;
    let pages: Vec<u8> = (0..FRAME).map(|n| (n * 7) as u8).collect();
    let contents: Vec<IoSlice<'_>> = pages.chunks(4096).map(IoSlice::new).collect();
    let (start, before) = (Instant::now(), thread_spent());
    for _ in 0..BYTES / FRAME {
        send(&conn, Kind::Contents, &[0; 64], &contents)?;
    }
    let sender = thread_spent() - before;
    drop(conn);
    let receiver = receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
    Ok(Speed { rate: (BYTES >> 20) as f64 / start.elapsed().as_secs_f64(), sender, receiver })
}

/// Prints both, the median of some measurements each.
pub fn run(times: usize) -> Result<()> {
    let keys = Keys::new()?;
    let dir = keys.at("127.0.0.1", "here", Role::Agent("here".into()))?;
    let tls =
        Security::Tls(Arc::new(Credentials::open(&dir, Use::Both).context("the bench's certificates")?));
    for (name, security) in [("plain", Security::Plain), ("tls", tls)] {
        let mut all = (0..times).map(|_| measure(&security)).collect::<Result<Vec<_>>>()?;
        all.sort_by(|a, b| a.rate.total_cmp(&b.rate));
        let s = all[all.len() / 2];
        println!(
            "tls: {name:5}: {:6.0} MiB/s; processor seconds a GiB: {:.3} sending, {:.3} receiving",
            s.rate, s.sender, s.receiver
        );
    }
    Ok(())
}
