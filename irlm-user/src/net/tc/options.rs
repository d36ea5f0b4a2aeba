//! Options of single kinds, found and changed in place.

/// Attributes begin at multiples of four.
pub(super) const fn align(n: usize) -> usize {
    n.next_multiple_of(4)
}

/// TCA_HTB_INIT.
pub(super) const HTB_INIT: u16 = 2;
/// Of `struct tc_htb_glob`: a counter of packets that no class took.
const DIRECT_PACKETS: std::ops::Range<usize> = 16..20;
/// TCA_U32_PCNT.
const U32_PCNT: u16 = 9;

/// Sets to 0 what HTB's own options count.
pub(super) fn forget_direct_packets(options: &mut [u8]) {
    if let Some(word) = glob(options).and_then(|g| g.get_mut(DIRECT_PACKETS)) {
        word.fill(0);
    }
}

/// Takes away what u32 counts per key.
pub(super) fn forget_key_counts(options: &mut [u8]) {
    if let Some(counts) = find(options, U32_PCNT) {
        counts.fill(0);
    }
}

/// `struct tc_htb_glob` among HTB's options.
pub(super) fn glob(options: &mut [u8]) -> Option<&mut [u8]> {
    find(options, HTB_INIT)
}

/// The value of one option.
pub(super) fn find(options: &mut [u8], wanted: u16) -> Option<&mut [u8]> {
    let mut at = 0;
    loop {
        let &[a, b, c, d] = options.get(at..at + 4)? else { return None };
        let (len, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
        if len < 4 {
            return None;
        }
        if kind == wanted {
            return options.get_mut(at + 4..at + len);
        }
        at += align(len);
    }
}
