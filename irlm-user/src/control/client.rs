//! The caller's side of the control protocol: what `irlm evacuate`, `status`, `cancel`, `settle` and, for plain
//! QEMU, agents among themselves use. A call has one deadline; a connection that failed is opened anew by the next
//! call, so that a caller outlives an agent's restart.

use super::api::{self, Refusal, Reply, Request};
use super::lines::Lines;
use super::socket::{self, Socket};
use crate::net::conn::is_closed;
use crate::net::connection::{Endpoint, Security};
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How long is waited before a question is asked again whose connection was closed: at first, and at last.
const AGAIN: (Duration, Duration) = (Duration::from_millis(10), Duration::from_millis(640));

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent cannot be reached, or went away.
    #[error("agent {agent}: {what}: {source}{}", advice(source, *tls))]
    Unreachable {
        /// Its control address.
        agent: SocketAddr,
        /// What was tried.
        what: &'static str,
        /// From the kernel.
        source: io::Error,
        /// It was called under TLS.
        tls: bool,
    },
    /// It answered, but not in this protocol.
    #[error("agent {agent}: bad answer: {what} (is that port an irlm agent's control port?)")]
    Grammar {
        /// Its control address.
        agent: SocketAddr,
        /// What was wrong.
        what: String,
    },
    /// It said no.
    #[error("agent {agent}: {refusal}")]
    Refused {
        /// Its control address.
        agent: SocketAddr,
        /// Its words.
        refusal: Refusal,
    },
}

/// A connection to one agent's control port.
#[derive(Debug)]
pub struct AgentClient {
    at: Endpoint,
    timeout: Duration,
    lines: Option<Lines<Socket>>,
}

impl AgentClient {
    /// For the agent at `at`; connects at the first call. Each call takes at most about `timeout` for each of
    /// connecting, sending and the answer.
    #[must_use]
    pub fn new(at: impl Into<Endpoint>, timeout: Duration) -> Self {
        Self { at: at.into(), timeout, lines: None }
    }

    /// The agent's control address.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.at.addr
    }

    /// Asks, and waits for the answer. On any error but [`CallError::Refused`] the connection is dropped.
    ///
    /// An agent closes a connection that was silent for a while, or that has to make room before its request is heard. The
    /// question is then asked again on a new one, as any may be.
    pub async fn call(&mut self, request: &Request) -> Result<Reply, CallError> {
        let until = Instant::now() + self.timeout;
        let mut pause = AGAIN.0;
        loop {
            let answer = match self.lines.take() {
                Some(lines) => self.ask(lines, request).await,
                None => self.ask_anew(request).await,
            };
            match answer {
                Err(CallError::Unreachable { source, .. })
                    if is_closed(&source) && pause <= AGAIN.1 && Instant::now() + pause < until =>
                {
                    tracing::debug!(
                        "agent {}: closed before it answered, asked again: {source}",
                        self.at.addr
                    );
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answer => return answer,
            }
        }
    }

    async fn ask_anew(&mut self, request: &Request) -> Result<Reply, CallError> {
        let socket = tokio::time::timeout(self.timeout, socket::call(&self.at))
            .await
            .unwrap_or_else(|_| Err(ErrorKind::TimedOut.into()))
            .map_err(|source| self.unreachable("cannot connect", source))?;
        tracing::debug!("agent {}: connected", self.at.addr);
        self.ask(Lines::new(socket), request).await
    }

    fn unreachable(&self, what: &'static str, source: io::Error) -> CallError {
        let tls = matches!(self.at.security, Security::Tls(_));
        CallError::Unreachable { agent: self.at.addr, what, source, tls }
    }

    async fn ask(&mut self, mut lines: Lines<Socket>, request: &Request) -> Result<Reply, CallError> {
        let agent = self.at.addr;
        let sent = lines.write(api::encode_request(request), self.timeout).await;
        sent.map_err(|e| self.unreachable("cannot send", e))?;
        let line = lines.read(self.timeout).await.map_err(|e| self.unreachable("no answer", e))?;
        let Some(line) = line else {
            return Err(self.unreachable("no answer", ErrorKind::ConnectionReset.into()));
        };
        let reply = api::decode_reply(&line.text).map_err(|what| CallError::Grammar { agent, what })?;
        self.lines = Some(lines);
        reply.map_err(|refusal| CallError::Refused { agent, refusal })
    }
}

/// What to look at. Who refuses a certificate is there, and has said why. Who ends a connection that it took may have heard
/// something else than it expects.
fn advice(source: &io::Error, tls: bool) -> &'static str {
    match source.kind() {
        ErrorKind::InvalidData => "",
        _ if is_closed(source) && tls => {
            " (is `irlm agent` running there, or is it set to plain text? Then leave --tls, IRLM_TLS and the group file's `tls` out)"
        }
        _ if is_closed(source) => {
            " (is `irlm agent` running there, or does it want TLS? Then give --tls DIR, see docs/identity.md)"
        }
        _ => " (is `irlm agent` running there?)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::connection::tests::{disbelieved, keys};
    use std::sync::Arc;
    use tokio::net::TcpListener;
    use tokio::sync::Semaphore;

    const T: Duration = Duration::from_secs(10);

    /// The client's handshake is over before the server has looked at its certificate.
    #[tokio::test]
    async fn who_is_refused_for_a_certificate_is_told_that_and_not_to_start_an_agent() {
        let (server, client) = disbelieved();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint { addr: listener.local_addr().unwrap(), security: client };
        let served = tokio::spawn(async move {
            let e = socket::answer(listener.accept().await.unwrap().0, &server).await.unwrap_err();
            e.to_string()
        });
        let e = AgentClient::new(at, T).call(&Request::Hello).await.unwrap_err().to_string();
        assert!(e.contains("refuses this side's certificate: it was issued by somebody else"), "{e}");
        assert!(!e.contains("running there"), "{e}");
        let log = served.await.unwrap();
        assert!(log.contains("issued by somebody else"), "{log}");
    }

    /// One side was given certificates, and the other one was not.
    #[tokio::test]
    async fn who_speaks_plain_text_to_tls_or_tls_to_plain_text_is_told_to_change_that() {
        let security = keys();
        for (server, client, log_says, says) in [
            (
                security.clone(),
                Security::Plain,
                "does not speak TLS",
                "does it want TLS? Then give --tls DIR",
            ),
            (Security::Plain, security, "it speaks TLS, and here is plain text", "is it set to plain text?"),
        ] {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let at = Endpoint { addr: listener.local_addr().unwrap(), security: client };
            let served = tokio::spawn(async move {
                let mut log = String::new();
                loop {
                    // It is called again.
                    let next = tokio::time::timeout(Duration::from_secs(2), listener.accept()).await;
                    let Ok(Ok((stream, _))) = next else { return log };
                    // A test beside may call a port that was its own before.
                    log += &match socket::answer(stream, &server).await {
                        Ok((stream, _)) => {
                            let read = Lines::served(stream, vec![Arc::new(Semaphore::new(1))]).read(T).await;
                            read.err().map(|e| e.to_string()).unwrap_or_default()
                        }
                        Err(e) => e.to_string(),
                    };
                }
            });
            let began = Instant::now();
            let e = AgentClient::new(at, T).call(&Request::Hello).await.unwrap_err().to_string();
            assert!(e.contains(says) && began.elapsed() < T, "{e}");
            let log = served.await.unwrap();
            assert!(log.contains(log_says), "{log}");
        }
    }

    /// A command that has got its answer ends, and its connection with it.
    #[tokio::test]
    async fn a_caller_who_ends_between_lines_is_no_trouble() {
        let security = keys();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = Endpoint { addr: listener.local_addr().unwrap(), security: security.clone() };
        let caller = tokio::spawn(async move { Lines::new(socket::call(&at).await.unwrap()) });
        let (far, _) = socket::answer(listener.accept().await.unwrap().0, &security).await.unwrap();
        let mut near = caller.await.unwrap();
        near.write("{}".into(), T).await.unwrap();
        let mut far = Lines::new(far);
        assert_eq!(far.read(T).await.unwrap().unwrap().text, b"{}");
        drop(near);
        assert!(far.read(T).await.unwrap().is_none());
    }
}
