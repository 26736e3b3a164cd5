//! The commands from outside: exit codes, what goes to which stream, JSON, and certificates; the
//! coordinator is played by the test.
#![allow(clippy::unwrap_used)]

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread::JoinHandle;

use crcoord_common::ids::{Epoch, Incarnation, JobKey, MemberId};
use crcoord_common::report::{Class, Report};
use crcoord_common::wire::MESSAGE_LIMIT;
use crcoord_common::wire::client::{EpochInfo, Event, MemberFigures, Phase, Request};
use crcoord_common::wire::control::Preflight;
use crcoord_common::wire::frame;
use crcoord_common::wire::member::{ExitStatus, NetworkMode, Placement, Stdio};
use tempfile::TempDir;

/// A directory with a configuration whose coordinator is this test.
struct Site {
    directory: TempDir,
}

impl Site {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().display();
        let text = format!(
            "coordinator.socket = \"{path}/c.sock\"\ncluster.pki_dir = \"{path}/pki\"\n\
             cluster.name = \"alpha\"\n"
        );
        std::fs::write(directory.path().join("crcoord.toml"), text).unwrap();
        Site { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Answers one request with these events and gives the request back.
    fn answer(&self, events: Vec<Event>) -> JoinHandle<Request> {
        let listener = UnixListener::bind(self.path("c.sock")).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let request = frame::read(&mut stream, MESSAGE_LIMIT).unwrap().unwrap();
            for event in &events {
                frame::write(&mut stream, event, MESSAGE_LIMIT).unwrap();
            }
            request
        })
    }

    fn crcoord(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_crcoord"));
        command
            .arg("--config")
            .arg(self.path("crcoord.toml"))
            .args(arguments);
        for variable in [
            "SLURM_JOB_ID",
            "SLURM_JOB_NODELIST",
            "CRCOORD_JOB",
            "CRCOORD_CONFIG",
        ] {
            command.env_remove(variable);
        }
        command
    }
}

fn code(output: &Output) -> i32 {
    output.status.code().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn key() -> JobKey {
    JobKey {
        cluster: "alpha".parse().unwrap(),
        id: "42".parse().unwrap(),
        submitted: 1,
    }
}

fn placements() -> Vec<Placement> {
    vec![Placement {
        member: MemberId(0),
        node: "n1".parse().unwrap(),
        address: "10.0.0.1".parse().unwrap(),
    }]
}

fn epoch() -> EpochInfo {
    EpochInfo {
        epoch: Epoch(3),
        incarnation: Incarnation(1),
        taken: 1_700_000_000,
        members: vec![MemberFigures {
            member: MemberId(0),
            node: "n1".parse().unwrap(),
            freeze_us: 13_840,
            raw_bytes: 1 << 30,
            stored_bytes: 1 << 20,
            stream_ms: 500,
        }],
        total_ms: 1200,
        notes: Vec::new(),
    }
}

#[test]
fn a_coordinator_that_is_not_there_is_exit_5_and_of_run_125() {
    let site = Site::new();
    for arguments in [
        vec!["list"],
        vec!["status"],
        vec!["checkpoint", "--job", "42"],
    ] {
        let output = site.crcoord(&arguments);
        assert_eq!(code(&output), 5, "{arguments:?}");
        assert!(err(&output).contains("c.sock"), "{}", err(&output));
        assert_eq!(out(&output), "");
    }
    let output = site.crcoord(&["run", "--job", "42", "--nodes", "n1", "--", "true"]);
    assert_eq!(code(&output), 125);
}

#[test]
fn every_class_of_failure_has_its_code_and_equal_reports_are_grouped() {
    let codes = [
        (Class::Failure, 1),
        (Class::Usage, 2),
        (Class::Obstacle, 3),
        (Class::Aborted, 4),
        (Class::Unreachable, 5),
        (Class::Denied, 6),
        (Class::NotFound, 7),
        (Class::TimedOut, 8),
    ];
    for (class, expected) in codes {
        let site = Site::new();
        let report = |node: &str| {
            Report::new("test-code", class, "a reason").on_node(&node.parse().unwrap())
        };
        site.answer(vec![Event::Failed(vec![report("n1"), report("n2")])]);
        let output = site.crcoord(&["checkpoint", "--job", "42", "--json"]);
        assert_eq!(code(&output), expected, "{class:?}");
        assert_eq!(err(&output), "crcoord: n[1-2]: a reason [test-code]\n");
        let document: serde_json::Value = serde_json::from_str(&out(&output)).unwrap();
        assert_eq!(document["schema"], 1);
        assert_eq!(document["kind"], "failed");
        assert_eq!(document["data"][1]["place"]["node"], "n2");
    }
}

#[test]
fn checkpoint_waits_for_the_commit_and_prints_its_figures() {
    let site = Site::new();
    let request = site.answer(vec![
        Event::Opened { epoch: Epoch(3) },
        Event::Phase { phase: Phase::Hold },
        Event::Committed(epoch()),
    ]);
    let output = site.crcoord(&["checkpoint", "--job", "42", "--external-tcp", "reset"]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    assert_eq!(err(&output), "", "no progress without a terminal");
    let text = out(&output);
    assert!(
        text.starts_with("job 42 epoch 3 committed after 1.20 s\n"),
        "{text}"
    );
    for figure in ["13.8 ms", "1.00 GiB", "1.00 MiB", "2.00 GiB/s"] {
        assert!(text.contains(figure), "{figure}: {text}");
    }
    let expected = Request::Checkpoint {
        job: "42".parse().unwrap(),
        adopt: None,
        kill: false,
        wait: true,
        reset_external_tcp: true,
    };
    assert_eq!(request.join().unwrap(), expected);
}

#[test]
fn a_connection_that_ends_early_is_no_success() {
    let site = Site::new();
    site.answer(vec![Event::Phase { phase: Phase::Hold }]);
    let output = site.crcoord(&["checkpoint", "--job", "42"]);
    assert_eq!(code(&output), 5);
    assert!(err(&output).contains("client-cut-off"), "{}", err(&output));
}

#[test]
fn checkpoint_without_waiting_prints_the_epoch() {
    let site = Site::new();
    site.answer(vec![Event::Opened { epoch: Epoch(4) }]);
    let output = site.crcoord(&["checkpoint", "--job", "42", "--no-wait"]);
    assert_eq!((code(&output), out(&output)), (0, "4\n".to_owned()));
}

#[test]
fn the_job_defaults_to_slurms_then_to_our_own() {
    for (variables, expected) in [
        (vec![("SLURM_JOB_ID", "7"), ("CRCOORD_JOB", "8")], "7"),
        (vec![("CRCOORD_JOB", "8")], "8"),
    ] {
        let site = Site::new();
        let request = site.answer(vec![Event::Done]);
        let output = site.command(&["kill"]).envs(variables).output().unwrap();
        assert_eq!(code(&output), 0, "{}", err(&output));
        let expected = Request::Kill {
            job: expected.parse().unwrap(),
        };
        assert_eq!(request.join().unwrap(), expected);
    }
    let output = Site::new().crcoord(&["kill"]);
    assert_eq!(code(&output), 2);
    assert!(err(&output).contains("--job"), "{}", err(&output));
}

#[test]
fn run_forwards_output_and_returns_the_programs_status() {
    for (status, expected) in [
        (ExitStatus::Exited(0), 0),
        (ExitStatus::Exited(3), 3),
        (ExitStatus::Signaled(15), 143),
        (ExitStatus::Lost, 125),
    ] {
        let site = Site::new();
        let bytes = |stream, text: &str| Event::Output {
            member: MemberId(0),
            stream,
            bytes: text.as_bytes().to_vec(),
        };
        let request = site.answer(vec![
            Event::JobStarted {
                job: key(),
                placements: placements(),
            },
            bytes(1, "to out\n"),
            bytes(2, "to err\n"),
            Event::JobEnded {
                statuses: vec![(MemberId(0), status)],
            },
        ]);
        let arguments = [
            "run",
            "--job",
            "42",
            "--nodes",
            "n[1-2]",
            "--network",
            "virtual",
        ];
        let output = site
            .command(&arguments)
            .args(["--run-lease", "10s", "--", "./app", "--json"])
            .env("MARK", "here")
            .output()
            .unwrap();
        assert_eq!(code(&output), expected);
        assert_eq!(out(&output), "to out\n");
        assert!(err(&output).starts_with("to err\n"), "{}", err(&output));
        match request.join().unwrap() {
            Request::Run {
                nodes,
                command,
                stdio,
                network,
                run_lease_ms,
                attach,
                ..
            } => {
                assert_eq!(nodes.len(), 2);
                assert_eq!(command.arguments, ["./app", "--json"]);
                assert_eq!(command.environment["MARK"], "here");
                assert_eq!(stdio, Stdio::Caller);
                assert_eq!(network, NetworkMode::Virtual);
                assert_eq!(run_lease_ms, Some(10_000));
                assert!(attach);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn restart_tells_what_was_lost_and_attached_returns_the_status() {
    let resumed = || Event::Resumed {
        job: key(),
        incarnation: Incarnation(2),
        epoch: Epoch(3),
        lost_seconds: 9,
        placements: placements(),
    };
    let site = Site::new();
    let request = site.answer(vec![resumed()]);
    let output = site.crcoord(&[
        "restart",
        "--job",
        "42",
        "--epoch",
        "3",
        "--nodes",
        "n1,n3",
        "--confirm-dead",
        "n2",
    ]);
    assert_eq!(
        out(&output),
        "job 42 resumed from epoch 3 as life 2 on n1; 9 s of work lost\n"
    );
    let expected = Request::Restart {
        job: "42".parse().unwrap(),
        epoch: Some(Epoch(3)),
        nodes: vec!["n1".parse().unwrap(), "n3".parse().unwrap()],
        confirmed_dead: vec!["n2".parse().unwrap()],
        attach: false,
    };
    assert_eq!(request.join().unwrap(), expected);

    let site = Site::new();
    let ended = Event::JobEnded {
        statuses: vec![(MemberId(0), ExitStatus::Exited(5))],
    };
    site.answer(vec![resumed(), ended]);
    let output = site.crcoord(&["restart", "--job", "42", "--attach"]);
    assert_eq!((code(&output), out(&output)), (5, String::new()));
}

#[test]
fn check_fails_by_the_first_finding_that_is_no_note() {
    let finding = |class| Report::new("x", class, "a finding").remedy("mend it");
    for (findings, expected) in [
        (vec![], 0),
        (vec![finding(Class::Note)], 0),
        (
            vec![
                finding(Class::Note),
                finding(Class::Unreachable),
                finding(Class::Obstacle),
            ],
            5,
        ),
    ] {
        let site = Site::new();
        site.answer(vec![Event::Findings(findings)]);
        assert_eq!(
            code(&site.crcoord(&["check", "--nodes", "n[001-003]"])),
            expected
        );
    }
    let site = Site::new();
    let preflight = Preflight {
        findings: vec![finding(Class::Obstacle)],
        ..Preflight::default()
    };
    site.answer(vec![Event::Preflights(vec![(MemberId(0), preflight)])]);
    let output = site.crcoord(&["check", "--job", "42"]);
    assert_eq!(code(&output), 3);
    assert!(
        out(&output).ends_with("the job cannot be checkpointed now\n"),
        "{}",
        out(&output)
    );
}

#[test]
fn wrong_command_lines_are_exit_2_and_of_run_125() {
    let site = Site::new();
    for arguments in [
        vec!["nonsense"],
        vec!["checkpoint", "--job", "a/b"],
        vec!["checkpoint", "--job", "42", "--pid", "7"],
        vec!["check", "--nodes", "n[1"],
        vec!["--set", "agent.listn=1", "list"],
        vec!["--set", "novalue", "list"],
    ] {
        assert_eq!(code(&site.crcoord(&arguments)), 2, "{arguments:?}");
    }
    for arguments in [
        vec!["run", "--job", "42", "--nodes", "n1"],
        vec![
            "run",
            "--job",
            "42",
            "--nodes",
            "n1",
            "--run-lease",
            "10",
            "--",
            "true",
        ],
        vec![
            "run", "--job", "42", "--nodes", "n1", "--detach", "--", "true",
        ],
    ] {
        assert_eq!(code(&site.crcoord(&arguments)), 125, "{arguments:?}");
    }
    assert_eq!(code(&site.crcoord(&["--help"])), 0);
    assert_eq!(code(&site.crcoord(&["run", "--help"])), 0);
}

#[test]
fn config_show_tells_origins() {
    let site = Site::new();
    let output = site
        .command(&["--set", "retention.epochs=5", "config", "show", "--origin"])
        .env("CRCOORD_COORDINATOR_HEARTBEAT", "2s")
        .output()
        .unwrap();
    let text = out(&output);
    let line = |start: &str| text.lines().find(|line| line.starts_with(start)).unwrap();
    assert!(
        line("name = \"alpha\"").ends_with("crcoord.toml:3"),
        "{text}"
    );
    assert!(line("heartbeat = \"2s\"").ends_with("# environment CRCOORD_COORDINATOR_HEARTBEAT"));
    assert!(line("epochs = 5").ends_with("# flag --set"));
    assert!(line("state_dir = ").ends_with("# default"));

    std::fs::write(site.path("crcoord.toml"), "[agent]\nstor_dir = \"/x\"\n").unwrap();
    let output = site.crcoord(&["config", "show"]);
    assert_eq!(code(&output), 2);
    let expected = "crcoord.toml:2: unknown key agent.stor_dir (did you mean agent.store_dir?)";
    assert!(err(&output).contains(expected), "{}", err(&output));
}

#[test]
fn pki_makes_an_authority_and_certificates_that_load() {
    let site = Site::new();
    let output = site.crcoord(&["pki", "init"]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    let output = site.crcoord(&[
        "pki", "issue", "--role", "node", "--name", "n[01-02]", "--json",
    ]);
    assert_eq!(code(&output), 0, "{}", err(&output));
    let document: serde_json::Value = serde_json::from_str(&out(&output)).unwrap();
    assert_eq!(document["data"][1]["peer"], "crcoord://alpha/node/n02");
    for name in ["ca.key", "image.key", "node-n01.key"] {
        let mode = std::fs::metadata(site.path("pki").join(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    let identity = crcoord_transport::Identity::load(&crcoord_transport::IdentityPaths {
        certificate: site.path("pki/node-n02.pem"),
        key: site.path("pki/node-n02.key"),
        authority: site.path("pki/ca.pem"),
    });
    assert_eq!(identity.unwrap().peer().name(), "n02");

    let output = site.crcoord(&["pki", "init"]);
    assert_eq!(code(&output), 1);
    assert!(err(&output).contains("pki-exists"), "{}", err(&output));
    let output = site.crcoord(&[
        "pki", "issue", "--role", "node", "--name", "n1", "--days", "0",
    ]);
    assert_eq!(code(&output), 2);
    let output = site.crcoord(&[
        "pki",
        "issue",
        "--role",
        "node",
        "--name",
        "n1",
        "--dir",
        "/nonexistent",
    ]);
    assert_eq!(code(&output), 7);
}
