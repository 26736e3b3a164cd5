//! `Client`: one request to the coordinator over its unix socket, and the events that answer it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crcoord_common::report::{Class, Report};
use crcoord_common::wire::client::{Event, Request};
use crcoord_transport::{FrameReader, FrameWriter};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use crate::failure::Failure;

/// A request that is being answered. Dropping it closes the connection; what was begun goes on.
pub struct Client {
    reader: FrameReader<OwnedReadHalf>,
    writer: FrameWriter<OwnedWriteHalf>,
    socket: PathBuf,
}

impl Client {
    /// Connects to the coordinator at `socket` and sends the request.
    pub async fn send(socket: &Path, request: &Request) -> Result<Self, Failure> {
        let stream = UnixStream::connect(socket)
            .await
            .map_err(|error| unreachable(socket, &error))?;
        let (read, write) = stream.into_split();
        let mut client = Client {
            reader: FrameReader::new(read),
            writer: FrameWriter::new(write),
            socket: socket.to_owned(),
        };
        client.writer.send(request).await?;
        Ok(client)
    }

    /// The next event; a failed request is an error with all its reasons.
    pub async fn next(&mut self) -> Result<Event, Failure> {
        match self.reader.recv::<Event>().await? {
            Some(Event::Failed(reports)) => Err(Failure::new(reports)),
            Some(event) => Ok(event),
            None => Err(Report::new(
                "client-cut-off",
                Class::Unreachable,
                "the coordinator ended the connection before the answer was complete",
            )
            .path(self.socket.display().to_string())
            .remedy("look into the coordinator's log, then ask again")
            .into()),
        }
    }
}

/// Sends a request that has one answer.
pub async fn ask(socket: &Path, request: &Request) -> Result<Event, Failure> {
    Client::send(socket, request).await?.next().await
}

/// An answer that does not fit the request.
pub fn unexpected(event: &Event) -> Failure {
    let text = format!("{event:?}");
    let name: String = text.chars().take_while(|c| c.is_alphanumeric()).collect();
    Report::new(
        "client-unexpected-answer",
        Class::Failure,
        format!("the coordinator answered with {name}, which does not fit the request"),
    )
    .remedy("run the same version of crcoord on both sides")
    .into()
}

fn unreachable(socket: &Path, error: &std::io::Error) -> Failure {
    let (class, remedy) = match error.kind() {
        ErrorKind::PermissionDenied => (Class::Denied, "ask your administrator for access"),
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => (
            Class::Unreachable,
            "start the coordinator (crcoord coordinator), or run this on its host",
        ),
        _ => (
            Class::Unreachable,
            "look at the socket coordinator.socket of the configuration",
        ),
    };
    Report::new(
        "client-unreachable",
        class,
        format!("the coordinator cannot be reached: {error}"),
    )
    .path(socket.display().to_string())
    .errno(error.raw_os_error())
    .remedy(remedy)
    .into()
}
