//! The capsule as a real process: start, output, exit, re-attachment, lease, and the proof of death.
//!
//! Needs root. The test binary is its own capsule: a capsule runs a copy of the program that made it.
#![allow(
    clippy::unwrap_used,
    reason = "tests, though not marked as such: see main"
)]

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command as Process, ExitCode};
use std::time::{Duration, Instant};

use crcoord_agent::OwnImage;
use crcoord_agent::capsule::protocol::{Answer, Ask, Order, Status};
use crcoord_agent::capsule::{Capsule, cgroup::Cgroups};
use crcoord_common::wire::member::{Command, ExitStatus, Owner, Stdio};

const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args().collect();
    match arguments.get(1).map(String::as_str) {
        Some("capsule") => return crcoord_agent::capsule::main(),
        Some("leave-a-capsule") => return leave_a_capsule(Path::new(&arguments[2])),
        _ => {}
    }
    let filter = arguments.iter().skip(1).find(|one| !one.starts_with('-'));
    let mut failed = 0;
    for (name, test) in TESTS {
        if filter.is_some_and(|filter| !name.contains(filter.as_str())) {
            continue;
        }
        let outcome = catch_unwind(AssertUnwindSafe(test));
        println!(
            "test {name} ... {}",
            if outcome.is_ok() { "ok" } else { "FAILED" }
        );
        failed += u32::from(outcome.is_err());
    }
    ExitCode::from(u8::from(failed > 0))
}

const TESTS: &[(&str, fn())] = &[
    (
        "a_program_has_its_owner_environment_and_namespaces",
        a_program_is_what_was_asked_for,
    ),
    (
        "a_program_starts_with_no_signal_blocked",
        no_signal_is_blocked,
    ),
    (
        "output_waits_for_a_watcher_and_comes_before_the_exit",
        output_waits_for_a_watcher,
    ),
    (
        "a_watcher_may_change_its_mind_without_loss",
        a_watcher_may_change_its_mind,
    ),
    (
        "files_are_opened_by_the_owner_and_appended_to",
        files_are_appended_to,
    ),
    (
        "orphans_are_reaped_and_end_with_the_root",
        orphans_end_with_the_root,
    ),
    (
        "a_program_that_does_not_exist_is_refused",
        a_missing_program_is_refused,
    ),
    (
        "a_capsule_outlives_its_maker_and_is_found_again",
        a_capsule_outlives_its_maker,
    ),
    (
        "the_run_lease_ends_everything",
        the_run_lease_ends_everything,
    ),
    ("a_kill_is_proven", a_kill_is_proven),
    (
        "streams_of_a_restored_tree_are_handed_out",
        streams_are_handed_out,
    ),
];

struct Place {
    directory: tempfile::TempDir,
    image: OwnImage,
}

impl Place {
    fn new() -> Self {
        Place {
            directory: tempfile::tempdir().unwrap(),
            image: OwnImage::create().unwrap(),
        }
    }

    fn socket(&self) -> PathBuf {
        self.directory.path().join("capsule.sock")
    }

    fn make(&self, change: impl FnOnce(&mut Order)) -> Capsule {
        let mut order = order(&self.socket());
        change(&mut order);
        Capsule::create(&self.image, "test", &order).expect("the test needs root")
    }

    fn attach(&self) -> Option<(Capsule, Status)> {
        Capsule::attach("test", &self.socket(), None, None).unwrap()
    }
}

fn order(socket: &Path) -> Order {
    Order {
        socket: socket.to_str().unwrap().to_owned(),
        hostname: "member-7".to_owned(),
        own_network: false,
        hosts: None,
        cgroup: None,
        owner: Owner {
            uid: 1234,
            gid: 2345,
            groups: vec![7, 9],
        },
        stdio: Stdio::Caller,
        run_lease_ms: None,
    }
}

fn shell(script: &str) -> Ask {
    Ask::Start {
        command: Command {
            arguments: ["sh", "-c", script].map(str::to_owned).to_vec(),
            environment: BTreeMap::from([
                ("PATH".to_owned(), "/usr/bin:/bin".to_owned()),
                ("GREETING".to_owned(), "hello".to_owned()),
            ]),
            directory: "/tmp".to_owned(),
            umask: 0o027,
        },
    }
}

/// Starts a script and gives all its output and its end.
fn run(capsule: &Capsule, script: &str) -> (String, ExitStatus) {
    let Answer::Started { pid } = capsule.ask(&shell(script)).unwrap() else {
        panic!("not started");
    };
    assert!(pid > 1);
    watch(capsule)
}

fn watch(capsule: &Capsule) -> (String, ExitStatus) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut watch = capsule.watch(true).await.unwrap();
        let mut output = String::new();
        loop {
            let event = tokio::time::timeout(PATIENCE, watch.next())
                .await
                .expect("in time");
            match event.unwrap().expect("the watch goes on") {
                Answer::Output { bytes, .. } => output += std::str::from_utf8(&bytes).unwrap(),
                Answer::Exited { status } => return (output, status),
                other => panic!("unexpected {other:?}"),
            }
        }
    })
}

fn a_program_is_what_was_asked_for() {
    let place = Place::new();
    let cgroups = Cgroups::find().unwrap();
    let cgroup = cgroups
        .create(&format!("test-{}", std::process::id()))
        .unwrap();
    let capsule = place.make(|order| {
        order.own_network = true;
        order.cgroup = Some(cgroup.to_str().unwrap().to_owned());
    });
    let script = "id -u; id -g; id -G; umask; pwd; hostname; echo $GREETING $HOME; ls /proc/self/fd \
                  | tr '\\n' ' '; grep -c : /proc/net/dev; \
                  cut -d' ' -f5,6 /proc/$$/stat; cat /proc/self/oom_score_adj; exit 3";
    let (output, status) = run(&capsule, script);
    let lines: Vec<_> = output.lines().collect();
    assert_eq!(status, ExitStatus::Exited(3), "{output}");
    assert_eq!(
        lines[..7],
        [
            "1234", "2345", "2345 7 9", "0027", "/tmp", "member-7", "hello"
        ]
    );
    // 3 is the directory that ls reads; one interface: lo.
    assert_eq!(lines[7], "0 1 2 3 1");
    assert_eq!(lines[8], "2 2", "leader of its own group and session");
    assert_eq!(lines[9], "0");
    let inside = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap();
    assert_eq!(inside.trim(), capsule.init.to_string());
    let environment = fs::read(format!("/proc/{}/environ", capsule.init)).unwrap();
    assert!(
        environment.is_empty(),
        "PID 1 knows nothing of its maker's environment"
    );
    capsule.kill(PATIENCE).unwrap();
    assert!(!place.socket().exists() && !cgroup.exists());
}

/// Without a shell, which has a mask of its own at times.
fn no_signal_is_blocked() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    let Ask::Start { mut command } = shell("") else {
        unreachable!()
    };
    command.arguments = ["grep", "Sig[BI]", "/proc/self/status"]
        .map(str::to_owned)
        .to_vec();
    capsule.ask(&Ask::Start { command }).unwrap();
    // 32 and 33 are the C library's own, which posix_spawn(3) leaves ignored.
    let expected = "SigBlk:\t0000000000000000\nSigIgn:\t0000000180000000\n";
    assert_eq!(watch(&capsule).0, expected);
    capsule.kill(PATIENCE).unwrap();
}

fn output_waits_for_a_watcher() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    // More than a pipe holds: the program cannot end before somebody watches.
    let script = "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo done >&2";
    let Answer::Started { pid } = capsule.ask(&shell(script)).unwrap() else {
        panic!()
    };
    let host = capsule
        .host_pid(pid)
        .expect("the program waits for its reader");
    assert!(
        fs::read_to_string(format!("/proc/{host}/comm"))
            .unwrap()
            .starts_with("sh")
    );
    // One that only wants the exit takes no output.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mut exit_only = runtime.block_on(capsule.watch(false)).unwrap();
    assert_eq!(capsule.status().unwrap().ended, None);
    let (output, status) = watch(&capsule);
    // The newer watcher has replaced it.
    assert_eq!(runtime.block_on(exit_only.next()).unwrap(), None);
    assert_eq!(status, ExitStatus::Exited(0));
    assert_eq!(output.matches('x').count(), 1_000_000);
    assert!(output.contains("done"));
    // A later watcher is told the exit again.
    assert_eq!(watch(&capsule), (String::new(), ExitStatus::Exited(0)));
    capsule.kill(PATIENCE).unwrap();
}

fn files_are_appended_to() {
    let place = Place::new();
    let directory = place.directory.path().join("out");
    fs::create_dir(&directory).unwrap();
    std::os::unix::fs::chown(&directory, Some(1234), Some(2345)).unwrap();
    let traverse = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(place.directory.path(), traverse).unwrap();
    let path = directory.join("log").to_str().unwrap().to_owned();
    for round in ["first", "second"] {
        let stdio = Stdio::Files {
            output: path.clone(),
            error: path.clone(),
        };
        let capsule = place.make(|order| order.stdio = stdio);
        let (output, status) = run(&capsule, &format!("echo {round}; echo {round}-error >&2"));
        assert_eq!((output.as_str(), status), ("", ExitStatus::Exited(0)));
        capsule.kill(PATIENCE).unwrap();
    }
    assert_eq!(
        fs::read_to_string(&path).unwrap(),
        "first\nfirst-error\nsecond\nsecond-error\n"
    );
    let metadata = fs::metadata(&path).unwrap();
    use std::os::unix::fs::MetadataExt;
    assert_eq!(
        (metadata.uid(), metadata.gid(), metadata.mode() & 0o777),
        (1234, 2345, 0o640)
    );
    // What the owner may not write is refused by name.
    let stdio = Stdio::Files {
        output: "/root/x".into(),
        error: "/root/x".into(),
    };
    let capsule = place.make(|order| order.stdio = stdio);
    let error = capsule.ask(&shell("true")).unwrap_err().to_string();
    assert!(error.contains("/root/x"), "{error}");
    capsule.kill(PATIENCE).unwrap();
}

fn a_watcher_may_change_its_mind() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut watch = capsule.watch(false).await.unwrap();
        assert!(matches!(
            capsule.ask(&shell("echo kept; exit 4")),
            Ok(Answer::Started { .. })
        ));
        let exited = Answer::Exited {
            status: ExitStatus::Exited(4),
        };
        assert_eq!(
            watch.next().await.unwrap(),
            Some(exited.clone()),
            "without its output"
        );
        watch.want_output(true).await.unwrap();
        let mut events = Vec::new();
        while events.last() != Some(&exited) {
            events.push(watch.next().await.unwrap().unwrap());
        }
        let output = Answer::Output {
            stream: 1,
            bytes: b"kept\n".to_vec(),
        };
        assert_eq!(events, [Answer::Done, output, exited]);
    });
    capsule.kill(PATIENCE).unwrap();
}

fn orphans_end_with_the_root() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    // The inner shell ends at once; its child becomes PID 1's.
    let script = "(sleep 1000 & echo $!); (true &); kill -TERM $$";
    let (output, status) = run(&capsule, script);
    assert_eq!(status, ExitStatus::Signaled(15));
    assert!(output.trim().parse::<i32>().unwrap() > 1);
    let children = format!("/proc/{0}/task/{0}/children", capsule.init);
    let end = Instant::now() + PATIENCE;
    while !fs::read_to_string(&children).unwrap().trim().is_empty() {
        assert!(Instant::now() < end, "children are left");
        std::thread::yield_now();
    }
    capsule.kill(PATIENCE).unwrap();
}

fn a_missing_program_is_refused() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    let Ask::Start { mut command } = shell("") else {
        unreachable!()
    };
    command.arguments = vec!["no-such-program".to_owned()];
    let error = capsule
        .ask(&Ask::Start {
            command: command.clone(),
        })
        .unwrap_err();
    assert!(error.to_string().contains("no-such-program"), "{error}");
    command.directory = "/no/such/directory".to_owned();
    let error = capsule.ask(&Ask::Start { command }).unwrap_err();
    assert!(error.to_string().contains("/no/such/directory"), "{error}");
    // It can be tried again.
    assert_eq!(run(&capsule, "exit 5").1, ExitStatus::Exited(5));
    capsule.kill(PATIENCE).unwrap();
}

/// Runs in a process of its own, which dies without a farewell.
fn leave_a_capsule(socket: &Path) -> ExitCode {
    let capsule = Capsule::create(&OwnImage::create().unwrap(), "test", &order(socket)).unwrap();
    let script =
        "while ! test -e /tmp/crcoord-go-$$-$GO; do sleep 0.05; done; echo went on; exit 9";
    let script = script.replace("$$-$GO", &std::process::id().to_string());
    capsule.ask(&shell(&script)).unwrap();
    std::process::abort();
}

fn a_capsule_outlives_its_maker() {
    let place = Place::new();
    let mut maker = Process::new(std::env::current_exe().unwrap())
        .arg("leave-a-capsule")
        .arg(place.socket())
        .spawn()
        .unwrap();
    let maker_pid = maker.id();
    assert!(!maker.wait().unwrap().success());
    let (capsule, status) = place.attach().expect("the capsule is alive");
    assert_eq!((status.root.is_some(), status.ended), (true, None));
    assert!(capsule.host_pid(status.root.unwrap()).is_some());
    let name = fs::read_link(format!("/proc/{}/exe", capsule.init)).unwrap();
    assert!(name.to_str().unwrap().contains("memfd:crcoord"), "{name:?}");
    let go = format!("/tmp/crcoord-go-{maker_pid}");
    fs::write(&go, "").unwrap();
    assert_eq!(
        watch(&capsule),
        ("went on\n".to_owned(), ExitStatus::Exited(9))
    );
    fs::remove_file(&go).unwrap();
    // The status is kept for whoever comes later, and gone after the end.
    let (capsule, status) = place.attach().unwrap();
    assert_eq!(status.ended, Some(ExitStatus::Exited(9)));
    capsule.kill(PATIENCE).unwrap();
    assert!(place.attach().is_none());
}

fn the_run_lease_ends_everything() {
    let place = Place::new();
    let capsule = place.make(|order| order.run_lease_ms = Some(60_000));
    let Answer::Started { pid } = capsule.ask(&shell("sleep 1000")).unwrap() else {
        panic!()
    };
    let host = capsule.host_pid(pid).unwrap();
    assert_eq!(
        capsule.ask(&Ask::RenewLease { lease_ms: 50 }).unwrap(),
        Answer::Done
    );
    let end = Instant::now() + PATIENCE;
    while !capsule.ended() {
        assert!(Instant::now() < end, "the lease does not end it");
        std::thread::yield_now();
    }
    assert!(!Path::new(&format!("/proc/{host}")).exists());
    assert!(place.attach().is_none());
}

fn a_kill_is_proven() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    // A process that ignores everything it can, and its children.
    let script =
        "trap '' TERM INT HUP; (sleep 1000 &) ; (setsid sleep 1000 &); sleep 1000; sleep 1000";
    let Answer::Started { pid } = capsule.ask(&shell(script)).unwrap() else {
        panic!()
    };
    assert!(capsule.host_pid(pid).is_some());
    assert!(!capsule.ended());
    let namespace = fs::read_link(format!("/proc/{}/ns/pid", capsule.init)).unwrap();
    capsule.kill(PATIENCE).unwrap();
    assert!(capsule.ended());
    let zombie = format!("/proc/{}", capsule.init); // until the node's init has waited for it
    let alive = fs::read_dir("/proc")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path != Path::new(&zombie))
        .filter_map(|path| fs::read_link(path.join("ns/pid")).ok())
        .filter(|one| *one == namespace)
        .count();
    assert_eq!(alive, 0);
    capsule.kill(PATIENCE).unwrap(); // again is fine
}

fn streams_are_handed_out() {
    let place = Place::new();
    let capsule = place.make(|_| {});
    let status = capsule.status().unwrap();
    let streams = capsule.streams().unwrap();
    let names: Vec<_> = streams.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["stdout", "stderr"]);
    for ((_, descriptor), identity) in streams.iter().zip(&status.streams) {
        let path = format!("/proc/self/fd/{}", descriptor.as_raw_fd());
        let metadata = fs::metadata(path).unwrap();
        use std::os::unix::fs::MetadataExt;
        assert_eq!(
            (metadata.dev(), metadata.ino()),
            (identity.device, identity.inode)
        );
    }
    // A tree built from outside: here a process put into the PID namespace as an engine would.
    let target = capsule.init.to_string();
    let mut child = Process::new("nsenter")
        .args([
            "-t",
            &target,
            "-p",
            "sh",
            "-c",
            "echo restored; exec sleep 1000",
        ])
        .stdout(streams.into_iter().next().unwrap().1)
        .spawn()
        .unwrap();
    assert_eq!(capsule.ask(&Ask::Expect { root: 2 }).unwrap(), Answer::Done);
    let refused = capsule.ask(&shell("true")).unwrap_err();
    assert!(refused.to_string().contains("already"), "{refused}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut watch = capsule.watch(true).await.unwrap();
        let event = tokio::time::timeout(PATIENCE, watch.next())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(
            event,
            Some(Answer::Output {
                stream: 1,
                bytes: b"restored\n".to_vec()
            })
        );
    });
    capsule.kill(PATIENCE).unwrap();
    assert!(!child.wait().unwrap().success());
}
