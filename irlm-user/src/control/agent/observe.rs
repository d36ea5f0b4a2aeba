//! How this agent watches its VMs' writes: its samplers for `irlm status`, an observation on request, and the bandwidth
//! by which VMs are sent on their way.

use super::Shared;
use crate::control::api::{
    Code, GroupSpec, HostWrites, Refusal, Reply, SamplerStatus, VmSpec, VmWrites, sampling::MAX_SECONDS,
};
use crate::flow::source::observe::{self, Observation, Observed, Options, Subject};
use crate::flow::source::prepare::Opened;
use crate::host::dirty::{Sampler, Tracer};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, TryLockError};
use std::time::Duration;

/// Loads what the configuration allows and the kernel takes, and says what came of it.
pub(super) fn tracer(config: &crate::control::config::AgentConfig) -> Tracer {
    // Beside the classifier's directory, not in it: that one is its own.
    let pins = crate::host::bpf::default_pin_dir(&format!("{}-dirty", config.name)).ok();
    let off = match (config.bpf, config.sampling.kernel) {
        (true, true) => None,
        (false, _) => Some("bpf = false in the configuration"),
        (_, false) => Some("sampling.kernel = false in the configuration"),
    };
    let tracer = match off {
        None => Tracer::load(pins.as_deref()),
        Some(why) => {
            // An agent that was killed before its configuration was changed may have left some.
            if let Some(dir) = &pins {
                crate::host::dirty::clear_stale(dir);
            }
            Tracer::disabled(why)
        }
    };
    for s in samplers(&tracer) {
        match s.refused {
            None => tracing::info!("dirty pages: {}: in force; sees {}", s.name, s.sees),
            Some(why) => tracing::info!("dirty pages: {}: not in force: {why}", s.name),
        }
    }
    tracer
}

/// All samplers, the best first.
pub(super) fn samplers(tracer: &Tracer) -> Vec<SamplerStatus> {
    let one = |sampler: Sampler, refused| SamplerStatus {
        sampler,
        name: sampler.name().to_owned(),
        sees: sampler.sees().to_owned(),
        refused,
    };
    let kernel = tracer.tried().iter().map(|t| one(t.sampler, t.refused.clone()));
    kernel.chain([one(Sampler::Content, None)]).collect()
}

impl Shared {
    /// Mbit/s that migration may use towards the core link, if that is known: as configured, by the port's policy, or by
    /// what the port says of itself.
    pub(super) fn link_mbit(&self) -> Option<u64> {
        let policy = || self.shaper.limit().map(|bits| (bits / 1_000_000).max(1));
        self.config.sampling.link_mbit.or_else(policy).or_else(|| {
            let path = format!("/sys/class/net/{}/speed", self.config.core_iface.as_ref()?);
            // -1 where the driver does not know.
            std::fs::read_to_string(path).ok()?.trim().parse().ok().filter(|n| *n > 0)
        })
    }

    /// Watches `subjects` if nobody else is watching; says whether it did. Page events go to one watcher at a time.
    pub(super) fn watch(
        &self,
        subjects: &[Subject],
        seconds: u32,
        one_in: u32,
        stop: &AtomicBool,
        out: &Observed,
    ) -> bool {
        let _one = match self.observing.try_lock() {
            Ok(guard) => guard,
            Err(TryLockError::Poisoned(p)) => p.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        let options = Options {
            time: Duration::from_secs(seconds.into()),
            one_in,
            log: self.config.sampling.kernel,
            setup: self.timeouts.setup,
        };
        observe::observe(&self.tracer, subjects, &options, stop, out);
        true
    }

    pub(super) fn observe(&self, spec: &GroupSpec, seconds: u32, one_in: u32) -> Result<Reply, Refusal> {
        self.usable(spec)?;
        if !(1..=MAX_SECONDS).contains(&seconds) || one_in == 0 {
            let what = format!("observing takes 1 to {MAX_SECONDS} seconds, and one_in at least 1");
            return Err(Refusal::new(Code::BadRequest, what));
        }
        let mine: Vec<_> = spec.vms.iter().filter(|v| Some(v.source) == spec.my_source).collect();
        let subject = |v: &&VmSpec| Subject {
            name: v.name.clone(),
            front: v.source_front.clone(),
            opened: Opened::default(),
        };
        let subjects: Vec<Subject> = mine.iter().map(subject).collect();
        let out = Observed::default();
        if !self.watch(&subjects, seconds, one_in, &AtomicBool::new(false), &out) {
            let what =
                format!("agent {} is watching VMs already: ask again when that is over", self.config.name);
            return Err(Refusal::new(Code::NotNow, what));
        }
        let mut reply = HostWrites { link_mbit: self.link_mbit(), ..HostWrites::default() };
        for (n, v) in mine.iter().enumerate() {
            match out.get(n) {
                Some(Ok(o)) => reply.vms.push(vm_writes(v.ix, &o)),
                Some(Err(e)) => reply.problems.push(e.to_string()),
                None => reply.problems.push(format!("{}: not watched long enough to say anything", v.name)),
            }
        }
        Ok(Reply::Observed(reply))
    }
}

fn vm_writes(ix: u16, o: &Arc<Observation>) -> VmWrites {
    VmWrites {
        ix,
        sampler: o.sampler,
        note: o.note.clone(),
        seconds: o.heat.observed(),
        writes: o.writes(),
        distinct_pages: o.heat.distinct(),
        hot_pages: o.heat.hot_pages().len() as u64,
        ram_pages: o.ram_pages,
        data_pages: o.data_pages,
        seen: o.totals.seen,
        lost: o.totals.region_lost + o.heat.lost() + o.unplaced,
    }
}
