//! Contents go to the target rack's hosts by multicast, whatever is lost on the way, and only there.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, ensure};
use irlm_tests::lab::Lab;
use irlm_tests::multicast::{self, ON};
use irlm_tests::unmet::unmet;

pub(crate) const CASES: &[Case] = &[
    Case {
        name: "multicast-one-percent-lost",
        needs: &[Need::Irlm, Need::ChosenQemu],
        takes: Takes::Alone,
        run: lossy,
    },
    Case {
        name: "multicast-not-passed",
        needs: &[Need::Irlm, Need::ChosenQemu],
        takes: Takes::Alone,
        run: not_passed,
    },
];

/// Every target host loses one datagram of a hundred: the guests are identical, and next to nothing is asked of their
/// sources because of it.
fn lossy(b: &Bench) -> Result<()> {
    let lab = Lab::new(b.cache.clone(), b.spec(3, 1), &say)?;
    let m = multicast::run(&lab, &b.irlm, ON, 10)?;
    let of = |key: &str| m.multicast(key).with_context(|| format!("no multicast counter {key}"));
    let (sent, repaired) = (of("sent_bytes")?, of("repaired_bytes")?);
    println!(
        "  {:.1} MB shared; target rack {:.1} MB, of it multicast {:.1} and repairs {:.2}; {} contents by unicast after all, \
         {} pages asked of their sources",
        m.shared as f64 / 1e6,
        m.rack as f64 / 1e6,
        sent as f64 / 1e6,
        repaired as f64 / 1e6,
        of("handed_pages")?,
        m.pages("answered")
    );
    if of("dropped")? == 0 {
        return unmet("no datagram was lost");
    }
    ensure!(repaired > 0, "{} datagrams were lost, and nothing was repaired", of("dropped")?);
    ensure!(of("sent_pages")? > 0 && of("received_pages")? > of("sent_pages")?, "nobody heard what was sent");
    ensure!(
        repaired * 10 < sent,
        "one datagram of a hundred was lost, and {repaired} of {sent} bytes sent again"
    );
    ensure!(m.by_shared() < 1.3, "{:.2} bytes in the target rack by byte shared", m.by_shared());
    // What the target hosts sent to the source rack is what TCP answers, and what agents say.
    ensure!(
        m.core.back < sent / 4,
        "{} bytes went back over the core link, {sent} by multicast",
        m.core.back
    );
    Ok(())
}

/// A switch that passes no multicast: everything goes by unicast, as without.
fn not_passed(b: &Bench) -> Result<()> {
    let lab = Lab::new(b.cache.clone(), b.spec(3, 1), &say)?;
    lab.net.stop_multicast()?;
    let m = multicast::run(&lab, &b.irlm, ON, 0)?;
    let of = |key: &str| m.multicast(key).with_context(|| format!("no multicast counter {key}"));
    println!("  {} contents by unicast, because nobody hears", of("unheard_pages")?);
    ensure!(of("unheard_pages")? > 0 && of("sent_pages")? == 0 && of("hearers")? == 0, "who heard?");
    Ok(())
}
