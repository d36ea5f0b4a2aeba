//! One target as a program. Built by `cargo xtask fuzz` it is libFuzzer's, with the target's name in `IRLM_FUZZ`; built
//! as everything else is, it runs the target once on each file that it is given.
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(
    // libFuzzer takes an end for a finding, but not one before it has begun.
    init: { irlm_fuzz::named_by_environment(); },
    |data: &[u8]| irlm_fuzz::named_by_environment()(data)
);

#[cfg(not(fuzzing))]
fn main() -> std::process::ExitCode {
    irlm_fuzz::replay(std::env::args().skip(1))
}
