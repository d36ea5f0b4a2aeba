//! Other people's traffic: iperf3 between machines of both racks that have nothing to do with the evacuation, over the
//! same core link. What arrives is read from the receivers' reports, in intervals of half a second, so that any stretch
//! of time can be looked at afterwards.

use crate::irlm::Proc;
use crate::lab::Lab;
use crate::net::Host;
use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Signal;
use serde::Deserialize;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// iperf3's own port; every pair has its own network, so that one will do.
const PORT: u16 = 5201;
/// Payload of a UDP packet: with headers below an Ethernet frame's 1,500 bytes.
const UDP_PAYLOAD: u64 = 1400;
/// Ethernet, IP and UDP headers, as the links' token buckets count them.
const UDP_HEADERS: u64 = 14 + 20 + 8;
/// Payload and headers of a full TCP packet (with timestamps).
const TCP_PAYLOAD: u64 = 1448;
const TCP_HEADERS: u64 = 14 + 20 + 32;
/// Length of a report's intervals.
const INTERVAL: Duration = Duration::from_millis(500);
/// Until flows have settled: their first intervals are not counted.
pub const SETTLE: Duration = Duration::from_secs(3);

/// What the others send.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Kind {
    /// A steady stream that does not care about loss.
    Udp,
    /// A stream that backs off.
    Tcp,
}

impl Kind {
    /// "udp", "tcp".
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Udp => "udp",
            Self::Tcp => "tcp",
        }
    }

    /// Payload rate at which packets, headers included, take `wire` bit/s of a link.
    fn payload(self, wire: u64) -> u64 {
        match self {
            Self::Udp => wire * UDP_PAYLOAD / (UDP_PAYLOAD + UDP_HEADERS),
            Self::Tcp => wire * TCP_PAYLOAD / (TCP_PAYLOAD + TCP_HEADERS),
        }
    }
}

/// Which traffic, and how much of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load {
    /// UDP or TCP.
    pub kind: Kind,
    /// What all pairs together take of the core link, bit/s with headers.
    pub wire: u64,
}

/// What one receiver saw in one interval.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Interval {
    /// Seconds since the flow began.
    pub start: f64,
    /// Its end, likewise.
    pub end: f64,
    /// Payload that arrived.
    pub bytes: u64,
    /// UDP packets that were sent, by their numbers; 0 for TCP.
    pub packets: u64,
    /// UDP packets that did not arrive; below zero where some that came late had been counted before.
    pub lost: i64,
}

/// What arrived at the others in a stretch of time, all pairs together.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
pub struct Seen {
    /// Seconds looked at (mean of the pairs).
    pub seconds: f64,
    /// Payload that arrived, Mbit/s.
    pub mbit: f64,
    /// Share of the UDP packets sent that arrived; 1 for TCP, which sends again what is lost.
    pub received: f64,
}

impl Seen {
    /// What was lost against `alone`, the same traffic without an evacuation: packets for UDP, throughput for TCP.
    #[must_use]
    pub fn loss(&self, kind: Kind, alone: &Self) -> f64 {
        match kind {
            Kind::Udp => 1.0 - self.received / alone.received,
            Kind::Tcp => 1.0 - self.mbit / alone.mbit,
        }
    }
}

/// The running traffic of all pairs. Dropping it ends it.
#[derive(Debug)]
pub struct Others {
    flows: Vec<Flow>,
    began: Instant,
}

#[derive(Debug)]
struct Flow {
    receiver: Proc,
    sender: Proc,
    report: PathBuf,
}

impl Others {
    /// Starts the traffic between all of the lab's pairs, and returns when it has settled.
    pub fn start(lab: &Lab, load: Load) -> Result<Self> {
        let pairs = lab.spec.others;
        ensure!(pairs > 0, "this lab has no machines of other people (LabSpec::others)");
        let rate = load.kind.payload(load.wire) / pairs as u64;
        let before = lab.net.core_bytes()?;
        let mut flows = Vec::new();
        for n in 0..pairs {
            let (from, to) = (Host::OtherSource(n), Host::OtherTarget(n));
            let report = lab.dir(to).join("iperf3.json");
            let serve = ["--server", "--one-off", "--json", "--interval", "0.5"];
            let mut receiver = iperf(lab, to, &serve, "json")?;
            receiver.listening(PORT, Duration::from_secs(10))?;
            let (rate, payload, target) = (rate.to_string(), UDP_PAYLOAD.to_string(), to.ip());
            // It is stopped long before; the limit is for a lab that hangs.
            let mut args = vec!["--client", &target, "--bitrate", &rate, "--time", "3600", "--interval", "0"];
            match load.kind {
                Kind::Udp => args.extend(["--udp", "--length", &payload]),
                // Small writes, so that the rate is even.
                Kind::Tcp => args.extend(["--length", "8K"]),
            }
            let sender = iperf(lab, from, &args, "log")?;
            flows.push(Flow { receiver, sender, report });
        }
        let until = Instant::now() + Duration::from_secs(10);
        // Flows start within some ms of each other: that is below the intervals' own length.
        while lab.net.core_bytes()?.since(before).forward < 100_000 {
            for f in &mut flows {
                if let Some(code) = f.sender.ended()? {
                    bail!("iperf3 ended with {code}: {}", f.sender.said());
                }
            }
            ensure!(Instant::now() < until, "the others' traffic does not begin");
            std::thread::sleep(Duration::from_millis(5));
        }
        let began = Instant::now();
        std::thread::sleep(SETTLE);
        Ok(Self { flows, began })
    }

    /// Ends the traffic, and gives what arrived from `from` to `to`.
    pub fn stop(mut self, from: Instant, to: Instant) -> Result<(Seen, Vec<Vec<Interval>>)> {
        // The interval in which `to` lies must come to its end.
        std::thread::sleep(INTERVAL * 2);
        for f in &self.flows {
            f.sender.signal(Signal::INT)?;
        }
        let mut all = Vec::new();
        for f in &mut self.flows {
            // It ends with an error code, because its client was interrupted.
            f.receiver.wait(Duration::from_secs(20))?;
            let text = std::fs::read_to_string(&f.report).context("the report of iperf3")?;
            all.push(intervals(&text)?);
        }
        let since = |t: Instant| t.saturating_duration_since(self.began).as_secs_f64();
        Ok((seen(&all, since(from), since(to))?, all))
    }
}

/// What the others get while nobody is in their way.
pub fn alone(lab: &Lab, load: Load, time: Duration) -> Result<Seen> {
    let others = Others::start(lab, load)?;
    let from = Instant::now();
    std::thread::sleep(time);
    Ok(others.stop(from, Instant::now())?.0)
}

/// iperf3 on one of the others' machines. They are machines of their own, so here they go before the guests.
fn iperf(lab: &Lab, host: Host, args: &[&str], kind: &str) -> Result<Proc> {
    let log = lab.dir(host).join(format!("iperf3.{kind}"));
    let out = std::fs::File::create(&log)?;
    let mut c: Command = lab.net.command(host, "nice".as_ref());
    c.args(["-n", "-10", "iperf3"]).args(args);
    c.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    Proc::spawn(c, &format!("iperf3 on {}", host.name()), log)
}

#[derive(Deserialize)]
struct Report {
    #[serde(default)]
    intervals: Vec<Reported>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Reported {
    sum: Sum,
}

#[derive(Deserialize)]
struct Sum {
    start: f64,
    end: f64,
    bytes: u64,
    #[serde(default)]
    packets: u64,
    #[serde(default, deserialize_with = "wrapped")]
    lost_packets: i64,
}

/// iperf3 writes a count below zero as such or, in a sum, as an unsigned number that went below zero.
fn wrapped<'d, D: serde::Deserializer<'d>>(d: D) -> Result<i64, D::Error> {
    let n = i128::deserialize(d)?;
    i64::try_from(n)
        .or_else(|_| u64::try_from(n).map(u64::cast_signed))
        .map_err(|_| serde::de::Error::custom(format!("a count of packets is {n}")))
}

/// The intervals of a receiver's report.
fn intervals(json: &str) -> Result<Vec<Interval>> {
    // Through a value: iperf3 says `error` twice where both the client's end and its own go wrong.
    let value: serde_json::Value = serde_json::from_str(json).context("the report of iperf3")?;
    let report: Report = serde_json::from_value(value).context("the report of iperf3")?;
    if report.intervals.is_empty() {
        bail!("iperf3 received nothing: {}", report.error.as_deref().unwrap_or("it does not say why"));
    }
    let one = |r: Reported| Interval {
        start: r.sum.start,
        end: r.sum.end,
        bytes: r.sum.bytes,
        packets: r.sum.packets,
        lost: r.sum.lost_packets,
    };
    Ok(report.intervals.into_iter().map(one).collect())
}

/// Sums what the pairs saw in intervals that lie wholly between `from` and `to`.
fn seen(flows: &[Vec<Interval>], from: f64, to: f64) -> Result<Seen> {
    let (mut seconds, mut mbit, mut sent, mut lost) = (0.0, 0.0, 0, 0);
    for flow in flows {
        let inside: Vec<&Interval> = flow.iter().filter(|i| i.start >= from && i.end <= to).collect();
        let time: f64 = inside.iter().map(|i| i.end - i.start).sum();
        if time < (to - from) * 0.5 {
            bail!("iperf3 reports {time:.1} s of the {:.1} s that were asked for", to - from);
        }
        seconds += time / flows.len() as f64;
        mbit += inside.iter().map(|i| i.bytes).sum::<u64>() as f64 * 8e-6 / time;
        sent += inside.iter().map(|i| i.packets).sum::<u64>();
        lost += inside.iter().map(|i| i.lost).sum::<i64>();
    }
    let received = if sent == 0 { 1.0 } else { 1.0 - lost.max(0) as f64 / sent as f64 };
    Ok(Seen { seconds, mbit, received })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A receiver's report as iperf3 3.12 writes it, shortened to the keys that differ by kind.
    const UDP: &str = r#"{"start": {"target_bitrate": 5000000, "target_bitrate": 5000000},
        "intervals": [
            {"streams": [], "sum": {"start": 0, "end": 0.505584, "seconds": 0.5055840015411377, "bytes": 298200,
             "jitter_ms": 0.25, "lost_packets": 10, "packets": 223, "omitted": false, "sender": false}},
            {"streams": [], "sum": {"start": 0.505584, "end": 1.0, "bytes": 308000, "lost_packets": 4, "packets": 224}},
            {"streams": [], "sum": {"start": 1.0, "end": 1.5, "bytes": 350000, "lost_packets": -2, "packets": 250}},
            {"streams": [], "sum": {"start": 1.5, "end": 1.5, "bytes": 0, "lost_packets": 18446744073709551615, "packets": 0}},
            {"streams": [], "sum": {"start": 1.5, "end": 2.0, "bytes": 175000, "lost_packets": 125, "packets": 250}}],
        "end": {"sum": {"bytes": 0}}, "error": "the client has terminated"}"#;

    #[test]
    fn a_report_is_read_and_cut_to_a_stretch_of_time() {
        let all = intervals(UDP).unwrap();
        assert_eq!(all.len(), 5);
        assert_eq!((all[0].packets, all[0].lost, all[2].lost, all[3].lost), (223, 10, -2, -1));
        // The first interval begins before 0.5 and is left out; two pairs add up.
        let s = seen(&[all.clone(), all], 0.5, 2.0).unwrap();
        assert!((s.seconds - 1.494_416).abs() < 1e-6, "{s:?}");
        assert!((s.received - (1.0 - 126.0 / 724.0)).abs() < 1e-9, "{s:?}");
        assert!((s.mbit - 2.0 * 833_000.0 * 8e-6 / 1.494_416).abs() < 1e-6, "{s:?}");
    }

    #[test]
    fn a_stretch_that_was_not_reported_is_an_error() {
        let all = intervals(UDP).unwrap();
        assert!(seen(&[all], 0.0, 9.0).unwrap_err().to_string().contains("2.0 s of the 9.0 s"));
        let none = intervals(r#"{"intervals": [], "error": "unable to connect"}"#).unwrap_err();
        assert!(none.to_string().contains("unable to connect"), "{none}");
        // As it was seen: the interrupted client's end, and its own.
        let twice = UDP.replace(r#""error": "the"#, r#""error": "select failed", "error": "the"#);
        assert_ne!(twice, UDP);
        assert_eq!(intervals(&twice).unwrap().len(), 5);
        assert!(intervals("iperf3: error").is_err());
    }

    #[test]
    fn loss_is_counted_in_what_each_kind_cares_about() {
        let alone = Seen { seconds: 10.0, mbit: 100.0, received: 1.0 };
        let now = Seen { seconds: 10.0, mbit: 80.0, received: 0.9 };
        assert!((now.loss(Kind::Udp, &alone) - 0.1).abs() < 1e-9);
        assert!((now.loss(Kind::Tcp, &alone) - 0.2).abs() < 1e-9);
    }

    #[test]
    fn rates_are_what_the_link_carries() {
        // 12,138 packets of 1,442 bytes are 140 Mbit/s.
        assert_eq!(Kind::Udp.payload(140_000_000) / 8 / 1400, 12_135);
        assert!(Kind::Tcp.payload(1514) == 1448);
    }
}
