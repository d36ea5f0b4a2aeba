//! A guest of some sixty instructions whose writes are known: it writes a number into page after page of a *cold* and
//! of a *hot* set, at a pace set by the processor's time stamp counter, and says itself how often it has written. It
//! stands in the firmware's place, so it runs where no operating system would boot in useful time.

use std::ops::Range;

/// Where the guest keeps its count of writes (32 bits), and how many writes it lets pass between two updates. The
/// updates dirty a page too: one more in [`GRAIN`].
pub const COUNTER: u64 = 0x8000;
/// See [`COUNTER`].
pub const GRAIN: u32 = 256;

/// What the guest writes to, in guest page numbers, at or above 256 (1 MiB).
#[derive(Clone, Debug)]
pub struct Payload {
    /// Written one after the other, round and round.
    pub cold: Range<u32>,
    /// If not empty: one of these is written after each cold one, round and round.
    pub hot: Range<u32>,
    /// Ticks of the time stamp counter between two steps; 0: as fast as it can.
    pub ticks: u32,
    /// Turns of an empty loop between two steps: unlike `ticks` they do not make up for time lost elsewhere.
    pub spin: u32,
}

/// Where the 64 KiB image lies below 1 MiB, and in it: the descriptor table, its pointer, and the 32-bit code.
const BASE: u32 = 0xf_0000;
const TABLE_POINTER: usize = 0x40;
const TABLE: usize = 0x48;
const CODE: usize = 0x100;

/// Assembles as it goes.
#[derive(Default, Debug)]
pub struct Code(pub Vec<u8>);

impl Code {
    /// Whole instructions.
    pub fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }
    /// An instruction that ends in a 32-bit operand.
    pub fn with(&mut self, bytes: &[u8], operand: u32) -> &mut Self {
        self.put(bytes).put(&operand.to_le_bytes())
    }
    /// Writes the count to where `modrm` points, counts, and steps on a page; at `end` back to `start`. `register`: 3
    /// for ebx, 7 for edi.
    fn write_and_step(&mut self, register: u8, pages: &Range<u32>) -> &mut Self {
        self.put(&[0x89, 0x28 | register]); // mov [register], ebp
        self.put(&[0x45]); // inc ebp
        self.with(&[0x81, 0xc0 | register], 4096); // add register, 4096
        self.with(&[0x81, 0xf8 | register], pages.end << 12); // cmp register, end
        self.put(&[0x72, 5]); // jb over the next
        self.with(&[0xb8 | register], pages.start << 12) // mov register, start
    }
}

/// The 64 KiB image for QEMU's `-bios` and for `irlm vmm --payload` that enters `code` in flat 32-bit mode, with interrupts
/// off and no stack. A processor that is started with vector 0xf0 comes the same way.
///
/// # Panics
/// `code` is longer than the image has room for.
#[must_use]
pub fn image_of(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0; 64 << 10];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    // The reset vector: jmp f000:0000.
    put(0xfff0, &[0xea, 0x00, 0x00, 0x00, 0xf0]);
    // Real mode: load the descriptor table, switch to protected mode, and jump into flat 32-bit code.
    let mut real = Code::default();
    real.put(&[0xfa]) // cli
        .put(&[0x2e, 0x0f, 0x01, 0x16, TABLE_POINTER as u8, (TABLE_POINTER >> 8) as u8]) // lgdt cs:[pointer]
        .put(&[0x0f, 0x20, 0xc0]) // mov eax, cr0
        .put(&[0x0c, 0x01]) // or al, 1
        .put(&[0x0f, 0x22, 0xc0]) // mov cr0, eax
        .with(&[0x66, 0xea], BASE + CODE as u32) // jmp dword 8:CODE
        .put(&[0x08, 0x00]);
    put(0, &real.0);
    put(TABLE_POINTER, &[23, 0]); // three descriptors of 8 bytes, less one
    put(TABLE_POINTER + 2, &(BASE + TABLE as u32).to_le_bytes());
    put(TABLE + 8, &[0xff, 0xff, 0, 0, 0, 0x9b, 0xcf, 0]); // 8: code, 4 GiB
    put(TABLE + 16, &[0xff, 0xff, 0, 0, 0, 0x93, 0xcf, 0]); // 16: data, 4 GiB
    let mut flat = Code::default();
    flat.put(&[0x66, 0xb8, 0x10, 0x00]) // mov ax, 16
        .put(&[0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0]) // mov ds, ax; mov es, ax; mov ss, ax
        .put(code);
    assert!(CODE + flat.0.len() <= 0xfff0, "{} bytes of code", flat.0.len());
    put(CODE, &flat.0);
    image
}

impl Payload {
    /// The 64 KiB image for QEMU's `-bios` and for `irlm vmm --payload`.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        self.image_with(&[], &[])
    }

    /// The same with further instructions: `begin` before all else, `turn` whenever the count is updated. `turn` may use eax,
    /// ecx, edx and esi.
    #[must_use]
    pub fn image_with(&self, begin: &[u8], turn: &[u8]) -> Vec<u8> {
        let mut code = Code::default();
        code.put(begin);
        code.with(&[0xbf], self.cold.start << 12) // mov edi, cold
            .with(&[0xbb], self.hot.start << 12) // mov ebx, hot
            .put(&[0x31, 0xed]); // xor ebp, ebp
        let again = code.0.len();
        code.write_and_step(7, &self.cold);
        if !self.hot.is_empty() {
            code.write_and_step(3, &self.hot);
        }
        code.put(&[0x89, 0xe8]) // mov eax, ebp
            .with(&[0xa9], GRAIN - 2) // test eax, GRAIN - 2: steps may count by two
            .with(&[0x0f, 0x85], 6 + turn.len() as u32) // jnz over the next
            .with(&[0x89, 0x2d], COUNTER as u32) // mov [COUNTER], ebp
            .put(turn);
        if self.spin > 0 {
            code.with(&[0xb9], self.spin) // mov ecx, spin
                .put(&[0x49]) // dec ecx
                .put(&[0x75, 0xfd]); // jnz back to dec
        }
        if self.ticks > 0 {
            code.put(&[0x0f, 0x31]) // rdtsc
                .put(&[0x89, 0xc6]) // mov esi, eax
                .put(&[0x0f, 0x31]) // rdtsc
                .put(&[0x29, 0xf0]) // sub eax, esi
                .with(&[0x3d], self.ticks) // cmp eax, ticks
                .put(&[0x72, 0xf5]); // jb back to the second rdtsc
        }
        let from = code.0.len() + 5;
        code.with(&[0xe9], (again as u32).wrapping_sub(from as u32)); // jmp again
        image_of(&code.0)
    }
}
