//! `crcoord config show`: every value and where it came from.

use std::process::ExitCode;

use serde::Serialize;

use crate::context::Context;
use crate::failure::Outcome;
use crate::output;

/// Arguments of `config`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print the configuration that is in force, as TOML
    Show {
        /// Add to each value where it came from
        #[arg(long)]
        origin: bool,
    },
}

#[derive(Serialize)]
struct Entry {
    key: String,
    value: serde_json::Value,
    origin: String,
    meaning: &'static str,
}

impl Arguments {
    /// Does it.
    pub fn execute(self, context: &Context) -> Outcome {
        let Command::Show { origin } = self.command;
        let shown = context.loaded.shown();
        if context.json {
            let entries: Vec<Entry> = shown
                .into_iter()
                .map(|shown| Entry {
                    // TOML strings, numbers and arrays of them, as written here, are JSON too.
                    value: serde_json::from_str(&shown.value)
                        .unwrap_or(serde_json::Value::String(shown.value)),
                    key: shown.key,
                    origin: shown.origin.to_string(),
                    meaning: shown.meaning,
                })
                .collect();
            output::json("config", entries)?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut section = "";
        let mut lines = Vec::new();
        for value in &shown {
            let (of, name) = value.key.split_once('.').unwrap_or(("", &value.key));
            if of != section {
                lines.push(format!(
                    "{}[{of}]",
                    if section.is_empty() { "" } else { "\n" }
                ));
                section = of;
            }
            let pair = format!("{name} = {}", value.value);
            lines.push(match origin {
                true => format!("{pair:<48} # {}", value.origin),
                false => pair,
            });
        }
        output::print(&lines.join("\n"))?;
        Ok(ExitCode::SUCCESS)
    }
}
