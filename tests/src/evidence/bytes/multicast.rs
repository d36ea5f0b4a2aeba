//! Point 3: what the target rack's own links carry for the contents its hosts share, by multicast with loss, and by
//! unicast.

use super::super::{Point, at_most};
use anyhow::{Context as _, Result};
use irlm_tests::cache::Cache;
use irlm_tests::lab::{Lab, LabSpec};
use irlm_tests::multicast::{self, Moved, ON};
use std::path::Path;

/// Hosts and guests a host. With three target hosts every content that all need goes to two others.
const RACK: (usize, usize) = (3, 2);
/// Of a thousand datagrams that arrive at a target host.
const DROPPED: u32 = 10;

pub(super) fn point(points: &mut Vec<Point>, id: &str, irlm: &Path) -> Result<()> {
    let cache = Cache::open()?;
    let spec = LabSpec::new(&cache, RACK.0, RACK.1, 256);
    let lab = Lab::new(cache, spec, &|line| eprintln!("{line}"))?;
    let plain = multicast::run(&lab, irlm, "", 0)?;
    let m = multicast::run(&lab, irlm, ON, DROPPED)?;
    let of = |key: &str| m.multicast(key).with_context(|| format!("no multicast counter {key}"));
    let mb = |n: u64| n as f64 / 1e6;
    let sent = of("sent_bytes")?;
    let all = |m: &Moved| format!("{:.2} ({:.1} MB for {:.1} MB)", m.by_shared(), mb(m.rack), mb(m.shared));
    let how = format!(
        "{}x{} guests of 256 MiB, edge 100 Mbit/s; bytes that target hosts' ports sent, less what went back over the core link, by \
         bytes of the distinct contents that came with a forward list; by multicast {}, of it {:.1} MB sent first, {:.2} \
         again, {} contents by unicast after all; by unicast {}; {} of 1000 datagrams dropped at every host ({} in all); pages asked \
         of their sources {}, by unicast {}; core link {:.1} MB, by unicast {:.1}; back over it {:.2} MB, by unicast {:.2}; group {:.1} \
         s, by unicast {:.1}; all memory identical",
        RACK.0,
        RACK.1,
        all(&m),
        mb(sent),
        mb(of("repaired_bytes")?),
        of("handed_pages")?,
        all(&plain),
        DROPPED,
        of("dropped")?,
        m.pages("answered"),
        plain.pages("answered"),
        mb(m.core.forward),
        mb(plain.core.forward),
        mb(m.core.back),
        mb(plain.core.back),
        m.group_ms / 1e3,
        plain.group_ms / 1e3
    );
    let what = "target-rack bytes by multicast, as a share of the distinct shared content";
    at_most(points, id, what, &how, m.by_shared(), 1.3)
}
