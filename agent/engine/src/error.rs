//! Why a capture or restore did not happen, with the place and the remedy.

use crcoord_common::image::record::RecordError;
use crcoord_common::report::{Class, Report};
use crcoord_kernel::inject::InjectError;
use crcoord_kernel::stub::StubError;

/// Reasons, all at once. Whatever was done is undone: a tree that was to be captured runs as before,
/// a tree that was being built is gone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct EngineError(pub Vec<Report>);

/// Short form inside the engine.
pub type Result<T> = std::result::Result<T, EngineError>;

impl From<Report> for EngineError {
    fn from(report: Report) -> Self {
        EngineError(vec![report])
    }
}

impl From<InjectError> for EngineError {
    fn from(error: InjectError) -> Self {
        let report = match &error {
            InjectError::Gone { tid } => {
                Report::new("engine-process-ended", Class::Failure, error.to_string()).tid(*tid)
            }
            InjectError::NoVdso => {
                obstacle("engine-no-vdso", error.to_string()).remedy("boot without vdso=0")
            }
            InjectError::NoStack { tid, .. } => {
                obstacle("engine-no-stack", error.to_string()).tid(*tid)
            }
            InjectError::Call { error: cause, .. } => {
                Report::new("engine-injected-call", Class::Failure, error.to_string())
                    .errno(cause.raw_os_error())
            }
            InjectError::Trace {
                error: cause, tid, ..
            } => Report::new("engine-trace", Class::Failure, error.to_string())
                .tid(*tid)
                .errno(cause.raw_os_error()),
        };
        report.into()
    }
}

impl From<StubError> for EngineError {
    fn from(error: StubError) -> Self {
        let errno = match &error {
            StubError::Call { error, .. } | StubError::Trace { error, .. } => error.raw_os_error(),
            StubError::Unexpected { .. } => None,
        };
        Report::new("engine-build", Class::Failure, error.to_string())
            .errno(errno)
            .into()
    }
}

impl From<RecordError> for EngineError {
    fn from(error: RecordError) -> Self {
        let code = match &error {
            RecordError::TooNew { .. } => "image-record-too-new",
            RecordError::Damaged { .. } => "image-record-damaged",
        };
        let remedy = match &error {
            RecordError::TooNew { .. } => "restart on nodes with a newer crcoord",
            RecordError::Damaged { .. } => "restart from another epoch",
        };
        Report::new(code, Class::Obstacle, error.to_string())
            .remedy(remedy)
            .into()
    }
}

/// A named reason why something cannot be done.
pub fn obstacle(code: &str, message: impl Into<String>) -> Report {
    Report::new(code, Class::Obstacle, message)
}

/// A failed system call of the engine itself.
pub fn failure(what: impl std::fmt::Display, error: &std::io::Error) -> Report {
    Report::new(
        "engine-io",
        Class::Failure,
        format!("{what} failed: {error}"),
    )
    .errno(error.raw_os_error())
}

/// An image that says something impossible.
pub fn bad_image(message: impl Into<String>) -> Report {
    obstacle("image-invalid", message).remedy("restart from another epoch")
}
