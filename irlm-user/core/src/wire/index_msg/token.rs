//! The secret of a group, compared so that the time taken tells nothing.

/// The secret that lets a connection into a group: drawn at random by the coordinator.
#[derive(Clone, Copy)]
pub struct Token(pub [u8; 32]);

impl Token {
    /// Whether both are the same, in a time that does not tell where they differ.
    #[must_use]
    pub fn matches(&self, other: &Self) -> bool {
        let differ = self.0.iter().zip(&other.0).fold(0, |d, (a, b)| std::hint::black_box(d | (a ^ b)));
        std::hint::black_box(differ) == 0
    }
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        self.matches(other)
    }
}
impl Eq for Token {}
