//! An input read as a list of choices. Where it ends all choices are the first, and the list is over.

/// What is left of an input.
#[derive(Debug)]
pub(crate) struct Ops<'a>(&'a [u8]);

impl<'a> Ops<'a> {
    pub(crate) fn new(data: &'a [u8]) -> Self {
        Self(data)
    }

    /// Whether there are no more choices.
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// One byte, or 0.
    pub(crate) fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((b, rest)) => {
                self.0 = rest;
                *b
            }
            None => 0,
        }
    }

    /// Two bytes.
    pub(crate) fn word(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    /// A number below `n`, which is no more than 256.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        usize::from(self.byte()) % n.max(1)
    }

    /// One time in four.
    pub(crate) fn rarely(&mut self) -> bool {
        self.byte() & 3 == 3
    }

    /// One of them.
    pub(crate) fn pick<T: Clone>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())].clone()
    }
}
