//! A guest of one or more processors whose memory can be predicted: each goes round its own set of pages in a known order,
//! checks what it wrote there a round ago, writes the number of its step, and keeps count and checksum in a page of its
//! own. So whoever reads its memory can say of every page what must be in it, and of the whole that no step was
//! missed, none done twice, and no write lost, wherever it ran in between.

use crate::payload::{Code, image_of};

/// Page of the first processor's count; the next processors' follow.
pub const CONTROL: u32 = 0x10;
/// Where on it: step, checksum, steps that did not find what they had written, and [`STARTED`].
const STEP: usize = 0;
const SUM: usize = 4;
const ERRORS: usize = 8;
const MARK: usize = 12;
/// A processor has written this before its first step.
pub const STARTED: u32 = 0x5354_4550;
/// Second place on a page that is written.
const TAIL: usize = 4092;
/// What a page holds.
pub type Page = [u8; 4096];

/// The workload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Steps {
    /// Processors that work; of any more the rest halts.
    pub vcpus: u32,
    /// First page of the first processor's set, at or above 256 (1 MiB); all sets must lie below 3 GiB.
    pub first: u32,
    /// Pages in each processor's set.
    pub pages: u32,
    /// From one step to the next it goes on so many pages; without a common divisor with `pages`.
    pub stride: u32,
    /// Turns of an empty loop between two steps.
    pub spin: u32,
}

/// What a processor says of itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Seen {
    /// Its last whole step; 0 before the first.
    pub step: u32,
    /// Its checksum.
    pub sum: u32,
    /// Steps that found something else than they should.
    pub errors: u32,
    /// Whether it has begun.
    pub started: bool,
}

impl Steps {
    /// The 64 KiB image for `irlm vmm --payload` and for QEMU's `-bios`.
    ///
    /// # Panics
    /// The workload is none: no processor, no page, or a stride that does not reach all pages.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        assert!(self.vcpus > 0 && self.vcpus <= 64 && self.stride < self.pages, "{self:?}");
        assert_eq!(gcd(self.pages, self.stride), 1, "the stride must reach all pages");
        let mut c = Code::default();
        c.with(&[0xb8], 1) // mov eax, 1
            .put(&[0x0f, 0xa2]) // cpuid
            .put(&[0xc1, 0xeb, 24]) // shr ebx, 24: this processor's number
            .with(&[0x81, 0xfb], self.vcpus) // cmp ebx, vcpus
            .put(&[0x72, 3]) // jb over the next
            .put(&[0xf4, 0xeb, 0xfd]); // hlt; jmp back to hlt
        if self.vcpus > 1 {
            let mut start = Code::default();
            start.with(&[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe], 0x000c_4500); // mov [ICR], INIT to all others
            start.with(&[0xb9], 200).put(&[0x49, 0x75, 0xfd]); // mov ecx, 200; dec ecx; jnz back
            for _ in 0..2 {
                start.with(&[0xc7, 0x05, 0x00, 0x03, 0xe0, 0xfe], 0x000c_46f0); // mov [ICR], start at f000:0000
                start.with(&[0xb9], 200).put(&[0x49, 0x75, 0xfd]);
            }
            c.put(&[0x85, 0xdb]) // test ebx, ebx
                .put(&[0x75, start.0.len() as u8]) // jnz over what only the first does
                .put(&start.0);
        }
        c.put(&[0x89, 0xde, 0xc1, 0xe6, 12]) // mov esi, ebx; shl esi, 12
            .with(&[0x81, 0xc6], CONTROL << 12) // add esi, CONTROL
            .with(&[0x69, 0xfb], self.pages << 12) // imul edi, ebx, length of a set
            .with(&[0x81, 0xc7], self.first << 12) // add edi, first
            .put(&[0x89, 0xfa]) // mov edx, edi
            .with(&[0x81, 0xc2], self.pages << 12) // add edx, length of a set
            .put(&[0x31, 0xed, 0x31, 0xdb]) // xor ebp, ebp; xor ebx, ebx
            .with(&[0xc7, 0x46, MARK as u8], STARTED); // mov [esi + MARK], STARTED
        let again = c.0.len();
        c.put(&[0x45]) // inc ebp: the step
            .put(&[0x8b, 0x07]) // mov eax, [edi]
            .put(&[0x89, 0xe9]) // mov ecx, ebp
            .with(&[0x81, 0xe9], self.pages) // sub ecx, pages
            .put(&[0x73, 2, 0x31, 0xc9]) // jae over; xor ecx, ecx
            .put(&[0x39, 0xc8]) // cmp eax, ecx: what a round ago was written
            .put(&[0x74, 3, 0xff, 0x46, ERRORS as u8]) // je over; inc [esi + ERRORS]
            .put(&[0xd1, 0xc3, 0x31, 0xc3, 0x01, 0xeb]) // rol ebx, 1; xor ebx, eax; add ebx, ebp
            .put(&[0x89, 0x2f]) // mov [edi], ebp
            .put(&[0x89, 0xe8, 0x31, 0xf0]) // mov eax, ebp; xor eax, esi
            .with(&[0x89, 0x87], TAIL as u32) // mov [edi + TAIL], eax
            .put(&[0x89, 0x2e]) // mov [esi + STEP], ebp
            .put(&[0x89, 0x5e, SUM as u8]) // mov [esi + SUM], ebx
            .with(&[0x81, 0xc7], self.stride << 12) // add edi, stride
            .put(&[0x39, 0xd7]) // cmp edi, edx
            .put(&[0x72, 6]) // jb over the next
            .with(&[0x81, 0xef], self.pages << 12); // sub edi, length of a set
        if self.spin > 0 {
            c.with(&[0xb9], self.spin).put(&[0x49, 0x75, 0xfd]); // mov ecx, spin; dec ecx; jnz back
        }
        let from = c.0.len() + 5;
        c.with(&[0xe9], (again as u32).wrapping_sub(from as u32)); // jmp again
        image_of(&c.0)
    }

    /// Bytes of guest memory that it needs.
    #[must_use]
    pub fn memory(&self) -> u64 {
        (u64::from(self.first) + u64::from(self.vcpus) * u64::from(self.pages)) << 12
    }

    /// The guest page where a processor keeps its count.
    #[must_use]
    pub fn control_page(&self, vcpu: u32) -> u32 {
        CONTROL + vcpu
    }

    /// The guest page that a step writes to; steps begin with 1.
    #[must_use]
    pub fn page_of(&self, vcpu: u32, step: u32) -> u32 {
        let at = u64::from(step - 1) * u64::from(self.stride) % u64::from(self.pages);
        self.first + vcpu * self.pages + at as u32
    }

    /// The checksum after so many steps.
    #[must_use]
    pub fn sum(&self, steps: u32) -> u32 {
        (1..=steps).fold(0u32, |sum, s| (sum.rotate_left(1) ^ s.saturating_sub(self.pages)).wrapping_add(s))
    }

    /// What a processor says of itself.
    #[must_use]
    pub fn seen(control: &Page) -> Seen {
        let word = |at: usize| control[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
        let started = word(MARK) == STARTED;
        Seen { step: word(STEP), sum: word(SUM), errors: word(ERRORS), started }
    }

    /// Holds a processor's memory against what it must be; the guest must stand still. `read` gives a guest page. An error
    /// says what is wrong.
    ///
    /// # Errors
    /// Something is not as the processor's own count says, or `read` fails.
    pub fn check<E: std::fmt::Display>(
        &self,
        vcpu: u32,
        mut read: impl FnMut(u32, &mut Page) -> Result<(), E>,
    ) -> Result<Seen, String> {
        let mut page = [0; 4096];
        let mut get = |n: u32, page: &mut Page| read(n, page).map_err(|e| format!("page {n:#x}: {e}"));
        get(self.control_page(vcpu), &mut page)?;
        let seen = Self::seen(&page);
        let who = format!("processor {vcpu} after step {}", seen.step);
        if !seen.started {
            return Err(format!("processor {vcpu} has not started"));
        }
        if seen.errors > 0 {
            return Err(format!("{who}: {} steps did not find what they had written", seen.errors));
        }
        // It may stand between its last three writes: the step is counted, the sum not yet.
        let before = seen.step.checked_sub(1).map(|s| self.sum(s));
        if seen.sum != self.sum(seen.step) && Some(seen.sum) != before {
            return Err(format!("{who}: checksum {:#x}, not {:#x}", seen.sum, self.sum(seen.step)));
        }
        let tag = self.control_page(vcpu) << 12;
        let next = self.page_of(vcpu, seen.step + 1);
        for back in 0..self.pages {
            // The last steps, newest first, reach each page once.
            let step = i64::from(seen.step) - i64::from(back);
            let (n, want) = match u32::try_from(step) {
                Ok(s) if s > 0 => (self.page_of(vcpu, s), s),
                _ => {
                    let ahead = (1 - step) as u32;
                    // Not reached yet: page of a step that comes in this first round.
                    (self.page_of(vcpu, seen.step + ahead), 0)
                }
            };
            get(n, &mut page)?;
            let word = |at: usize| page[at..at + 4].try_into().map_or(0, u32::from_le_bytes);
            let tail = |s: u32| if s == 0 { 0 } else { s ^ tag };
            let is = (word(0), word(TAIL));
            let ahead = seen.step + 1;
            let ok = is == (want, tail(want))
                || n == next && (is == (ahead, tail(want)) || is == (ahead, tail(ahead)));
            if !ok || page[4..TAIL].iter().any(|b| *b != 0) {
                return Err(format!(
                    "{who}: page {n:#x} holds {:#x} and {:#x}, not step {want}, or something between them",
                    is.0, is.1
                ));
            }
        }
        Ok(seen)
    }
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    const SMALL: Steps = Steps { vcpus: 2, first: 256, pages: 10, stride: 3, spin: 0 };

    /// What the guest does, in Rust: memory after so many steps, with `half` of the next one's writes done.
    fn play(s: &Steps, vcpu: u32, steps: u32, half: u32) -> HashMap<u32, Page> {
        let mut m: HashMap<u32, Page> = HashMap::new();
        let put = |m: &mut HashMap<u32, Page>, page: u32, at: usize, v: u32| {
            m.entry(page).or_insert([0; 4096])[at..at + 4].copy_from_slice(&v.to_le_bytes());
        };
        let control = s.control_page(vcpu);
        put(&mut m, control, MARK, STARTED);
        for step in 1..=steps + 1 {
            let writes = if step > steps { half } else { 4 };
            let page = s.page_of(vcpu, step);
            let all = [
                (page, 0, step),
                (page, TAIL, step ^ (control << 12)),
                (control, STEP, step),
                (control, SUM, s.sum(step)),
            ];
            for (page, at, v) in all.into_iter().take(writes as usize) {
                put(&mut m, page, at, v);
            }
        }
        m
    }

    fn check(s: &Steps, vcpu: u32, m: &HashMap<u32, Page>) -> Result<Seen, String> {
        s.check(vcpu, |n, page| -> Result<(), String> {
            *page = m.get(&n).copied().unwrap_or([0; 4096]);
            Ok(())
        })
    }

    #[test]
    fn a_round_reaches_all_pages_of_a_set_and_no_other() {
        for vcpu in 0..2 {
            let round: HashSet<u32> = (5..15).map(|s| SMALL.page_of(vcpu, s)).collect();
            assert_eq!(round, (256 + vcpu * 10..266 + vcpu * 10).collect());
        }
        assert!(SMALL.image().len() == 64 << 10 && SMALL.memory() == 276 << 12);
    }

    #[test]
    fn the_model_takes_every_moment_and_no_wrong_page() {
        for steps in [0, 1, 5, 9, 10, 11, 37] {
            for half in 0..4 {
                let m = play(&SMALL, 1, steps, half);
                let seen = check(&SMALL, 1, &m).unwrap();
                assert_eq!(seen.step, steps + u32::from(half == 3));
                // Any word of any page of the set changed is seen.
                for page in 266..276 {
                    for at in [0, 2000, TAIL] {
                        let mut m = m.clone();
                        m.entry(page).or_insert([0; 4096])[at + 1] ^= 0x40;
                        assert!(check(&SMALL, 1, &m).is_err(), "step {steps}+{half}, page {page}, byte {at}");
                    }
                }
                let mut old = m.clone();
                let last = SMALL.page_of(1, steps.max(1));
                old.insert(last, [0; 4096]);
                assert!(steps == 0 || check(&SMALL, 1, &old).is_err(), "a lost write");
            }
        }
    }
}
