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
    Cast, CastKey, Data, Fragments, MAC_LEN, Miss, Report, decode, encode, seal,
};

const HOSTS: u16 = 4;
/// Version, kind, host and tag of a datagram.
const HEAD: usize = 12;

/// The input is cut into datagrams, each behind two bytes of length. As a stranger's they are refused; with a MAC put
/// behind them, as a member's who has gone mad, they are heard.
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
        assert!(decode(&key, said).is_err(), "a stranger was believed");
        let Some((host, said)) = said.split_first() else { continue };
        let sealed = seal(&key, HostIx(u16::from(host % 6)), said);
        let Ok((from, cast)) = decode(&key, &sealed) else { continue };
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
    let key = CastKey::new(&[1; 32]);
    let part = |fragment, payload: &'static [u8]| {
        Cast::Data(Data { block: 0, total: 150, size: 100, fragment, hosts: HostSet::first(2), payload })
    };
    let misses = vec![Miss { block: 1, fragments: Some(Fragments::first(3)) }, Miss { block: 2, fragments: None }];
    let all = [
        Cast::Announce { count: 1, next: 1 },
        part(0, &[7; 100]),
        part(1, &[8; 50]),
        Cast::Report(Report { count: 1, below: 0, end: 3, misses }),
        Cast::Skip(vec![1, 2]),
    ];
    let said = |cast: &Cast<'_>| {
        let mut out = Vec::new();
        encode(&key, HostIx(1), cast, &mut out);
        // Version, host and tag are put before it again, and a MAC behind it.
        let fields = &out[HEAD..out.len() - MAC_LEN];
        let length = fields.len() as u16 + 2;
        [&length.to_le_bytes()[..], &[1, out[1]], fields].concat()
    };
    let mut seeds: Vec<Vec<u8>> = all.iter().map(said).collect();
    seeds.push(seeds.concat());
    seeds
}
