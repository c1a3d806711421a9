//! Data on standard output, as a table for people or as JSON or YAML for programs.

use std::{
    borrow::Cow,
    io::{self, Write as _},
};

use serde::Serialize;

use crate::exit::{Exit, Failure, Result, io as io_failure};

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Format {
    Table,
    Json,
    Yaml,
}

/// Something that can be shown to people: lines of a name and a value.
pub(crate) trait Show: Serialize {
    /// Names and values, in order. An empty name continues the line above.
    fn lines(&self) -> Vec<(&'static str, String)>;
}

/// An entry of a list.
pub(crate) trait Row: Serialize {
    /// Names of the columns, with the width of each; the last one is not padded. Negative widths align to the right.
    const COLUMNS: &'static [(&'static str, isize)];

    /// Whether the last column may have several lines, made here and not by somebody's names.
    const HAS_LINES: bool = false;

    /// One text for each column.
    fn cells(&self) -> Vec<String>;
}

impl Format {
    /// Prints one thing.
    pub(crate) fn print(self, value: &impl Show) -> Result<()> {
        match self {
            Self::Table => {
                let lines = value.lines();
                let width = lines.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
                let text: String =
                    lines.iter().map(|(name, value)| format!("{name:width$}  {}\n", visible(value))).collect();
                write(&text)
            }
            _ => self.data(value),
        }
    }

    /// Prints one thing as data, or `text` for people.
    pub(crate) fn print_or(self, value: &impl Serialize, text: &str) -> Result<()> {
        match self {
            Self::Table => write(&format!("{}\n", text.trim_end_matches('\n'))),
            _ => self.data(value),
        }
    }

    fn data(self, value: &impl Serialize) -> Result<()> {
        match self {
            Self::Yaml => write(&yaml(value)?),
            _ => write(&format!("{}\n", json(value)?)),
        }
    }

    /// Starts a list whose entries are printed as they come.
    pub(crate) fn list<R: Row>(self) -> Result<List<R>> {
        if self == Self::Table {
            let names: Vec<_> = R::COLUMNS.iter().map(|(name, _)| (*name).to_owned()).collect();
            write(&table_line::<R>(&names))?;
        }
        Ok(List { format: self, count: 0, row: std::marker::PhantomData })
    }
}

/// See [`Format::list`].
pub(crate) struct List<R> {
    format: Format,
    count: u64,
    row: std::marker::PhantomData<R>,
}

impl<R: Row> List<R> {
    pub(crate) fn push(&mut self, row: &R) -> Result<()> {
        let text = match self.format {
            Format::Table => table_line::<R>(&row.cells()),
            Format::Json if self.count == 0 => format!("[{}", json(row)?),
            Format::Json => format!(",\n {}", json(row)?),
            Format::Yaml => yaml(&[row])?,
        };
        self.count += 1;
        write(&text)
    }

    pub(crate) fn end(self) -> Result<()> {
        match self.format {
            Format::Table => Ok(()),
            Format::Json if self.count == 0 => write("[]\n"),
            Format::Json => write("]\n"),
            Format::Yaml if self.count == 0 => write("[]\n"),
            Format::Yaml => Ok(()),
        }
    }
}

fn table_line<R: Row>(cells: &[String]) -> String {
    let mut line = String::new();
    for (at, ((_, width), cell)) in R::COLUMNS.iter().zip(cells).enumerate() {
        // A row is one line, unless its last cell is made of several.
        let mut cell = visible(cell).into_owned();
        if at + 1 < R::COLUMNS.len() || !R::HAS_LINES {
            cell = cell.replace('\n', "\\u{a}");
        }
        if at > 0 {
            line.push_str("  ");
        }
        let is_last = at + 1 == R::COLUMNS.len();
        let pad = " ".repeat(width.unsigned_abs().saturating_sub(cell.chars().count()));
        match (*width < 0, is_last) {
            (true, _) => line.extend([pad.as_str(), cell.as_str()]),
            (false, true) => line.push_str(&cell),
            (false, false) => line.extend([cell.as_str(), pad.as_str()]),
        }
    }
    line.push('\n');
    line
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|error| Failure::new(Exit::Other, error))
}

fn yaml(value: &impl Serialize) -> Result<String> {
    serde_yaml_ng::to_string(value).map_err(|error| Failure::new(Exit::Other, error))
}

/// Writes to standard output; a reader that has gone ends the command quietly.
pub(crate) fn write(text: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(io_failure("standard output"))
}

/// Text from a stranger as it may go to a terminal: what would move the cursor, change colours or turn the direction of writing is
/// shown as its code. Line ends stay.
pub(crate) fn visible(text: &str) -> Cow<'_, str> {
    // Embeddings, overrides and isolates (Unicode UAX #9) make a name read as another.
    let is_hidden = |c: char| {
        (c.is_control() && c != '\n')
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
    };
    if !text.contains(is_hidden) {
        return Cow::Borrowed(text);
    }
    let shown = text.chars().map(|c| if is_hidden(c) { c.escape_unicode().to_string() } else { c.to_string() });
    Cow::Owned(shown.collect())
}

/// Bytes for people: `17 B`, `1.5 KiB`, `416 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = usize::from(value < 100.0 && value.fract() != 0.0);
    format!("{value:.digits$} {}", UNITS[unit])
}

/// A rate in units of 10⁶ bytes a second, as the other figures of this field are given.
pub(crate) fn rate(bytes: u64, time: std::time::Duration) -> String {
    format!("{:.0} MB/s", bytes as f64 / time.as_secs_f64().max(1e-9) / 1e6)
}

/// A number with separated thousands.
pub(crate) fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_for_people() {
        for (number, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (416 << 20, "416 MiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(number), text);
        }
        assert_eq!((count(7), count(1234), count(1_234_567)), ("7".into(), "1,234".into(), "1,234,567".into()));
    }

    #[test]
    fn names_from_strangers_do_not_command_the_terminal() {
        assert_eq!(visible("plain/näme 🙂"), "plain/näme 🙂");
        assert_eq!(visible("a\u{1b}[2Jb\rc\u{202e}gpj"), "a\\u{1b}[2Jb\\u{d}c\\u{202e}gpj");
        assert_eq!(table_line::<Line>(&["a\nb".into(), "1".into(), "x".into()]), "a\\u{a}b      1  x\n");
    }

    #[derive(Serialize)]
    struct Line(&'static str, u64);

    impl Row for Line {
        const COLUMNS: &'static [(&'static str, isize)] = &[("NAME", 6), ("SIZE", -5), ("END", 0)];

        fn cells(&self) -> Vec<String> {
            vec![self.0.into(), self.1.to_string(), "x".into()]
        }
    }

    #[test]
    fn columns_line_up() {
        assert_eq!(table_line::<Line>(&["NAME".into(), "SIZE".into(), "END".into()]), "NAME     SIZE  END\n");
        assert_eq!(table_line::<Line>(&Line("ä", 17).cells()), "ä          17  x\n");
    }
}
