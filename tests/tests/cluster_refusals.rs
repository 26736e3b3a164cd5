//! What is refused, by name and with its exit code, and that nothing was touched.

use std::net::UdpSocket;
use std::os::unix::process::CommandExt;

use crcoord_tests::cluster::Site;
use crcoord_tests::cluster_phase::signal;
use crcoord_tests::cluster_work::{PAIR_AND_MEMORY, Work};

const NOBODY: u32 = 65534;
const SIGSTOP: i32 = 19;
const SIGCONT: i32 = 18;

#[test]
fn what_does_not_exist_is_not_found() {
    let site = Site::start("n[1-2]", &[]);
    for command in ["checkpoint", "restart", "show", "kill", "abort", "check"] {
        site.crcoord(&format!("{command} --job 99"))
            .code(7)
            .says("99");
    }
    let work = Work::new(&site, "42", &["memory_private"]);
    let _run = work.run(&site, "--nodes n1 --network virtual");
    site.crcoord("kill --job 42").code(0);
    site.crcoord("restart --job 42").code(7);
    site.crcoord("restart --job 42 --epoch 5").code(7);
}

#[test]
fn a_node_that_does_not_answer_and_a_port_in_use_are_named() {
    let site = Site::start("n[1-2]", &[]);
    let work = Work::new(&site, "42", &PAIR_AND_MEMORY[..2]);
    let _run = work.run(&site, "--nodes n1,n2 --network virtual");
    let agent = site.agent_of("n2");
    signal(agent, SIGSTOP);
    site.until_connected(1);
    for command in ["checkpoint --job 42", "check --nodes n[1-2]"] {
        let done = site.crcoord(command);
        assert!([5, 8].contains(&done.code), "{done:?}");
        assert!(
            format!("{}{}", done.output, done.said).contains("n2"),
            "{done:?}"
        );
    }
    signal(agent, SIGCONT);
    site.until_connected(2);
    site.crcoord("checkpoint --job 42").code(0);
    work.verify();

    let taken = UdpSocket::bind("127.0.0.1:0").expect("loopback");
    let address = taken.local_addr().expect("it is bound").to_string();
    let state = site.path("other");
    let words = format!(
        "--set coordinator.listen={address} --set coordinator.state_dir={0} --set coordinator.socket={0}.sock coordinator",
        state.display()
    );
    let done = site.crcoord(&words).says(&address);
    assert_ne!(done.code, 0);
}

#[test]
fn a_job_belongs_to_its_user() {
    let site = Site::start("n1", &[]);
    let work = Work::new(&site, "42", &["memory_private"]);
    let _run = work.run(&site, "--nodes n1 --network virtual");
    let as_nobody = |words: &str| {
        let running = site.begin_with(words, &[], |command| {
            command.uid(NOBODY).gid(NOBODY);
        });
        running.end()
    };
    for command in ["checkpoint", "restart", "kill", "abort", "check"] {
        as_nobody(&format!("{command} --job 42")).code(6);
    }
    site.crcoord("checkpoint --job 42").code(0);
    work.verify();

    // His own he may do with as he likes.
    let own = Work::new(&site, "50", &["memory_private"]);
    let own_run = site.begin_with(
        "run --job 50 --nodes n1 --network virtual -- sh -c",
        &[own.script()],
        |command| {
            command.uid(NOBODY).gid(NOBODY);
        },
    );
    own.await_ready();
    as_nobody("checkpoint --job 50 --kill").code(0);
    own_run.end().code(137);
    as_nobody("restart --job 50").code(0);
    own.verify();
}

#[test]
fn all_obstacles_are_told_at_once_and_nothing_is_frozen() {
    let site = Site::start("n[1-2]", &[]);
    let script = "cd $(mktemp -d); mkfifo f g; if [ $CRCOORD_MEMBER = 0 ]; \
                  then exec 3<>f; else exec 4<>g; fi; echo up; exec sleep 1000";
    let mut run = site.begin_with(
        "run --job 42 --nodes n1,n2 --network virtual -- sh -c",
        &[script],
        |_| {},
    );
    run.until_output("up\nup\n");
    for command in ["checkpoint --job 42", "check --job 42"] {
        let done = site.crcoord(command).code(3);
        let told = format!("{}{}", done.output, done.said);
        assert!(told.contains("/f") && told.contains("/g"), "{told}");
    }
    assert!(site.epochs("42").is_empty());
    assert!(!run.has_ended());
    site.crcoord("kill --job 42").code(0);
}
