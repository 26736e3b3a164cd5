//! Sizes and times as Slurm writes them, in and out without loss, and rounded for people.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Unit letters and the power of 1024 they stand for.
const SIZE_UNITS: [(char, u32); 5] = [('P', 5), ('T', 4), ('G', 3), ('M', 2), ('K', 1)];

const SECOND_NS: u128 = 1_000_000_000;

/// A text that is not a size or a time.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}: {reason}")]
pub struct InvalidQuantity {
    /// `size` or `time`.
    pub what: &'static str,
    /// The offending text.
    pub text: String,
    /// What is wrong, and what would be right.
    pub reason: &'static str,
}

/// A number of bytes, written like `512K`, `4G` or `1.5T` (powers of 1024, also `4GB`, `4GiB`).
///
/// Slurm reads a number without unit as MiB in one place and as KiB in another, so it is refused
/// here; `0` is not.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(try_from = "String", into = "String")]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// The size with three significant digits, for tables: `1.21 GiB`.
    pub fn rounded(self) -> String {
        let mut value = self.0 as f64;
        let mut unit = "B";
        for next in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
            if value < 999.5 {
                break;
            }
            value /= 1024.0;
            unit = next;
        }
        match unit {
            "B" => format!("{} B", self.0),
            _ => format!("{} {unit}", three_digits(value)),
        }
    }
}

impl fmt::Display for ByteSize {
    /// The shortest text that is read back as the same number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SIZE_UNITS
            .iter()
            .find(|(_, power)| self.0 != 0 && self.0.is_multiple_of(1 << (10 * power)));
        match exact {
            Some((letter, power)) => f.pad(&format!("{}{letter}", self.0 >> (10 * power))),
            None if self.0 == 0 => f.pad("0"),
            None => f.pad(&format!("{}B", self.0)),
        }
    }
}

impl FromStr for ByteSize {
    type Err = InvalidQuantity;

    fn from_str(text: &str) -> Result<Self, InvalidQuantity> {
        let refuse = |reason| InvalidQuantity {
            what: "size",
            text: excerpt(text),
            reason,
        };
        let digits_end = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (digits, unit) = text.split_at(digits_end);
        let (whole, fraction) =
            decimal(digits).ok_or_else(|| refuse("write a number and a unit, like 512M or 4G"))?;
        let power = match unit.to_ascii_uppercase().as_str() {
            "" if whole == 0 && fraction == 0 => 0,
            "" => return Err(refuse("give a unit: B, K, M, G, T or P")),
            "B" => 0,
            unit => {
                let letter = unit
                    .strip_suffix("IB")
                    .or_else(|| unit.strip_suffix('B'))
                    .unwrap_or(unit);
                SIZE_UNITS
                    .iter()
                    .find(|(known, _)| letter.chars().eq([*known]))
                    .map(|(_, power)| *power)
                    .ok_or_else(|| refuse("the unit is none of B, K, M, G, T, P"))?
            }
        };
        let scale = 1u128 << (10 * power);
        let bytes = u128::from(whole) * scale + u128::from(fraction) * scale / SECOND_NS;
        u64::try_from(bytes)
            .map(ByteSize)
            .map_err(|_| refuse("it is too large"))
    }
}

impl TryFrom<String> for ByteSize {
    type Error = InvalidQuantity;
    fn try_from(text: String) -> Result<Self, InvalidQuantity> {
        text.parse()
    }
}

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> String {
        size.to_string()
    }
}

/// Reads a time: `MM:SS`, `HH:MM:SS`, `D-HH`, `D-HH:MM`, `D-HH:MM:SS`, or a number with one of the
/// units `us`, `ms`, `s`, `m`, `h`, `d`. A number alone is minutes in sbatch and seconds in
/// slurm.conf, so it is refused; `0` is not.
///
/// # Errors
/// [`InvalidQuantity`] that names the text and what would be right.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidQuantity> {
    let refuse = |reason| InvalidQuantity {
        what: "time",
        text: excerpt(text),
        reason,
    };
    let parsed = match text.contains(['-', ':']) {
        true => clock_nanoseconds(text),
        false => unit_nanoseconds(text),
    };
    let nanoseconds = parsed.map_err(refuse)?;
    let seconds = u64::try_from(nanoseconds / SECOND_NS).map_err(|_| refuse("it is too large"))?;
    Ok(Duration::new(seconds, (nanoseconds % SECOND_NS) as u32))
}

/// Writes a time so that [`parse_duration`] reads the same back (whole microseconds; less is
/// rounded up): `250ms`, `10s`, `01:30` (a minute and a half), `7-00:00:00`.
pub fn format_duration(duration: Duration) -> String {
    let microseconds = duration.as_nanos().div_ceil(1000);
    if !microseconds.is_multiple_of(1_000_000) {
        return match microseconds.is_multiple_of(1000) {
            true => format!("{}ms", microseconds / 1000),
            false => format!("{microseconds}us"),
        };
    }
    let seconds = microseconds / 1_000_000;
    let (days, hours) = (seconds / 86400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes:02}:{rest:02}"),
        (0, ..) => format!("{hours:02}:{minutes:02}:{rest:02}"),
        _ => format!("{days}-{hours:02}:{minutes:02}:{rest:02}"),
    }
}

/// Writes a time with three significant digits, for tables: `412 us`, `13.8 ms`, `2.05 s`.
pub fn rounded_duration(duration: Duration) -> String {
    let nanoseconds = duration.as_nanos() as f64;
    match nanoseconds {
        n if n < 999_500.0 => format!("{:.0} us", n / 1e3),
        n if n < 999.5e6 => format!("{} ms", three_digits(n / 1e6)),
        n if n < 60e9 => format!("{} s", three_digits(n / 1e9)),
        _ => format_duration(Duration::from_secs(duration.as_secs())),
    }
}

fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v < 9.995 => 2,
        v if v < 99.95 => 1,
        _ => 0,
    };
    format!("{value:.decimals$}")
}

fn clock_nanoseconds(text: &str) -> Result<u128, &'static str> {
    const FORMS: &str =
        "write MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS, minutes and seconds below 60";
    let (days, clock) = match text.split_once('-') {
        Some((days, clock)) => (Some(whole(days).ok_or(FORMS)?), clock),
        None => (None, text),
    };
    let fields = clock
        .split(':')
        .map(whole)
        .collect::<Option<Vec<u64>>>()
        .ok_or(FORMS)?;
    let (hours, minutes, seconds) = match (days, fields.as_slice()) {
        (None, [minutes, seconds]) => (0, *minutes, *seconds),
        (_, [hours, minutes, seconds]) => (*hours, *minutes, *seconds),
        (Some(_), [hours]) => (*hours, 0, 0),
        (Some(_), [hours, minutes]) => (*hours, *minutes, 0),
        _ => return Err(FORMS),
    };
    let leading_minutes = days.is_none() && fields.len() == 2;
    if seconds >= 60 || (minutes >= 60 && !leading_minutes) || (hours >= 24 && days.is_some()) {
        return Err(FORMS);
    }
    let seconds = u128::from(days.unwrap_or(0)) * 86400
        + u128::from(hours) * 3600
        + u128::from(minutes) * 60
        + u128::from(seconds);
    Ok(seconds * SECOND_NS)
}

fn unit_nanoseconds(text: &str) -> Result<u128, &'static str> {
    const FORM: &str = "write a number and a unit, like 10s or 5m";
    let digits_end = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (digits, unit) = text.split_at(digits_end);
    let (whole, fraction) = decimal(digits).ok_or(FORM)?;
    let nanoseconds: u128 = match unit {
        "" if whole == 0 && fraction == 0 => 0,
        "" => return Err("give a unit: us, ms, s, m, h or d (a number alone is ambiguous)"),
        "us" => 1_000,
        "ms" => 1_000_000,
        "s" => SECOND_NS,
        "m" => 60 * SECOND_NS,
        "h" => 3600 * SECOND_NS,
        "d" => 86400 * SECOND_NS,
        _ => return Err("the unit is none of us, ms, s, m, h, d"),
    };
    Ok(u128::from(whole) * nanoseconds + u128::from(fraction) * nanoseconds / SECOND_NS)
}

/// A decimal number as its whole part and its fraction in units of 10^-9.
fn decimal(text: &str) -> Option<(u64, u64)> {
    let (integer, fraction) = text.split_once('.').unwrap_or((text, "0"));
    if fraction.len() > 9 {
        return None;
    }
    let scale = 10u64.pow(9 - u32::try_from(fraction.len()).ok()?);
    Some((whole(integer)?, whole(fraction)? * scale))
}

fn whole(text: &str) -> Option<u64> {
    match text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse().ok(),
        false => None,
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("512B", 512),
            ("1K", 1024),
            ("4G", 4 << 30),
            ("4GB", 4 << 30),
            ("4GiB", 4 << 30),
            ("1.5t", 3 << 39),
            ("2P", 2 << 50),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in [
            "",
            "1",
            "-1G",
            "1X",
            "G",
            "1.G",
            "1 G",
            "1KK",
            "99999999P",
            "1BB",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn times_are_read_as_slurm_writes_them() {
        for (text, seconds) in [
            ("0", 0),
            ("10s", 10),
            ("5m", 300),
            ("90:00", 5400),
            ("01:30", 90),
            ("26:00:01", 93601),
            ("2-12", 216_000),
            ("7-00", 604_800),
            ("1-02:03", 93_780),
            ("1-02:03:04", 93_784),
            ("7d", 604_800),
            ("0.5h", 1800),
        ] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_secs(seconds)),
                "{text}"
            );
        }
        assert_eq!(parse_duration("250ms"), Ok(Duration::from_millis(250)));
        for bad in [
            "", "10", "1:60", "1:2:3:4", "1-24", "-5", "5-", ":", "s", "1w", "1.s",
        ] {
            assert!(parse_duration(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_number_without_unit_says_what_would_be_right() {
        assert_eq!(
            parse_duration("10").unwrap_err().to_string(),
            "\"10\" is not a time: give a unit: us, ms, s, m, h or d (a number alone is ambiguous)"
        );
    }

    #[test]
    fn tables_show_three_digits() {
        assert_eq!(ByteSize(999).rounded(), "999 B");
        assert_eq!(ByteSize(1 << 30).rounded(), "1.00 GiB");
        assert_eq!(ByteSize(1234 << 20).rounded(), "1.21 GiB");
        assert_eq!(rounded_duration(Duration::from_micros(412)), "412 us");
        assert_eq!(rounded_duration(Duration::from_micros(13_840)), "13.8 ms");
        assert_eq!(rounded_duration(Duration::from_millis(2050)), "2.05 s");
        assert_eq!(rounded_duration(Duration::from_secs(90)), "01:30");
    }

    proptest! {
        #[test]
        fn every_size_comes_back(bytes: u64) {
            prop_assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }

        #[test]
        fn every_time_of_microseconds_comes_back(microseconds in 0u64..1 << 60) {
            let duration = Duration::from_micros(microseconds);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_panics(text in "\\PC{0,20}") {
            let _ = text.parse::<ByteSize>();
            let _ = parse_duration(&text);
        }
    }
}
