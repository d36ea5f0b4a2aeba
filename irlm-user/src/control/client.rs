//! The caller's side of the control protocol: what `irlm evacuate`, `status`, `cancel`, `settle` and, for plain
//! QEMU, agents among themselves use. A call has one deadline; a connection that failed is opened anew by the next
//! call, so that a caller outlives an agent's restart.

use super::api::{self, Refusal, Reply, Request};
use super::lines::Lines;
use super::socket::{self, Socket};
use crate::net::connection::Endpoint;
use std::net::SocketAddr;
use std::time::Duration;

/// Why a call gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The agent cannot be reached, or went away.
    #[error("agent {agent}: {what}: {source} (is `irlm agent` running there?)")]
    Unreachable {
        /// Its control address.
        agent: SocketAddr,
        /// What was tried.
        what: &'static str,
        /// From the kernel.
        source: std::io::Error,
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
    pub async fn call(&mut self, request: &Request) -> Result<Reply, CallError> {
        let agent = self.at.addr;
        let fail = |what| move |source| CallError::Unreachable { agent, what, source };
        let mut lines = match self.lines.take() {
            Some(lines) => lines,
            None => {
                let socket = tokio::time::timeout(self.timeout, socket::call(&self.at))
                    .await
                    .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
                    .map_err(fail("cannot connect"))?;
                Lines::new(socket)
            }
        };
        lines.write(api::encode_request(request), self.timeout).await.map_err(fail("cannot send"))?;
        let line = lines.read(self.timeout).await.map_err(fail("no answer"))?;
        let Some(line) = line else {
            return Err(fail("no answer")(std::io::ErrorKind::ConnectionReset.into()));
        };
        let reply = api::decode_reply(&line).map_err(|what| CallError::Grammar { agent, what })?;
        self.lines = Some(lines);
        reply.map_err(|refusal| CallError::Refused { agent, refusal })
    }
}
