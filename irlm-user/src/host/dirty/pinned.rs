//! The programs' maps, pinned where operators and tools can look at them. They are of no use to a later agent: its
//! programs have maps of their own. So whoever ends or starts removes them.

use crate::host::bpf::error::chain;
use crate::host::bpf::pins::Pins;
use aya::maps::Map;
use irlm_common::dirty::{CONFIG_MAP, PAGES_MAP, REGIONS_MAP, SLOTS_MAP, VMS_MAP};
use std::io;
use std::path::Path;

/// The maps that are pinned.
pub(super) const MAPS: [&str; 5] = [CONFIG_MAP, VMS_MAP, REGIONS_MAP, SLOTS_MAP, PAGES_MAP];

/// Pins the maps, in the order of [`MAPS`], as long as the value lives.
pub(super) fn pin(dir: &Path, maps: [&Map; 5]) -> io::Result<Pins> {
    let pins = Pins::open(dir, MAPS.map(str::to_owned))?;
    // What a killed agent left: its counts mean nothing any more, since its programs went with it.
    pins.clear()?;
    for (name, map) in MAPS.iter().zip(maps) {
        map.pin(pins.path(name)).map_err(|e| io::Error::other(format!("{name}: {}", chain(&e))))?;
    }
    Ok(pins)
}

/// Removes what an agent of this name left pinned when it was killed. For one that does not pin anything anew.
pub fn clear_stale(dir: &Path) {
    if dir.exists() {
        // The directory goes with the value.
        let cleared = Pins::open(dir, MAPS.map(str::to_owned)).and_then(|p| p.clear());
        if let Err(e) = cleared {
            tracing::warn!("{}: what is pinned there from before stays: {e}", dir.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::bpf::default_pin_dir;
    use crate::host::dirty::Tracer;

    #[test]
    fn pins_that_a_killed_agent_left_go_also_when_the_programs_are_refused() {
        let dir = default_pin_dir(&format!("irlm-test-{}-dirty", std::process::id())).unwrap();
        // What can be left without a program that the kernel takes: the directory.
        let left = Pins::open(&dir, []).and_then(|p| {
            drop(p);
            std::fs::create_dir(&dir)
        });
        if let Err(e) = left {
            println!("skipped: no bpffs here: {e}");
            return;
        }
        drop(Tracer::load_object(&[], Some(&dir)));
        assert!(!dir.exists());
        clear_stale(&dir);
        assert!(!dir.exists(), "nothing is made by clearing");
    }
}
