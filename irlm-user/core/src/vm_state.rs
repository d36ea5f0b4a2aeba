//! How the state of a VM of our own front travels in `Verbatim` frames after RAM: QEMU's stream ends itself, a state of
//! ours is behind its length. What is in it only the two VMMs know; it is versioned and checksummed there.

/// Longest state, bytes: as the VMM's client takes it.
pub const MAX_STATE: usize = 64 << 20;
const MAGIC: &[u8; 8] = b"IRLMVMST";
const HEAD: usize = 16;

/// Why the bytes after RAM are no state.
#[derive(Debug, thiserror::Error, PartialEq, Eq, Clone)]
pub enum StateError {
    /// They begin otherwise.
    #[error("what follows the source's RAM is not the state of a VM of this front: is the source a QEMU?")]
    Magic,
    /// Longer than [`MAX_STATE`].
    #[error("the source announces a VM state of {0} bytes; at most {MAX_STATE} are taken")]
    TooLong(u64),
    /// More came than was announced.
    #[error("the source sent more than the VM state that it announced")]
    Trailing,
}

/// A state as it is sent.
#[must_use]
pub fn wrap(state: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEAD + state.len());
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&(state.len() as u64).to_le_bytes());
    out.extend_from_slice(state);
    out
}

/// Gathers a state from pieces of any size. It grows with what has come, not with what is announced.
#[derive(Debug, Default)]
pub struct Gather(Vec<u8>);

impl Gather {
    /// Takes a piece; gives the state once it is whole.
    pub fn take(&mut self, piece: &[u8]) -> Result<Option<&[u8]>, StateError> {
        if self.0.len() + piece.len() > HEAD + MAX_STATE {
            return Err(StateError::TooLong((self.0.len() + piece.len()) as u64));
        }
        self.0.extend_from_slice(piece);
        let shown = self.0.len().min(MAGIC.len());
        if self.0[..shown] != MAGIC[..shown] {
            return Err(StateError::Magic);
        }
        let Some((head, state)) = self.0.split_first_chunk::<HEAD>() else { return Ok(None) };
        let mut len = [0; 8];
        len.copy_from_slice(&head[MAGIC.len()..]);
        let len = u64::from_le_bytes(len);
        if len > MAX_STATE as u64 {
            return Err(StateError::TooLong(len));
        }
        match (state.len() as u64).cmp(&len) {
            std::cmp::Ordering::Less => Ok(None),
            std::cmp::Ordering::Equal => Ok(Some(state)),
            std::cmp::Ordering::Greater => Err(StateError::Trailing),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_arrives_in_pieces_of_any_size() {
        let state: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        let bytes = wrap(&state);
        for size in [1, 7, 16, 17, 5000] {
            let mut g = Gather::default();
            let mut whole = None;
            for piece in bytes.chunks(size) {
                assert!(whole.is_none());
                whole = g.take(piece).unwrap().map(<[u8]>::to_vec);
            }
            assert_eq!(whole.as_deref(), Some(&*state));
        }
        assert_eq!(Gather::default().take(&wrap(&[])).unwrap(), Some(&[][..]));
    }

    #[test]
    fn what_is_no_state_is_refused_by_name() {
        assert_eq!(Gather::default().take(b"QEVM"), Err(StateError::Magic));
        let mut long = wrap(&[]);
        long[8..].copy_from_slice(&(MAX_STATE as u64 + 1).to_le_bytes());
        assert_eq!(Gather::default().take(&long), Err(StateError::TooLong(MAX_STATE as u64 + 1)));
        let mut trailing = wrap(&[1, 2]);
        trailing.push(3);
        assert_eq!(Gather::default().take(&trailing), Err(StateError::Trailing));
    }
}
