//! Rust source with comments and literals blanked, so that the house rules look at code and not at words about it.

/// The same text, byte for byte as long, with comments, strings and character literals as spaces. Lines are kept.
pub(crate) fn code_only(text: &str) -> String {
    let b = text.as_bytes();
    let mut out = b.to_vec();
    let mut i = 0;
    while i < b.len() {
        let end = match b[i] {
            b'/' if b.get(i + 1) == Some(&b'/') => find(b, i, |r| r[0] == b'\n'),
            b'/' if b.get(i + 1) == Some(&b'*') => block_comment(b, i),
            b'"' => string(b, i),
            b'r' | b'b' if raw_string(b, i).is_some() && !part_of_word(b, i) => {
                raw_string(b, i).unwrap_or(i + 1)
            }
            b'\'' => character(b, i),
            _ => {
                i += 1;
                continue;
            }
        };
        // A quote alone is a lifetime's.
        for c in out[i..end].iter_mut().filter(|_| end > i + 1) {
            if *c != b'\n' {
                *c = b' ';
            }
        }
        i = end;
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn find(b: &[u8], from: usize, mut is: impl FnMut(&[u8]) -> bool) -> usize {
    (from..b.len()).find(|&i| is(&b[i..])).unwrap_or(b.len())
}

fn part_of_word(b: &[u8], i: usize) -> bool {
    i > 0 && (b[i - 1].is_ascii_alphanumeric() || b[i - 1] == b'_')
}

fn block_comment(b: &[u8], start: usize) -> usize {
    let (mut depth, mut i) = (0, start);
    while i < b.len() {
        match &b[i..(i + 2).min(b.len())] {
            b"/*" => {
                depth += 1;
                i += 2;
            }
            b"*/" => {
                depth -= 1;
                i += 2;
                if depth == 0 {
                    return i;
                }
            }
            _ => i += 1,
        }
    }
    b.len()
}

fn string(b: &[u8], start: usize) -> usize {
    let mut i = start + 1;
    while i < b.len() {
        match b[i] {
            b'\\' => i += 2,
            b'"' => return i + 1,
            _ => i += 1,
        }
    }
    b.len()
}

/// The end of a raw string that starts at `i` (`r"`, `r#"`, `br"`, …); `None` if none does.
fn raw_string(b: &[u8], i: usize) -> Option<usize> {
    let r = if b[i] == b'b' { i + 1 } else { i };
    if b.get(r) != Some(&b'r') {
        return None;
    }
    let hashes = b[r + 1..].iter().take_while(|&&c| c == b'#').count();
    if b.get(r + 1 + hashes) != Some(&b'"') {
        return None;
    }
    let close: Vec<u8> = std::iter::once(b'"').chain(std::iter::repeat_n(b'#', hashes)).collect();
    let body = r + 2 + hashes;
    Some((find(b, body, |rest| rest.starts_with(&close)) + close.len()).min(b.len()))
}

/// A character literal; a lifetime is left alone.
fn character(b: &[u8], i: usize) -> usize {
    if b.get(i + 1) == Some(&b'\\') {
        return (find(b, i + 3, |r| r[0] == b'\'') + 1).min(b.len());
    }
    // One character of up to four bytes, then a quote: anything else is a lifetime.
    match (i + 2..(i + 6).min(b.len())).find(|&j| b[j] == b'\'') {
        Some(j) if j == i + 2 || b[i + 1] >= 0x80 => j + 1,
        _ => i + 1,
    }
}

/// The text up to the first test module, which the rules for shipped code do not bind.
pub(crate) fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]").map_or(text, |at| &text[..at])
}

/// The same code with each item that only tests see as spaces, wherever it stands; lines are kept.
/// `code` is what [`code_only`] gives.
pub(crate) fn blank_tests(code: &str) -> String {
    const MARK: &str = "#[cfg(test)]";
    let mut out = String::with_capacity(code.len());
    let mut rest = code;
    while let Some(at) = rest.find(MARK) {
        let end = at + MARK.len() + item_end(&rest[at + MARK.len()..]);
        out.push_str(&rest[..at]);
        out.extend(rest[at..end].chars().map(|c| if c == '\n' { '\n' } else { ' ' }));
        rest = &rest[end..];
    }
    out + rest
}

/// Where the item that `code` begins with ends: at a `;` or behind a body, outside of all brackets.
fn item_end(code: &str) -> usize {
    let (mut depth, mut angles) = (0, 0);
    for (i, c) in code.char_indices() {
        match c {
            '<' => angles += 1,
            '>' if !code[..i].ends_with(['-', '=']) => angles -= 1,
            '{' | '(' | '[' => depth += 1,
            '}' | ')' | ']' => {
                depth -= 1;
                // A list of names in braces has its semicolon still to come; a field or variant
                // ends with its owner.
                if depth < 0 {
                    return i;
                }
                if depth == 0 && c == '}' && !code[i + 1..].trim_start().starts_with(';') {
                    return i + 1;
                }
            }
            ';' if depth == 0 => return i + 1,
            ',' if depth == 0 && angles == 0 => return i + 1,
            _ => {}
        }
    }
    code.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_in_comments_and_literals_are_not_code() {
        let text = "let a = \"unsafe\\\" x\"; // unsafe\n/* unsafe /* deep */ */ let r = r#\"unsafe \"q\"\"#; \
                    let c = '\"'; let l: &'static str = b\"x\"; let q = '\\''; call();";
        let code = code_only(text);
        assert_eq!(code.len(), text.len());
        assert!(
            !code.contains("unsafe") && code.contains("call()") && code.contains("&'static str"),
            "{code}"
        );
        assert!(code.contains("let r =") && code.contains("let c =") && code.contains('\n'), "{code}");
    }

    #[test]
    fn unfinished_text_ends_at_its_end() {
        for text in ["\"abc", "r#\"abc", "/* abc", "'", "'\\", "// abc", "b", "r"] {
            assert_eq!(code_only(text).len(), text.len(), "{text}");
        }
    }

    #[test]
    fn what_only_tests_see_is_blanked_and_the_rest_stays() {
        let code = "#[cfg(test)]\nmod tests;\nuse a;\n#[cfg(test)]\n#[allow(x)]\nfn f<A, B>(a: [u8; 2]) { b; }\nuse c;\n\
                    #[cfg(test)]\nuse d::{e, f};\nstruct S {\n    #[cfg(test)]\n    g: u8,\n    h: u8,\n}\n";
        let words: Vec<String> = blank_tests(code).split_whitespace().map(str::to_owned).collect();
        assert_eq!(words.join(" "), "use a; use c; struct S { h: u8, }");
        assert_eq!(blank_tests(code).lines().count(), code.lines().count());
    }
}
