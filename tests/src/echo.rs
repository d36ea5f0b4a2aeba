//! The lab's round trip, as a program on one host sees it that asks another: one byte there and back over TCP.

use crate::net::{Host, Net};
use anyhow::{Context as _, Result};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;
use std::time::{Duration, Instant};

const PORT: u16 = 7790;

/// Answers on this address until its one caller is gone.
pub fn serve(ip: &str) -> Result<()> {
    let listener = TcpListener::bind((ip, PORT)).with_context(|| format!("listen on {ip}"))?;
    let (mut conn, _) = listener.accept()?;
    conn.set_nodelay(true)?;
    let mut byte = [0];
    while conn.read(&mut byte)? == 1 {
        conn.write_all(&byte)?;
    }
    Ok(())
}

/// Asks so often, and prints the median in microseconds.
pub fn ask(ip: &str, count: usize) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(5);
    let mut conn = loop {
        match TcpStream::connect((ip, PORT)) {
            Ok(c) => break c,
            Err(e) if Instant::now() > until => return Err(e).with_context(|| format!("call {ip}")),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    };
    conn.set_nodelay(true)?;
    let mut times = Vec::with_capacity(count);
    let mut byte = [1];
    for _ in 0..count {
        let start = Instant::now();
        conn.write_all(&byte)?;
        conn.read_exact(&mut byte)?;
        times.push(start.elapsed().as_nanos() as u64);
        // As far apart as faults are, so that both ends have gone to sleep.
        std::thread::sleep(Duration::from_millis(1));
    }
    times.sort_unstable();
    println!("{}", times.get(count / 2).context("nothing was asked")? / 1000);
    Ok(())
}

/// Median round trip between two hosts, microseconds.
pub fn round_trip(net: &Net, from: Host, to: Host) -> Result<f64> {
    let me = std::env::current_exe().context("find the lab's own program")?;
    let ip = to.ip();
    let mut server = net.command(to, &me).args(["echo", "--serve", &ip]).stdin(Stdio::null()).spawn()?;
    let asked = net.command(from, &me).args(["echo", &ip]).stdin(Stdio::null()).output();
    let _ = server.kill();
    let _ = server.wait();
    let asked = asked?;
    let text = String::from_utf8_lossy(&asked.stdout);
    text.trim().parse().with_context(|| format!("echo: {}", String::from_utf8_lossy(&asked.stderr)))
}
