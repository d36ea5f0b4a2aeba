//! All targets. A new one is a file here with `target` and `seeds`, and a line in this list.

use crate::{Kind, Target};

/// Declares the modules, and lists them.
macro_rules! targets {
    ($($(#[$doc:meta])* $name:ident: $kind:ident, $tries:expr;)*) => {
        $($(#[$doc])* mod $name;)*
        /// All of them.
        pub const ALL: &[Target] = &[$(Target {
            name: stringify!($name),
            kind: Kind::$kind,
            run: $name::target,
            seeds: $name::seeds,
            tries: $tries,
        }),*];
    };
}

// The number is how many mutations a test tries: those of slow targets are fewer.
targets! {
    cast: Parser, 20_000;
    config: Parser, 5_000;
    control: Parser, 20_000;
    frames: Parser, 20_000;
    identity: Parser, 20_000;
    index_msg: Parser, 20_000;
    pages: Parser, 5_000;
    paging: Parser, 10_000;
    qemu_stream: Parser, 5_000;
    qmp: Parser, 10_000;
    vmm_state: Parser, 10_000;
    vmm_words: Parser, 10_000;
    arrival: States, 20_000;
    budget: States, 20_000;
    drivers: States, 20_000;
    handover: States, 10_000;
    hold: States, 20_000;
    index: States, 5_000;
    page_set: States, 20_000;
}
