//! What a QEMU, or whoever has its monitor socket, says there: greeting, replies and events, over a real socket. No bytes
//! make the client panic, keep more than its bounds, or take a line for the answer to what it did not ask.

use super::vmm_words::said;
use irlm_user::net::qmp::{MAX_EVENTS, Qmp};
use std::time::Duration;

pub(crate) fn target(data: &[u8]) {
    let (here, _there) = said(data);
    let wait = Duration::from_secs(5);
    let mut q = match Qmp::over(here, "fuzz".into(), wait) {
        Ok(q) => q,
        Err(e) => return assert!(!e.to_string().is_empty()),
    };
    q.set_timeout(wait);
    let _ = q.query_migrate();
    let _ = q.query_status();
    let _ = q.capabilities();
    let _ = q.parameters();
    let _ = q.vm_uuid();
    let _ = q.machine();
    let _ = q.memory();
    let _ = q.jobs();
    let _ = q.memory_backends();
    let found = q.found(&[("events", true)], &["max-bandwidth", "downtime-limit"]);
    if let Ok(found) = found {
        let _ = q.put_back(&found);
    }
    let _ = q.hmp("info mtree");
    while let Ok(Some(event)) = q.next_event(wait) {
        let _ = event.migration_status();
    }
    let events = q.drain_events().unwrap_or_default();
    assert!(events.len() <= MAX_EVENTS);
}

pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let greeting = "{\"QMP\":{\"version\":{\"qemu\":{\"micro\":22,\"minor\":2,\"major\":7},\"package\":\"\"},\
                    \"capabilities\":[\"oob\"]}}\n{\"return\":{},\"id\":1}\n";
    let event = "{\"timestamp\":{\"seconds\":1700000000,\"microseconds\":5},\"event\":\"MIGRATION\",\
                 \"data\":{\"status\":\"active\"}}\n";
    let replies = [
        "{\"status\":\"active\",\"total-time\":5,\"ram\":{\"total\":1,\"remaining\":2,\"dirty-sync-count\":3},\
         \"socket-address\":[{\"type\":\"inet\",\"port\":\"4444\"}],\"blocked-reasons\":[\"x\"]}",
        "{\"running\":true,\"status\":\"running\"}",
        "[{\"capability\":\"events\",\"state\":false}]",
        "{\"max-bandwidth\":1000,\"downtime-limit\":300}",
        "{\"UUID\":\"8b\"}",
        "\"pc-q35-7.2-machine\"",
        "{\"base-memory\":268435456,\"plugged-memory\":0}",
        "[{\"type\":\"virtio-mem\",\"data\":{\"max-size\":5,\"size\":1}}]",
        "[{\"id\":\"j\",\"type\":\"mirror\",\"status\":\"running\"}]",
        "[{\"id\":\"ram0\",\"size\":268435456,\"share\":true}]",
    ];
    let talk: String = replies
        .iter()
        .enumerate()
        .map(|(n, r)| format!("{event}{{\"return\":{r},\"id\":{}}}\n", n + 2))
        .collect();
    let refused = "{\"error\":{\"class\":\"GenericError\",\"desc\":\"no\"},\"id\":2}\n";
    [greeting.to_owned(), format!("{greeting}{talk}"), format!("{greeting}{refused}{talk}")]
        .map(String::into_bytes)
        .into()
}
