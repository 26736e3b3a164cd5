//! Loading: the layers, which of them wins, and where each value came from.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, ConfigErrors};
use super::keys::{Config, Key};
use super::value::Raw;

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nobody set it.
    Default,
    /// A file.
    File {
        /// Its path.
        path: PathBuf,
        /// The line, counted from 1.
        line: usize,
    },
    /// An environment variable.
    Environment(String),
    /// A flag of the command line.
    Flag(String),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Default => f.write_str("default"),
            Origin::File { path, line } => write!(f, "{}:{line}", path.display()),
            Origin::Environment(name) => write!(f, "environment {name}"),
            Origin::Flag(name) => write!(f, "flag {name}"),
        }
    }
}

/// What a configuration is loaded from.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    /// The main file: it must exist. `None`: [`super::DEFAULT_PATH`], which need not exist.
    pub file: Option<PathBuf>,
    /// Environment variables; those that do not concern the configuration are passed over.
    pub environment: Vec<(String, String)>,
    /// Values of flags: (key as `section.name`, flag, value).
    pub flags: Vec<(String, String, String)>,
}

impl Sources {
    /// From a file and this process's environment.
    pub fn of_process(file: Option<PathBuf>) -> Self {
        let environment = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        Sources {
            file,
            environment,
            flags: Vec::new(),
        }
    }
}

/// A configuration and where its values came from.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The values.
    pub config: Config,
    origins: BTreeMap<String, Origin>,
}

/// One value as it is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// The key.
    pub key: String,
    /// Its value in TOML form.
    pub value: String,
    /// Where it came from.
    pub origin: Origin,
    /// What it means.
    pub meaning: &'static str,
}

impl Loaded {
    /// Reads all layers. Every fault is found, not only the first.
    ///
    /// # Errors
    /// All [`ConfigErrors`].
    pub fn load(sources: &Sources) -> Result<Self, ConfigErrors> {
        let mut loader = Loader {
            loaded: Loaded {
                config: Config::default(),
                origins: BTreeMap::new(),
            },
            errors: Vec::new(),
        };
        let (main, required) = match &sources.file {
            Some(path) => (path.as_path(), true),
            None => (Path::new(super::DEFAULT_PATH), false),
        };
        loader.file(main, required);
        loader.directory(&main.with_file_name("conf.d"));
        loader.environment(&sources.environment);
        for (key, flag, value) in &sources.flags {
            let origin = Origin::Flag(flag.clone());
            loader.set(key, &Raw::Text(value.clone()), origin);
        }
        match loader.errors.is_empty() {
            true => Ok(loader.loaded),
            false => Err(ConfigErrors(loader.errors)),
        }
    }

    /// Where the value of a key came from.
    pub fn origin(&self, key: &str) -> Origin {
        self.origins.get(key).cloned().unwrap_or(Origin::Default)
    }

    /// All values in the order of the keys.
    pub fn shown(&self) -> Vec<Shown> {
        Config::KEYS
            .iter()
            .map(|key| Shown {
                key: key.path(),
                value: (key.show)(&self.config),
                origin: self.origin(&key.path()),
                meaning: key.meaning.trim(),
            })
            .collect()
    }
}

struct Loader {
    loaded: Loaded,
    errors: Vec<ConfigError>,
}

impl Loader {
    fn set(&mut self, key: &str, raw: &Raw, place: Origin) {
        let Some(known) = Config::KEYS.iter().find(|known| known.path() == key) else {
            self.unknown(place, key.to_owned(), Config::KEYS.iter().map(Key::path));
            return;
        };
        match (known.set)(&mut self.loaded.config, raw) {
            Ok(()) => {
                self.loaded.origins.insert(key.to_owned(), place);
            }
            Err(reason) => self.errors.push(ConfigError::Invalid {
                place,
                key: key.to_owned(),
                reason,
            }),
        }
    }

    fn unknown(&mut self, place: Origin, key: String, all: impl Iterator<Item = String>) {
        let near = nearest(&key, all);
        self.errors.push(ConfigError::Unknown { place, key, near });
    }

    fn environment(&mut self, variables: &[(String, String)]) {
        for (name, value) in variables {
            let ours = Config::SECTIONS.iter().any(|section| {
                let prefix = format!("CRCOORD_{}_", section.to_ascii_uppercase());
                name.starts_with(&prefix)
            });
            if !ours {
                continue;
            }
            let place = Origin::Environment(name.clone());
            match Config::KEYS.iter().find(|key| key.variable() == *name) {
                Some(key) => self.set(&key.path(), &Raw::Text(value.clone()), place),
                None => self.unknown(place, name.clone(), Config::KEYS.iter().map(Key::variable)),
            }
        }
    }

    fn directory(&mut self, path: &Path) {
        let entries = match std::fs::read_dir(path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => return self.unreadable(path, &error),
        };
        let mut files = Vec::new();
        for entry in entries {
            match entry {
                Ok(entry) => files.push(entry.path()),
                Err(error) => return self.unreadable(path, &error),
            }
        }
        files.retain(|file| {
            file.extension()
                .is_some_and(|extension| extension == "toml")
        });
        files.sort();
        for file in files {
            self.file(&file, true);
        }
    }

    fn file(&mut self, path: &Path, required: bool) {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && !required => return,
            Err(error) => return self.unreadable(path, &error),
        };
        let place = |offset: usize| Origin::File {
            path: path.to_owned(),
            line: 1 + text
                .bytes()
                .take(offset)
                .filter(|byte| *byte == b'\n')
                .count(),
        };
        let (document, faults) = DeTable::parse_recoverable(&text);
        if !faults.is_empty() {
            self.errors
                .extend(faults.iter().map(|fault| ConfigError::Syntax {
                    place: place(fault.span().map_or(0, |span| span.start)),
                    reason: fault.message().to_owned(),
                }));
            return;
        }
        for (section, value) in document.get_ref() {
            let name = section.get_ref().as_ref();
            let here = place(section.span().start);
            if !Config::SECTIONS.contains(&name) {
                let all = Config::SECTIONS.iter().map(|known| (*known).to_owned());
                self.unknown(here, name.to_owned(), all);
                continue;
            }
            let Some(table) = value.get_ref().as_table() else {
                self.errors.push(ConfigError::Invalid {
                    place: here,
                    key: name.to_owned(),
                    reason: format!("must be a section: write [{name}]"),
                });
                continue;
            };
            for (key, value) in table {
                let path = format!("{name}.{}", key.get_ref());
                let here = place(key.span().start);
                match raw(value) {
                    Some(raw) => self.set(&path, &raw, here),
                    None if Config::KEYS.iter().any(|known| known.path() == path) => {
                        self.errors.push(ConfigError::Invalid {
                            place: here,
                            key: path,
                            reason: "takes a value or a list of values".to_owned(),
                        });
                    }
                    None => self.unknown(here, path, Config::KEYS.iter().map(Key::path)),
                }
            }
        }
    }

    fn unreadable(&mut self, path: &Path, error: &std::io::Error) {
        self.errors.push(ConfigError::Read {
            path: path.display().to_string(),
            reason: error.to_string(),
            errno: error.raw_os_error(),
        });
    }
}

fn raw(value: &Spanned<DeValue<'_>>) -> Option<Raw> {
    match value.get_ref() {
        DeValue::Array(items) => {
            let texts: Option<Vec<String>> =
                items.iter().map(|item| text(item.get_ref())).collect();
            texts.map(Raw::List)
        }
        other => text(other).map(Raw::Text),
    }
}

fn text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(integer) if integer.radix() == 10 => Some(integer.as_str().to_owned()),
        DeValue::Float(float) => Some(float.as_str().to_owned()),
        DeValue::Boolean(truth) => Some(truth.to_string()),
        _ => None,
    }
}

/// The candidate with the fewest edits, where these are few.
fn nearest(wrong: &str, candidates: impl Iterator<Item = String>) -> Option<String> {
    candidates
        .map(|candidate| (edits(wrong, &candidate), candidate))
        .min()
        .filter(|(count, _)| *count <= 3)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let change = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = change.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
