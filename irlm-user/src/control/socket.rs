//! Control connections, in plain text or under TLS, as the asynchronous half of the program has them.

use crate::net::connection::{Endpoint, Security, in_words, name_of};
use rustls::pki_types::CertificateDer;
use std::io;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// Bytes both ways.
pub(super) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin + std::fmt::Debug {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin + std::fmt::Debug> Duplex for T {}

/// A connection.
pub(super) type Socket = Box<dyn Duplex>;

/// Calls somebody. The caller bounds the time.
pub(super) async fn call(at: &Endpoint) -> io::Result<Socket> {
    let stream = TcpStream::connect(at.addr).await?;
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
