//! House rules for Markdown pages: lines that fit beside code, and sentences that are read once.

/// Longest line outside of tables and code blocks, characters.
const COLUMNS: usize = 100;
/// Most words of a sentence, or of a part of it that a colon or semicolon ends; cells of tables count too.
const WORDS: usize = 35;

/// What is wrong with a page, each with its line.
pub(crate) fn check(text: &str, fail: &mut impl FnMut(usize, String)) {
    let mut paragraph = Paragraph::default();
    let mut code = false;
    for (n, line) in text.lines().enumerate() {
        let bare = line.trim_start();
        if bare.starts_with("```") {
            code = !code;
            paragraph.end(fail);
            continue;
        }
        if code {
            continue;
        }
        let table = bare.starts_with('|');
        let wide = line.chars().count();
        if wide > COLUMNS && !table && line.contains(' ') {
            fail(n + 1, format!("{wide} columns; at most {COLUMNS}"));
        }
        if table {
            paragraph.end(fail);
            for cell in bare.split('|') {
                sentences(n + 1, cell, fail);
            }
        } else {
            if bare.is_empty() || starts_anew(bare) {
                paragraph.end(fail);
            }
            if !bare.is_empty() {
                paragraph.add(n + 1, bare);
            }
        }
    }
    paragraph.end(fail);
}

/// Whether a line begins something of its own: a heading, an item of a list, a quotation.
fn starts_anew(line: &str) -> bool {
    let (first, rest) = line.split_once(' ').unwrap_or((line, ""));
    let numbered =
        first.strip_suffix('.').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()));
    !rest.is_empty() && (numbered || matches!(first, "-" | "*" | ">") || first.bytes().all(|b| b == b'#'))
}

#[derive(Default)]
struct Paragraph {
    line: usize,
    text: String,
}

impl Paragraph {
    fn add(&mut self, line: usize, text: &str) {
        if self.text.is_empty() {
            self.line = line;
        }
        self.text.push_str(text);
        self.text.push(' ');
    }

    fn end(&mut self, fail: &mut impl FnMut(usize, String)) {
        sentences(self.line, &std::mem::take(&mut self.text), fail);
    }
}

fn sentences(line: usize, text: &str, fail: &mut impl FnMut(usize, String)) {
    let mut words = Vec::new();
    for word in text.split_whitespace() {
        words.push(word);
        // What closes a quotation or a bracket belongs to the sentence.
        if word.trim_end_matches(['"', ')', '*', '`', '_']).ends_with(['.', '!', '?', ':', ';']) {
            judge(line, &std::mem::take(&mut words), fail);
        }
    }
    judge(line, &words, fail);
}

fn judge(line: usize, words: &[&str], fail: &mut impl FnMut(usize, String)) {
    if let [first, second, third, ..] = words
        && words.len() > WORDS
    {
        let count = words.len();
        fail(line, format!("a sentence of {count} words ({first} {second} {third} …); at most {WORDS}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<(usize, String)> {
        let mut all = Vec::new();
        check(text, &mut |n, what| all.push((n, what)));
        all
    }

    #[test]
    fn long_lines_count_outside_of_tables_and_code() {
        let wide = "word ".repeat(25);
        assert_eq!(found(&format!("{wide}\n")).len(), 1);
        assert_eq!(found(&format!("```\n{wide}\n```\n| {wide} |\n")), []);
        assert_eq!(found(&format!("[x]:https://{}\n", "a".repeat(120))), [], "nobody can break that");
        assert_eq!(found(&format!("{}\n", "é".repeat(99) + " é")).len(), 1, "characters, not bytes");
    }

    #[test]
    fn long_sentences_are_found_where_they_begin() {
        // Lines of ten words.
        let words = |n: usize| vec!["w"; n].chunks(10).map(|l| l.join(" ")).collect::<Vec<_>>().join("\n");
        assert_eq!(found(&format!("{}.\n", words(WORDS))), []);
        let long = found(&format!("# Title\n\n{}.\n", words(WORDS + 1)));
        assert!(long.len() == 1 && long[0].0 == 3 && long[0].1.contains("36 words"), "{long:?}");
        // What stands apart is not one sentence.
        for apart in ["\n\n", "\n- ", "\n2. ", "; ", ": ", ".\n"] {
            assert_eq!(found(&format!("{}{apart}{}\n", words(20), words(20))), [], "{apart:?}");
        }
        assert_eq!(found(&format!("| {} | {} |\n", "w ".repeat(30), "w ".repeat(30))), []);
        assert_eq!(found(&format!("| {} |\n", "w ".repeat(36))).len(), 1);
    }
}
