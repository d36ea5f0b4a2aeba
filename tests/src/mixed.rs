//! A group of which some guests are QEMU's and some our own VMM's: put together, moved, and looked at.

use crate::irlm::{Irlm, Method, Proc};
use crate::kvm::{Image, KvmPair};
use crate::lab::{Guests, Lab};
use crate::net::{CoreBytes, Host};
use anyhow::{Context as _, Result, bail};
use irlm_user::net::vmm::State;
use serde_json::Value;
use std::path::Path;
use std::time::{Duration, Instant};

/// A group that stands, its daemons with it. Dropping it ends all.
#[derive(Debug)]
pub struct Mixed<'a> {
    /// Where it is.
    pub lab: &'a Lab,
    images: &'a [(usize, Image)],
    /// QEMU's guests.
    pub guests: Guests,
    /// Our VMM's, in the order of their images.
    pub kvm: Vec<KvmPair>,
    /// The daemons.
    pub irlm: Irlm<'a>,
    began: CoreBytes,
}

/// What a move came to.
#[derive(Debug)]
pub struct Moved {
    /// Bytes on the core link, preparation and control included.
    pub core: CoreBytes,
    /// Guest memory that was compared, bytes.
    pub compared: u64,
    /// The report of `irlm evacuate`.
    pub report: Value,
}

impl Moved {
    /// A VM's part of the report.
    pub fn vm(&self, name: &str) -> Result<&Value> {
        let vms = self.report["vms"].as_array().context("a report without vms")?;
        vms.iter().find(|v| v["name"] == name).with_context(|| format!("{name} is not in the report"))
    }
}

impl<'a> Mixed<'a> {
    /// Starts the lab's own QEMU guests, and one of our VMM's for each image on the host with that number.
    pub fn start(
        lab: &'a Lab,
        program: &Path,
        images: &'a [(usize, Image)],
        extra: &str,
        agent_args: Vec<String>,
    ) -> Result<Self> {
        let guests = lab.start_guests()?;
        let start = |(host, image): &(usize, Image)| KvmPair::start(lab, program, image, *host);
        let kvm = images.iter().map(start).collect::<Result<Vec<_>>>()?;
        let entries: String = kvm.iter().map(KvmPair::entry).collect();
        let irlm = Irlm::start_with(lab, program, &guests, &format!("{extra}\n{entries}"), agent_args)?;
        Ok(Self { lab, images, guests, kvm, irlm, began: lab.net.core_bytes()? })
    }

    /// Starts the move by method `irlm`.
    pub fn evacuate(&self, leave_paused: bool) -> Result<Proc> {
        let json = self.lab.top().join("report.json");
        let _ = std::fs::remove_file(&json);
        self.irlm.evacuate(Method::Irlm, &json, leave_paused)
    }

    /// Bytes that have passed the core link towards the target rack since the group stands.
    pub fn passed(&self) -> Result<u64> {
        Ok(self.lab.net.core_bytes()?.since(self.began).forward)
    }

    /// The report of the move that has ended.
    pub fn report(&self) -> Result<Value> {
        let text = std::fs::read_to_string(self.lab.top().join("report.json")).context("no report")?;
        Ok(serde_json::from_str(&text)?)
    }

    /// What everybody printed, for an error message.
    #[must_use]
    pub fn said(&self) -> String {
        let vmm = |p: &KvmPair| {
            format!(
                "--- {} source\n{}\n--- {} target\n{}\n",
                p.name,
                p.source.said(),
                p.name,
                p.target.said()
            )
        };
        self.irlm.logs() + &self.guests.said() + &self.kvm.iter().map(vmm).collect::<String>()
    }

    /// Moves all, and looks at every byte and at every guest's own work afterwards.
    pub fn move_all(&mut self, wait: Duration) -> Result<Moved> {
        let mut evacuate = self.evacuate(true)?;
        let code = evacuate.wait(wait).with_context(|| self.said())?;
        let core = self.lab.net.core_bytes()?.since(self.began);
        if code != 0 {
            bail!("irlm evacuate ended with {code}: {}\n{}", evacuate.said(), self.said());
        }
        let mut compared = 0;
        for p in &mut self.guests.pairs {
            compared += self.lab.compare(p)?.bytes;
        }
        for (p, (_, image)) in self.kvm.iter_mut().zip(self.images) {
            compared += p.check_moved(image)?;
        }
        for p in &mut self.guests.pairs {
            p.resume_and_check()?;
        }
        Ok(Moved { core, compared, report: self.report()? })
    }

    /// Moves all, running where they come to; then stops each there and looks whether it missed no step and has every page of
    /// the real guest's.
    pub fn move_running(&mut self, wait: Duration) -> Result<Moved> {
        let mut evacuate = self.evacuate(false)?;
        let code = evacuate.wait(wait).with_context(|| self.said())?;
        let core = self.lab.net.core_bytes()?.since(self.began);
        if code != 0 {
            bail!("irlm evacuate ended with {code}: {}\n{}", evacuate.said(), self.said());
        }
        let mut compared = 0;
        for (p, (_, image)) in self.kvm.iter_mut().zip(self.images) {
            compared += p.check_running(image)?;
        }
        Ok(Moved { core, compared, report: self.report()? })
    }

    /// Changes pages of the first guest of our VMM through its memory file, which no dirty log sees, after they have been
    /// hashed and before they leave. Returns why its move ended.
    pub fn plant_stale_pages(mut self, wait: Duration) -> Result<String> {
        let pages = self.images.first().context("no guest")?.1.quiet_pages(64)?;
        let memory = self.kvm.first().context("no guest")?.source.memory()?;
        let mut evacuate = self.evacuate(false)?;
        let start = Instant::now();
        // Preparation hashes first what is not written to, and watches the guest on until its time is over.
        loop {
            let status = self.irlm.status(Host::Source(0))?;
            let prepare = &status[0]["groups"][0]["prepare"];
            let count = |key: &str| prepare[key].as_u64().unwrap_or(0);
            if count("pages_total") > 0 && count("pages_done") * 10 > count("pages_total") * 8 {
                break;
            }
            if start.elapsed() > wait {
                bail!("the guest is not prepared: {status}\n{}", self.said());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        for page in pages {
            memory.change(page, b"changed behind the log's back")?;
        }
        let code = evacuate.wait(wait).with_context(|| self.said())?;
        if code != 2 {
            bail!("irlm evacuate ended with {code}, and the guest should have stayed: {}", self.said());
        }
        if self.settled(wait)? != [false] {
            bail!("the guest does not run at its source");
        }
        let report = self.report()?;
        Ok(report["vms"][0]["error"].as_str().unwrap_or_default().to_owned())
    }

    /// Which sides of our VMM's guests run now, source first; fails if both of one do.
    pub fn sides(&mut self) -> Result<Vec<(bool, bool)>> {
        let mut out = Vec::new();
        for p in &mut self.kvm {
            let runs = |state: Option<State>| state == Some(State::Running);
            let (source, target) = (runs(p.source.state()), runs(p.target.state()));
            // Between the two questions it may have moved.
            if source && target && runs(p.source.state()) {
                bail!("{}: TWO copies run, on the source and on the target", p.name);
            }
            out.push((source && !target, target));
        }
        Ok(out)
    }

    /// Waits until exactly one copy of each of our VMM's guests has run for a second; never two. Returns for each
    /// whether it runs on the target.
    pub fn settled(&mut self, wait: Duration) -> Result<Vec<bool>> {
        let until = Instant::now() + wait;
        let mut since: Option<(Instant, Vec<bool>)> = None;
        loop {
            let sides = self.sides()?;
            let now: Vec<bool> = sides.iter().map(|s| s.1).collect();
            let one = sides.iter().all(|(s, t)| s != t);
            since =
                since.filter(|(_, was)| one && *was == now).or_else(|| one.then(|| (Instant::now(), now)));
            if let Some((at, now)) = &since
                && at.elapsed() > Duration::from_secs(1)
            {
                return Ok(now.clone());
            }
            if Instant::now() > until {
                bail!("not settled after {wait:?}: {sides:?}\n{}", self.said());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
