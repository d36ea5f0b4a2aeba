//! The index as an agent or a coordinator sees it. Every call ends by a deadline with what was asked for or with an
//! [`IndexError`]; after one that breaks the connection every further call fails at once with [`IndexError::Lost`],
//! and the caller goes on with what its own host knows: that costs bandwidth, never correctness.

use super::{Conn, ConnError, send_on};
use crate::core::index::{HostSet, LateItem, LateReply, Registration};
use crate::core::models::{HostModels, SketchItem};
use crate::core::plan::HostPlan;
use crate::core::units::{HostIx, PageId};
use crate::core::wire::index_msg::{
    ErrorCode, IndexMsg, IndexMsgError, MAX_BATCH, MAX_BODY, Token, VERSIONS,
};
use crate::net::connection::Endpoint;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Why the index did not do what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// No connection.
    #[error("index {addr}: cannot connect: {source}")]
    Connect {
        /// The server.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The connection failed in the middle.
    #[error("index {addr}: connection lost while waiting for {what}: {source}")]
    Io {
        /// The server.
        addr: SocketAddr,
        /// What was under way.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The server hung up.
    #[error("index {addr}: hung up while this side waited for {what}")]
    HungUp {
        /// The server.
        addr: SocketAddr,
        /// What was under way.
        what: &'static str,
    },
    /// The deadline passed.
    #[error("index {addr}: no {what} by the deadline ({after:?})")]
    Timeout {
        /// The server.
        addr: SocketAddr,
        /// What was under way.
        what: &'static str,
        /// How long it was waited for.
        after: Duration,
    },
    /// The server's bytes are no message, or the request is above a cap.
    #[error("index {addr}: {source}")]
    Wire {
        /// The server.
        addr: SocketAddr,
        /// Why.
        source: IndexMsgError,
    },
    /// The server said no.
    #[error("index {addr}: refused {what}: {text} ({code:?})")]
    Refused {
        /// The server.
        addr: SocketAddr,
        /// What was asked for.
        what: &'static str,
        /// Why, for programs.
        code: ErrorCode,
        /// Why, for people.
        text: String,
    },
    /// The server answered something else.
    #[error("index {addr}: answered {got} where {what} was due")]
    Unexpected {
        /// The server.
        addr: SocketAddr,
        /// What was due.
        what: &'static str,
        /// What came.
        got: &'static str,
    },
    /// An earlier call broke the connection.
    #[error("index {addr}: the connection was lost earlier")]
    Lost {
        /// The server.
        addr: SocketAddr,
    },
}

/// The connection under both clients.
#[derive(Debug)]
struct Link {
    addr: SocketAddr,
    conn: Conn,
    timeout: Duration,
    broken: bool,
    seq: u32,
}

impl Link {
    /// Connects and says `first`.
    fn connect(at: &Endpoint, first: &IndexMsg, timeout: Duration) -> Result<Self, IndexError> {
        let addr = at.addr;
        let connect = |source| IndexError::Connect { addr, source };
        let stream = TcpStream::connect_timeout(&addr, timeout).map_err(connect)?;
        let stream = at.security.call(stream, addr, timeout).map_err(connect)?;
        let conn = Conn::new(stream, MAX_BODY).map_err(connect)?;
        let mut link = Self { addr, conn, timeout, broken: false, seq: 0 };
        match link.ask(first, "welcome", timeout)? {
            IndexMsg::HelloOk { version } if VERSIONS.contains(&version) => Ok(link),
            other => Err(link.unexpected("welcome", &other)),
        }
    }

    fn error(&mut self, e: ConnError, what: &'static str, after: Duration) -> IndexError {
        self.broken = true;
        let addr = self.addr;
        match e {
            ConnError::Io(source) => IndexError::Io { addr, what, source },
            ConnError::Closed => IndexError::HungUp { addr, what },
            ConnError::Wire(source) => IndexError::Wire { addr, source },
            ConnError::GaveUp => IndexError::Timeout { addr, what, after },
        }
    }

    fn unexpected(&mut self, what: &'static str, got: &IndexMsg) -> IndexError {
        self.broken = true;
        IndexError::Unexpected { addr: self.addr, what, got: got.name() }
    }

    fn whole(&self) -> Result<(), IndexError> {
        if self.broken { Err(IndexError::Lost { addr: self.addr }) } else { Ok(()) }
    }

    fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    /// Says `msg` and gives the first answer. A refusal after which the server goes on listening leaves the
    /// connection whole.
    fn ask(&mut self, msg: &IndexMsg, what: &'static str, within: Duration) -> Result<IndexMsg, IndexError> {
        self.say(msg, what, within)?;
        self.recv(what, within)
    }

    /// Says `msg`, to which there is no answer, or whose answer the caller waits for.
    fn say(&mut self, msg: &IndexMsg, what: &'static str, within: Duration) -> Result<(), IndexError> {
        self.whole()?;
        let until = Instant::now() + within;
        if let Err(e) = self.conn.send(msg, &|| Instant::now() < until) {
            // A server that refuses and hangs up may have said why: look before giving up.
            if matches!(e, ConnError::Io(_) | ConnError::Closed)
                && let Err(refused @ IndexError::Refused { .. }) = self.recv(what, within)
            {
                self.broken = true;
                return Err(refused);
            }
            return Err(self.error(e, what, within));
        }
        Ok(())
    }

    /// The next message, if it is no error.
    fn recv(&mut self, what: &'static str, within: Duration) -> Result<IndexMsg, IndexError> {
        let until = Instant::now() + within;
        let got = self.conn.recv(&mut |_| Instant::now() < until);
        self.judge(got, what, within)
    }

    fn judge(
        &mut self,
        got: Result<IndexMsg, ConnError>,
        what: &'static str,
        within: Duration,
    ) -> Result<IndexMsg, IndexError> {
        match got {
            Ok(IndexMsg::Error { code, text }) => {
                self.broken = !matches!(code, ErrorCode::NotReady | ErrorCode::NotInPlan);
                Err(IndexError::Refused { addr: self.addr, what, code, text })
            }
            Ok(msg) => Ok(msg),
            Err(e) => Err(self.error(e, what, within)),
        }
    }

    fn done(&mut self, msg: &IndexMsg, what: &'static str) -> Result<(), IndexError> {
        match self.ask(msg, what, self.timeout)? {
            IndexMsg::Done => Ok(()),
            other => Err(self.unexpected(what, &other)),
        }
    }
}

/// An agent's connection to the index: one source host of one group.
#[derive(Debug)]
pub struct IndexClient {
    link: Link,
    /// Contents with an id so far: the plan cannot name more.
    registered: usize,
    /// Sketches reported so far: this host cannot lend more.
    sketched: usize,
}

impl IndexClient {
    /// Connects as source host `host` of `group`. `timeout` is for this and for each answer later.
    pub fn connect(
        at: impl Into<Endpoint>,
        group: &str,
        token: &[u8; 32],
        host: HostIx,
        timeout: Duration,
    ) -> Result<Self, IndexError> {
        let (versions, group, token) = (VERSIONS.to_vec(), group.to_owned(), Token(*token));
        let hello = IndexMsg::Hello { versions, group, token, host };
        Ok(Self { link: Link::connect(&at.into(), &hello, timeout)?, registered: 0, sketched: 0 })
    }

    /// The connection's ends, for whoever tags and counts its packets.
    #[must_use]
    pub fn ends(&self) -> Option<(SocketAddr, SocketAddr)> {
        let stream = &self.link.conn.stream;
        stream.local_addr().ok().zip(stream.peer_addr().ok())
    }

    /// Whether an earlier call broke the connection.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.link.broken
    }

    /// After a reconnection: how many ids this host got over earlier connections. A plan that names more than were
    /// given out is refused, so that a server cannot make this side hold any amount.
    pub fn assume_registered(&mut self, ids: usize) {
        self.registered += ids;
    }

    /// After a reconnection: how many sketches this host reported over earlier connections, likewise.
    pub fn assume_sketched(&mut self, sketches: usize) {
        self.sketched += sketches;
    }

    /// Registers contents and gives their ids, in order; `None` is host-local. Any number: batches are sent while
    /// answers come in, and each answer must come within the timeout after the one before. If it fails, none of
    /// them counts for the caller.
    pub fn register(&mut self, all: &[Registration]) -> Result<Vec<Option<PageId>>, IndexError> {
        const WHAT: &str = "ids";
        self.link.whole()?;
        let timeout = self.link.timeout;
        let first_seq = self.link.seq.wrapping_add(1);
        // Read and write at once: a server that waits for us to take its answers takes no more batches.
        let writer_stream = self.link.conn.stream.clone();
        let give_up = AtomicBool::new(false);
        let ids = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                for (i, batch) in (0u32..).zip(all.chunks(MAX_BATCH)) {
                    let msg = IndexMsg::Register { seq: first_seq.wrapping_add(i), batch: batch.to_vec() };
                    // If this fails, the reader may still find the server's own word about it.
                    send_on(&writer_stream, &msg, &|| !give_up.load(Ordering::Relaxed))?;
                }
                Ok(())
            });
            let got = self.read_ids(all, timeout);
            give_up.store(true, Ordering::Relaxed);
            match (got, writer.join()) {
                (Err(refused @ IndexError::Refused { .. }), _) => Err(refused),
                (Err(_), Ok(Err(e @ (ConnError::Io(_) | ConnError::Wire(_))))) => {
                    Err(self.link.error(e, WHAT, timeout))
                }
                (got, _) => got,
            }
        })?;
        self.registered += ids.iter().flatten().count();
        Ok(ids)
    }

    fn read_ids(
        &mut self,
        all: &[Registration],
        timeout: Duration,
    ) -> Result<Vec<Option<PageId>>, IndexError> {
        const WHAT: &str = "ids";
        let mut out = Vec::with_capacity(all.len());
        for batch in all.chunks(MAX_BATCH) {
            let want = self.link.next_seq();
            match self.link.recv(WHAT, timeout)? {
                IndexMsg::Registered { seq, ids } if seq == want && ids.len() == batch.len() => {
                    out.extend(ids);
                }
                other => return Err(self.link.unexpected(WHAT, &other)),
            }
        }
        Ok(out)
    }

    /// Says that all is registered. `own_unique_pages`: pages this host will send that it did not register, or that
    /// got no id. Registered ones that nobody shares are counted by the index itself.
    pub fn done(&mut self, own_unique_pages: u64) -> Result<(), IndexError> {
        self.link.done(&IndexMsg::RegisterDone { own_unique_pages }, "word that registration is done")
    }

    /// This host's part of the plan, by `deadline`; it is made when all source hosts are done, or the coordinator
    /// will wait no longer. Refused as `NotReady` (the connection stays whole) if it was not made in time.
    pub fn plan(&mut self, deadline: Instant) -> Result<HostPlan, IndexError> {
        const WHAT: &str = "plan";
        let (wait, wait_ms) = until(deadline);
        // The server waits for the plan, we for the server: let its answer arrive.
        let mut part = self.link.ask(&IndexMsg::PlanRequest { wait_ms }, WHAT, wait + self.link.timeout)?;
        let mut plan = HostPlan::default();
        loop {
            let IndexMsg::PlanPart { last, piece } = part else {
                return Err(self.link.unexpected(WHAT, &part));
            };
            let news = piece.carry.len() + piece.remote.len();
            let total = plan.carry.len() + plan.remote.len() + news;
            // A plan names what this host registered and no more, and each piece but the last brings something.
            if total > self.registered || (news == 0 && !last) {
                self.link.broken = true;
                let got = "more plan than was registered";
                return Err(IndexError::Unexpected { addr: self.link.addr, what: WHAT, got });
            }
            plan.carry.extend(piece.carry);
            plan.remote.extend(piece.remote);
            if last {
                return Ok(plan);
            }
            part = self.link.recv(WHAT, self.link.timeout)?;
        }
    }

    /// Reports what contents of a trust domain look like that this host alone has, by the plan; after it and before
    /// [`Self::models`], else it is of no use. There is no answer.
    pub fn sketches(&mut self, domain: u16, items: &[SketchItem]) -> Result<(), IndexError> {
        for batch in items.chunks(MAX_BATCH) {
            let msg = IndexMsg::Sketches { domain, items: batch.to_vec() };
            self.link.say(&msg, "sketches to be taken", self.link.timeout)?;
            self.sketched += batch.len();
        }
        Ok(())
    }

    /// What this host lends to others, and how many contents they lend to it: at most `room`. Models are chosen when all
    /// source hosts of the plan have asked, or at the first one's deadline; its answer comes a little later. Refused as
    /// `NotReady` (the connection stays whole) if there is no plan by then.
    pub fn models(&mut self, room: u32, deadline: Instant) -> Result<HostModels, IndexError> {
        const WHAT: &str = "models";
        let (wait, wait_ms) = until(deadline);
        let msg = IndexMsg::ModelsRequest { room, wait_ms };
        // The choice is made after the wait: some seconds for millions of sketches.
        let mut part = self.link.ask(&msg, WHAT, wait + self.link.timeout)?;
        let mut models = HostModels::default();
        loop {
            let IndexMsg::ModelsPart { last, borrows, lend } = part else {
                return Err(self.link.unexpected(WHAT, &part));
            };
            let idle = lend.is_empty() && !last;
            if models.lend.len() + lend.len() > self.sketched || borrows > room || idle {
                self.link.broken = true;
                let got = "more models than sketches or room";
                return Err(IndexError::Unexpected { addr: self.link.addr, what: WHAT, got });
            }
            models.lend.extend(lend);
            models.borrows = borrows;
            if last {
                return Ok(models);
            }
            part = self.link.recv(WHAT, self.link.timeout)?;
        }
    }

    /// Reports contents that appeared after the plan and were sent, and learns where they are. Meant for a thread of
    /// its own: no page waits for this.
    pub fn late(&mut self, items: &[LateItem]) -> Result<Vec<LateReply>, IndexError> {
        const WHAT: &str = "answer to late contents";
        let mut out = Vec::with_capacity(items.len());
        for batch in items.chunks(MAX_BATCH) {
            let want = self.link.next_seq();
            let msg = IndexMsg::Late { seq: want, items: batch.to_vec() };
            match self.link.ask(&msg, WHAT, self.link.timeout)? {
                IndexMsg::LateReply { seq, replies } if seq == want && replies.len() == batch.len() => {
                    out.extend(replies);
                }
                other => return Err(self.link.unexpected(WHAT, &other)),
            }
        }
        Ok(out)
    }
}

/// How long it is to `deadline`, also as the server is told.
fn until(deadline: Instant) -> (Duration, u32) {
    let wait = deadline.saturating_duration_since(Instant::now());
    (wait, u32::try_from(wait.as_millis()).unwrap_or(u32::MAX))
}

#[cfg(test)]
impl IndexClient {
    /// The socket, so that a test can cut it.
    pub(super) fn stream(&self) -> crate::net::connection::Connection {
        self.link.conn.stream.clone()
    }
}

/// What `plan_now` tells the coordinator.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Planned {
    /// Source hosts in the plan.
    pub sources: HostSet,
    /// Distinct contents registered.
    pub digests: u64,
    /// Of these with a carrier.
    pub shared: u64,
}

/// The coordinator's connection to the index.
#[derive(Debug)]
pub struct IndexOpener {
    link: Link,
}

impl IndexOpener {
    /// Makes the group, or finds it again if token and shape are the same. Hosts are counted from 0.
    pub fn open(
        at: impl Into<Endpoint>,
        group: &str,
        token: &[u8; 32],
        source_hosts: u16,
        target_hosts: u16,
        timeout: Duration,
    ) -> Result<Self, IndexError> {
        let (versions, group, token) = (VERSIONS.to_vec(), group.to_owned(), Token(*token));
        let open = IndexMsg::Open { versions, group, token, source_hosts, target_hosts };
        Ok(Self { link: Link::connect(&at.into(), &open, timeout)? })
    }

    /// Has the plan made now, over the source hosts that are done and not in `missing`; once made, it stays. `within`
    /// must leave room for the making: some seconds for ten million contents.
    pub fn plan_now(&mut self, missing: &HostSet, within: Duration) -> Result<Planned, IndexError> {
        match self.link.ask(&IndexMsg::PlanNow { missing: missing.clone() }, "plan", within)? {
            IndexMsg::Planned { sources, digests, shared } => Ok(Planned { sources, digests, shared }),
            other => Err(self.link.unexpected("plan", &other)),
        }
    }

    /// Has the group forgotten.
    pub fn close(mut self) -> Result<(), IndexError> {
        self.link.done(&IndexMsg::Close, "word that the group is closed")
    }
}
