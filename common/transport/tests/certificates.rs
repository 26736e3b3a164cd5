//! The authority, what it issues, and what `Identity::load` refuses.
#![allow(clippy::unwrap_used)] // in a test's helpers, too, a failure is a panic

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, SystemTime};

use crcoord_transport::pki::{self, PkiError, Request};
use crcoord_transport::{Identity, IdentityError, IdentityPaths, Role};
use support::Cluster;

fn mode(path: &std::path::Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn init_makes_private_keys_and_overwrites_nothing() {
    let cluster = Cluster::new("alpha");
    let [certificate, key, image] =
        ["ca.pem", "ca.key", "image.key"].map(|name| cluster.path().join(name));
    assert_eq!((mode(&key), mode(&image)), (0o600, 0o600));
    let text = fs::read_to_string(&image).unwrap();
    assert_eq!(text.trim_end().len(), 64);
    assert!(text.trim_end().bytes().all(|byte| byte.is_ascii_hexdigit()));

    let before = fs::read(&certificate).unwrap();
    fs::remove_file(&key).unwrap();
    let error = pki::init(cluster.path(), "alpha").unwrap_err();
    assert!(matches!(error, PkiError::Exists(path) if path == image));
    assert_eq!(fs::read(&certificate).unwrap(), before);
    assert!(!key.exists(), "nothing may be made beside files that exist");
}

#[test]
fn two_authorities_have_different_image_keys() {
    let keys = [Cluster::new("alpha"), Cluster::new("alpha")]
        .map(|cluster| fs::read(cluster.path().join("image.key")).unwrap());
    assert_ne!(keys[0], keys[1]);
}

#[test]
fn issue_writes_role_and_name_and_overwrites_nothing() {
    let cluster = Cluster::new("alpha");
    let issued = cluster.issue(Role::Node, "n1");
    assert_eq!(issued.certificate, cluster.path().join("node-n1.pem"));
    assert_eq!(issued.key, cluster.path().join("node-n1.key"));
    assert_eq!(mode(&issued.key), 0o600);

    let identity = Identity::load(&cluster.paths(&issued)).unwrap();
    assert_eq!(identity.peer().to_string(), "crcoord://alpha/node/n1");

    let request = Request {
        role: Role::Node,
        name: "n1",
        subject_names: &[],
        validity: pki::DEFAULT_VALIDITY,
    };
    let error = pki::issue(cluster.path(), &request, cluster.path()).unwrap_err();
    assert!(matches!(error, PkiError::Exists(_)), "{error}");
}

#[test]
fn expiry_is_read_back_to_the_second() {
    let cluster = Cluster::new("alpha");
    let issued = cluster.issue(Role::Node, "n1");
    let read = pki::expiry(&fs::read(&issued.certificate).unwrap()).unwrap();
    assert_eq!(read, issued.expires);
    let left = read.duration_since(SystemTime::now()).unwrap();
    let year = Duration::from_secs(365 * 24 * 3600);
    assert!(left <= year && left > year - Duration::from_secs(60));
    let authority = pki::expiry(&fs::read(cluster.authority()).unwrap()).unwrap();
    assert!(authority > read);
    assert!(pki::expiry(b"no certificate").is_err());
}

#[test]
fn wrong_requests_are_refused() {
    let cluster = Cluster::new("alpha");
    let attempt = |name: &str, subject_names: &[String], validity| {
        let request = Request {
            role: Role::Node,
            name,
            subject_names,
            validity,
        };
        pki::issue(cluster.path(), &request, cluster.path()).unwrap_err()
    };
    let day = Duration::from_secs(24 * 3600);
    assert!(matches!(attempt("../n1", &[], day), PkiError::Name(_)));
    assert!(matches!(
        attempt("n1", &[], Duration::ZERO),
        PkiError::Validity(_)
    ));
    assert!(matches!(
        attempt("n1", &[], 4000 * day),
        PkiError::Validity(_)
    ));
    let subject_names = ["not a host".to_owned()];
    assert!(matches!(
        attempt("n1", &subject_names, day),
        PkiError::SubjectName(_)
    ));
    assert!(!cluster.path().join("node-n1.key").exists());
    assert!(pki::init(&cluster.path().join("new"), "a/b").is_err());
    assert!(!cluster.path().join("new").exists());
}

#[test]
fn further_subject_names_do_not_disturb() {
    let cluster = Cluster::new("alpha");
    let request = Request {
        role: Role::Node,
        name: "n1",
        subject_names: &[
            "10.0.0.1".to_owned(),
            "fe80::1".to_owned(),
            "n1.example".to_owned(),
        ],
        validity: pki::DEFAULT_VALIDITY,
    };
    let issued = pki::issue(cluster.path(), &request, cluster.path()).unwrap();
    let identity = Identity::load(&cluster.paths(&issued)).unwrap();
    assert_eq!(identity.peer(), &cluster.peer(Role::Node, "n1"));
}

#[test]
fn an_authority_whose_key_is_another_ones_issues_nothing() {
    let (cluster, other) = (Cluster::new("alpha"), Cluster::new("alpha"));
    fs::copy(other.path().join("ca.key"), cluster.path().join("ca.key")).unwrap();
    let request = Request {
        role: Role::Node,
        name: "n1",
        subject_names: &[],
        validity: pki::DEFAULT_VALIDITY,
    };
    let error = pki::issue(cluster.path(), &request, cluster.path()).unwrap_err();
    assert!(matches!(error, PkiError::KeyMismatch { .. }), "{error}");
}

#[test]
fn a_key_that_others_can_read_is_refused() {
    let cluster = Cluster::new("alpha");
    let issued = cluster.issue(Role::Node, "n1");
    for open in [0o640, 0o604, 0o620, 0o601] {
        fs::set_permissions(&issued.key, fs::Permissions::from_mode(open)).unwrap();
        let error = Identity::load(&cluster.paths(&issued)).unwrap_err();
        assert!(
            matches!(error, IdentityError::KeyIsOpen { mode, .. } if mode == open),
            "{error}"
        );
    }
    fs::set_permissions(&issued.key, fs::Permissions::from_mode(0o400)).unwrap();
    Identity::load(&cluster.paths(&issued)).unwrap();
}

#[test]
fn files_that_are_missing_wrong_or_do_not_fit_are_named() {
    let cluster = Cluster::new("alpha");
    let (n1, n2) = (
        cluster.issue(Role::Node, "n1"),
        cluster.issue(Role::Node, "n2"),
    );
    let good = cluster.paths(&n1);
    let refused = |change: &dyn Fn(&mut IdentityPaths)| {
        let mut paths = good.clone();
        change(&mut paths);
        Identity::load(&paths).unwrap_err()
    };

    let error = refused(&|paths| paths.certificate = cluster.path().join("none.pem"));
    assert!(error.to_string().contains("none.pem"), "{error}");
    let error = refused(&|paths| paths.key = n2.key.clone());
    assert!(
        matches!(error, IdentityError::KeyMismatch { .. }),
        "{error}"
    );
    let error = refused(&|paths| paths.certificate = n1.key.clone());
    assert!(
        matches!(
            error,
            IdentityError::Unusable {
                what: "certificate",
                ..
            }
        ),
        "{error}"
    );
    let error =
        refused(&|paths| paths.authority = Cluster::new("alpha").directory.keep().join("ca.pem"));
    assert!(matches!(error, IdentityError::NotOurs { .. }), "{error}");
    let error = refused(&|paths| paths.certificate = cluster.authority());
    assert!(matches!(error, IdentityError::Name { .. }), "{error}");
}
