//! The command socket: accepts callers, reads the one request of each, notices when they go.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, Request};
use crcoord_protocol::ClientId;
use crcoord_transport::{FrameReader, FrameWriter};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};

use crate::caller::Caller;
use crate::driver::Message;
use crate::error::CoordinatorError;

/// Commands at a time.
const CONNECTIONS: usize = 1024;

/// A caller must have sent its request within this time.
const REQUEST_TIME: Duration = Duration::from_secs(10);

/// Largest request, in bytes: a command with its whole environment (execve(2) allows a quarter of
/// the stack limit, 2 MiB as a rule).
const REQUEST_LIMIT: u32 = 4 << 20;

/// The listening socket; its file is removed on drop.
#[derive(Debug)]
pub(crate) struct CommandSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl CommandSocket {
    /// Binds the socket. A file that a killed coordinator left behind is replaced, one that answers
    /// is not.
    pub(crate) async fn bind(path: &Path) -> Result<Self, CoordinatorError> {
        let failed = |action| {
            move |source| CoordinatorError::File {
                action,
                path: path.to_owned(),
                source,
            }
        };
        if UnixStream::connect(path).await.is_ok() {
            return Err(CoordinatorError::Running {
                path: path.to_owned(),
            });
        }
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent).map_err(failed("create the directory of"))?;
        }
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(failed("remove the old")(error));
            }
            _ => {}
        }
        let listener = UnixListener::bind(path).map_err(failed("listen on"))?;
        // Everybody may ask; who may do what is decided by SO_PEERCRED.
        std::fs::set_permissions(path, PermissionsExt::from_mode(0o666))
            .map_err(failed("set the mode of"))?;
        Ok(CommandSocket {
            listener,
            path: path.to_owned(),
        })
    }

    /// Accepts callers until the driver is gone.
    pub(crate) async fn serve(self, queue: mpsc::Sender<Message>) {
        let shares = Arc::new(Semaphore::new(CONNECTIONS));
        let mut next = 0;
        while let Ok(share) = shares.clone().acquire_owned().await {
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors: those in use must be given back first.
                    tracing::warn!(%error, "command not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            next += 1;
            let (client, queue) = (ClientId(next), queue.clone());
            tokio::spawn(async move {
                serve_one(client, stream, queue).await;
                drop(share);
            });
        }
    }
}

impl Drop for CommandSocket {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "socket file not removed");
        }
    }
}

async fn serve_one(client: ClientId, stream: UnixStream, queue: mpsc::Sender<Message>) {
    let caller = match Caller::of(&stream) {
        Ok(caller) => caller,
        Err(error) => {
            tracing::warn!(%error, "caller without credentials refused");
            return;
        }
    };
    let (read, write) = stream.into_split();
    let mut reader = FrameReader::with_limit(read, REQUEST_LIMIT);
    let mut writer = FrameWriter::new(write);
    let request = match tokio::time::timeout(REQUEST_TIME, reader.recv::<Request>()).await {
        Ok(Ok(Some(request))) => request,
        Ok(Ok(None)) => return,
        Ok(Err(error)) => return refuse(&mut writer, error.report()).await,
        Err(_) => {
            let report = Report::new("command-silent", Class::TimedOut, "no request was sent");
            return refuse(&mut writer, report).await;
        }
    };
    let asked = Message::Asked {
        client,
        caller,
        request: Box::new(request),
        writer,
    };
    if queue.send(asked).await.is_err() {
        return;
    }
    // Nothing more is expected: the end of the stream says that the caller is gone.
    if matches!(reader.recv::<Request>().await, Ok(Some(_))) {
        tracing::debug!(
            client = client.0,
            "caller sent more than one request, let go"
        );
    }
    // Fails only when the driver is gone, too.
    let _ = queue.send(Message::Left(client)).await;
}

async fn refuse<W: tokio::io::AsyncWrite + Unpin>(writer: &mut FrameWriter<W>, report: Report) {
    if let Err(error) = writer.send(&Event::Failed(vec![report])).await {
        tracing::debug!(%error, "caller went away before it was refused");
    }
}
