//! Whatever goes in comes out, and no bytes make a decoder panic or reserve beyond the caps.

use super::super::frame::*;
use super::super::limits::*;
use super::super::messages::*;
use super::super::pages::*;
use super::{at, decode, entries, golden, id};
use crate::account::Tally;
use crate::digest::{DIGEST_LEN, Digest};
use crate::handover::GuestState;
use crate::ram::{Block, Ram, Sums};
use crate::units::{HostIx, PageAddr, PageId, VmIx};
use proptest::collection::vec;
use proptest::prelude::*;

fn any_id() -> impl Strategy<Value = PageId> {
    (any::<u32>(), any::<u32>()).prop_map(|(b, i)| id(b, i))
}
fn any_digest() -> impl Strategy<Value = Digest> {
    any::<[u8; DIGEST_LEN]>().prop_map(Digest)
}
fn any_addr() -> impl Strategy<Value = PageAddr> {
    let page = prop_oneof![0..200u32, any::<u32>(), (u32::MAX - 20)..=u32::MAX];
    (prop_oneof![0..3u16, any::<u16>()], page).prop_map(|(b, p)| at(b, p))
}

/// One page as a sender puts it in.
#[derive(Clone, Copy, Debug)]
enum Put {
    Uniform(u8),
    Unique(Option<u32>),
    Shared(PageId, Digest, Form),
    Named(Digest, u32),
    Ref(PageId),
    Remote(PageId, Digest),
    Keep(Digest, u32),
}
fn any_slot() -> impl Strategy<Value = u32> {
    prop_oneof![0..300u32, 0..u32::MAX - 20]
}
fn any_form() -> impl Strategy<Value = Form> {
    prop_oneof![Just(Form::Whole), any_slot().prop_map(Form::Kept), any_slot().prop_map(Form::Less)]
}
fn any_put() -> impl Strategy<Value = Put> {
    prop_oneof![
        prop_oneof![Just(0u8), any::<u8>()].prop_map(Put::Uniform),
        proptest::option::of(any_slot()).prop_map(Put::Unique),
        (any_id(), any_digest(), any_form()).prop_map(|(i, d, f)| Put::Shared(i, d, f)),
        (any_digest(), any_slot()).prop_map(|(d, s)| Put::Named(d, s)),
        any_id().prop_map(Put::Ref),
        (any_id(), any_digest()).prop_map(|(i, d)| Put::Remote(i, d)),
        (any_digest(), any_slot()).prop_map(|(d, s)| Put::Keep(d, s)),
    ]
}

proptest! {
    #[test]
    fn pages_come_out_as_they_went_in(items in vec((any_addr(), 1..12u32, any_put()), 0..120)) {
        let mut b = PagesBuilder::default();
        b.unique(at(77, 7), None);
        b.clear();
        prop_assert!(b.is_empty());
        let mut sent = Vec::new();
        'all: for (first, count, put) in items {
            for i in 0..count {
                if b.is_full() { break 'all; }
                let addr = PageAddr { page: first.page.wrapping_add(i), ..first };
                // Belongs to no page.
                let addr = if let Put::Keep(..) = put { at(0, 0) } else { addr };
                let put = match put {
                    Put::Unique(Some(slot)) => Put::Unique(Some(slot + i)),
                    other => other,
                };
                match put {
                    Put::Uniform(f) => b.uniform(addr, f),
                    Put::Unique(slot) => b.unique(addr, slot),
                    Put::Shared(id, d, form) => b.shared(addr, id, &d, form),
                    Put::Named(d, slot) => b.named(addr, &d, slot),
                    Put::Ref(id) => b.reference(addr, id),
                    Put::Remote(id, d) => b.remote(addr, id, &d),
                    Put::Keep(d, slot) => b.keep(slot, &d),
                }
                sent.push((addr, put));
            }
        }
        let contents = b.contents();
        let mut reader = Records::new(b.meta());
        let mut got = Vec::new();
        while let Some(r) = reader.next() {
            let form = reader.form();
            let run = |addr: PageAddr, count: u32, put: Put| {
                (0..count).map(move |i| (PageAddr { page: addr.page + i, ..addr }, put))
            };
            match r.unwrap() {
                Record::Uniform { addr, count, fill } => got.extend(run(addr, count, Put::Uniform(fill))),
                Record::Unique { addr, count } => got.extend((0..count).map(|i| {
                    let slot = match form {
                        Form::Kept(first) => Some(first + i),
                        _ => None,
                    };
                    (PageAddr { page: addr.page + i, ..addr }, Put::Unique(slot))
                })),
                Record::Shared { addr, id, digest } => got.push((addr, Put::Shared(id, digest, form))),
                Record::Named { addr, digest } => {
                    let Form::Less(slot) = form else { panic!("{form:?}") };
                    got.push((addr, Put::Named(digest, slot)));
                }
                Record::Ref { addr, id } => got.push((addr, Put::Ref(id))),
                Record::Remote { addr, id, digest } => got.push((addr, Put::Remote(id, digest))),
                Record::Keep { digest, slot } => got.push((at(0, 0), Put::Keep(digest, slot))),
            }
        }
        prop_assert_eq!(reader.contents(), contents);
        prop_assert_eq!(format!("{got:?}"), format!("{sent:?}"));
    }

    // bounds: proptest draws each of them
    #[test]
    fn messages_come_out_as_they_went_in(
        versions in vec(any::<u16>(), 0..=MAX_VERSIONS),
        group in "[a-zä]{0,20}",
        (pass, nonce) in any::<([u8; 32], [u8; NONCE_LEN])>(),
        tally in any::<(u128, u64)>().prop_map(|(sum, pages)| Tally { sum, pages }),
        (tag, host, vm) in (0..9u8, any::<u16>().prop_map(HostIx), any::<u16>().prop_map(VmIx)),
        list in vec((proptest::option::of(any_id()), any_digest(), vec(any::<u16>(), 0..5)), 0..20),
        needs in vec((any_addr(), any_id(), proptest::option::of(any_digest())), 0..20),
        blocks in vec(("[ -~]{0,30}", any::<u64>()), 0..20),
        (section_id, footers) in (any::<u32>(), any::<bool>()),
        (why, unread) in ("[ -~]{0,40}", any::<u64>()),
        slots in vec(any::<u32>(), 0..40),
    ) {
        let purpose = match tag {
            0 => Purpose::Vm { source: host, vm },
            1 => Purpose::Push { source: host, domain: vm.0 },
            2 => Purpose::Peer { target: host, domain: vm.0 },
            3 => Purpose::Settle { source: host, vm },
            4 => Purpose::Demand { source: host, vm },
            5 => Purpose::Direct { source: host, vm },
            6 => Purpose::Stream { source: host, vm },
            7 => Purpose::Lend { source: host, domain: vm.0 },
            _ => Purpose::Probe { source: host },
        };
        let h = Hello { versions, group, pass, purpose };
        prop_assert_eq!(Hello::decode(&h.encode(&nonce)), Ok(h));
        let list: Vec<_> = list.iter().map(|(i, d, f)| {
            ContentEntry { id: *i, digest: *d, forward: f.iter().map(|h| HostIx(*h)).collect() }
        }).collect();
        prop_assert_eq!(decode_entries(Kind::Contents, &entries(&list)), Ok(list));
        let needs: Vec<_> = needs.into_iter().map(|(addr, i, d)| {
            NeedEntry { addr, want: d.map_or(Want::Id(i), Want::Digest) }
        }).collect();
        prop_assert_eq!(decode_needs(Kind::Need, &encode_needs(&needs)), Ok(needs));
        prop_assert_eq!(decode_slots(&encode_slots(&slots)), Ok(slots));
        let b = Blocks { section_id, footers, blocks };
        prop_assert_eq!(Blocks::decode(&b.encode()), Ok(b.clone()));
        let reasons = [Word::Aborted(why.clone()), Word::Refused(why.clone()), Word::Lost(why)];
        let bare = [Word::Runs, Word::Discarded, Word::Filled, Word::PagesLost, Word::Gone];
        let sums = std::array::from_fn(|n| Sums { marks: tally.sum, placed: n as u128 });
        let memory = b.blocks.iter().map(|(name, n)| Block { name: name.clone(), pages: *n as u32, sums }).collect();
        let memory = Word::Memory(Ram { blocks: memory, unread, took_ms: section_id });
        prop_assert_eq!(Word::decode(&memory.encode()), Ok(memory));
        let made = [None, Some(tally)].into_iter();
        let loaded = made.clone().flat_map(|t| [Word::Loaded(t), Word::Ready(t)]);
        let given = made.flat_map(|t| GuestState::ALL.map(|g| Word::GivenUp(g, t)));
        for w in reasons.into_iter().chain(bare).chain(loaded).chain(given) {
            prop_assert_eq!(Word::decode(&w.encode()), Ok(w));
        }
    }

    #[test]
    fn random_bytes_end_in_a_value_or_an_error(head in any::<[u8; HEADER_LEN]>(), meta in vec(any::<u8>(), 0..400)) {
        if let Ok(h) = Header::decode(&head) {
            prop_assert!(h.payload_len() <= MAX_META + MAX_BODY);
        }
        for kind in Kind::ALL {
            let _ = decode(*kind, &meta);
        }
    }

    /// One byte of a good frame changed: more of the decoders' depths are reached than by noise.
    #[test]
    fn damaged_frames_end_in_a_value_or_an_error(which in any::<prop::sample::Index>(), byte in any::<prop::sample::Index>(), v in any::<u8>()) {
        let list = golden();
        let (kind, mut meta, _) = list[which.index(list.len())].clone();
        if !meta.is_empty() {
            let i = byte.index(meta.len());
            meta[i] = v;
            let _ = decode(kind, &meta);
        }
    }
}
