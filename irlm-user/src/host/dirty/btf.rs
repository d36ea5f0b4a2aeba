//! As much of a kernel's BTF as choosing a sampler takes: how many arguments a function or tracepoint has, and where a
//! structure keeps a member. aya reads BTF too, but gives out neither. Modules' BTF continues the kernel's own.
//!
//! Grammar: Documentation/bpf/btf.rst of the kernel.

use std::collections::HashMap;
use std::io;
use std::path::Path;

/// Where the kernel shows its BTF.
const KERNEL: &str = "/sys/kernel/btf/vmlinux";
/// Where it shows KVM's, if that is a module.
const KVM: &str = "/sys/kernel/btf/kvm";
/// More than any kernel has; a BTF of a vmlinux is some 6 MiB.
const MAX_BYTES: u64 = 256 << 20;

const KIND_PTR: u32 = 2;
const KIND_STRUCT: u32 = 4;
const KIND_TYPEDEF: u32 = 8;
const KIND_FUNC: u32 = 12;
const KIND_FUNC_PROTO: u32 = 13;

/// One type: its words, and where its names are.
#[derive(Clone, Copy, Debug)]
struct Type {
    /// Which part it is in: 0 the kernel, 1 the module.
    part: usize,
    /// Where in the part's type section.
    at: usize,
    kind: u32,
    /// Members or parameters.
    count: usize,
    /// Size, or the type it refers to.
    refers: u32,
}

#[derive(Debug)]
struct Part {
    bytes: Vec<u8>,
    types: usize,
    strings: std::ops::Range<usize>,
}

/// The kernel's types, KVM's included.
#[derive(Debug)]
pub(super) struct Btf {
    parts: Vec<Part>,
    types: Vec<Type>,
    /// Functions, structures and typedefs by kind and name.
    names: HashMap<(u32, String), u32>,
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

impl Btf {
    /// Of the running kernel.
    pub(super) fn running() -> io::Result<Self> {
        let read = |path: &str| -> io::Result<Vec<u8>> {
            if std::fs::metadata(path)?.len() > MAX_BYTES {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("{path}: too large")));
            }
            std::fs::read(path).map_err(|e| io::Error::new(e.kind(), format!("{path}: {e}")))
        };
        let mut parts = vec![read(KERNEL)?];
        if Path::new(KVM).exists() {
            parts.push(read(KVM)?);
        }
        Self::parse(parts).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "BTF not understood"))
    }

    /// `parts`: the kernel's, then a module's.
    fn parse(parts: Vec<Vec<u8>>) -> Option<Self> {
        // Type 0 is void and not written down.
        let void = Type { part: 0, at: 0, kind: 0, count: 0, refers: 0 };
        let mut out = Self { parts: vec![], types: vec![void], names: HashMap::new() };
        for bytes in parts {
            out.part(bytes)?;
        }
        Some(out)
    }

    fn part(&mut self, bytes: Vec<u8>) -> Option<()> {
        if bytes.get(..2)? != 0xeb9f_u16.to_ne_bytes() || bytes.get(2) != Some(&1) {
            return None;
        }
        let field = |n: usize| word(&bytes, 4 + n * 4).map(|w| w as usize);
        let header = field(0)?;
        let (types, type_len) = (header.checked_add(field(1)?)?, field(2)?);
        let (strings, string_len) = (header.checked_add(field(3)?)?, field(4)?);
        let (end, string_end) = (types.checked_add(type_len)?, strings.checked_add(string_len)?);
        if end > bytes.len() || string_end > bytes.len() {
            return None;
        }
        let part = self.parts.len();
        let mut at = types;
        self.parts.push(Part { bytes, types, strings: strings..string_end });
        while at < end {
            let bytes = &self.parts[part].bytes;
            let (name, info, refers) = (word(bytes, at)?, word(bytes, at + 4)?, word(bytes, at + 8)?);
            let (kind, count) = (info >> 24 & 0x1f, (info & 0xffff) as usize);
            let more = match kind {
                1 | 14 | 17 => 4,
                3 => 12,
                KIND_STRUCT | 5 | 15 | 19 => 12 * count,
                6 | KIND_FUNC_PROTO => 8 * count,
                2 | 7..=12 | 16 | 18 => 0,
                // Without knowing its length nothing after it can be read.
                _ => return None,
            };
            if matches!(kind, KIND_STRUCT | KIND_TYPEDEF | KIND_FUNC)
                && let Some(name) = self.name(part, name)
            {
                let id = u32::try_from(self.types.len()).ok()?;
                self.names.entry((kind, name)).or_insert(id);
            }
            self.types.push(Type { part, at: at - self.parts[part].types, kind, count, refers });
            at += 12 + more;
        }
        Some(())
    }

    fn name(&self, part: usize, offset: u32) -> Option<String> {
        let mut offset = offset as usize;
        let mut part = part;
        // A module's strings continue the kernel's.
        let base = self.parts[0].strings.len();
        if part > 0 && offset < base {
            part = 0;
        } else if part > 0 {
            offset -= base;
        }
        let p = &self.parts[part];
        let text = p.bytes.get(p.strings.clone())?.get(offset..)?;
        let end = text.iter().position(|b| *b == 0)?;
        (end > 0).then(|| String::from_utf8_lossy(&text[..end]).into_owned())
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type> {
        let id = *self.names.get(&(kind, name.to_owned()))?;
        self.get(id)
    }

    fn get(&self, id: u32) -> Option<Type> {
        self.types.get(id as usize).copied()
    }

    /// How many parameters a function has, and whether it is the kernel's own (not a module's).
    pub(super) fn function(&self, name: &str) -> Option<(usize, bool)> {
        let f = self.find(KIND_FUNC, name)?;
        let proto = self.get(f.refers).filter(|t| t.kind == KIND_FUNC_PROTO)?;
        Some((proto.count, f.part == 0))
    }

    /// How many arguments a tracepoint has.
    pub(super) fn tracepoint(&self, name: &str) -> Option<usize> {
        let t = self.find(KIND_TYPEDEF, &format!("btf_trace_{name}"))?;
        let pointer = self.get(t.refers).filter(|t| t.kind == KIND_PTR)?;
        let proto = self.get(pointer.refers).filter(|t| t.kind == KIND_FUNC_PROTO)?;
        // The first is the tracepoint's own.
        proto.count.checked_sub(1)
    }

    /// The offset in bytes of a direct member of a structure, and whether the member is a pointer.
    pub(super) fn member(&self, structure: &str, member: &str) -> Option<(u32, bool)> {
        let t = self.find(KIND_STRUCT, structure)?;
        let p = &self.parts[t.part];
        for n in 0..t.count {
            let at = p.types + t.at + 12 + n * 12;
            if self.name(t.part, word(&p.bytes, at)?).as_deref() == Some(member) {
                // The upper byte is a bit field's width, if the structure has any.
                let bits = word(&p.bytes, at + 8)? & 0x00ff_ffff;
                let pointer = self.get(word(&p.bytes, at + 4)?).is_some_and(|t| t.kind == KIND_PTR);
                return Some((bits / 8, pointer));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part with these types (words) and strings.
    fn part(types: &[u32], strings: &[u8]) -> Vec<u8> {
        let mut out = 0xeb9f_u16.to_ne_bytes().to_vec();
        out.extend([1, 0]);
        let len = types.len() as u32 * 4;
        for w in [24, 0, len, len, strings.len() as u32].iter().chain(types) {
            out.extend(w.to_ne_bytes());
        }
        out.extend(strings);
        out
    }

    fn info(kind: u32, count: u32) -> u32 {
        kind << 24 | count
    }

    fn kernel() -> Vec<u8> {
        let types = [
            // 1: int
            1,
            info(1, 0),
            4,
            0x20, //
            // 2: pointer to 1
            0,
            info(2, 0),
            1, //
            // 3: struct kvm_memory_slot { int a; int *b }
            5,
            info(4, 2),
            16,
            21,
            1,
            0,
            23,
            2,
            64, //
            // 4: int (*)(int, int, int), 5: pointer to it, 6: typedef btf_trace_x
            0,
            info(13, 3),
            1,
            0,
            1,
            0,
            1,
            0,
            1, //
            0,
            info(2, 0),
            4, //
            25,
            info(8, 0),
            5,
        ];
        part(&types, b"\0int\0kvm_memory_slot\0a\0b\0btf_trace_x\0")
    }

    #[test]
    fn arguments_and_members_are_found_in_the_kernel_and_in_its_module() {
        let strings = b"mark\0own\0";
        let base = 37;
        // 7: void own(int) of the module, by a prototype of its own; 8: mark by the kernel's prototype.
        let module =
            part(&[0, info(13, 1), 0, 0, 1, base + 5, info(12, 0), 7, base, info(12, 0), 4], strings);
        let btf = Btf::parse(vec![kernel(), module]).unwrap();
        assert_eq!(btf.member("kvm_memory_slot", "a"), Some((0, false)));
        assert_eq!(btf.member("kvm_memory_slot", "b"), Some((8, true)));
        assert_eq!(btf.member("kvm_memory_slot", "c"), None);
        assert_eq!(btf.tracepoint("x"), Some(2));
        assert_eq!(btf.function("own"), Some((1, false)));
        assert_eq!(btf.function("mark"), Some((3, false)));
        assert!(btf.function("none").is_none());
    }

    #[test]
    fn broken_bytes_end_in_none() {
        let whole = kernel();
        for cut in 0..whole.len() {
            let _ = Btf::parse(vec![whole[..cut].to_vec()]);
        }
        for at in 0..whole.len() {
            let mut bad = whole.clone();
            bad[at] ^= 0xff;
            if let Some(btf) = Btf::parse(vec![bad]) {
                let _ = (btf.member("kvm_memory_slot", "b"), btf.tracepoint("x"), btf.function("y"));
            }
        }
    }

    #[test]
    fn this_kernel_s_own_is_read() {
        let Ok(btf) = Btf::running() else {
            println!("skipped: this kernel shows no BTF");
            return;
        };
        assert_eq!(btf.member("list_head", "next"), Some((0, true)));
        assert!(btf.member("task_struct", "tgid").is_some_and(|(at, pointer)| at > 0 && !pointer));
    }
}
