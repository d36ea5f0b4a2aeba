//! What a run of tests came to, by what it printed. Red is a test that has a name and failed: a build that
//! failed, a test that cannot run here and a run that was ended from outside show nothing.

use anyhow::{Context as _, Result};
use std::process::{Command, Stdio};

/// What was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Seen {
    /// These tests failed.
    Failed(Vec<String>),
    /// So many passed, and none failed.
    Passed(usize),
    /// Nothing that counts, and why.
    Nothing(String),
}

/// A command that has ended.
#[derive(Debug)]
pub(crate) struct Run {
    out: String,
    err: String,
    /// None: a signal ended it.
    code: Option<i32>,
}

/// `timeout` says so when the time was over; the second, when it had to kill.
const LATE: [i32; 2] = [124, 137];

impl Run {
    pub(crate) fn of(c: &mut Command) -> Result<Self> {
        let what = crate::ctx::name(c);
        let end = c.stdin(Stdio::null()).output().with_context(|| format!("start {what}"))?;
        let text = |b: &[u8]| String::from_utf8_lossy(b).into_owned();
        Ok(Self { out: text(&end.stdout), err: text(&end.stderr), code: end.status.code() })
    }

    fn is_late(&self) -> bool {
        self.code.is_none_or(|c| LATE.contains(&c))
    }

    /// Why a build has come to nothing, if it has.
    pub(crate) fn not_built(&self) -> Option<String> {
        if self.code == Some(0) {
            return None;
        }
        if self.is_late() {
            return Some("the build has not come to its end in time".to_owned());
        }
        let error = self.err.lines().find(|l| l.starts_with("error"));
        Some(format!("it does not compile: {}", error.unwrap_or("cargo says nothing that is understood")))
    }

    /// What the tests of a run came to, in cargo's or the lab's words.
    pub(crate) fn seen(&self) -> Seen {
        if self.is_late() {
            return Seen::Nothing("the tests have not come to their end in time".to_owned());
        }
        if let Some(why) = self.out.lines().find_map(|l| l.trim().strip_prefix("skipped: ")) {
            return Seen::Nothing(format!("a test was skipped: {why}"));
        }
        let (mut failed, mut passed) = (Vec::new(), 0);
        for line in self.out.lines() {
            let Some((test, how)) = line.strip_prefix("test ").and_then(|l| l.rsplit_once(" ... ")) else {
                continue;
            };
            match how.split([' ', ',', ':']).next() {
                Some("ok") => passed += 1,
                Some("FAILED") => failed.push(test.to_owned()),
                Some("skipped" | "ignored") => {
                    return Seen::Nothing(format!("{test} was {how}"));
                }
                _ => {}
            }
        }
        match (failed.is_empty(), passed) {
            (false, _) => Seen::Failed(failed),
            (true, 0) => Seen::Nothing("no test of that name ran".to_owned()),
            (true, _) if self.code != Some(0) => {
                Seen::Nothing(format!("no test failed, and the run did: {}", last(&self.err)))
            }
            (true, _) => Seen::Passed(passed),
        }
    }
}

fn last(text: &str) -> &str {
    text.lines().rev().find(|l| !l.trim().is_empty()).unwrap_or("it says nothing")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(out: &str, err: &str, code: Option<i32>) -> Run {
        Run { out: out.into(), err: err.into(), code }
    }

    #[test]
    fn only_a_test_with_a_name_that_failed_is_red() {
        let out = "running 2 tests\ntest a::b ... ok\ntest a::c ... FAILED\n\ntest result: FAILED. 1 passed;";
        assert_eq!(run(out, "", Some(101)).seen(), Seen::Failed(vec!["a::c".into()]));
        assert_eq!(run("test a ... ok\ntest b ... ok\n", "", Some(0)).seen(), Seen::Passed(2));
        for (out, err, code, word) in [
            ("running 0 tests\n", "", Some(0), "no test"),
            ("test a ... ok\n", "error: signal: 11", Some(101), "signal: 11"),
            ("test a ... FAILED\n", "", Some(124), "in time"),
            ("test a ... FAILED\n", "", None, "in time"),
            ("test a ... ok\n---- a stdout ----\nskipped: no /dev/kvm\n", "", Some(0), "no /dev/kvm"),
            ("test own-x ... skipped: needs QEMU\n", "", Some(0), "needs QEMU"),
        ] {
            match run(out, err, code).seen() {
                Seen::Nothing(why) => assert!(why.contains(word), "{why}"),
                other => panic!("{out}: {other:?}"),
            }
        }
    }

    #[test]
    fn what_does_not_compile_is_not_red_and_says_so() {
        let why = run("", "   Compiling x\nerror[E0308]: mismatched types\n", Some(101)).not_built().unwrap();
        assert!(why.contains("does not compile") && why.contains("E0308"), "{why}");
        assert!(run("", "", Some(124)).not_built().unwrap().contains("in time"));
        assert_eq!(run("", "", Some(0)).not_built(), None);
    }
}
