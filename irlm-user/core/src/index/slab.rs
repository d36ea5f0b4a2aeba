//! An append-only table in chunks: growing a hundred million entries by doubling one `Vec` would need three times
//! their memory at the worst moment.

/// log2 of the items in a chunk.
const CHUNK_BITS: u32 = 14;
const CHUNK: usize = 1 << CHUNK_BITS;

/// Items numbered from 0 in the order of their arrival.
#[derive(Debug)]
pub(crate) struct Slab<T> {
    chunks: Vec<Vec<T>>,
    len: u32,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { chunks: Vec::new(), len: 0 }
    }
}

impl<T> Slab<T> {
    pub(crate) fn len(&self) -> u32 {
        self.len
    }

    /// Appends an item; its number. The caller keeps `len` below `u32::MAX`.
    pub(crate) fn push(&mut self, item: T) -> u32 {
        let number = self.len;
        match self.chunks.last_mut().filter(|c| c.len() < CHUNK) {
            Some(chunk) => chunk.push(item),
            None => {
                let mut chunk = Vec::with_capacity(CHUNK);
                chunk.push(item);
                self.chunks.push(chunk);
            }
        }
        self.len += 1;
        number
    }

    /// The item of that number, which `push` has given out.
    pub(crate) fn at(&self, number: u32) -> &T {
        &self.chunks[(number >> CHUNK_BITS) as usize][number as usize % CHUNK]
    }

    pub(crate) fn at_mut(&mut self, number: u32) -> &mut T {
        &mut self.chunks[(number >> CHUNK_BITS) as usize][number as usize % CHUNK]
    }

    pub(crate) fn heap_bytes(&self) -> usize {
        self.chunks.len() * CHUNK * size_of::<T>() + self.chunks.capacity() * size_of::<Vec<T>>()
    }
}
