//! Output: data on standard output as tables or JSON, messages on standard error.

use std::io::{self, ErrorKind, Write};

use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::failure::Failure;

/// Version of every JSON document: raised when a field changes its meaning or goes away.
pub const SCHEMA: u32 = 1;

#[derive(Serialize)]
struct Document<'a, T> {
    schema: u32,
    kind: &'a str,
    data: T,
}

/// Prints one JSON document `{"schema": 1, "kind": KIND, "data": ...}` on a line of its own.
pub fn json(kind: &str, data: impl Serialize) -> Result<(), Failure> {
    let document = Document {
        schema: SCHEMA,
        kind,
        data,
    };
    let text = serde_json::to_string(&document)
        .map_err(|error| Failure::internal("cannot write JSON", &error))?;
    print(&text)
}

/// Prints a text and a newline on standard output. A reader that has gone away is no failure.
pub fn print(text: &str) -> Result<(), Failure> {
    raw(io::stdout(), format!("{text}\n").as_bytes())
}

/// Writes a member's output to standard output (1) or standard error (2), unchanged.
pub fn forward(stream: u8, bytes: &[u8]) -> Result<(), Failure> {
    match stream {
        2 => raw(io::stderr(), bytes),
        _ => raw(io::stdout(), bytes),
    }
}

/// Says something to people. If standard error is closed there is nobody to tell.
pub fn message(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

fn raw(mut stream: impl Write, bytes: &[u8]) -> Result<(), Failure> {
    match stream.write_all(bytes).and_then(|()| stream.flush()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(Failure::internal("cannot write output", &error))
        }
        _ => Ok(()),
    }
}

/// A table without lines: `header` names the columns; those that begin with `>` are numbers.
pub fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_preset(presets::NOTHING);
    table.set_header(header.iter().map(|name| name.trim_start_matches('>')));
    for row in rows {
        table.add_row(row);
    }
    for (index, name) in header.iter().enumerate() {
        if let Some(column) = table.column_mut(index) {
            column.set_padding((0, 2));
            if name.starts_with('>') {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_align_and_end_without_blanks() {
        let text = table(
            &["NODE", ">BYTES"],
            [
                vec!["n1".into(), "5".into()],
                vec!["node10".into(), "123".into()],
            ],
        );
        assert_eq!(text, "NODE    BYTES\nn1          5\nnode10    123");
    }
}
