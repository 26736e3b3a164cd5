//! The configuration from outside: which layer wins, what is refused, and what is said about it.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::Duration;

use crcoord_common::config::{Config, ConfigErrors, Loaded, Origin, Sources};

fn write(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

fn refused(text: &str) -> ConfigErrors {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("crcoord.toml");
    write(&file, text);
    let sources = Sources {
        file: Some(file),
        ..Sources::default()
    };
    Loaded::load(&sources).unwrap_err()
}

/// One fault, with the directory's name cut off.
fn complaint(text: &str) -> String {
    let errors = refused(text);
    assert_eq!(errors.0.len(), 1, "{errors}");
    let full = errors.to_string();
    full[full.find("crcoord.toml").unwrap()..].to_owned()
}

#[test]
fn flag_wins_over_environment_over_conf_d_over_file_over_default() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("crcoord.toml");
    let key = "coordinator.heartbeat";
    write(
        &file,
        "[coordinator]\nstate_dir = \"/a\"\nheartbeat = \"1s\"\n",
    );
    let mut sources = Sources {
        file: Some(file.clone()),
        ..Sources::default()
    };
    let heartbeat = |sources: &Sources| {
        let loaded = Loaded::load(sources).unwrap();
        (loaded.config.coordinator.heartbeat, loaded.origin(key))
    };

    let loaded = Loaded::load(&sources).unwrap();
    assert_eq!(loaded.origin("coordinator.lost_after"), Origin::Default);
    assert_eq!(loaded.config.coordinator.lost_after, Duration::from_secs(5));
    let place = Origin::File {
        path: file,
        line: 3,
    };
    assert_eq!(heartbeat(&sources), (Duration::from_secs(1), place));

    let early = directory.path().join("conf.d/10-early.toml");
    let late = directory.path().join("conf.d/20-late.toml");
    write(&late, "coordinator.heartbeat = \"3s\"\n");
    write(&early, "[coordinator]\nheartbeat = \"2s\"\n");
    write(&directory.path().join("conf.d/ignored.bak"), "nonsense");
    let place = Origin::File {
        path: late,
        line: 1,
    };
    assert_eq!(heartbeat(&sources), (Duration::from_secs(3), place));

    let variable = "CRCOORD_COORDINATOR_HEARTBEAT".to_owned();
    sources.environment = vec![(variable.clone(), "4s".to_owned())];
    let place = Origin::Environment(variable);
    assert_eq!(heartbeat(&sources), (Duration::from_secs(4), place));

    sources.flags = vec![(key.to_owned(), "--heartbeat".to_owned(), "5s".to_owned())];
    let place = Origin::Flag("--heartbeat".to_owned());
    assert_eq!(heartbeat(&sources), (Duration::from_secs(5), place));
}

#[test]
fn unknown_keys_are_refused_by_name_with_file_and_line() {
    assert_eq!(
        complaint("# one\n[agent]\nlisten = \"0.0.0.0:1\"\nlistn = \"0.0.0.0:1\"\n"),
        "crcoord.toml:4: unknown key agent.listn (did you mean agent.listen?)"
    );
    assert_eq!(
        complaint("[agents]\nlisten = 1\n"),
        "crcoord.toml:1: unknown key agents (did you mean agent?)"
    );
    assert_eq!(complaint("\ntop = 1\n"), "crcoord.toml:2: unknown key top");
    assert_eq!(
        complaint("[agent.deeper]\nx = 1\n"),
        "crcoord.toml:1: unknown key agent.deeper"
    );
}

#[test]
fn wrong_values_are_refused_with_file_line_and_reason() {
    assert_eq!(
        complaint("[coordinator]\nhold_lease = 10\n"),
        "crcoord.toml:2: coordinator.hold_lease cannot be: \"10\" is not a time: give a unit: \
         us, ms, s, m, h or d (a number alone is ambiguous)"
    );
    assert_eq!(
        complaint("[agent]\nstore_dir = [\"/a\"]\n"),
        "crcoord.toml:2: agent.store_dir takes one value, not a list"
    );
    assert_eq!(
        complaint("agent = 1\n"),
        "crcoord.toml:1: agent must be a section: write [agent]"
    );
    assert!(complaint("[agent]\nlisten =\n").starts_with("crcoord.toml:2: "));
}

#[test]
fn all_faults_are_told_at_once() {
    let errors = refused("[agent]\na = 1\nb = 2\nmin_free = \"much\"\n");
    assert_eq!(errors.0.len(), 3, "{errors}");
    assert!(
        errors
            .reports()
            .iter()
            .all(|report| !report.remedy.is_empty())
    );
}

#[test]
fn misspelt_variables_of_a_section_are_refused_and_others_passed_over() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("crcoord.toml");
    write(&file, "");
    let variable = |name: &str| (name.to_owned(), "x".to_owned());
    let sources = Sources {
        file: Some(file),
        environment: vec![variable("CRCOORD_JOB"), variable("CRCOORD_AGENT_LISTN")],
        flags: Vec::new(),
    };
    assert_eq!(
        Loaded::load(&sources).unwrap_err().to_string(),
        "environment CRCOORD_AGENT_LISTN: unknown key CRCOORD_AGENT_LISTN \
         (did you mean CRCOORD_AGENT_LISTEN?)"
    );
}

#[test]
fn a_named_file_must_exist() {
    let sources = Sources {
        file: Some("/nonexistent/crcoord.toml".into()),
        ..Sources::default()
    };
    let errors = Loaded::load(&sources).unwrap_err();
    assert!(errors.to_string().contains("/nonexistent/crcoord.toml"));
    assert_eq!(errors.reports()[0].errno, Some(2));
}

#[test]
fn what_is_shown_loads_again_to_the_same() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("crcoord.toml");
    write(&file, "");
    let sources = Sources {
        file: Some(file.clone()),
        ..Sources::default()
    };
    let first = Loaded::load(&sources).unwrap();
    let mut text = String::new();
    for shown in first.shown() {
        assert!(!shown.meaning.is_empty(), "{}", shown.key);
        text.push_str(&format!("{} = {}\n", shown.key, shown.value));
    }
    write(&file, &text);
    let second = Loaded::load(&sources).unwrap();
    assert_eq!(second.config, first.config);
    assert_eq!(second.config, Config::default());
    for key in Config::KEYS {
        assert_ne!(
            second.origin(&key.path()),
            Origin::Default,
            "{}",
            key.path()
        );
    }
}
