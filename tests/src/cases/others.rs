//! What shaping is for: other people's traffic over the same core link does not notice that a rack is evacuated.

use super::say;
use crate::cmd_test::{Bench, Case, Need, Takes};
use anyhow::{Context as _, Result, bail, ensure};
use irlm_tests::irlm::Method;
use irlm_tests::lab::Lab;
use irlm_tests::net::Rates;
use irlm_tests::others::{self, Kind, Load};
use irlm_tests::round::{self, Plan};
use std::time::Duration;

pub(crate) const CASES: &[Case] = &[Case {
    name: "others-keep-their-share",
    needs: &[Need::Irlm, Need::ChosenQemu],
    takes: Takes::Alone,
    run: keep_their_share,
}];

/// TCP, which backs off at once where it is crowded: without shaping it loses a third and more here.
const LOAD: Load = Load { kind: Kind::Tcp, wire: 140_000_000 };

fn keep_their_share(b: &Bench) -> Result<()> {
    let mut spec = b.spec(2, 1);
    // Two edge links are as wide as the core link, of which the others ask for 0.7.
    spec.rates = Rates { edge: Some(100_000_000), core: Some(200_000_000) };
    spec.others = 2;
    spec.congestion = Some("cubic");
    spec.host_qdisc = false;
    let port = "[port]\nshaping = \"own\"\nlink_mbit = 100\nrack_prefixes = [\"10.77.1.0/24\"]\n";
    spec.policy = Some(port.to_owned());
    let lab = Lab::new(b.cache.clone(), spec, &say)?;
    let alone = others::alone(&lab, LOAD, Duration::from_secs(5))?;
    ensure!(alone.mbit > 120.0, "the others alone get only {:.1} of 134 Mbit/s", alone.mbit);
    let wait = Duration::from_secs(120);
    let extra = "budget_mbit = 54";
    let plan = Plan { method: Method::Irlm, irlm: &b.irlm, writers: 0, extra, wait, others: Some(LOAD) };
    let r = round::run(&lab, &plan, &|_, _| {})?;
    let now = r.others.context("the others were not watched")?;
    let loss = now.loss(LOAD.kind, &alone);
    println!(
        "  alone {:.1} Mbit/s, during {:.1} s of evacuation {:.1} Mbit/s",
        alone.mbit, now.seconds, now.mbit
    );
    if loss > 0.02 {
        bail!("the others lost {:.3} of their throughput", loss);
    }
    Ok(())
}
