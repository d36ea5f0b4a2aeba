//! The kept inputs, and mutations of them from a fixed seed, on the compiler that builds everything else. All targets are
//! tried, two at a time, and those that found something are named. `IRLM_FUZZ_SEED` gives other mutations.

use irlm_fuzz::{ALL, Random, Target, kept, mutate};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;

#[test]
fn kept_inputs_and_mutations_of_them_find_nothing() {
    let waiting = Mutex::new(ALL.iter());
    let findings = Mutex::new(Vec::new());
    std::thread::scope(|s| {
        for _ in 0..2 {
            s.spawn(|| {
                while let Some(t) = waiting.lock().ok().and_then(|mut w| w.next()) {
                    if let Some(found) = one(t) {
                        findings.lock().unwrap().push(found);
                    }
                }
            });
        }
    });
    let findings = findings.into_inner().unwrap();
    assert!(findings.is_empty(), "{}", findings.join("\n"));
}

/// What the target finds first.
fn one(t: &Target) -> Option<String> {
    let start = std::time::Instant::now();
    let mut inputs = (t.seeds)();
    assert!(!inputs.is_empty(), "{} begins with nothing", t.name);
    inputs.extend(kept(t.name).expect("the kept corpus"));
    let mut random = Random(std::env::var("IRLM_FUZZ_SEED").map_or(1, |s| s.parse().expect("a number")));
    let found = inputs
        .iter()
        .find_map(|i| finding(t, i))
        .or_else(|| (0..t.tries).find_map(|_| finding(t, &mutate(&inputs, &mut random))));
    println!("{}: {} inputs, {} mutations, {:.1?}", t.name, inputs.len(), t.tries, start.elapsed());
    found
}

/// Runs it, and says where its input is if that finds something.
fn finding(t: &Target, input: &[u8]) -> Option<String> {
    catch_unwind(AssertUnwindSafe(|| (t.run)(input))).err()?;
    let file = std::env::temp_dir().join(format!("irlm-fuzz-{}-{}", t.name, std::process::id()));
    std::fs::write(&file, input).expect("a place for the input");
    Some(format!("{}: once more with `cargo run -p irlm-fuzz -- {} {}`", t.name, t.name, file.display()))
}
