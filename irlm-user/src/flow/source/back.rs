//! Reads what the target says on a VM or settle connection and posts it to the vm thread, so that the vm thread never
//! blocks on a read.

use super::{Input, SourceVmShared};
use crate::core::wire::frame::{Kind, WireError};
use crate::core::wire::limits::MAX_UNKEPT;
use crate::core::wire::messages::{Word, decode_needs, decode_number, decode_slots};
use crate::flow::{lock, now};
use crate::net::conn::{FrameBuf, NetError, peer_name};
use crate::net::connection::Connection;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Reads until the connection ends or stays silent for `silence`. `number` tells connections of one VM apart.
pub(super) fn read(
    stream: &Connection,
    mut frames: FrameBuf,
    number: u32,
    silence: Duration,
    shared: &Arc<SourceVmShared>,
) {
    let why = loop {
        let frame = match frames.wait(stream, silence) {
            Ok(f) => f,
            Err(e) => break e.to_string(),
        };
        shared.heard.store(now().0, Ordering::Relaxed);
        let input = match frame.kind {
            Kind::Heartbeat => Ok(None),
            Kind::Waiting => decode_number(frame.kind, frame.meta).map(|n| Some(Input::Waiting(n))),
            Kind::Taken => decode_number(frame.kind, frame.meta).map(|n| {
                shared.taken.store(n, Ordering::Release);
                None
            }),
            Kind::Unkept => decode_slots(frame.meta).map(|slots| {
                let mut unkept = lock(&shared.unkept);
                let room = MAX_UNKEPT.saturating_sub(unkept.len());
                unkept.extend(slots.into_iter().take(room));
                None
            }),
            Kind::Need => decode_needs(Kind::Need, frame.meta).map(|n| Some(Input::Needs(n))),
            Kind::Demand | Kind::Lacks => Ok(Some(Input::Paging(frame.kind, frame.meta.to_vec()))),
            Kind::Word => Word::decode(frame.meta).map(|w| Some(Input::Word(w))),
            Kind::ReturnPath => Ok(Some(Input::ReturnPath(frame.body.to_vec()))),
            kind => Err(WireError::Unexpected(kind)),
        };
        match input {
            Ok(None) => {}
            Ok(Some(input)) => shared.inbox.post(input),
            Err(source) => break NetError::Wire { peer: peer_name(stream), source }.to_string(),
        }
    };
    // Also ends the writing half: nobody would hear it.
    let _ = stream.shutdown(std::net::Shutdown::Both);
    shared.lost.store(true, Ordering::Relaxed);
    shared.inbox.post(Input::Lost(number, why));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::wire::messages::{encode_number, encode_slots};
    use crate::net::conn::send;

    #[test]
    fn slots_that_could_not_be_filled_are_remembered_up_to_a_bound() {
        let (target, stream) = crate::net::connection::pair();
        let shared = Arc::new(SourceVmShared::new().unwrap());
        for slots in [&[7, 300][..], &vec![9; MAX_UNKEPT]] {
            send(&target, Kind::Unkept, &encode_slots(slots), &[]).unwrap();
        }
        send(&target, Kind::Taken, &encode_number(5), &[]).unwrap();
        drop(target);
        read(&stream, FrameBuf::new(), 0, Duration::from_secs(20), &shared);
        let unkept = lock(&shared.unkept);
        assert_eq!((unkept.len(), &unkept[..3]), (MAX_UNKEPT, &[7, 300, 9][..]));
        assert_eq!(shared.taken.load(Ordering::Acquire), 5);
    }
}
