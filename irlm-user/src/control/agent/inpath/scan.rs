//! Preparation's reading of a source host's VMs, and watching meanwhile where they write.

use super::super::Shared;
use super::side::SourceSide;
use crate::control::api::Refusal;
use crate::core::forecast::Departure;
use crate::flow::lock;
use crate::flow::source::observe::{Observed, Subject};
use crate::flow::source::prepare::{self, Opened, PrepareError, PreparedVm};
use std::time::Duration;

impl SourceSide {
    /// Reads and hashes all VMs whose RAM is open, while it is watched where they write.
    pub(super) fn scan_all(
        &self,
        shared: &Shared,
        opened: &[Opened],
        problems: &mut Vec<String>,
    ) -> Result<Vec<PreparedVm>, Refusal> {
        let rate = shared.config.prepare.rate_mib_s << 20;
        let sampling = &shared.config.sampling;
        let readable: Vec<usize> = (0..opened.len()).filter(|i| opened[*i].ram.is_some()).collect();
        let subject = |i: &usize| {
            let (spec, _) = &self.vms[*i];
            Subject { name: spec.name.clone(), front: spec.front.clone(), opened: opened[*i].clone() }
        };
        let subjects: Vec<Subject> = readable.iter().map(subject).collect();
        let observed = Observed::default();
        let mut prepared = Vec::new();
        std::thread::scope(|scope| {
            let watch = || {
                let (seconds, one_in) = (sampling.seconds, sampling.one_in);
                if !shared.watch(&subjects, seconds, one_in, &self.scan.cancel, &observed) {
                    let name = &self.group.name;
                    tracing::info!(
                        "group {name}: VMs are being watched for somebody else; hot pages not known"
                    );
                }
            };
            let watching = (sampling.seconds > 0 && !subjects.is_empty())
                .then(|| std::thread::Builder::new().name("irlm-observe".into()).spawn_scoped(scope, watch))
                .transpose()
                .map_err(|e| Refusal::failed(format!("no thread: {e}")))?;
            let wait = || {
                while watching.as_ref().is_some_and(|w| !w.is_finished()) {
                    std::thread::sleep(Duration::from_millis(5));
                }
            };
            for (n, ((spec, _), opened)) in self.vms.iter().zip(opened).enumerate() {
                let Some(ram) = &opened.ram else {
                    prepared.push(PreparedVm::default());
                    continue;
                };
                let guest = opened.guest.as_ref();
                let ix = readable.iter().position(|i| *i == n).unwrap_or(usize::MAX);
                let heat = prepare::Heat { observed: &observed, ix, wait: &wait };
                match prepare::scan(&self.group, spec, ram, guest, rate, &self.scan, &heat) {
                    Ok(p) => prepared.push(p),
                    Err(PrepareError::Cancelled) => return Err(Refusal::failed("cancelled")),
                    Err(e) => {
                        problems.push(e.to_string());
                        prepared.push(PreparedVm::unhashed(opened.clone()));
                    }
                }
            }
            wait();
            Ok(())
        })?;
        self.note_writes(&readable, &observed);
        Ok(prepared)
    }

    /// Keeps what the order of departures goes by. `readable`: the VMs' places, in the observation's order.
    fn note_writes(&self, readable: &[usize], observed: &Observed) {
        let limit = self.group.options.downtime_ms as f64 / 1e3;
        let mut writes = vec![Departure::default(); self.vms.len()];
        for (n, i) in readable.iter().enumerate() {
            match observed.get(n) {
                Some(Ok(o)) => {
                    let w = o.writes();
                    writes[*i] = Departure { needs: w.needs(limit), pages: o.data_pages as f64 };
                    let (name, by) = (&self.vms[*i].0.name, o.sampler.name());
                    let (rate, set) = (w.rate, w.working_set);
                    tracing::info!("{name}: dirties {rate:.0} pages/s, working set {set:.0} pages, by {by}");
                }
                Some(Err(e)) => tracing::warn!("group {}: not known how it writes: {e}", self.group.name),
                None => {}
            }
        }
        *lock(&self.writes) = writes;
    }
}
