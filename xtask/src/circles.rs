//! No circles among files: what uses what, read from the text, so that each file can be understood
//! before its users.

use crate::rust_text::{blank_tests, code_only};
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};

/// The crates that are looked at: where their files are.
const CRATES: &[&str] = &["irlm-user/src/", "irlm-user/core/src/"];
/// Two folders that must not name each other: both sides of a move share what is in `flow` itself.
const APART: (&str, &str) = ("irlm-user/src/flow/source/", "irlm-user/src/flow/arrival/");
/// Circles that are known: one whose files are all below the paths of one entry is a warning. No
/// new ones, please.
const KNOWN: &[&[&str]] = &[&["irlm-user/src/control/agent/"]];

/// A file, as its name from the tree's directory and its text.
pub(crate) type Source = (String, String);

/// What is wrong, and whether it is only a warning.
pub(crate) fn check(sources: &[Source]) -> Vec<(String, bool)> {
    let mut out = Vec::new();
    for root in CRATES {
        let graph = Graph::of(root, sources);
        for circle in graph.circles() {
            let names: Vec<&str> = circle.iter().map(|&f| graph.files[f].name.as_str()).collect();
            let known = is_known(&names);
            let names: Vec<&str> = names.iter().map(|n| &n[root.len()..]).collect();
            let what = format!("{root}: files use each other in a circle: {}", names.join(", "));
            out.push((format!("{what}; {}", graph.example(&circle)), known));
        }
        for (&(from, to), edge) in &graph.edges {
            let (a, b) = (&graph.files[from].name, &graph.files[to].name);
            let apart = |x: &str, y: &str| a.starts_with(x) && b.starts_with(y);
            if apart(APART.0, APART.1) || apart(APART.1, APART.0) {
                let what = "source and arrival must not name each other: put what both need into flow";
                out.push((format!("{a}:{}: {} ({what})", edge.line, edge.path), false));
            }
        }
    }
    out
}

fn is_known(names: &[&str]) -> bool {
    KNOWN.iter().any(|paths| names.iter().all(|n| paths.iter().any(|p| n.starts_with(p))))
}

/// One place where a file names another one's item.
struct Edge {
    line: usize,
    path: String,
}

/// What is known of a file, which is one module.
#[derive(Default)]
struct File {
    name: String,
    parent: Option<usize>,
    /// Modules in files of their own, by name.
    children: HashMap<String, usize>,
    /// Names that `use` brings in, and the path behind each.
    bound: HashMap<String, Vec<String>>,
    /// Paths behind `use …::*`.
    globs: Vec<Vec<String>>,
    /// Names of items that are written here.
    defined: HashSet<String>,
    /// Every path in the code, by line.
    paths: Vec<(usize, Vec<String>)>,
}

struct Graph {
    files: Vec<File>,
    edges: BTreeMap<(usize, usize), Edge>,
}

/// What a path leads to: a module, or an item of a file.
#[derive(Clone, Copy)]
enum Place {
    Module(usize),
    Item(usize),
}

/// Paths through more re-exports than this are a mistake of ours, not of the code.
const DEEP: usize = 16;

impl Graph {
    /// The files that are reached from `lib.rs` of the crate at `root` by `mod`, without tests.
    fn of(root: &str, sources: &[Source]) -> Self {
        let texts: HashMap<&str, &str> = sources.iter().map(|(n, t)| (n.as_str(), t.as_str())).collect();
        let mut graph = Graph { files: Vec::new(), edges: BTreeMap::new() };
        let mut waiting = VecDeque::from([(None, String::new(), format!("{root}lib.rs"))]);
        while let Some((parent, module, name)) = waiting.pop_front() {
            let Some(text) = texts.get(name.as_str()) else { continue };
            let (mut file, mods) = read(text);
            let at = graph.files.len();
            let base = match name.strip_suffix("mod.rs").or_else(|| name.strip_suffix("lib.rs")) {
                Some(folder) => folder.to_owned(),
                None => format!("{}/", name.trim_end_matches(".rs")),
            };
            for m in mods {
                let names = [format!("{base}{m}.rs"), format!("{base}{m}/mod.rs")];
                if let Some(n) = names.into_iter().find(|n| texts.contains_key(n.as_str())) {
                    waiting.push_back((Some(at), m, n));
                }
            }
            (file.name, file.parent) = (name, parent);
            graph.files.push(file);
            if let Some(p) = parent {
                graph.files[p].children.insert(module, at);
            }
        }
        graph.connect();
        graph
    }

    fn connect(&mut self) {
        for from in 0..self.files.len() {
            for (line, path) in &self.files[from].paths {
                let Some(Place::Module(to) | Place::Item(to)) = self.resolve(from, path, 0) else { continue };
                if to != from {
                    let edge = || Edge { line: *line, path: path.join("::") };
                    self.edges.entry((from, to)).or_insert_with(edge);
                }
            }
        }
    }

    /// Where a path that is written in `at` leads; `None` out of the crate.
    fn resolve(&self, at: usize, path: &[String], depth: usize) -> Option<Place> {
        let mut here = at;
        for (i, name) in path.iter().enumerate() {
            match name.as_str() {
                "self" => continue,
                "crate" => here = 0,
                "super" => here = self.files[here].parent?,
                name => match self.step(here, name, depth) {
                    Some(Place::Module(m)) => here = m,
                    Some(item) => return Some(item),
                    // A macro may have made it; a first name that nobody knows is another crate's.
                    None if i > 0 => return Some(Place::Item(here)),
                    None => return None,
                },
            }
        }
        Some(Place::Module(here))
    }

    fn step(&self, here: usize, name: &str, depth: usize) -> Option<Place> {
        let file = &self.files[here];
        if let Some(&child) = file.children.get(name) {
            return Some(Place::Module(child));
        }
        if file.defined.contains(name) {
            return Some(Place::Item(here));
        }
        if depth > DEEP {
            return None;
        }
        // A name that stands for itself is another crate's, as in `use rustix;`.
        if let Some(path) = file.bound.get(name).filter(|p| p[0] != name) {
            return self.resolve(here, path, depth + 1);
        }
        file.globs.iter().find_map(|path| match self.resolve(here, path, depth + 1)? {
            Place::Module(m) if m != here => self.step(m, name, depth + 1),
            _ => None,
        })
    }

    /// All sets of more than one file that use each other in a circle.
    fn circles(&self) -> Vec<BTreeSet<usize>> {
        let reach: Vec<HashSet<usize>> = (0..self.files.len()).map(|f| self.reached(f)).collect();
        let mut seen: HashSet<usize> = HashSet::new();
        let mut out = Vec::new();
        for f in 0..self.files.len() {
            if reach[f].contains(&f) && !seen.contains(&f) {
                let circle: BTreeSet<usize> =
                    reach[f].iter().copied().filter(|&g| reach[g].contains(&f)).collect();
                seen.extend(&circle);
                out.push(circle);
            }
        }
        out
    }

    fn used_by(&self, f: usize) -> impl Iterator<Item = usize> {
        self.edges.range((f, 0)..(f + 1, 0)).map(|((_, to), _)| *to)
    }

    fn reached(&self, from: usize) -> HashSet<usize> {
        let mut reached = HashSet::new();
        let mut waiting = vec![from];
        while let Some(f) = waiting.pop() {
            waiting.extend(self.used_by(f).filter(|&to| reached.insert(to)));
        }
        reached
    }

    /// The shortest way round a circle, from and to its first file.
    fn example(&self, circle: &BTreeSet<usize>) -> String {
        let Some(&first) = circle.first() else { return String::new() };
        let mut before = HashMap::new();
        let mut waiting = VecDeque::from([first]);
        while let Some(f) = waiting.pop_front() {
            for to in self.used_by(f).filter(|to| circle.contains(to)) {
                before.entry(to).or_insert_with(|| {
                    waiting.push_back(to);
                    f
                });
            }
        }
        let mut words = Vec::new();
        let mut to = first;
        while let Some(&from) = before.get(&to) {
            let edge = &self.edges[&(from, to)];
            words.push(format!("{}:{} uses {}", self.files[from].name, edge.line, edge.path));
            to = from;
            if to == first {
                break;
            }
        }
        words.reverse();
        words.join(", ")
    }
}

/// A word, `::`, or a single other character, with its line.
fn tokens(code: &str) -> Vec<(usize, &str)> {
    let mut out = Vec::new();
    for (n, line) in code.lines().enumerate() {
        let mut rest = line.trim_start();
        while let Some(c) = rest.chars().next() {
            let end = match c {
                _ if part_of_word(c) => rest.find(|c| !part_of_word(c)).unwrap_or(rest.len()),
                ':' if rest.starts_with("::") => 2,
                _ => c.len_utf8(),
            };
            out.push((n + 1, &rest[..end]));
            rest = rest[end..].trim_start();
        }
    }
    out
}

fn part_of_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn is_word(token: &str) -> bool {
    token.starts_with(|c: char| c.is_alphabetic() || c == '_')
}

/// What a file says, and the modules that it declares without a body.
fn read(text: &str) -> (File, Vec<String>) {
    let code = blank_tests(&code_only(text));
    let tokens = tokens(&code);
    let word = |i: usize| tokens.get(i).map_or("", |t| t.1);
    let (mut file, mut mods) = (File::default(), Vec::new());
    // Depths of braces at which a module with a body ends: `super` in there is this file.
    let (mut depth, mut inline) = (0_usize, Vec::new());
    let mut i = 0;
    while i < tokens.len() {
        let (line, token) = tokens[i];
        let mut next = i + 1;
        match token {
            "{" => depth += 1,
            "}" => {
                depth = depth.saturating_sub(1);
                inline.pop_if(|d| *d == depth);
            }
            "pub" if word(i + 1) == "(" => {
                next = (i..tokens.len()).find(|&j| word(j) == ")").unwrap_or(i);
            }
            "mod" if is_word(word(i + 1)) => {
                if word(i + 2) == ";" {
                    mods.push(word(i + 1).to_owned());
                } else {
                    file.defined.insert(word(i + 1).to_owned());
                    inline.push(depth);
                }
                next = i + 2;
            }
            "use" => {
                let mut found = Vec::new();
                next = tree(&tokens, i + 1, &mut Vec::new(), &mut found);
                for (line, path, name) in found {
                    let path = out_of(path, inline.len());
                    match name.as_deref() {
                        _ if path.is_empty() => continue,
                        None => file.globs.push(path.clone()),
                        Some("_") => {}
                        Some(name) => drop(file.bound.insert(name.to_owned(), path.clone())),
                    }
                    file.paths.push((line, path));
                }
            }
            "fn" | "struct" | "enum" | "trait" | "type" | "const" | "static" | "union"
                if is_word(word(i + 1)) =>
            {
                file.defined.insert(word(i + 1).to_owned());
                next = i + 2;
            }
            "macro_rules" => next = i + 3,
            _ if is_word(token) && !matches!(word(i.wrapping_sub(1)), "::" | "." | "$") => {
                let mut path = vec![token.to_owned()];
                while word(next) == "::" && is_word(word(next + 1)) {
                    path.push(word(next + 1).to_owned());
                    next += 2;
                }
                let path = out_of(path, inline.len());
                if path.len() > 1 {
                    file.paths.push((line, path));
                }
            }
            _ => {}
        }
        i = next.max(i + 1);
    }
    (file, mods)
}

/// The path as its file would write it, if it is written inside of `deep` modules with bodies.
fn out_of(mut path: Vec<String>, deep: usize) -> Vec<String> {
    let climbs = path.iter().take(deep).take_while(|p| *p == "super").count();
    path.drain(..climbs);
    path
}

/// What a `use` names: each path with its line, and the name that it gets here (`None` for all
/// names in it).
type Named = (usize, Vec<String>, Option<String>);

/// Reads a tree of `use` from token `i` on, below the path `above`; returns the token after it.
fn tree(tokens: &[(usize, &str)], mut i: usize, above: &mut Vec<String>, out: &mut Vec<Named>) -> usize {
    let word = |i: usize| tokens.get(i).map_or("", |t| t.1);
    let depth = above.len();
    let line = tokens.get(i).map_or(0, |t| t.0);
    loop {
        match word(i) {
            "::" => i += 1,
            "{" => {
                i += 1;
                while !matches!(word(i), "}" | "") {
                    i = tree(tokens, i, above, out);
                    i += usize::from(word(i) == ",");
                }
                i += 1;
                break;
            }
            "*" => {
                out.push((line, above.clone(), None));
                i += 1;
                break;
            }
            w if is_word(w) => {
                if w != "self" || above.is_empty() {
                    above.push(w.to_owned());
                }
                i += 1;
                if word(i) != "::" {
                    let alias = word(i) == "as";
                    let name = if alias {
                        word(i + 1).to_owned()
                    } else {
                        above.last().cloned().unwrap_or_default()
                    };
                    out.push((line, above.clone(), Some(name)));
                    i += if alias { 2 } else { 0 };
                    break;
                }
            }
            _ => break,
        }
    }
    above.truncate(depth);
    i
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sources(texts: &[(&str, &str)]) -> Vec<Source> {
        texts.iter().map(|(n, t)| (format!("irlm-user/src/{n}"), (*t).to_owned())).collect()
    }

    fn found(texts: &[(&str, &str)]) -> Vec<String> {
        check(&sources(texts)).into_iter().map(|f| f.0).collect()
    }

    #[test]
    fn two_files_that_use_each_other_are_found() {
        let f = found(&[
            ("lib.rs", "mod a;\nmod b;\nmod c;\n"),
            ("a.rs", "use crate::b::X;\n"),
            ("b.rs", "use super::{c, a::{self as other, deep::Y}};\n"),
            ("c.rs", "fn f() {}\n"),
        ]);
        assert_eq!(f.len(), 1, "{f:?}");
        assert!(f[0].contains("circle: a.rs, b.rs;") && f[0].contains("a.rs:1 uses crate::b::X"), "{f:?}");
    }

    #[test]
    fn a_declaration_is_no_use_and_a_parent_may_be_used() {
        let texts = [
            ("lib.rs", "mod a;\n"),
            (
                "a/mod.rs",
                "//! See b::X.\nmod b;\n#[cfg(test)]\nmod tests {\n use super::b::X;\n}\nstruct Y;\n",
            ),
            ("a/b.rs", "use super::Y;\npub struct X;\n"),
        ];
        assert_eq!(found(&texts), Vec::<String>::new());
        let uses = [texts[0], ("a/mod.rs", "mod b;\nstruct Y;\nfn f() { b::g() }\n"), texts[2]];
        assert_eq!(found(&uses).len(), 1);
        // A name that the parent re-exports is the other child's.
        let passed = [
            texts[0],
            ("a/mod.rs", "mod b;\nmod c;\npub use c::Y;\n"),
            texts[2],
            ("a/c.rs", "pub struct Y;\n"),
        ];
        assert_eq!(found(&passed), Vec::<String>::new());
        let round = [passed[0], passed[1], passed[2], ("a/c.rs", "pub struct Y;\nuse super::b::X;\n")];
        assert_eq!(found(&round).len(), 1);
    }

    #[test]
    fn modules_with_bodies_and_globs_and_other_crates_are_read() {
        let f = found(&[
            ("lib.rs", "mod a;\nmod b;\n"),
            (
                "a.rs",
                "mod m {\n use super::Z;\n fn f() { super::super::b::g() }\n}\nstruct Z;\nuse std::a::b;\n",
            ),
            ("b.rs", "use crate::a::*;\npub(in crate::a) fn g() { Z::new(); y.a::b(); }\n"),
        ]);
        assert_eq!(f.len(), 1, "{f:?}");
        let f = found(&[("lib.rs", "mod a;\nmod b;\n"), ("a.rs", "use b::c;\n"), ("b.rs", "use a::b;\n")]);
        assert_eq!(f, Vec::<String>::new());
    }

    #[test]
    fn a_known_circle_stays_where_it_is_known() {
        let path = |f: &str| format!("irlm-user/src/{f}");
        let known = |files: &[&str]| {
            let files: Vec<String> = files.iter().map(|f| path(f)).collect();
            is_known(&files.iter().map(String::as_str).collect::<Vec<_>>())
        };
        assert!(known(&["control/agent/mod.rs", "control/agent/inpath/mod.rs"]));
        assert!(!known(&["control/api.rs", "control/agent/mod.rs"]));
        assert!(!known(&["flow/source/mod.rs", "flow/source/vm.rs"]));
    }

    #[test]
    fn both_sides_of_a_move_stay_apart() {
        let f = found(&[
            ("lib.rs", "mod flow;\n"),
            ("flow/mod.rs", "mod source;\nmod arrival;\n"),
            ("flow/source/mod.rs", "use super::arrival::X;\n"),
            ("flow/arrival/mod.rs", "struct X;\n#[cfg(test)]\nmod t { use crate::flow::source::Y; }\n"),
        ]);
        assert_eq!(f.len(), 1, "{f:?}");
        assert!(f[0].contains("flow/source/mod.rs:1: super::arrival::X"), "{f:?}");
    }
}
