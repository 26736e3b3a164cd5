//! Real programs, unmodified, dumped and restored at arbitrary moments: redis-server under load,
//! python3 with threads and numpy, a bash pipeline, xz. The result is that of an uninterrupted run.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot go on fails by panicking"
)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crcoord_kernel::namespace::in_network_namespace;
use crcoord_tests::binaries::installed;
use crcoord_tests::{DumpOptions, Program, Random, Sandbox, eventually};

/// Dumps and restores of one run, at least.
const ROUNDS: u32 = 2;

/// Runs a bash script in `directory` to its end, uninterrupted, and returns its standard output.
fn uninterrupted(directory: &Path, script: &str) -> Vec<u8> {
    let output = Command::new("bash")
        .args(["-c", script])
        .current_dir(directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    output.stdout
}

/// Runs a script again and carries it through dumps and restores on its way; checks its status and
/// returns its standard output.
fn interrupted(name: &str, directory: &Path, script: &str, milliseconds: u64) -> Vec<u8> {
    let mut random = Random::announced(name);
    let images = tempfile::tempdir().unwrap();
    // The program is a child of a shell that keeps its status: trees are the usual case.
    let script = format!("( {script} ); echo $? >status");
    let mut sandbox = Sandbox::new();
    let pid = sandbox.start(&Program::new("bash", directory).arguments(["-c", &script]));
    for round in 1..=ROUNDS {
        random.sleep_below(milliseconds);
        let what = format!("{name}, round {round}");
        let status = directory.join("status");
        assert!(!status.exists(), "{what}: it ended too soon for this test");
        let image = images.path().join(round.to_string());
        sandbox
            .dump(pid, &image, DumpOptions::default())
            .done(&what);
        sandbox.await_empty(&what);
        sandbox = Sandbox::new();
        sandbox.restore(&image).done(&what);
    }
    sandbox.await_empty(&format!("end of {name}"));
    let read = |file| fs::read_to_string(directory.join(file)).unwrap();
    assert_eq!(read("status"), "0\n", "{name}: {}", read("stderr"));
    fs::read(directory.join("stdout")).unwrap()
}

#[test]
fn a_bash_pipeline_computes_the_same() {
    installed("/usr/bin/awk", "mawk");
    let script = "for i in $(seq 30); do \
                  seq $i 7 900000 | awk '{ print ($1 * 7919) % 104729, $1 }' | sort -n | md5sum; \
                  done";
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let expected = uninterrupted(directories[0].path(), script);
    let found = interrupted("bash", directories[1].path(), script, 250);
    assert_eq!(
        String::from_utf8_lossy(&found),
        String::from_utf8_lossy(&expected)
    );
}

#[test]
fn xz_with_two_threads_writes_the_same_file() {
    let xz = installed("/usr/bin/xz", "xz-utils");
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::announced("content for xz");
    // Bytes that compress, but not to nothing.
    let words: Vec<[u8; 8]> = (0..5000)
        .map(|_| random.below(1 << 60).to_le_bytes())
        .collect();
    let content: Vec<u8> = (0..750_000)
        .flat_map(|_| words[random.below(5000) as usize])
        .collect();
    fs::write(directory.path().join("plain"), &content).unwrap();
    let script = |output: &str| {
        format!(
            "{} -T2 --block-size=2MiB -6 -k -c plain >{output}",
            xz.display()
        )
    };
    uninterrupted(directory.path(), &script("expected"));
    interrupted("xz", directory.path(), &script("found"), 500);
    let read = |file| fs::read(directory.path().join(file)).unwrap();
    assert!(read("expected") == read("found"), "the outputs differ");
}

const NUMPY: &str = r#"
import hashlib, threading
import numpy

results = {}

def work(number):
    state = numpy.random.default_rng(number)
    matrix = state.standard_normal((160, 160))
    for step in range(350):
        matrix = numpy.tanh(matrix @ matrix.T / 160) + state.standard_normal((160, 160)) * 1e-3
    results[number] = hashlib.sha256(matrix.tobytes()).hexdigest()

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for number in sorted(results):
    print(number, results[number])
"#;

#[test]
fn python_with_threads_and_numpy_computes_the_same() {
    let python = installed("/usr/bin/python3", "python3");
    installed("/usr/lib/python3/dist-packages/numpy", "python3-numpy");
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("work.py"), NUMPY).unwrap();
    // One thread of the library each, so that sums are formed in the same order.
    let script = format!("OPENBLAS_NUM_THREADS=1 {} work.py", python.display());
    let expected = uninterrupted(directory.path(), &script);
    let found = interrupted("numpy", directory.path(), &script, 250);
    assert_eq!(
        String::from_utf8_lossy(&found),
        String::from_utf8_lossy(&expected)
    );
}

/// How long a client waits for a reply: the server goes without a word when its tree is ended.
const REDIS_PATIENCE: Duration = Duration::from_secs(2);

/// A connection that speaks RESP, the protocol of redis.
struct Redis(BufReader<TcpStream>);

impl Redis {
    const PORT: u16 = 6399;

    /// Connects to the server in the sandbox.
    fn connect(sandbox: &Sandbox) -> io::Result<Redis> {
        let network = sandbox.network();
        let stream = in_network_namespace(network.as_fd(), || {
            TcpStream::connect((Ipv4Addr::LOCALHOST, Redis::PORT))
        })
        .unwrap()?;
        stream.set_read_timeout(Some(REDIS_PATIENCE))?;
        Ok(Redis(BufReader::new(stream)))
    }

    /// Sends a command and reads a reply that is one line or one string.
    fn ask(&mut self, words: &[&str]) -> io::Result<String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request += &format!("${}\r\n{word}\r\n", word.len());
        }
        self.0.get_mut().write_all(request.as_bytes())?;
        let line = self.line()?;
        match line.strip_prefix('$') {
            Some("-1") => Err(io::Error::other("no such key")),
            Some(length) => {
                let length: usize = length.parse().map_err(io::Error::other)?;
                let mut bytes = vec![0; length + 2];
                self.0.read_exact(&mut bytes)?;
                bytes.truncate(length);
                String::from_utf8(bytes).map_err(io::Error::other)
            }
            None if line.starts_with('-') => Err(io::Error::other(line)),
            None => Ok(line.trim_start_matches('+').to_owned()),
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = String::new();
        if self.0.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(line.trim_end().to_owned())
    }
}

/// Writes numbered keys until the connection ends or `enough`; remembers what was acknowledged.
fn load(
    client: usize,
    sandbox: &Sandbox,
    acknowledged: &Mutex<BTreeMap<String, String>>,
    enough: &AtomicBool,
) {
    let mut redis = Redis::connect(sandbox).unwrap();
    for number in 0.. {
        let key = format!("client{client}:{}", number % 2000);
        let first = acknowledged.lock().unwrap().len();
        let value = format!("{number}-{first}-{}", "x".repeat(number % 300));
        match redis.ask(&["SET", &key, &value]) {
            Ok(reply) => {
                assert_eq!(reply, "OK");
                acknowledged.lock().unwrap().insert(key, value);
            }
            // The order of the last command may have been followed without an answer.
            Err(_) => {
                acknowledged.lock().unwrap().remove(&key);
                return;
            }
        }
        if enough.load(Ordering::SeqCst) {
            return;
        }
    }
}

#[test]
fn redis_under_load_keeps_its_socket_and_all_acknowledged_data() {
    let server = installed("/usr/bin/redis-server", "redis-server");
    let directory = tempfile::tempdir().unwrap();
    let mut random = Random::announced("redis");
    let mut sandbox = Sandbox::new();
    let port = Redis::PORT.to_string();
    let pid = sandbox.start(
        &Program::new(server, directory.path())
            .arguments(["--port", &port, "--bind", "127.0.0.1"])
            .arguments(["--save", "", "--appendonly", "no"]),
    );
    eventually("redis-server listens", || Redis::connect(&sandbox).is_ok());
    let acknowledged = Mutex::new(BTreeMap::new());
    for round in 1..=ROUNDS + 1 {
        let what = format!("redis, round {round}");
        let image = directory.path().join(format!("image-{round}"));
        let enough = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for client in 0..3 {
                let (sandbox, acknowledged, enough) = (&sandbox, &acknowledged, &enough);
                scope.spawn(move || load(client, sandbox, acknowledged, enough));
            }
            std::thread::sleep(Duration::from_millis(100));
            random.sleep_below(400);
            let options = DumpOptions {
                reset_external_tcp: true,
                ..DumpOptions::default()
            };
            let ended = sandbox.dump(pid, &image, options);
            enough.store(true, Ordering::SeqCst);
            ended.done(&what);
        });
        sandbox = Sandbox::new();
        sandbox.restore(&image).done(&what);
        let mut redis = Redis::connect(&sandbox).unwrap();
        let acknowledged = acknowledged.lock().unwrap();
        assert!(acknowledged.len() > 100, "{what}: hardly any load");
        for (key, value) in &*acknowledged {
            assert_eq!(redis.ask(&["GET", key]).unwrap(), *value, "{what}: {key}");
        }
        // It has seen the old clients go.
        eventually(&format!("{what}: old connections are gone"), || {
            redis.ask(&["CLIENT", "LIST"]).unwrap().lines().count() == 1
        });
    }
}
