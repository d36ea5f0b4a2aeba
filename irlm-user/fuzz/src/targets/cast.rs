//! Datagrams of the target rack's multicast, and what is put together from them: whatever they say, nothing panics, what
//! is kept stays below its bounds, and what is read is what would be written.

use irlm_user::core::cast::block::open;
use irlm_user::core::cast::rate::Rate;
use irlm_user::core::cast::receiver::Receiver;
use irlm_user::core::cast::sender::Sender;
use irlm_user::core::cast::{HELD_BYTES, RING_BYTES};
use irlm_user::core::index::HostSet;
use irlm_user::core::units::{HostIx, Nanos};
use irlm_user::core::wire::cast::{
    Cast, CastKey, Data, Fragments, Miss, Report, decode, encode, fields, seal,
};

const HOSTS: u16 = 4;

/// The input is cut into datagrams, each behind two bytes of length. As a stranger's they are refused; sealed with
/// the group's key, as a member's who has gone mad, they are heard.
pub(crate) fn target(data: &[u8]) {
    let key = CastKey::new(&[1; 32]);
    let _ = open(data);
    let mut now = Nanos(0);
    let mut receiver = Receiver::new(HostIx(0), HOSTS, 1 << 20, 7);
    let mut sender = Sender::new(HostIx(0), HOSTS, key.clone(), 1472, Rate::new(1 << 20, 1 << 30, now), now);
    let (mut rest, mut out, mut reports) = (data, Vec::new(), Vec::new());
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_le_bytes(*length) % 2048).min(after.len());
        let (said, next) = after.split_at(length);
        rest = next;
        assert!(decode(&key, &mut said.to_vec()).is_err(), "a stranger was believed");
        let Some((host, said)) = said.split_first() else { continue };
        let sealed = seal(&key, HostIx(u16::from(host % 6)), said);
        let mut opened = sealed.clone();
        let Ok((from, cast)) = decode(&key, &mut opened) else { continue };
        encode(&key, from, &cast, &mut out);
        assert_eq!(out, sealed, "written otherwise than read");
        now = Nanos(now.0 + 3_000_000);
        match cast {
            Cast::Data(d) => drop(receiver.data(from, &d, now)),
            Cast::Announce { count, next } => receiver.announce(from, count, next, now),
            Cast::Report(r) => sender.report(from, &r, now),
            Cast::Skip(blocks) => receiver.skip(from, &blocks, now),
        }
        receiver.reports(now, &mut reports);
        if sender.takes() {
            sender.push(0, Vec::new(), HostSet::first(HOSTS), vec![*host; length.max(1)], now);
        }
        sender.step(now, &mut out);
        drop((reports.drain(..), sender.take_handed()));
        assert!(receiver.held() <= HELD_BYTES.min(1 << 20) && sender.kept() <= RING_BYTES);
    }
}

/// One datagram of each kind, as a member sends them, in one input.
pub(crate) fn seeds() -> Vec<Vec<u8>> {
    let part = |fragment, payload: &'static [u8]| {
        Cast::Data(Data { block: 0, total: 150, size: 100, fragment, hosts: HostSet::first(2), payload })
    };
    let misses = vec![Miss { block: 1, fragments: Some(Fragments::first(3)) }, Miss { block: 2, fragments: None }];
    let all = [
        (2, Cast::Announce { count: 1, next: 1 }),
        (1, part(0, &[7; 100])),
        (1, part(1, &[8; 50])),
        (3, Cast::Report(Report { count: 1, below: 0, end: 3, misses })),
        (4, Cast::Skip(vec![1, 2])),
    ];
    let said = |kind, cast: &Cast<'_>| {
        // Version, host and tag are put before it, and it is sealed.
        let mut out = Vec::new();
        fields(cast, &mut out);
        let length = out.len() as u16 + 2;
        [&length.to_le_bytes()[..], &[1, kind], &out].concat()
    };
    let mut seeds: Vec<Vec<u8>> = all.iter().map(|(kind, cast)| said(*kind, cast)).collect();
    seeds.push(seeds.concat());
    seeds
}
