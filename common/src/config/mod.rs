//! The configuration: one value for every key, from command line, environment, `conf.d/*.toml`,
//! `crcoord.toml` or the default, in this order; every value knows where it came from.

mod error;
mod keys;
mod layers;
mod value;

pub use error::{ConfigError, ConfigErrors};
pub use keys::{Agent, Cluster, Config, Coordinator, Key, Network, Retention};
pub use layers::{Loaded, Origin, Shown, Sources};
pub use value::{Address, Value};

/// Where the configuration lies unless `--config` or `CRCOORD_CONFIG` say otherwise. Overrides are
/// looked for in `conf.d` beside it.
pub const DEFAULT_PATH: &str = "/etc/crcoord/crcoord.toml";
/// Environment variable that names another file.
pub const PATH_VARIABLE: &str = "CRCOORD_CONFIG";
