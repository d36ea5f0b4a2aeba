//! Contents that appear after the plan (dirtied pages): asked of the index in batches, by a thread of its own, so that
//! no page waits for an answer. What the index knows to be at a target host, whoever brings it, goes there as a remote
//! reference from then on; what it does not know is deduplicated on this host only.

use super::SourceGroup;
use crate::core::index::LateItem;
use crate::core::units::HostIx;
use crate::flow::index::client::IndexClient;
use crate::flow::lock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Between two questions: many pages are dirtied again and again within less.
const PAUSE: Duration = Duration::from_millis(100);

/// Counted while it runs.
#[derive(Debug, Default)]
pub struct LateProgress {
    /// Contents asked about or reported.
    pub asked: AtomicU64,
    /// Pairs of content and target host that others were found to bring.
    pub known: AtomicU64,
}

/// Has the tables note what appears from now on.
pub fn begin(group: &SourceGroup) {
    for table in &group.tables {
        lock(table).note_fresh();
    }
}

/// Asks until `over` says that no VM streams any more, or the index is lost: that costs bandwidth only.
pub fn ask(group: &SourceGroup, client: &mut IndexClient, progress: &LateProgress, over: impl Fn() -> bool) {
    while !over() {
        std::thread::sleep(PAUSE);
        let mut items = Vec::new();
        for (t, table) in (0u16..).zip(&group.tables) {
            let fresh = lock(table).take_fresh();
            items.extend(fresh.iter().map(|f| LateItem {
                digest: f.digest,
                target: HostIx(t),
                kept: f.kept,
            }));
        }
        if items.is_empty() {
            continue;
        }
        progress.asked.fetch_add(items.len() as u64, Ordering::Relaxed);
        let replies = match client.late(&items) {
            Ok(r) => r,
            Err(e) => {
                tracing::debug!("group {}: new contents are deduplicated on this host only: {e}", group.name);
                return;
            }
        };
        for (item, reply) in items.iter().zip(replies) {
            let Some(id) = reply.id else { continue };
            for t in reply.delivered.iter().filter(|t| !(item.kept && *t == item.target)) {
                let Some(table) = group.tables.get(usize::from(t.0)) else { continue };
                lock(table).planned(item.digest, id);
                progress.known.fetch_add(1, Ordering::Relaxed);
            }
        }
    }
}
