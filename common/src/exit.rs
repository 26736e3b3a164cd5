//! Exit codes of every crcoord command (a contract with the site: see README, "Exit codes").

/// Why a command ended. The numbers never change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum ExitCode {
    /// Done: committed, resumed, printed.
    Done = 0,
    /// Failed for a reason that has no code of its own.
    Failed = 1,
    /// The command line or the configuration is wrong.
    Usage = 2,
    /// An obstacle was found; nothing was frozen.
    Obstacle = 3,
    /// The epoch was aborted; the job runs on.
    Aborted = 4,
    /// A daemon or node could not be reached.
    Unreachable = 5,
    /// The caller may not do this.
    Denied = 6,
    /// No such job, epoch or node.
    NotFound = 7,
    /// A deadline passed.
    TimedOut = 8,
    /// `run` and `exec` only: crcoord itself failed, the program has no status.
    RunFailed = 125,
}

impl From<ExitCode> for std::process::ExitCode {
    fn from(code: ExitCode) -> Self {
        std::process::ExitCode::from(code as u8)
    }
}
