//! Names of users, in and out, by the system's own name service (`getent`, so that LDAP works too).

use std::collections::BTreeMap;
use std::process::Command;

use crate::failure::Failure;

/// The uid of a user given by name or number.
pub fn uid_of(user: &str) -> Result<u32, Failure> {
    if let Ok(uid) = user.parse() {
        return Ok(uid);
    }
    let text = getent(&[user.to_owned()])
        .map_err(|error| Failure::internal("cannot look up users by getent", &error))?;
    entries(&text)
        .find(|(name, _)| *name == user)
        .map(|(_, uid)| uid)
        .ok_or_else(|| Failure::usage(format!("there is no user {user:?}")))
}

/// The names of these uids; those without one are left out.
pub fn names_of(uids: impl IntoIterator<Item = u32>) -> BTreeMap<u32, String> {
    let mut keys: Vec<String> = uids.into_iter().map(|uid| uid.to_string()).collect();
    keys.sort();
    keys.dedup();
    if keys.is_empty() {
        return BTreeMap::new();
    }
    // Without a name service the number itself is shown.
    let text = getent(&keys).unwrap_or_default();
    entries(&text)
        .map(|(name, uid)| (uid, name.to_owned()))
        .collect()
}

/// Lines of `passwd` for the keys that exist.
fn getent(keys: &[String]) -> std::io::Result<String> {
    let output = Command::new("getent").arg("passwd").args(keys).output()?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn entries(text: &str) -> impl Iterator<Item = (&str, u32)> {
    text.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        Some((name, uid))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_is_found_both_ways_and_strangers_are_not() {
        assert_eq!(uid_of("root").unwrap(), 0);
        assert_eq!(uid_of("1234").unwrap(), 1234);
        assert!(uid_of("no-such-user-here").is_err());
        assert_eq!(
            names_of([0, 4_000_000_000]),
            BTreeMap::from([(0, "root".to_owned())])
        );
    }
}
