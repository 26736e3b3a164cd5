//! What every command works with: the loaded configuration and how output is wanted.

use std::path::Path;

use crcoord_common::config::{Config, Loaded, Sources};

use crate::arguments::Global;
use crate::failure::Failure;

/// Configuration and output choices of one command.
#[derive(Debug)]
pub struct Context {
    /// The configuration.
    pub loaded: Loaded,
    /// Data is printed as JSON.
    pub json: bool,
    /// Logs are written as JSON.
    pub log_json: bool,
    /// What is logged.
    pub log: String,
}

impl Context {
    /// Loads the configuration that the global options name.
    pub fn new(global: &Global) -> Result<Self, Failure> {
        let mut sources = Sources::of_process(global.config.clone());
        sources.flags = global
            .assignments
            .iter()
            .map(|(key, value)| (key.clone(), "--set".to_owned(), value.clone()))
            .collect();
        Ok(Context {
            loaded: Loaded::load(&sources)?,
            json: global.json,
            log_json: global.log_json,
            log: global.log.clone(),
        })
    }

    /// The values of the configuration.
    pub fn config(&self) -> &Config {
        &self.loaded.config
    }

    /// The coordinator's socket.
    pub fn socket(&self) -> &Path {
        &self.loaded.config.coordinator.socket
    }
}
