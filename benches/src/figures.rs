//! Figures: medians over rounds, as a table for people and as JSON for machines.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Duration;

use comfy_table::{CellAlignment, Table, presets};
use crcoord_common::units::ByteSize;
use crcoord_kernel::sys::kernel_release;
use serde::Serialize;

use crate::failure::{Explain, Result};

/// Version of the JSON document.
const SCHEMA: u32 = 1;

/// What one measurement of one round gave.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// How long it took.
    pub took: Duration,
    /// How long the yardstick took in the same round.
    pub yardstick: Duration,
    /// How long the tree stood still, where there was one.
    pub frozen: Option<Duration>,
}

/// One row: medians of all rounds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What it was done to: `1 GiB 4K`.
    pub subject: String,
    /// What was done.
    pub what: String,
    /// Bytes that it was done to; 0 where no bytes are.
    pub bytes: u64,
    /// Rounds.
    pub rounds: usize,
    /// How long it took, in milliseconds.
    pub ms: f64,
    /// Rate; `None` for what has no bytes.
    pub gib_per_second: Option<f64>,
    /// What the ratio is to.
    pub yardstick: String,
    /// Time of the yardstick in the same round divided by the time taken: above 1 is faster.
    pub ratio: f64,
    /// The lowest and the highest ratio of any round.
    pub ratio_range: (f64, f64),
    /// Freeze, in milliseconds.
    pub freeze_ms: Option<f64>,
}

#[derive(Serialize)]
struct Document<'a> {
    schema: u32,
    kind: &'a str,
    data: Data<'a>,
}

#[derive(Serialize)]
struct Data<'a> {
    kernel: String,
    cpus: usize,
    /// Load averages over 1, 5 and 15 minutes when the bench ended.
    load: String,
    figures: &'a [Figure],
}

/// Samples on their way to figures; rows come out in the order of their first samples.
#[derive(Debug, Default)]
pub struct Collection {
    order: Vec<(String, String)>,
    rows: BTreeMap<(String, String), (u64, String, Vec<Sample>)>,
}

impl Collection {
    /// Adds what one round gave.
    pub fn add(&mut self, subject: &str, what: &str, bytes: u64, yardstick: &str, sample: Sample) {
        let key = (subject.to_owned(), what.to_owned());
        if !self.rows.contains_key(&key) {
            self.order.push(key.clone());
        }
        let row = self.rows.entry(key);
        row.or_insert_with(|| (bytes, yardstick.to_owned(), Vec::new()))
            .2
            .push(sample);
    }

    /// The medians.
    pub fn figures(&self) -> Vec<Figure> {
        let rows = self
            .order
            .iter()
            .filter_map(|key| Some((key, self.rows.get(key)?)));
        rows.map(|((subject, what), (bytes, yardstick, samples))| {
            let of = |value: &dyn Fn(&Sample) -> f64| -> Vec<f64> {
                let mut all: Vec<f64> = samples.iter().map(value).collect();
                all.sort_by(f64::total_cmp);
                all
            };
            let times = of(&|sample| sample.took.as_secs_f64());
            let ratios = of(&|s| s.yardstick.as_secs_f64() / s.took.as_secs_f64());
            let freezes: Vec<f64> = samples
                .iter()
                .filter_map(|sample| Some(sample.frozen?.as_secs_f64() * 1e3))
                .collect();
            Figure {
                subject: subject.clone(),
                what: what.clone(),
                bytes: *bytes,
                rounds: samples.len(),
                ms: median(&times) * 1e3,
                gib_per_second: (*bytes > 0).then(|| gib_per_second(*bytes, median(&times))),
                yardstick: yardstick.clone(),
                ratio: median(&ratios),
                ratio_range: (
                    ratios.first().copied().unwrap_or(f64::NAN),
                    ratios.last().copied().unwrap_or(f64::NAN),
                ),
                freeze_ms: (!freezes.is_empty()).then(|| {
                    let mut freezes = freezes;
                    freezes.sort_by(f64::total_cmp);
                    median(&freezes)
                }),
            }
        })
        .collect()
    }
}

fn gib_per_second(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / f64::from(1 << 30) / seconds
}

/// `1 GiB`, `256 MiB`: sizes of subjects are round.
pub fn size_label(bytes: u64) -> String {
    for (unit, name) in [(1 << 30, "GiB"), (1 << 20, "MiB")] {
        if bytes >= unit && bytes.is_multiple_of(unit) {
            return format!("{} {name}", bytes / unit);
        }
    }
    ByteSize(bytes).rounded()
}

/// Of ascending values; between the two in the middle where their number is even.
fn median(sorted: &[f64]) -> f64 {
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length.is_multiple_of(2) => (sorted[half - 1] + sorted[half]) / 2.0,
        _ => sorted[half],
    }
}

/// Prints the figures on standard output.
pub fn print(kind: &str, figures: &[Figure], json: bool) -> Result<()> {
    let kernel = kernel_release();
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let load = std::fs::read_to_string("/proc/loadavg").explain("/proc/loadavg")?;
    let load = load.split(' ').take(3).collect::<Vec<_>>().join(" ");
    let text = if json {
        let document = Document {
            schema: SCHEMA,
            kind,
            data: Data {
                kernel,
                cpus,
                load,
                figures,
            },
        };
        serde_json::to_string(&document).explain("writing JSON")?
    } else {
        format!(
            "{}\n\nLinux {kernel}, {cpus} CPUs, load {load}; medians of rounds; a ratio above 1 is \
             faster than the yardstick of the same round",
            table(figures)
        )
    };
    writeln!(std::io::stdout(), "{text}").explain("standard output")
}

fn table(figures: &[Figure]) -> Table {
    let mut table = Table::new();
    table.load_preset(presets::ASCII_MARKDOWN);
    table.set_header([
        "subject",
        "what",
        "ms",
        "GiB/s",
        "ratio",
        "lowest",
        "highest",
        "to",
        "freeze ms",
        "rounds",
    ]);
    for figure in figures {
        table.add_row([
            figure.subject.clone(),
            figure.what.clone(),
            format!("{:.1}", figure.ms),
            optional(figure.gib_per_second, 2),
            format!("{:.2}", figure.ratio),
            format!("{:.2}", figure.ratio_range.0),
            format!("{:.2}", figure.ratio_range.1),
            figure.yardstick.clone(),
            optional(figure.freeze_ms, 1),
            figure.rounds.to_string(),
        ]);
    }
    for column in [2, 3, 4, 5, 6, 8, 9] {
        if let Some(column) = table.column_mut(column) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

fn optional(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(String::new, |value| format!("{value:.digits$}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_of_rates_and_ratios() {
        let mut collection = Collection::default();
        for (took, yardstick) in [(400, 100), (100, 50), (200, 100)] {
            let sample = Sample {
                took: Duration::from_millis(took),
                yardstick: Duration::from_millis(yardstick),
                frozen: Some(Duration::from_millis(took / 100)),
            };
            collection.add("1 GiB", "copied", 1 << 30, "memcpy", sample);
        }
        let [figure] = &collection.figures()[..] else {
            panic!()
        };
        assert_eq!((figure.ms, figure.gib_per_second), (200.0, Some(5.0)));
        assert_eq!((figure.ratio, figure.ratio_range), (0.5, (0.25, 0.5)));
        assert_eq!(figure.freeze_ms, Some(2.0));
        assert_eq!(median(&[1.0, 2.0, 4.0, 8.0]), 3.0);
    }

    #[test]
    fn labels() {
        assert_eq!(size_label(4 << 30), "4 GiB");
        assert_eq!(size_label(256 << 20), "256 MiB");
    }
}
