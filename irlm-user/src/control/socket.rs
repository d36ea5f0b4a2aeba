//! Control connections, in plain text or under TLS, as the asynchronous half of the program has them.

use crate::net::connection::{Endpoint, Security, in_words, name_of};
use rustls::pki_types::CertificateDer;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Bytes both ways.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + std::fmt::Debug {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + std::fmt::Debug> Duplex for T {}

/// A connection.
pub(super) type Socket = Box<dyn Duplex>;

/// How long after the last try to connect another one is made beside it. While pages fill a link, first packets are lost
/// there, and the kernel sends one again after a second only.
const BESIDE: Duration = Duration::from_millis(250);
/// Tries to connect at a time.
const TRIES: usize = 4;

/// Connects, however many first packets are lost. What an address says of itself counts at once.
async fn connect(addr: SocketAddr) -> io::Result<TcpStream> {
    let mut tries = JoinSet::new();
    loop {
        if tries.len() < TRIES {
            tries.spawn(TcpStream::connect(addr));
        }
        if let Ok(Some(ended)) = tokio::time::timeout(BESIDE, tries.join_next()).await {
            return ended.unwrap_or_else(|e| Err(io::Error::other(e)));
        }
    }
}

/// Calls somebody. The caller bounds the time.
pub(super) async fn call(at: &Endpoint) -> io::Result<Socket> {
    let stream = connect(at.addr).await?;
    // A request is one small segment that someone waits for.
    stream.set_nodelay(true)?;
    match &at.security {
        Security::Plain => Ok(Box::new(stream)),
        Security::Tls(keys) => {
            let connector = TlsConnector::from(keys.client()?);
            Ok(Box::new(connector.connect(name_of(at.addr), stream).await.map_err(in_words)?))
        }
    }
}

/// Makes a connection that came ready for use, with the certificate that its caller has shown; none in plain text. The
/// caller bounds the time.
pub(super) async fn answer(
    stream: TcpStream,
    security: &Security,
) -> io::Result<(Socket, Option<CertificateDer<'static>>)> {
    stream.set_nodelay(true)?;
    match security {
        Security::Plain => Ok((Box::new(stream), None)),
        Security::Tls(keys) => {
            let secured = TlsAcceptor::from(keys.server()?).accept(stream).await.map_err(in_words)?;
            let chain = secured.get_ref().1.peer_certificates().unwrap_or_default();
            let leaf = chain.first().map(|c| c.clone().into_owned());
            Ok((Box::new(secured), leaf))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::{Domain, Socket as Raw, Type};
    use std::time::Instant;

    /// Connections that the kernel has for whoever listens, so that it takes no more.
    fn full(listener: &Raw) -> Vec<Raw> {
        let addr = listener.local_addr().unwrap();
        let one = |_| {
            let raw = Raw::new(Domain::IPV4, Type::STREAM, None).unwrap();
            raw.set_nonblocking(true).unwrap();
            let _ = raw.connect(&addr);
            raw
        };
        (0..8).map(one).collect()
    }

    /// A first packet that nobody answers is sent again after a second. Slow machines get three tries.
    #[tokio::test]
    async fn a_first_packet_that_is_lost_costs_no_second() {
        let took = async || {
            let listener = Raw::new(Domain::IPV4, Type::STREAM, None).unwrap();
            listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
            listener.listen(1).unwrap();
            let addr = listener.local_addr().unwrap().as_socket().unwrap();
            let crowd = full(&listener);
            let call = tokio::spawn(connect(addr));
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!call.is_finished(), "it was let in all the same");
            let begun = Instant::now();
            listener.set_nonblocking(true).unwrap();
            let door = tokio::spawn(async move {
                let mut all = Vec::new();
                loop {
                    all.extend(listener.accept());
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            });
            call.await.unwrap().unwrap();
            door.abort();
            drop(crowd);
            begun.elapsed()
        };
        let mut all = Vec::new();
        for _ in 0..3 {
            all.push(took().await);
            if all.last().is_some_and(|t| *t < Duration::from_millis(700)) {
                return;
            }
        }
        panic!("{all:?}");
    }

    #[tokio::test]
    async fn a_port_where_nobody_listens_says_so_at_once() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let e = connect(free).await.unwrap_err();
        assert_eq!(e.kind(), io::ErrorKind::ConnectionRefused);
    }
}
