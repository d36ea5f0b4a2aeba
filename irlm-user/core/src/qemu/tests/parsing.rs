//! Streams that are carried: each record, and every way to cut them.

use super::build::{Build, RAM_ID, TAIL, content};
use super::*;
use crate::units::BlockIx;

fn at(block: u16, page: u32) -> PageAddr {
    PageAddr { block: BlockIx(block), page }
}

/// Two blocks, CONTINUE over a section's end, a version superseded, a command between sections.
fn stream(footers: bool) -> Vec<u8> {
    let mut b = Build::usual();
    b.footers = footers;
    b.start(&[("pc.ram", 0x8000), ("pc.bios", 0x2000)]);
    b.part().zero("pc.ram", 0).page("pc.ram", 7, &content(1)).eos();
    b.part().zero("pc.ram", 1).page("pc.bios", 1, &content(2)).eos();
    b.part().eos();
    b.command(11, &[]);
    b.end().zero("pc.bios", 0).forget().page("pc.bios", 1, &content(3)).eos().raw(TAIL);
    b.out
}

#[test]
fn the_events_of_a_stream_in_order() {
    let stream = stream(true);
    let (parser, seen, end) = feed(&stream, &[usize::MAX]);
    assert_eq!(end, Ok(()));
    assert_eq!(parser.machine(), Some("pc-q35-7.2"));
    let list = parser.blocks().expect("known").clone();
    assert_eq!((list.section_id(), list.footers(), list.pages()), (RAM_ID, true, 10));
    assert_eq!(list.blocks()[1], RamBlock { name: "pc.bios".into(), used_bytes: 0x2000 });
    assert_eq!(
        (list.find(b"pc.bios"), list.find(b"pc.ram"), list.find(b"pc")),
        (Some(BlockIx(1)), Some(BlockIx(0)), None)
    );
    assert_eq!((list.linear(at(0, 7)), list.linear(at(1, 1))), (Some(7), Some(9)));
    assert_eq!((list.linear(at(0, 8)), list.linear(at(2, 0))), (None, None));
    let part = stream.windows(5).position(|w| w == b"\x02\0\0\0\x02").expect("a PART");
    assert_eq!(
        seen,
        [
            Seen::Verbatim(stream[..part].to_vec()),
            Seen::Blocks(list),
            Seen::Zero(at(0, 0)),
            Seen::Page(at(0, 7), content(1)),
            Seen::SectionEnd,
            Seen::Zero(at(0, 1)),
            Seen::Page(at(1, 1), content(2)),
            Seen::SectionEnd,
            Seen::SectionEnd,
            Seen::Verbatim(b"\x08\0\x0b\0\0".to_vec()),
            Seen::Stopped,
            Seen::Zero(at(1, 0)),
            Seen::Page(at(1, 1), content(3)),
            Seen::RamEnd,
            Seen::Verbatim(TAIL.to_vec()),
        ]
    );
}

#[test]
fn the_first_end_section_says_stopped() {
    let mut b = Build::usual();
    b.start(&[("m0", 0x1000)]).end().eos().raw(TAIL);
    let seen = events(&b.out);
    assert_eq!(seen[2..4], [Seen::Stopped, Seen::RamEnd]);
}

#[test]
fn cut_at_every_byte_the_events_are_the_same() {
    for footers in [true, false] {
        let stream = stream(footers);
        let whole = events(&stream);
        assert_eq!(feed(&stream, &[1]).1, whole, "byte by byte");
        for cut in 1..stream.len() {
            let (_, seen, end) = feed(&stream, &[cut, usize::MAX]);
            assert_eq!((seen == whole, end), (true, Ok(())), "cut at {cut}");
        }
    }
}

#[test]
fn every_proper_prefix_up_to_the_tail_is_truncated() {
    let stream = stream(true);
    for len in 0..=stream.len() - TAIL.len() {
        let (_, _, end) = feed(&stream[..len], &[usize::MAX]);
        assert!(matches!(end, Err(StreamError::Truncated { .. })), "{len}: {end:?}");
    }
    assert_eq!(feed(&stream[..stream.len() - TAIL.len() + 1], &[usize::MAX]).2, Ok(()));
}

#[test]
fn events_do_not_wait_for_footers() {
    let mut b = Build::usual();
    b.start(&[("m0", 0x2000)]).part().zero("m0", 0).word(0x10);
    assert_eq!(feed(&b.out, &[usize::MAX]).1.last(), Some(&Seen::SectionEnd));
    b.raw(b"\x7e\0\0\0\x02").end().zero("m0", 1).word(0x10);
    assert_eq!(feed(&b.out, &[usize::MAX]).1.last(), Some(&Seen::RamEnd));
}

#[test]
fn blocks_come_once_the_footer_is_settled() {
    for footers in [true, false] {
        let mut b = Build::usual();
        b.footers = footers;
        b.start(&[("m0", 0x1000)]);
        let (parser, seen, _) = feed(&b.out, &[usize::MAX]);
        assert_eq!(parser.blocks().is_some(), footers);
        assert_eq!(matches!(seen.last(), Some(Seen::Blocks(_))), footers);
        b.part();
        let (parser, seen, _) = feed(&b.out, &[usize::MAX]);
        assert_eq!(parser.blocks().map(|l| l.footers()), Some(footers));
        assert!(matches!(seen.last(), Some(Seen::Blocks(_))));
    }
}

#[test]
fn configurations_with_known_subsections_or_none_pass_verbatim() {
    let mut b = Build::new();
    b.configuration("virt");
    b.subsection("configuration/target-page-bits", 1, &[0, 0, 0, 12]);
    b.subsection("configuration/capabilities", 1, &[0; 4]);
    b.subsection("configuration/uuid", 1, &[7; 16]);
    b.start(&[("m0", 0x1000)]).end().eos().raw(TAIL);
    events(&b.out);

    let mut b = Build::new();
    b.start(&[("m0", 0x1000)]).end().eos().raw(TAIL);
    let (parser, _, end) = feed(&b.out, &[1]);
    assert_eq!((parser.machine(), end), (None, Ok(())));
}

#[test]
fn huge_page_blocks_carry_their_page_size_when_post_copy_was_advised() {
    let mut advice = 0x20_1000u64.to_be_bytes().to_vec();
    advice.extend_from_slice(&0x1000u64.to_be_bytes());
    for sizes in [[Some(0x20_0000), None], [None, Some(0x20_0000)], [Some(0x20_0000); 2], [None, None]] {
        let mut b = Build::usual();
        b.command(3, &advice);
        b.start_sized(&[("huge", 0x20_0000, sizes[0]), ("small", 0x20_0000, sizes[1])]);
        b.part().zero("small", 511).eos().end().eos().raw(TAIL);
        let seen = events(&b.out);
        assert_eq!(seen[2], Seen::Zero(at(1, 511)));
        assert_eq!(feed(&b.out, &[1]).1, seen);
    }
    // Without huge pages in the advice, or with an advice for bitmaps only, there is no such field.
    for advice in [&[0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 0, 0, 0, 0, 16, 0][..], &[]] {
        let mut b = Build::usual();
        b.command(3, advice).start_sized(&[("a", 0x1000, Some(0x20_0000)), ("b", 0x1000, None)]);
        assert!(matches!(refused(&b.out), StreamError::Blocks { .. }));
    }
}

#[test]
fn long_names_and_many_blocks_up_to_the_caps() {
    let names: Vec<String> = (0..MAX_BLOCKS).map(|i| format!("{i:0>MAX_NAME$}")).collect();
    let blocks: Vec<_> = names.iter().map(|n| (n.as_str(), 0x1000)).collect();
    let mut b = Build::usual();
    b.start(&blocks).part();
    for (i, name) in names.iter().enumerate().step_by(97) {
        b.page(name, 0, &content(i as u64));
    }
    b.eos().end().eos().raw(TAIL);
    let seen = events(&b.out);
    assert_eq!(seen[2], Seen::Page(at(0, 0), content(0)));
    assert_eq!(seen[3], Seen::Page(at(97, 0), content(97)));
    assert_eq!(feed(&b.out, &[97]).1, seen);
}

#[test]
fn the_tail_is_passed_in_one_slice_whatever_it_holds() {
    let mut b = Build::usual();
    b.start(&[("m0", 0x1000)]).end().eos();
    let tail: Vec<u8> = (0..1_000_000u32).map(|i| i as u8).collect();
    b.raw(&tail);
    let mut parser = Parser::new();
    let mut slices = Vec::new();
    let used = parser.parse::<StreamError>(&b.out, &mut |e| {
        if let Event::Verbatim(bytes) = e {
            slices.push(bytes.len());
        }
        Ok(())
    });
    assert_eq!((used, slices.last()), (Ok(b.out.len()), Some(&tail.len())));
}

#[test]
fn a_sink_error_comes_back_and_ends_the_parser() {
    #[derive(Debug, PartialEq)]
    enum Mine {
        Stream(StreamError),
        Full,
    }
    impl From<StreamError> for Mine {
        fn from(e: StreamError) -> Self {
            Self::Stream(e)
        }
    }
    let stream = stream(true);
    let mut parser = Parser::new();
    let stop = parser
        .parse(&stream, &mut |e| if matches!(e, Event::Page { .. }) { Err(Mine::Full) } else { Ok(()) });
    assert_eq!(stop, Err(Mine::Full));
    let again = parser.parse::<Mine>(&stream, &mut |_| Ok(()));
    assert!(matches!(again, Err(Mine::Stream(StreamError::Refused { .. }))));
}
