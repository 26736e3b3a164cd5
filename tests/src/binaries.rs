//! The binaries under test: built once for each test binary, with the profile of the test itself.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// Names a directory with ready `crcoord` and `zoo` binaries, in place of a build.
const DIRECTORY_VARIABLE: &str = "CRCOORD_TEST_BIN_DIR";

/// The `crcoord` binary.
///
/// # Panics
/// It cannot be built.
pub fn crcoord() -> PathBuf {
    directory().join("crcoord")
}

/// The `zoo` binary.
///
/// # Panics
/// It cannot be built.
pub fn zoo() -> PathBuf {
    directory().join("zoo")
}

/// A program of the distribution.
///
/// # Panics
/// It is not installed.
pub fn installed(path: &str, package: &str) -> PathBuf {
    assert!(
        Path::new(path).exists(),
        "{path} is missing: install the package {package}"
    );
    path.into()
}

fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| match std::env::var_os(DIRECTORY_VARIABLE) {
        Some(directory) => directory.into(),
        None => build(),
    })
}

fn build() -> PathBuf {
    let test = std::env::current_exe().expect("a test knows its own path");
    // TARGET/PROFILE/deps/NAME-HASH
    let profile_directory = test
        .ancestors()
        .nth(2)
        .expect("tests lie in TARGET/PROFILE/deps");
    let target = profile_directory
        .parent()
        .expect("profiles lie in the target directory");
    let profile = match profile_directory.file_name().and_then(|name| name.to_str()) {
        Some("debug") => "dev",
        Some(name) => name,
        None => panic!("no profile in {}", test.display()),
    };
    let mut cargo = Command::new(env!("CARGO"));
    for (name, _) in std::env::vars_os() {
        // What cargo tells a test about itself would make build scripts run again.
        let told = [
            "CARGO_PKG_",
            "CARGO_MANIFEST_",
            "CARGO_BIN_",
            "CARGO_TARGET_TMPDIR",
        ];
        if told
            .iter()
            .any(|prefix| name.to_string_lossy().starts_with(prefix))
        {
            cargo.env_remove(name);
        }
    }
    // Of the whole workspace, so that features are as in the build of the tests.
    let status = cargo
        .args(["build", "--quiet", "--workspace", "--locked"])
        .args(["--bin", "crcoord", "--bin", "zoo", "--profile", profile])
        .arg("--target-dir")
        .arg(target)
        .current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."))
        .status()
        .expect("cargo runs: it built this test");
    assert!(status.success(), "building crcoord and zoo: {status}");
    profile_directory.to_owned()
}
