//! The types that a key may have, each read from text or TOML and written back.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::ids::{ClusterName, NodeName};
use crate::units::{ByteSize, format_duration, parse_duration};

/// A value as it is written, before its key gives it a type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Raw {
    /// A string, number or truth value.
    Text(String),
    /// A list of such.
    List(Vec<String>),
}

/// A type that a key may have.
pub trait Value: Sized {
    /// Reads one written value; the reason completes a sentence that begins with the key.
    ///
    /// # Errors
    /// The reason.
    fn read(raw: &Raw) -> Result<Self, String>;

    /// Writes it so that it reads back the same, in TOML form.
    fn write(&self) -> String;
}

/// Implements [`Value`] for a type that is written as one string.
macro_rules! text_value {
    ($type:ty, $parse:expr, $show:expr) => {
        impl Value for $type {
            fn read(raw: &Raw) -> Result<Self, String> {
                match raw {
                    Raw::Text(text) => $parse(text.as_str()),
                    Raw::List(_) => Err("takes one value, not a list".to_owned()),
                }
            }

            fn write(&self) -> String {
                quoted(&$show(self))
            }
        }
    };
}

text_value!(String, |text: &str| Ok(text.to_owned()), String::clone);
text_value!(ClusterName, parsed, ToString::to_string);
text_value!(NodeName, parsed, ToString::to_string);
text_value!(ByteSize, parsed, ToString::to_string);
text_value!(Address, parsed, ToString::to_string);
text_value!(
    SocketAddr,
    |text: &str| text
        .parse()
        .map_err(|_| format!("is {text:?}, not an address and a port like 0.0.0.0:7117")),
    ToString::to_string
);
text_value!(
    PathBuf,
    |text: &str| match text.starts_with('/') {
        true => Ok(PathBuf::from(text)),
        false => Err(format!("is {text:?}, not an absolute path")),
    },
    |path: &PathBuf| path.to_string_lossy().into_owned()
);
text_value!(
    Duration,
    |text: &str| parse_duration(text).map_err(|error| format!("cannot be: {error}")),
    |duration: &Duration| format_duration(*duration)
);

impl Value for bool {
    fn read(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::Text(text) if text == "true" => Ok(true),
            Raw::Text(text) if text == "false" => Ok(false),
            _ => Err("must be true or false".to_owned()),
        }
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

impl Value for u32 {
    fn read(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::Text(text) => text.parse().ok(),
            Raw::List(_) => None,
        }
        .ok_or_else(|| "must be a whole number from 0 to 4294967295".to_owned())
    }

    fn write(&self) -> String {
        self.to_string()
    }
}

/// Written `""` when there is none.
impl<T: Value> Value for Option<T> {
    fn read(raw: &Raw) -> Result<Self, String> {
        match raw {
            Raw::Text(text) if text.is_empty() => Ok(None),
            raw => T::read(raw).map(Some),
        }
    }

    fn write(&self) -> String {
        self.as_ref().map_or_else(|| "\"\"".to_owned(), T::write)
    }
}

/// A TOML array, or one text with commas (flags and environment).
impl<T: Value> Value for Vec<T> {
    fn read(raw: &Raw) -> Result<Self, String> {
        let texts = match raw {
            Raw::List(texts) => texts.clone(),
            Raw::Text(text) if text.is_empty() => Vec::new(),
            Raw::Text(text) => text.split(',').map(|item| item.trim().to_owned()).collect(),
        };
        texts
            .into_iter()
            .map(|text| T::read(&Raw::Text(text)))
            .collect()
    }

    fn write(&self) -> String {
        let items: Vec<String> = self.iter().map(T::write).collect();
        format!("[{}]", items.join(", "))
    }
}

fn parsed<T: FromStr>(text: &str) -> Result<T, String>
where
    T::Err: fmt::Display,
{
    text.parse().map_err(|error| format!("cannot be: {error}"))
}

/// A TOML basic string.
fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

/// A host, by name or address, and a UDP port: `head1:7117`, `10.0.0.1:7117`, `[fd00::1]:7117`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Name or address.
    pub host: String,
    /// Port.
    pub port: u16,
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || format!("{text:?} is not a host and a port like head1:7117");
        if let Ok(address) = text.parse::<SocketAddr>() {
            return Ok(Address {
                host: address.ip().to_string(),
                port: address.port(),
            });
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(refuse)?;
        let port = port.parse().map_err(|_| refuse())?;
        host.parse::<NodeName>().map_err(|_| refuse())?;
        Ok(Address {
            host: host.to_owned(),
            port,
        })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.host.parse::<IpAddr>() {
            Ok(address) => SocketAddr::new(address, self.port).fmt(f),
            Err(_) => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn comes_back<T: Value + PartialEq + fmt::Debug>(text: &str) {
        let value = T::read(&Raw::Text(text.to_owned())).unwrap();
        let document: toml::Table = format!("x = {}", value.write()).parse().unwrap();
        let raw = match &document["x"] {
            toml::Value::String(text) => Raw::Text(text.clone()),
            toml::Value::Array(items) => Raw::List(
                items
                    .iter()
                    .map(|item| item.as_str().unwrap().to_owned())
                    .collect(),
            ),
            other => Raw::Text(other.to_string()),
        };
        assert_eq!(T::read(&raw), Ok(value), "{text}");
    }

    #[test]
    fn every_type_is_written_so_that_it_reads_back() {
        comes_back::<String>("a \"b\" \\ c");
        comes_back::<bool>("true");
        comes_back::<u32>("7");
        comes_back::<ByteSize>("10G");
        comes_back::<Duration>("7-00:00:00");
        comes_back::<PathBuf>("/var/lib/crcoord");
        comes_back::<SocketAddr>("[::]:7117");
        comes_back::<Address>("head1:7117");
        comes_back::<Address>("[fd00::1]:7117");
        comes_back::<Option<Address>>("");
        comes_back::<Vec<String>>("alice, bob");
        comes_back::<Vec<String>>("");
    }

    #[test]
    fn wrong_values_are_refused() {
        let text = |text: &str| Raw::Text(text.to_owned());
        assert!(bool::read(&text("yes")).is_err());
        assert!(u32::read(&text("-1")).is_err());
        assert!(PathBuf::read(&text("relative")).is_err());
        assert!(Duration::read(&text("10")).is_err());
        assert!(Address::read(&text("head1")).is_err());
        assert!(Address::read(&text("he ad:1")).is_err());
        assert!(SocketAddr::read(&text("head1:7117")).is_err());
        assert!(String::read(&Raw::List(Vec::new())).is_err());
    }
}
