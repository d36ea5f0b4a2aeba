//! House rules on size: what a reader can hold in mind of one function or one struct. Whatever is
//! larger says why in a comment directly above it: `// bounds: <why>`.

use crate::rust_text::code_only;
use std::ops::Range;

/// Most parameters of a function, `self` among them.
const PARAMETERS: usize = 7;
/// Fewest words of a reason: fewer say that there is one, not which.
const WORDS: usize = 3;
/// Where larger ones are only warned about, until they are split.
const OPEN: &[&str] = &["irlm-user/src/flow/", "irlm-user/src/control/"];

/// What a function and a struct may have.
struct Bounds {
    lines: usize,
    fields: usize,
}

const SHIPPED: Bounds = Bounds { lines: 80, fields: 15 };
/// A test may tell a long story, and tally much.
const TESTS: Bounds = Bounds { lines: 130, fields: 30 };

/// Whether a file is so far only warned about.
pub(crate) fn open(name: &str) -> bool {
    OPEN.iter().any(|place| name.starts_with(place))
}

/// What of a file is too large, each with its line.
pub(crate) fn check(name: &str, text: &str, fail: &mut impl FnMut(usize, String)) {
    let code = code_only(text);
    let source: Vec<&str> = text.lines().collect();
    let blank: Vec<&str> = code.lines().collect();
    let tests = test_items(&code);
    let of = |at: usize| {
        let test = is_test_file(name) || tests.iter().any(|t| t.contains(&at));
        if test { TESTS } else { SHIPPED }
    };
    let mut larger = |at: usize, what: String| {
        let line = line_of(&code, at);
        if !argued(&source, &blank, line) {
            let way = "split it, or say why in a `// bounds:` comment above it";
            fail(line + 1, format!("{what}: {way}"));
        }
    };
    for (at, name, after) in items(&code, "fn") {
        let Some(f) = Function::parse(&code, after) else { continue };
        if f.parameters > PARAMETERS {
            larger(at, format!("{name} takes {} parameters; at most {PARAMETERS}", f.parameters));
        }
        let (lines, most) = (line_of(&code, f.end) - line_of(&code, at) + 1, of(at).lines);
        if lines > most {
            larger(at, format!("{name} has {lines} lines; at most {most}"));
        }
    }
    for (at, name, after) in items(&code, "struct") {
        let (fields, most) = (fields(&code, after), of(at).fields);
        if fields > most {
            larger(at, format!("{name} has {fields} fields; at most {most}"));
        }
    }
}

fn is_test_file(name: &str) -> bool {
    let mut parts = name.rsplit('/');
    parts.next() == Some("tests.rs") || parts.any(|folder| folder == "tests")
}

/// Where the items begin and end that only a test build has.
fn test_items(code: &str) -> Vec<Range<usize>> {
    const MARK: &str = "#[cfg(test)]";
    code.match_indices(MARK)
        .map(|(at, _)| {
            let body = outside(code, at + MARK.len(), b"{;");
            at..closing(code, body)
        })
        .collect()
}

/// Each item of a kind that has a name: where its keyword is, the name, and where that ends.
fn items<'a>(code: &'a str, keyword: &'a str) -> impl Iterator<Item = (usize, &'a str, usize)> {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(keyword).filter_map(move |(at, _)| {
        let rest = &code[at + keyword.len()..];
        let name = rest.trim_start();
        let from = code.len() - name.len();
        let long = name.find(|c| !part(c)).unwrap_or(name.len());
        let whole = !code[..at].ends_with(part) && name.len() < rest.len() && long > 0;
        whole.then(|| (at, &name[..long], from + long))
    })
}

struct Function {
    parameters: usize,
    /// Where its body ends, or its declaration if it has none.
    end: usize,
}

impl Function {
    /// What follows a function's name; `None` if it is cut off.
    fn parse(code: &str, after: usize) -> Option<Self> {
        let open = outside(code, after, b"(");
        let close = closing(code, open);
        if close >= code.len() {
            return None;
        }
        Some(Self {
            parameters: listed(&code[open + 1..close]),
            end: closing(code, outside(code, close + 1, b"{;")),
        })
    }
}

/// How many named fields a struct has, by what follows its name.
fn fields(code: &str, after: usize) -> usize {
    let open = outside(code, after, b"{(;");
    // A bound of the type's own, such as `where F: Fn(u8)`, is no list of fields.
    let bounded = code[after..open].contains(" where ") || code[after..open].contains("\nwhere");
    let open = if bounded { outside(code, open, b"{;") } else { open };
    match code.as_bytes().get(open) {
        Some(b'{') => listed(&code[open + 1..closing(code, open)]),
        _ => 0,
    }
}

/// The first of `wanted` from `from` on that is in no brackets; the text's end if there is none.
fn outside(code: &str, from: usize, wanted: &[u8]) -> usize {
    let mut depth = Depth::default();
    for (i, c) in code.bytes().enumerate().skip(from) {
        if depth.none() && wanted.contains(&c) {
            return i;
        }
        depth.take(c);
    }
    code.len()
}

/// Where the bracket at `open` closes: `open` itself if it is none, the text's end if none does.
fn closing(code: &str, open: usize) -> usize {
    let mut depth = Depth::default();
    for (i, c) in code.bytes().enumerate().skip(open) {
        depth.take(c);
        if depth.none() {
            return i;
        }
    }
    code.len()
}

/// How many a list between brackets has; commas in brackets of their own do not part it.
fn listed(list: &str) -> usize {
    let (mut depth, mut count, mut any) = (Depth::default(), 0, false);
    for c in list.bytes() {
        if c == b',' && depth.none() {
            count += usize::from(any);
            any = false;
        } else {
            any |= !c.is_ascii_whitespace();
        }
        depth.take(c);
    }
    count + usize::from(any)
}

/// How deep in brackets a place is. Among others, `<` may be an operator and `>` the end of an
/// arrow.
#[derive(Default)]
struct Depth {
    brackets: usize,
    angles: usize,
    last: u8,
}

impl Depth {
    fn take(&mut self, c: u8) {
        match c {
            b'(' | b'[' | b'{' => self.brackets += 1,
            b')' | b']' | b'}' => self.brackets = self.brackets.saturating_sub(1),
            b'<' if self.brackets == 0 => self.angles += 1,
            b'>' if self.brackets == 0 && !matches!(self.last, b'-' | b'=') => {
                self.angles = self.angles.saturating_sub(1);
            }
            _ => {}
        }
        self.last = c;
    }

    fn none(&self) -> bool {
        self.brackets == 0 && self.angles == 0
    }
}

fn line_of(code: &str, at: usize) -> usize {
    code[..at.min(code.len())].matches('\n').count()
}

/// Whether a comment directly above the item gives a reason. Its attributes and its doc comment may
/// be between.
fn argued(source: &[&str], code: &[&str], line: usize) -> bool {
    (0..line)
        .rev()
        .take_while(|&n| !source[n].trim().is_empty() && !code[n].trim().ends_with(['{', '}', ';']))
        .filter_map(|n| source[n].trim().strip_prefix("// bounds:"))
        .any(|why| why.split_whitespace().count() >= WORDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(name: &str, text: &str) -> Vec<String> {
        let mut f = Vec::new();
        check(name, text, &mut |line, what| f.push(format!("{line}: {what}")));
        f
    }

    /// A function of so many lines.
    fn long(lines: usize) -> String {
        format!("fn long() -> [u8; 2] {{\n{}}}\n", "    g(\"}\");\n".repeat(lines - 2))
    }

    fn record(fields: usize) -> String {
        let fields: String =
            (0..fields).map(|n| format!("    /// It, {{.\n    f{n}: B<u8, u8>,\n")).collect();
        format!("struct A<T> {{\n{fields}}}\n")
    }

    #[test]
    fn a_long_function_is_found_unless_a_reason_is_given() {
        assert_eq!(found("src/a.rs", &long(80)), Vec::<String>::new());
        let f = found("src/a.rs", &long(81));
        assert!(f.len() == 1 && f[0].starts_with("1: long has 81 lines"), "{f:?}");
        for above in [
            "// bounds: one list of kinds\n/// What.\n#[must_use]\n",
            "/// What.\n/// More.\n// bounds: one list of kinds\n",
            "// bounds: one list of kinds\n#[expect(\n    lint,\n    reason = \"x\"\n)]\n",
        ] {
            assert_eq!(found("src/a.rs", &format!("{above}{}", long(81))).len(), 0, "{above}");
        }
        for above in [
            "// bounds: too long\n",
            "// bounds: one list of kinds\n\n",
            "// bounds: one list of kinds\nfn other() {}\n",
            "/// bounds: one list of kinds\n",
        ] {
            assert_eq!(found("src/a.rs", &format!("{above}{}", long(81))).len(), 1, "{above}");
        }
    }

    #[test]
    fn parameters_are_counted_by_the_commas_between_them() {
        let seven = "fn f<F: Fn(u8, u8) -> u8, const N: usize>(&mut self, (a, b): (u8, u8), c: M<u8, [u8; 2]>,\n\
                     d: impl Fn(u8, u8) -> Result<u8, u8>, e: fn(u8, u8), f: F, g: &dyn Fn() -> bool,)";
        assert_eq!(found("src/a.rs", &format!("{seven} {{}}\n")), Vec::<String>::new());
        let eight = seven.replace(",)", ", h: u8) -> W<u8, { 1 }>\nwhere F: Fn(u8)");
        for end in [" {}\n", ";\n"] {
            let f = found("src/a.rs", &format!("{eight}{end}"));
            assert!(f.len() == 1 && f[0].contains("f takes 8 parameters"), "{f:?}");
        }
        let reason = format!("// bounds: proptest draws each of them\n{eight} {{}}\n");
        assert_eq!(found("src/a.rs", &reason).len(), 0);
    }

    #[test]
    fn named_fields_are_counted_and_no_others() {
        assert_eq!(found("src/a.rs", &record(15)), Vec::<String>::new());
        let f = found("src/a.rs", &record(16));
        assert!(f.len() == 1 && f[0].contains("A has 16 fields"), "{f:?}");
        let bounded = record(16).replace("A<T> {", "A<T>\nwhere\n    T: Fn(u8),\n{");
        assert_eq!(found("src/a.rs", &bounded).len(), 1, "{bounded}");
        assert_eq!(found("src/a.rs", &format!("// bounds: one line of JSON\n{}", record(16))).len(), 0);
        let many = "u8, ".repeat(20);
        let others = format!("struct T({many});\nstruct U;\nenum E {{ {many} V {{ a: u8 }} }}\n");
        assert_eq!(found("src/a.rs", &others), Vec::<String>::new());
    }

    #[test]
    fn tests_have_bounds_of_their_own() {
        let both = format!("{}{}", long(130), record(30));
        for name in ["tests/a.rs", "irlm-user/src/a/tests/b.rs", "irlm-user/src/a/tests.rs"] {
            assert_eq!(found(name, &both), Vec::<String>::new(), "{name}");
            assert_eq!(found(name, &format!("{}{}", long(131), record(31))).len(), 2, "{name}");
        }
        assert_eq!(found("src/a.rs", &both).len(), 2);
        assert_eq!(
            found("src/a.rs", &format!("#[cfg(test)]\nmod tests {{\n{both}}}\n")),
            Vec::<String>::new()
        );
        // What follows an item for tests is shipped.
        assert_eq!(found("src/a.rs", &format!("#[cfg(test)]\nuse a::b;\n{both}")).len(), 2);
    }

    #[test]
    fn unfinished_text_is_no_matter() {
        for text in
            ["fn", "fn f", "fn f(", "fn f()", "fn f<", "struct", "struct S", "struct S {", "#[cfg(test)]"]
        {
            assert_eq!(found("src/a.rs", text), Vec::<String>::new(), "{text}");
        }
    }
}
