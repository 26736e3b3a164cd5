//! A bulk stream between two endpoints on loopback, as agents send images, beside a plain TCP copy.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use bytes::Bytes;
use crcoord_transport::pki::{self, DEFAULT_VALIDITY, Request};
use crcoord_transport::{
    Connection, Endpoint, Identity, IdentityPaths, Limits, Peer, Role, Stream,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::failure::{Explain, Failure, Result};
use crate::figures::{Collection, Sample, size_label};

/// Bytes of one body: a chunk of a window.
const BODY: usize = 64 << 10;
/// Bytes that TCP is given and asked for at a time.
const BLOCK: usize = 1 << 20;
const CLUSTER: &str = "bench";
const ANY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

/// Measures a transfer of this many bytes, one way and the other in turn.
pub fn measure(bytes: u64, rounds: u32, collection: &mut Collection) -> Result<()> {
    let runtime = tokio::runtime::Runtime::new().explain("starting tokio")?;
    runtime.block_on(async {
        let pair = Pair::meet().await?;
        let (blocks, bodies) = (whole(bytes, BLOCK), whole(bytes, BODY));
        quic(&pair, bodies.min(1024)).await?; // the congestion window opens
        for _ in 0..rounds {
            let yardstick = tcp(blocks).await?;
            let took = quic(&pair, bodies).await?;
            let sample = Sample {
                took,
                yardstick,
                frozen: None,
            };
            let subject = format!("{} over loopback", size_label(bytes));
            collection.add(
                &subject,
                "bulk stream (QUIC, TLS 1.3)",
                bytes,
                "plain TCP",
                sample,
            );
        }
        for endpoint in &pair.endpoints {
            endpoint.shutdown("done").await;
        }
        Ok(())
    })
}

fn whole(bytes: u64, part: usize) -> u64 {
    bytes.div_ceil(part as u64)
}

/// From before the first byte is sent until the last one is read.
async fn tcp(blocks: u64) -> Result<Duration> {
    let listener = TcpListener::bind(ANY).await.explain("TCP")?;
    let address = listener.local_addr().explain("TCP")?;
    let sender = TcpStream::connect(address).await.explain("TCP")?;
    let (receiver, _) = listener.accept().await.explain("TCP")?;
    let start = Instant::now();
    let sending = tokio::spawn(tcp_send(sender, blocks));
    let received = tcp_receive(receiver).await?;
    let took = start.elapsed();
    sending.await.explain("TCP sender")??;
    complete(received, blocks * BLOCK as u64)?;
    Ok(took)
}

async fn tcp_send(mut stream: TcpStream, blocks: u64) -> Result<()> {
    let block = vec![5; BLOCK];
    for _ in 0..blocks {
        stream.write_all(&block).await.explain("TCP send")?;
    }
    stream.shutdown().await.explain("TCP send")
}

async fn tcp_receive(mut stream: TcpStream) -> Result<u64> {
    let mut block = vec![0; BLOCK];
    let mut received = 0;
    loop {
        match stream.read(&mut block).await.explain("TCP receive")? {
            0 => return Ok(received),
            count => received += count as u64,
        }
    }
}

/// One bulk stream: for each body a message with its length, then the body.
async fn quic(pair: &Pair, bodies: u64) -> Result<Duration> {
    let start = Instant::now();
    let sending = tokio::spawn(quic_send(pair.near.clone(), bodies));
    let received = quic_receive(&pair.far).await?;
    let took = start.elapsed();
    sending.await.explain("QUIC sender")??;
    complete(received, bodies * BODY as u64)?;
    Ok(took)
}

async fn quic_send(connection: Connection, bodies: u64) -> Result<()> {
    let body = Bytes::from(vec![5; BODY]);
    let stream = connection.open_bulk(&bodies).await.explain("QUIC open")?;
    let (mut sender, _receiver) = stream.split();
    for _ in 0..bodies {
        sender.send(&(BODY as u64)).await.explain("QUIC send")?;
        sender
            .send_body_bytes(body.clone())
            .await
            .explain("QUIC send")?;
    }
    sender.finish().await.explain("QUIC finish")
}

async fn quic_receive(connection: &Connection) -> Result<u64> {
    let Stream::Bulk(stream) = connection.accept_stream().await.explain("QUIC accept")? else {
        return Err(Failure("the stream is no bulk stream".to_owned()));
    };
    let (_sender, mut receiver) = stream.split();
    let bodies: Option<u64> = receiver.recv().await.explain("QUIC header")?;
    bodies.explain("the stream ended before its header")?;
    let mut body = Vec::new();
    let mut received = 0;
    while let Some(length) = receiver.recv::<u64>().await.explain("QUIC receive")? {
        receiver
            .recv_body(length, &mut body)
            .await
            .explain("QUIC receive")?;
        received += body.len() as u64;
    }
    Ok(received)
}

fn complete(received: u64, sent: u64) -> Result<()> {
    if received == sent {
        return Ok(());
    }
    Err(Failure(format!("{received} of {sent} bytes arrived")))
}

/// Two agents' endpoints and the connection between them.
struct Pair {
    near: Connection,
    far: Connection,
    endpoints: [Endpoint; 2],
}

impl Pair {
    async fn meet() -> Result<Pair> {
        let directory = tempfile::tempdir().explain("a directory for certificates")?;
        let authority = pki::init(directory.path(), CLUSTER).explain("making an authority")?;
        let endpoint = |name: &str| {
            let request = Request {
                role: Role::Node,
                name,
                subject_names: &[],
                validity: DEFAULT_VALIDITY,
            };
            let issued = pki::issue(directory.path(), &request, directory.path())
                .explain("issuing a certificate")?;
            let identity = Identity::load(&IdentityPaths {
                certificate: issued.certificate,
                key: issued.key,
                authority: authority.certificate.clone(),
            })
            .explain("loading a certificate")?;
            Endpoint::bind(ANY, identity, Limits::default()).explain("binding")
        };
        let (client, server) = (endpoint("n1")?, endpoint("n2")?);
        let address = server.local_address().explain("QUIC")?;
        let expected = Peer::new(CLUSTER, Role::Node, "n2").explain("QUIC")?;
        let near = client
            .connect(address, &expected)
            .await
            .explain("QUIC connect")?;
        let far = server.accept().await.explain("the QUIC endpoint ended")?;
        Ok(Pair {
            near,
            far,
            endpoints: [client, server],
        })
    }
}
