//! A cluster of real daemons on this machine, and the commands that are typed into it.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crcoord::demo::{Cluster, Options};
use crcoord_common::hostlist::HostList;
use crcoord_common::ids::NodeName;
use serde_json::Value;
use tempfile::TempDir;

use crate::binaries;

/// How long anything in a cluster may take on a busy machine with two cores.
pub const CLUSTER_PATIENCE: Duration = Duration::from_secs(60);

/// A coordinator and agents in namespaces of their own. All of it ends with the value, also in a
/// panic, and with the test process.
#[derive(Debug)]
pub struct Site {
    /// The daemons.
    pub cluster: Cluster,
    /// Commands are numbered, for the names of their output files.
    commands: std::cell::Cell<u32>,
    directory: TempDir,
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    line: String,
    output: PathBuf,
    error: PathBuf,
}

/// How a command ended.
#[derive(Clone, Debug)]
pub struct Done {
    line: String,
    /// Its exit status.
    pub code: i32,
    /// Its standard output.
    pub output: String,
    /// Its standard error.
    pub said: String,
}

/// The name of a node.
///
/// # Panics
/// It is none.
pub fn node(name: &str) -> NodeName {
    name.parse().expect("a node's name")
}

/// Waits until `condition` holds.
///
/// # Panics
/// It does not within [`CLUSTER_PATIENCE`].
pub fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < CLUSTER_PATIENCE,
            "{what}: not within {CLUSTER_PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

impl Site {
    /// Starts a cluster with these nodes (a list such as `n[1-3]`) and waits until all are connected.
    /// `settings` are further lines of the configuration.
    ///
    /// # Panics
    /// It cannot be built: this needs root.
    pub fn start(nodes: &str, settings: &[&str]) -> Site {
        let mut site = Site::build(nodes, settings);
        site.must(|cluster| cluster.start_all());
        let nodes = nodes.parse::<HostList>().expect("a list of nodes").0;
        site.until_connected(nodes.len());
        site
    }

    /// Builds a cluster and starts no daemon. `@` in a setting stands for the directory of [`Site::path`].
    ///
    /// # Panics
    /// It cannot be built: this needs root.
    pub fn build(nodes: &str, settings: &[&str]) -> Site {
        let directory = tempfile::Builder::new()
            .prefix("crcoord-")
            .tempdir()
            .expect("a temporary directory");
        // Users other than root read the configuration and run the programs in it.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755))
            .expect("the directory is ours");
        // Kept from a new build while the test runs.
        for binary in [binaries::crcoord(), binaries::zoo()] {
            let name = binary.file_name().expect("a file");
            fs::copy(&binary, directory.path().join(name)).expect("the binary was built");
        }
        let quick = [
            "coordinator.heartbeat = \"250ms\"",
            "coordinator.lost_after = \"2s\"",
            "coordinator.run_lease_margin = \"2s\"",
        ];
        let given = |line: &&str| {
            let key = line.split(" =").next().expect("there is a first part");
            !settings.iter().any(|setting| setting.starts_with(key))
        };
        let quick = quick.iter().copied().filter(given);
        let cluster = Cluster::build(Options {
            program: directory.path().join("crcoord"),
            directory: directory.path().to_owned(),
            nodes: nodes.parse::<HostList>().expect("a list of nodes").0,
            settings: quick
                .chain(settings.iter().copied())
                .map(|line| line.replace('@', &directory.path().display().to_string()))
                .collect(),
            log: "info".to_owned(),
        })
        .unwrap_or_else(|error| panic!("no cluster (this needs root): {error}"));
        Site {
            cluster,
            commands: std::cell::Cell::new(0),
            directory,
        }
    }

    /// Does something to the daemons.
    ///
    /// # Panics
    /// It fails.
    pub fn must<T, E: std::fmt::Display>(
        &mut self,
        act: impl FnOnce(&mut Cluster) -> Result<T, E>,
    ) -> T {
        act(&mut self.cluster).unwrap_or_else(|error| panic!("{error}"))
    }

    /// A path in the directory that all nodes see.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Waits until the coordinator answers and has exactly so many agents.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn until_connected(&self, count: usize) {
        until(&format!("{count} connected agents"), || {
            let done = self.crcoord("status --json");
            done.code == 0
                && done.data()["nodes"].as_array().is_some_and(|nodes| {
                    nodes
                        .iter()
                        .filter(|node| node["connected"] == true)
                        .count()
                        == count
                })
        });
    }

    /// Starts `crcoord WORDS`, words being separated by blanks.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn begin(&self, words: &str) -> Running {
        self.begin_with(words, &[], |_| {})
    }

    /// The same with further words that may hold blanks, and with changes to the process.
    ///
    /// # Panics
    /// It cannot be started.
    pub fn begin_with(
        &self,
        words: &str,
        more: &[&str],
        change: impl FnOnce(&mut Command),
    ) -> Running {
        let number = self.commands.replace(self.commands.get() + 1);
        let (output, error) = (
            self.path(&format!("{number}.out")),
            self.path(&format!("{number}.err")),
        );
        // Files and not pipes: nobody reads them meanwhile.
        let create = |path: &Path| File::create(path).expect("the directory is ours");
        let mut command = Command::new(self.path("crcoord"));
        command
            .arg("--config")
            .arg(self.cluster.configuration())
            .args(words.split_whitespace())
            .args(more)
            .current_dir(self.directory.path())
            .stdin(Stdio::null())
            .stdout(create(&output))
            .stderr(create(&error));
        change(&mut command);
        Running {
            child: command.spawn().expect("the binary was built"),
            line: words.to_owned(),
            output,
            error,
        }
    }

    /// Runs `crcoord WORDS` to its end.
    ///
    /// # Panics
    /// It does not end.
    pub fn crcoord(&self, words: &str) -> Done {
        self.begin(words).end()
    }

    /// What `show --json` says of a job.
    ///
    /// # Panics
    /// There is no such job.
    pub fn job(&self, id: &str) -> Value {
        let done = self.crcoord(&format!("show --json --job {id}")).code(0);
        done.data()[0].clone()
    }

    /// The numbers of a job's committed epochs, oldest first.
    ///
    /// # Panics
    /// There is no such job.
    pub fn epochs(&self, id: &str) -> Vec<u64> {
        let job = self.job(id);
        let epochs = job["epochs"].as_array().expect("a list");
        epochs
            .iter()
            .filter_map(|epoch| epoch["epoch"].as_u64())
            .collect()
    }

    /// A path as a node sees it, for this process: nodes have filesystems of their own.
    ///
    /// # Panics
    /// There is no such node.
    pub fn path_in(&self, name: &str, path: &Path) -> PathBuf {
        let init = self.init_of(name);
        let path = path.strip_prefix("/").expect("an absolute path");
        Path::new("/proc")
            .join(init.to_string())
            .join("root")
            .join(path)
    }

    /// A command in a node's namespaces.
    ///
    /// # Panics
    /// There is no such node.
    pub fn inside(&self, name: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--target={}", self.init_of(name)))
            .args(["--pid", "--mount", "--net", "--uts", "--ipc", "--"])
            .arg(program)
            .stdin(Stdio::null());
        command
    }

    fn init_of(&self, name: &str) -> i32 {
        self.cluster.init_of(&node(name)).expect("the node lives")
    }

    /// The process of a node's agent.
    ///
    /// # Panics
    /// It does not run.
    pub fn agent_of(&self, name: &str) -> i32 {
        self.cluster
            .process_of(&node(name), "agent")
            .expect("the agent runs")
    }

    /// The logs of all daemons, for a failure's message.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.cluster.logs())
            .into_iter()
            .flatten()
            .flatten()
        {
            text.push_str(&format!("--- {}\n", entry.path().display()));
            text.push_str(&fs::read_to_string(entry.path()).unwrap_or_default());
        }
        text
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
    }
}

impl Running {
    /// Its pid.
    pub fn pid(&self) -> i32 {
        self.child.id().cast_signed()
    }

    /// Waits until its standard output is this.
    ///
    /// # Panics
    /// It does not come to that.
    pub fn until_output(&mut self, text: &str) {
        until(&format!("{text:?} from crcoord {}", self.line), || {
            assert!(
                !self.has_ended(),
                "crcoord {} ended: {}",
                self.line,
                read(&self.error)
            );
            read(&self.output) == text
        });
    }

    /// True once it ended.
    ///
    /// # Panics
    /// Never for a child of ours.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().expect("it is a child").is_some()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// It does not end within [`CLUSTER_PATIENCE`].
    pub fn end(mut self) -> Done {
        use std::os::unix::process::ExitStatusExt;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("it is a child") {
                break status;
            }
            if start.elapsed() > CLUSTER_PATIENCE {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!(
                    "crcoord {} does not end; it said: {}{}",
                    self.line,
                    read(&self.output),
                    read(&self.error)
                );
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        Done {
            line: std::mem::take(&mut self.line),
            code: status
                .code()
                .unwrap_or_else(|| -status.signal().unwrap_or(0)),
            output: read(&self.output),
            said: read(&self.error),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Without effect on one that has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

impl Done {
    /// Requires this exit status.
    ///
    /// # Panics
    /// It is another one.
    #[track_caller]
    pub fn code(self, code: i32) -> Done {
        assert_eq!(
            self.code, code,
            "status of crcoord {}: {}{}",
            self.line, self.output, self.said
        );
        self
    }

    /// Requires a word on standard error.
    ///
    /// # Panics
    /// It is not there.
    #[track_caller]
    pub fn says(self, word: &str) -> Done {
        assert!(
            self.said.contains(word),
            "crcoord {}: no {word:?} in: {}",
            self.line,
            self.said
        );
        self
    }

    /// The data of its JSON document.
    ///
    /// # Panics
    /// It printed none.
    #[track_caller]
    pub fn data(&self) -> Value {
        let document: Value = serde_json::from_str(&self.output).unwrap_or_else(|error| {
            panic!(
                "crcoord {}: {error}: {}{}",
                self.line, self.output, self.said
            )
        });
        assert_eq!(document["schema"], 1, "crcoord {}", self.line);
        document["data"].clone()
    }
}
