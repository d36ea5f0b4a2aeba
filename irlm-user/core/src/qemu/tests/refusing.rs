//! Streams that are not carried: each is refused by name, at the right byte, without waiting for more of it.

use super::build::{Build, RAM_ID, TAIL, content};
use super::*;

fn blocks() -> Build {
    let mut b = Build::usual();
    b.start(&[("m0", 0x2000), ("rom", 0x1000)]);
    b
}

#[test]
fn foreign_connections() {
    assert_eq!(refused(b"\x11\x22\x33\x44\0\0\0\x01"), StreamError::Multifd);
    assert_eq!(refused(b"QEVM\0\0\0\x02"), StreamError::Version { found: 2 });
    assert_eq!(refused(b"\x16\x03\x01\x02"), StreamError::NotMigration { found: [0x16, 3, 1, 2] });
    // Post-copy recovery has no header.
    assert_eq!(refused(b"\x08\0\x0a\0"), StreamError::NotMigration { found: [8, 0, 10, 0] });
    assert!(matches!(refused(b"QEV"), StreamError::Truncated { at: 0, .. }));
}

#[test]
fn configurations() {
    for len in [0, 256, u32::MAX] {
        let mut b = Build::new();
        b.raw(&[7]).raw(&len.to_be_bytes());
        assert_eq!(refused(&b.out), StreamError::MachineName { at: 8, len });
    }
    assert_eq!(refused(b"QEVM\0\0\0\x03\x07\0\0\0\x01\xff"), StreamError::MachineName { at: 8, len: 1 });

    let at = Build::new().configuration("pc").out.len() as u64;
    let capability = |name: &str| {
        let mut b = Build::new();
        b.configuration("pc")
            .subsection("configuration/capabilities", 1, &[0xff, 0xff, 0xff, 0xff])
            .name(name);
        refused(&b.out)
    };
    for name in ["x-ignore-shared", "mapped-ram", "novel"] {
        assert!(matches!(capability(name), StreamError::Capability { name: n, .. } if n == name));
    }
    let mut b = Build::new();
    b.configuration("pc").subsection("configuration/target-page-bits", 1, &[0, 0, 0, 16]);
    assert_eq!(refused(&b.out), StreamError::TargetPageBits { at, bits: 16 });
    for (name, version) in [("configuration/novel", 1), ("configuration/uuid", 2)] {
        let mut b = Build::new();
        b.configuration("pc").subsection(name, version, &[]);
        assert_eq!(refused(&b.out), StreamError::ConfigSubsection { at, name: name.into(), version });
    }
}

#[test]
fn commands() {
    let at = Build::usual().out.len() as u64;
    let refuse = |number: u16, len: u16| {
        let mut b = Build::usual();
        b.raw(&[8]).raw(&number.to_be_bytes()).raw(&len.to_be_bytes());
        refused(&b.out)
    };
    for (number, len) in [(4, 0), (5, 0), (6, 30), (7, 4), (9, 0), (10, 5)] {
        assert!(matches!(refuse(number, len), StreamError::Postcopy { at: a, .. } if a == at), "{number}");
    }
    assert_eq!(refuse(8, 0), StreamError::Colo { at });
    for number in [0, 12, 0xffff] {
        assert_eq!(refuse(number, 0), StreamError::Command { at, number });
    }
    for (number, len) in [(1, 1), (2, 0), (2, 0xffff), (3, 8), (11, 1)] {
        assert!(matches!(refuse(number, len), StreamError::CommandLength { len: l, .. } if l == len));
    }
}

#[test]
fn other_sections_before_the_end_of_ram() {
    let at = Build::usual().out.len() as u64;
    for (kind, name) in [
        (1, "dirty-bitmap"),
        (1, "block"),
        (1, "0000:00:04.0/vfio"),
        (4, "0000:00:05.0/virtio-mem-device-early"),
        (4, "ram"),
    ] {
        let mut b = Build::usual();
        b.section(kind, 9, name, 1);
        assert_eq!(refused(&b.out), StreamError::ForeignSection { at, name: name.into() });
        let mut b = blocks();
        b.part().zero("m0", 0).eos().section(kind, 9, name, 1);
        assert!(matches!(refused(&b.out), StreamError::ForeignSection { .. }));
    }
}

#[test]
fn records_out_of_place() {
    for byte in [5, 6, 7, 9, 0x7e, 0xff] {
        let mut b = blocks();
        let at = b.out.len() as u64;
        b.raw(&[byte]);
        assert_eq!(refused(&b.out), StreamError::Record { at, byte });
    }
    let mut b = blocks();
    b.raw(TAIL);
    assert!(matches!(refused(&b.out), StreamError::ForeignSection { .. }), "device state while RAM is open");
    let mut b = blocks();
    b.raw(&[0]);
    assert!(matches!(refused(&b.out), StreamError::EndBeforeRam { .. }));
    let mut b = blocks();
    b.raw(&[2, 0, 0, 0, 3]);
    assert!(matches!(refused(&b.out), StreamError::SectionId { id: 3, .. }));
    let mut b = Build::usual();
    b.part();
    assert!(matches!(refused(&b.out), StreamError::SectionId { id: RAM_ID, .. }), "before START");
    let mut b = blocks();
    b.section(1, RAM_ID, "ram", 4);
    assert!(matches!(refused(&b.out), StreamError::SecondStart { .. }));
    let mut b = Build::usual();
    b.section(1, RAM_ID, "ram", 5);
    assert!(matches!(refused(&b.out), StreamError::RamVersion { version: 5, .. }));
}

#[test]
fn block_lists() {
    let refuse = |f: &dyn Fn(&mut Build)| {
        let mut b = Build::usual();
        b.section(1, RAM_ID, "ram", 4);
        f(&mut b);
        refused(&b.out)
    };
    let rule = |f: &dyn Fn(&mut Build)| match refuse(f) {
        StreamError::Blocks { error, .. } => error,
        other => panic!("{other}"),
    };
    let list = |blocks: &[(&str, u64)]| {
        let mut b = Build::usual();
        b.start(blocks);
        match refused(&b.out) {
            StreamError::Blocks { error, .. } => error,
            other => panic!("{other}"),
        }
    };
    assert_eq!(list(&[("a", 0x1000), ("a", 0x2000)]), BlockListError::Duplicate { name: "a".into() });
    assert!(matches!(list(&[("a", 0x1800), ("b", 0x800)]), BlockListError::Unaligned { bytes: 0x1800, .. }));
    assert!(matches!(list(&[("a\n", 0x1000)]), BlockListError::Name { index: 0, .. }));
    assert!(matches!(
        rule(&|b| {
            b.word(0x1004).raw(b"\0");
            b.word(0x1000);
        }),
        BlockListError::Name { .. }
    ));
    assert!(matches!(
        rule(&|b| {
            b.word(0x1004).raw(b"\x01\xff");
            b.word(0x1000);
        }),
        BlockListError::Name { .. }
    ));
    assert_eq!(
        rule(&|b| {
            b.word(u64::MAX << 12 | 4).name("a").word(0x1000);
        }),
        BlockListError::TooLarge
    );
    let too_many = rule(&|b| {
        b.word(0x1_0000_0004);
        for i in 0..=MAX_BLOCKS {
            b.name(&i.to_string()).word(0);
        }
    });
    assert_eq!(too_many, BlockListError::TooMany);
    assert!(matches!(
        refuse(&|b| {
            b.word(0x1004).name("a").word(0x2000);
        }),
        StreamError::BlockTotal { bytes: 0x2000, left: 0x1000, .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(0x1004).name("a").word(u64::MAX);
        }),
        StreamError::BlockTotal { bytes: u64::MAX, .. }
    ));
    // Pages, a multifd flush, or the addresses of x-ignore-shared where the list should be or end.
    for word in [0x8, 0x2, 0x10, 0, 0x1005] {
        assert!(
            matches!(refuse(&|b| { b.word(word); }), StreamError::SetupWord { word: w, .. } if w == word)
        );
    }
    assert!(matches!(
        refuse(&|b| {
            b.word(0x1004).name("a").word(0x1000).word(0x8);
        }),
        StreamError::SetupWord { word: 8, .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(0x1004).name("a").word(0x1000).word(0x200);
        }),
        StreamError::RamFeature { name: "multifd", .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(0x80);
        }),
        StreamError::RamFeature { name: "the RDMA transport", .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(0x1004).name("a").word(0x1000).word(0x10).raw(b"\x7e\0\0\0\x03");
        }),
        StreamError::Footer { found: 3, section: RAM_ID, .. }
    ));
}

#[test]
fn ram_records() {
    let refuse = |f: &dyn Fn(&mut Build)| {
        let mut b = blocks();
        b.part();
        let at = b.out.len() as u64;
        f(&mut b);
        (refused(&b.out), at)
    };
    for (flag, feature) in
        [(0x40, "xbzrle"), (0x80, "the RDMA transport"), (0x100, "compress"), (0x200, "multifd")]
    {
        for word in [flag, flag | 0x20, flag | 0x1000] {
            let (error, at) = refuse(&|b| {
                b.word(word);
            });
            assert_eq!(error, StreamError::RamFeature { at, name: feature });
        }
    }
    for word in [0, 1, 4, 0x1004, 0x0a, 0x18, 0x12, 0x20, 0x30, 0x1010, 0x400, 0x800, 0xfff, u64::MAX] {
        let (error, at) = refuse(&|b| {
            b.word(word);
        });
        assert_eq!(error, StreamError::Word { at, word });
    }
    assert!(matches!(
        refuse(&|b| {
            b.word(0x28);
        })
        .0,
        StreamError::NoBlock { .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(0x22);
        })
        .0,
        StreamError::NoBlock { .. }
    ));
    let (error, at) = refuse(&|b| {
        b.word(8).name("m1");
    });
    assert_eq!(error, StreamError::UnknownBlock { at, name: "m1".into() });
    assert!(matches!(
        refuse(&|b| {
            b.word(8).name("");
        })
        .0,
        StreamError::UnknownBlock { .. }
    ));
    let (error, at) = refuse(&|b| {
        b.word(0x2008).name("m0");
    });
    assert_eq!(error, StreamError::Offset { at, name: "m0".into(), offset: 0x2000, used: 0x2000 });
    let far = !0xfffu64;
    assert!(
        matches!(refuse(&|b| { b.word(far | 8).name("m0"); }).0, StreamError::Offset { offset, .. } if offset == far)
    );
    // The page number must not be cut to 32 bits before it is compared.
    assert!(matches!(
        refuse(&|b| {
            b.word(1 << 44 | 2).name("m0");
        })
        .0,
        StreamError::Offset { .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.zero("m0", 0).page("rom", 1, &content(0));
        })
        .0,
        StreamError::Offset { .. }
    ));
    assert!(matches!(
        refuse(&|b| {
            b.word(2).name("m0").raw(&[1]);
        })
        .0,
        StreamError::Fill { fill: 1, .. }
    ));
}

#[test]
fn footers_that_are_wrong_or_missing() {
    let mut b = blocks();
    b.part().word(0x10).raw(b"\x7e\0\0\0\x07");
    assert!(matches!(refused(&b.out), StreamError::Footer { found: 7, section: RAM_ID, .. }));
    for end in [false, true] {
        let mut b = blocks();
        if end { b.end() } else { b.part() }.word(0x10).raw(&[4]);
        assert!(matches!(refused(&b.out), StreamError::NoFooter { found: 4, .. }));
    }
    let mut b = Build::usual();
    b.footers = false;
    b.start(&[("m0", 0x1000)]).part().eos().raw(b"\x7e\0\0\0\x02");
    assert!(matches!(refused(&b.out), StreamError::Record { byte: 0x7e, .. }), "START had none");
}

#[test]
fn every_refusal_is_one_line_that_says_where_and_what_to_do() {
    let mut b = blocks();
    b.section(1, 9, "dirty-bitmap\n", 1);
    let line = refused(&b.out).to_string();
    assert!(
        line.starts_with("stream offset ") && line.contains("dirty-bitmap") && !line.contains('\n'),
        "{line}"
    );
    assert!(line.contains("--method oc"), "{line}");
}
