//! What a driver has set, as bytes: they go where the VM goes (docs/vmm.md).

#[cfg(test)]
use super::QUEUE_SIZE;
use virtio_queue::QueueState;

/// A device's state as it is saved (docs/vmm.md).
#[derive(PartialEq, Debug)]
pub(super) struct State {
    pub(super) number: u32,
    pub(super) identity: u64,
    pub(super) status: u32,
    pub(super) features: u64,
    pub(super) words: [u32; 5],
    pub(super) queues: Vec<QueueState>,
}

/// Bytes before the queues, and of each.
const STATE: usize = 44;
const STATE_QUEUE: usize = 34;
/// Most queues a device has.
const MAX_QUEUES: usize = 3;

impl State {
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(STATE + STATE_QUEUE * MAX_QUEUES);
        out.extend_from_slice(&self.number.to_le_bytes());
        out.extend_from_slice(&self.identity.to_le_bytes());
        out.extend_from_slice(&self.status.to_le_bytes());
        out.extend_from_slice(&self.features.to_le_bytes());
        self.words.iter().for_each(|w| out.extend_from_slice(&w.to_le_bytes()));
        for q in &self.queues {
            for n in [q.max_size, q.size, q.next_avail, q.next_used] {
                out.extend_from_slice(&n.to_le_bytes());
            }
            out.extend_from_slice(&[u8::from(q.ready), u8::from(q.event_idx_enabled)]);
            for at in [q.desc_table, q.avail_ring, q.used_ring] {
                out.extend_from_slice(&at.to_le_bytes());
            }
        }
        out
    }

    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        let (head, queues) = bytes.split_at_checked(STATE)?;
        let (queues, rest) = queues.as_chunks::<STATE_QUEUE>();
        if !rest.is_empty() || queues.is_empty() || queues.len() > MAX_QUEUES {
            return None;
        }
        let word = |b: &[u8], at: usize| Some(u32::from_le_bytes(*b[at..].first_chunk()?));
        let long = |b: &[u8], at: usize| Some(u64::from_le_bytes(*b[at..].first_chunk()?));
        let short = |b: &[u8], at: usize| Some(u16::from_le_bytes(*b[at..].first_chunk()?));
        let flag = |b: u8| (b < 2).then_some(b == 1);
        let queue = |q: &[u8; STATE_QUEUE]| {
            Some(QueueState {
                max_size: short(q, 0)?,
                size: short(q, 2)?,
                next_avail: short(q, 4)?,
                next_used: short(q, 6)?,
                ready: flag(q[8])?,
                event_idx_enabled: flag(q[9])?,
                desc_table: long(q, 10)?,
                avail_ring: long(q, 18)?,
                used_ring: long(q, 26)?,
            })
        };
        let mut words = [0; 5];
        for (i, w) in words.iter_mut().enumerate() {
            *w = word(head, 24 + 4 * i)?;
        }
        Some(Self {
            number: word(head, 0)?,
            identity: long(head, 4)?,
            status: word(head, 12)?,
            features: long(head, 16)?,
            words,
            queues: queues.iter().map(queue).collect::<Option<_>>()?,
        })
    }
}

/// Whether bytes are a saved device.
pub(in super::super) fn is_state(bytes: &[u8]) -> bool {
    State::of(bytes).is_some()
}

/// A state as no driver made it.
#[cfg(test)]
pub(in super::super) fn made_up(n: u32) -> Vec<u8> {
    let queue =
        QueueState { max_size: QUEUE_SIZE, size: 64, ready: true, next_used: 7, ..QueueState::default() };
    let queues = vec![QueueState { desc_table: u64::from(n) << 12, ..queue }; n as usize % 2 + 1];
    State { number: 2, identity: n.into(), status: 15, features: 1 << 32, words: [0, 1, 0, 1, 0], queues }
        .bytes()
}
