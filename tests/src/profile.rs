//! Where the processor time of a move goes: by program and thread, from /proc, with nothing to install.

use std::collections::BTreeMap;

/// Processor time by thread name, collected while the processes run.
#[derive(Debug, Default)]
pub struct Profile {
    /// (process number, thread number) → (label, ticks at the first look, ticks at the last look).
    seen: BTreeMap<(u32, u32), (String, u64, u64)>,
}

impl Profile {
    /// Looks at all threads of `pid`, to be shown under `label`. Threads that end between two looks lose a little.
    pub fn look(&mut self, label: &str, pid: u32, first: bool) {
        let Ok(tasks) = std::fs::read_dir(format!("/proc/{pid}/task")) else { return };
        for t in tasks.flatten() {
            let Some(tid) = t.file_name().to_str().and_then(|s| s.parse().ok()) else { continue };
            let Ok(stat) = std::fs::read_to_string(t.path().join("stat")) else { continue };
            let Some((name, ticks)) = parse(&stat) else { continue };
            // A thread that was not there at the first look has used all its time since.
            let start = if first { ticks } else { 0 };
            let entry =
                self.seen.entry((pid, tid)).or_insert_with(|| (format!("{label}: {name}"), start, ticks));
            entry.2 = ticks;
        }
    }

    /// Seconds by label and thread name, largest first. The kernel counts in ticks of 10 ms.
    #[must_use]
    pub fn seconds(&self) -> Vec<(String, f64)> {
        let mut sums: BTreeMap<&str, u64> = BTreeMap::new();
        for (name, first, last) in self.seen.values() {
            *sums.entry(name).or_default() += last - first;
        }
        let mut out: Vec<(String, f64)> =
            sums.into_iter().filter(|s| s.1 > 0).map(|(n, t)| (n.to_owned(), t as f64 / 100.0)).collect();
        out.sort_by(|a, b| b.1.total_cmp(&a.1));
        out
    }
}

/// Processor time of the calling thread so far, seconds.
#[must_use]
pub fn thread_spent() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 + t.tv_nsec as f64 / 1e9
}

/// Processor time of a process so far, seconds, threads that have ended included; without that of a QEMU's virtual
/// processors, which is the guest's own. 0 if there is no such process any more.
#[must_use]
pub fn spent(pid: u32) -> f64 {
    let ticks = |path: &str| std::fs::read_to_string(path).ok().as_deref().and_then(parse);
    let Some((_, all)) = ticks(&format!("/proc/{pid}/stat")) else { return 0.0 };
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let guests: u64 = threads
        .filter_map(|t| ticks(&t.path().join("stat").display().to_string()))
        .filter(|(name, _)| name.starts_with("CPU ") || name == "ALL CPUs/TCG")
        .map(|(_, n)| n)
        .sum();
    all.saturating_sub(guests) as f64 / 100.0
}

/// Name and user plus system ticks of a `stat` line; the name stands in parentheses and may hold any character.
fn parse(stat: &str) -> Option<(String, u64)> {
    let (open, close) = (stat.find('(')?, stat.rfind(')')?);
    let fields: Vec<&str> = stat.get(close + 2..)?.split(' ').collect();
    let ticks = |n: usize| fields.get(n)?.parse::<u64>().ok();
    // utime and stime are the 14th and 15th fields; the third is the first after the name.
    Some((stat.get(open + 1..close)?.to_owned(), ticks(11)? + ticks(12)?))
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn a_name_with_parentheses_does_not_shift_the_fields() {
        let line = "12 (a) b (c) S 1 2 3 4 5 6 7 8 9 10 70 5 0 0 20 0 1";
        assert_eq!(parse(line), Some(("a) b (c".into(), 75)));
        assert_eq!(parse("12"), None);
    }
}
