//! Warnings about peers, of which whoever reaches a port can cause any number: one line a reason and origin in ten seconds.
//! How many were left out is said by the next line, or by [`flush`] where none follows.
//!
//! Bound: [`MOST`] origins a reason at a time; those beyond share one line, so that thousands of addresses write no
//! thousands of lines.

use crate::core::origin::Origin;
use std::collections::HashMap;
use std::fmt::Arguments;
use std::net::SocketAddr;
use std::sync::{LazyLock, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often one reason is said of one origin.
const EVERY: Duration = Duration::from_secs(10);
/// Origins that are told apart, a reason.
const MOST: usize = 32;

/// Bytes that are said of one thing.
const LONGEST: usize = 1024;

static LINES: LazyLock<Mutex<Lines>> = LazyLock::new(Mutex::default);

/// Says that something (`what`, always in the same words) is wrong with a peer, and how (`text`), unless that was said of
/// its origin just now.
pub(crate) fn warn(what: &'static str, peer: SocketAddr, text: Arguments<'_>) {
    let origin = Origin::from(peer.ip());
    let said = LINES.lock().unwrap_or_else(PoisonError::into_inner).may(what, origin, Instant::now());
    let text = if said.is_some() { shown(&text.to_string()) } else { String::new() };
    match said {
        Some(0) => tracing::warn!("{what}: {peer}: {text}"),
        Some(more) => tracing::warn!("{what}: {peer}: {text} (and {more} like it, not said)"),
        None => {}
    }
}

/// One line, and not a long one, whatever a peer has put into it.
fn shown(text: &str) -> String {
    let mut line: String = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() > LONGEST {
        line.truncate(line.floor_char_boundary(LONGEST));
        line.push('…');
    }
    line
}

/// Says what was left out and has not been said since; to be called now and then.
pub(crate) fn flush() {
    let told = LINES.lock().unwrap_or_else(PoisonError::into_inner).told(Instant::now());
    for (what, origin, more) in told {
        tracing::warn!("{what}: {origin}: {more} more like the last one");
    }
}

/// What was said when.
#[derive(Debug, Default)]
struct Lines {
    said: HashMap<&'static str, HashMap<Origin, Said>>,
}

#[derive(Debug)]
struct Said {
    at: Instant,
    left_out: u64,
}

impl Lines {
    /// Whether a line may be said now; if so, how many were left out before it.
    fn may(&mut self, what: &'static str, origin: Origin, now: Instant) -> Option<u64> {
        let of = self.said.entry(what).or_default();
        let mut key = origin;
        if of.len() >= MOST && !of.contains_key(&key) {
            of.retain(|_, s| s.left_out > 0 || now.saturating_duration_since(s.at) < EVERY);
            if of.len() >= MOST {
                key = Origin::OTHERS;
            }
        }
        match of.get_mut(&key) {
            Some(s) if now.saturating_duration_since(s.at) < EVERY => {
                s.left_out += 1;
                None
            }
            Some(s) => {
                s.at = now;
                Some(std::mem::take(&mut s.left_out))
            }
            None => {
                of.insert(key, Said { at: now, left_out: 0 });
                Some(0)
            }
        }
    }

    /// What was left out for so long that it is to be told by itself. Forgets what nobody does any more.
    fn told(&mut self, now: Instant) -> Vec<(&'static str, Origin, u64)> {
        let mut told = Vec::new();
        self.said.retain(|what, of| {
            of.retain(|origin, s| {
                if now.saturating_duration_since(s.at) < EVERY {
                    return true;
                }
                if s.left_out == 0 {
                    return false;
                }
                told.push((*what, *origin, std::mem::take(&mut s.left_out)));
                s.at = now;
                true
            });
            !of.is_empty()
        });
        told
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn origin(n: u32) -> Origin {
        IpAddr::from((n + 1).to_be_bytes()).into()
    }

    #[test]
    fn what_a_peer_has_said_is_one_short_line() {
        assert_eq!(shown("/x\n2026-11-30 INFO all moved\r\u{1b}[2J"), "/x 2026-11-30 INFO all moved  [2J");
        let long = shown(&"é".repeat(5000));
        assert!(long.len() <= LONGEST + '…'.len_utf8() && long.ends_with("é…"), "{}", long.len());
    }

    #[test]
    fn one_line_a_reason_and_origin_is_said_and_the_others_are_counted() {
        let (mut lines, begin) = (Lines::default(), Instant::now());
        let at = |ms: u64| begin + Duration::from_millis(ms);
        assert_eq!(lines.may("a", origin(1), at(0)), Some(0));
        let more = (1..10_000).filter(|n| lines.may("a", origin(1), at(*n)).is_some()).count();
        assert_eq!(more, 0, "a storm is one line");
        assert_eq!(lines.may("a", origin(2), at(5000)), Some(0), "another origin has a line of its own");
        assert_eq!(lines.may("b", origin(1), at(5000)), Some(0), "and so has another reason");
        assert_eq!(lines.may("a", origin(1), at(10_000)), Some(9999));
        assert_eq!(lines.may("a", origin(1), at(25_000)), Some(0));
    }

    #[test]
    fn what_was_left_out_is_told_also_where_nothing_follows() {
        let (mut lines, begin) = (Lines::default(), Instant::now());
        for _ in 0..5 {
            lines.may("a", origin(1), begin);
        }
        assert_eq!(lines.told(begin + EVERY / 2), []);
        assert_eq!(lines.told(begin + EVERY), [("a", origin(1), 4)]);
        assert_eq!(lines.told(begin + EVERY * 2), []);
        assert!(lines.said.is_empty(), "and then it is forgotten");
    }

    #[test]
    fn origins_beyond_the_bound_share_a_line() {
        let (mut lines, begin) = (Lines::default(), Instant::now());
        let said = (0..20_000).filter(|n| lines.may("a", origin(*n), begin).is_some()).count();
        assert_eq!(said, MOST + 1);
        assert_eq!(lines.said["a"].len(), MOST + 1);
        assert_eq!(lines.may("b", origin(20_000), begin), Some(0), "another reason is not theirs");
        let told = lines.told(begin + EVERY);
        assert_eq!(told, [("a", Origin::OTHERS, 20_000 - MOST as u64 - 1)]);
        assert_eq!(lines.may("a", origin(30_000), begin + EVERY * 2), Some(0), "room comes back");
    }
}
