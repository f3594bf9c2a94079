//! Wraps and cuts text for people.

use textwrap::{Options, WordSplitter};

/// The maximum width of a printed line, in columns.
pub const WIDTH: usize = 100;

/// `text` beside `label`, in lines of at most [`WIDTH`] columns; further lines are below the text.
/// A word that is longer than a line is broken, never cut off.
pub fn beside(label: &str, text: &str) -> String {
    let room = label.len() <= if text.is_empty() { WIDTH } else { WIDTH / 2 };
    let (first, indent) = if room { (label, label.len()) } else { ("  ", 6) };
    let below = " ".repeat(indent);
    let options = |first| {
        // A name with hyphens is easier to copy in one piece.
        Options::new(WIDTH)
            .initial_indent(first)
            .subsequent_indent(&below)
            .word_splitter(WordSplitter::NoHyphenation)
    };
    let lines = if room {
        textwrap::wrap(text, options(first))
    } else {
        let mut lines = textwrap::wrap(label.trim(), options(first));
        lines.extend(textwrap::wrap(text, options(&below)));
        lines
    };
    lines.iter().fold(String::new(), |all, line| all + line.trim_end() + "\n")
}

/// `text` in at most `most` bytes. Longer text is cut and ends with `more`, which says where to
/// find the rest.
pub fn cut(text: &str, most: usize, more: &str) -> String {
    if text.len() <= most {
        return text.to_owned();
    }
    let mut end = most - more.len();
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{more}", &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_wrapped_below_the_text() {
        assert_eq!(beside("  app  off  ", "short"), "  app  off  short\n");
        assert_eq!(beside("  app  on   ", ""), "  app  on\n");
        let name = "n".repeat(60);
        assert_eq!(beside(&name, ""), format!("{name}\n"));
        assert_eq!(beside(&name, "text"), format!("  {name}\n      text\n"));
        let long = "a-name-with-hyphens ".repeat(10);
        let lines = beside("  app  off  ", &long);
        let lines: Vec<&str> = lines.lines().collect();
        assert_eq!(lines[0], format!("  app  off  {}", long[..80].trim_end()));
        assert_eq!(lines[1], format!("            {}", long[80..160].trim_end()));
    }

    #[test]
    fn what_is_cut_says_so() {
        assert_eq!(cut("short", 5, "..."), "short");
        assert_eq!(cut("longer", 5, "..."), "lo...");
        assert_eq!(cut("ééé", 5, "..."), "é...");
    }

    #[test]
    fn nothing_is_cut_off() {
        let (name, text) = ("n".repeat(317), "t".repeat(150));
        let lines = beside(&format!("  {name}  "), &text);
        assert!(lines.lines().all(|line| line.len() <= WIDTH), "{lines}");
        assert_eq!(lines.replace(['\n', ' '], ""), name + &text);
    }
}
