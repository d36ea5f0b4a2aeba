//! The control port: who is on it, and for how long. A caller is a stranger until its first request is whole and makes
//! sense. Then it has a place, which it may lose to a newcomer while nothing of its is done: whoever follows a group opens
//! a new connection for its next question (`control::client`).
//!
//! Bounds: strangers and places (`net::gate`); requests in hand (`turns`); a line's bytes (`control::lines`), and
//! [`BIG_LINES`] long ones at a time; each wait has one of the times below.

use super::super::api::heard::decode_request;
use super::super::api::{Code, Refusal, Reply, Request, encode_reply};
use super::super::lines::{Line, Lines, MAX_SMALL};
use super::super::socket::{self, Socket};
use super::turns::{Queue, Turns};
use super::{Shared, Signals};
use crate::core::identity::Identity;
use crate::core::quota::Owner;
use crate::flow::Traffic;
use crate::net::gate::{self, Gate, Pass, Sizes};
use crate::obs::rare;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::Notify;

/// How long a caller may take to show who it is and to say its first request.
const FIRST: Duration = Duration::from_secs(10);
/// A control connection may be silent for so long between two requests.
const IDLE: Duration = Duration::from_secs(60);
/// A request that has begun must be whole within this.
const WHOLE: Duration = Duration::from_secs(30);
/// A reply must be taken within this.
const WRITE: Duration = Duration::from_secs(10);
/// How long a request waits for its turn.
const TURN: Duration = Duration::from_secs(20);
/// How often a place is looked for while all are being served.
const LOOK: Duration = Duration::from_millis(2);
/// Lines of more than [`MAX_SMALL`] bytes that are read at a time.
const BIG_LINES: usize = 8;

/// What all connections of the port share.
struct Port {
    shared: Arc<Shared>,
    strangers: Arc<Gate>,
    places: Arc<Gate>,
    turns: Turns,
    /// For long lines.
    big: Turns,
}

/// Takes connections until a signal says that the agent is to end.
pub(super) async fn serve(
    shared: Arc<Shared>,
    control: std::net::TcpListener,
    sizes: Sizes,
    mut signals: Signals,
) -> io::Result<()> {
    control.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(control)?;
    gate::deepen(&listener);
    let here = listener.local_addr()?;
    let port = Arc::new(Port {
        shared,
        strangers: Gate::new("control port: full", sizes.strangers, FIRST),
        places: Gate::new("control port: places full", sizes.control, IDLE),
        turns: Turns::new(sizes.control),
        big: Turns::new(BIG_LINES),
    });
    loop {
        while let Some(pause) = port.strangers.pause() {
            tokio::time::sleep(pause).await;
        }
        let accepted = tokio::select! {
            a = listener.accept() => a,
            _ = signals.interrupt.recv() => return Ok(()),
            _ = signals.terminate.recv() => return Ok(()),
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(e) => {
                rare::warn("control port: cannot take a connection", here, format_args!("{e}"));
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let goes = Arc::new(Notify::new());
        let end = goes.clone();
        let Some(pass) = port.strangers.enter(peer, move || end.notify_one()) else { continue };
        let port = port.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = goes.notified() => {}
                ended = port.meet(stream, peer, pass) => match ended {
                    // A look at whether the port is open leaves no line.
                    Ok(()) => {}
                    Err(e) => rare::warn("control port: connection ended", peer, format_args!("{e}")),
                },
            }
        });
    }
}

impl Port {
    /// A stranger: until its first request is understood.
    async fn meet(&self, stream: TcpStream, peer: SocketAddr, mut pass: Pass) -> io::Result<()> {
        pass.rest();
        let local = stream.local_addr()?;
        let first = async {
            let (stream, leaf) = socket::answer(stream, &self.shared.security).await?;
            let who = self.shared.admission(leaf.as_deref());
            let by = match &who {
                Ok(Some(who)) => who.owner(),
                _ => Owner::From(peer.ip().into()),
            };
            let mut lines = Lines::served(stream, self.big.queue(&by).permits());
            if who.is_err() {
                lines.keep_small();
            }
            // The whole of it has a deadline.
            let line = lines.read(FIRST * 2).await?;
            Ok::<_, io::Error>((lines, (who, by), line))
        };
        let (mut lines, (who, by), line) = tokio::time::timeout_at(pass.until().into(), first)
            .await
            .unwrap_or_else(|_| Err(io::Error::new(io::ErrorKind::TimedOut, "no request in time")))?;
        let Some(line) = line else { return Ok(()) };
        // From here on it is this side that takes its time.
        pass.hold();
        let understood = understand(line).await.and_then(|request| Ok((request, who?)));
        let (request, who) = match understood {
            Ok(understood) => understood,
            Err(refusal) => {
                rare::warn("control port: not understood, or not let in", peer, format_args!("{refusal}"));
                return lines.write(encode_reply(&Err(refusal)), WRITE).await;
            }
        };
        let goes = Arc::new(Notify::new());
        let Some(place) = self.place(peer, &goes, pass.until()).await else {
            let what =
                format!("agent {} has {} requests in hand", self.shared.config.name, self.places.count());
            return lines.write(encode_reply(&Err(Refusal::new(Code::NotNow, what))), WRITE).await;
        };
        drop(pass);
        let tags = &self.shared.tags;
        tags.add(local, peer, Traffic::Control);
        let caller = Caller { turns: self.turns.queue(&by), by, who, peer, place };
        let ended = tokio::select! {
            () = goes.notified() => Ok(()),
            ended = self.converse(&mut lines, caller, request) => ended,
        };
        tags.remove(local, peer);
        ended
    }

    /// A place, as soon as one of those who have one is done with.
    async fn place(&self, peer: SocketAddr, goes: &Arc<Notify>, until: Instant) -> Option<Pass> {
        loop {
            let end = goes.clone();
            let place = self.places.enter(peer, move || end.notify_one());
            if place.is_some() || Instant::now() >= until {
                return place;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// A caller with a place: one request after the other.
    async fn converse(
        &self,
        lines: &mut Lines<Socket>,
        mut caller: Caller,
        first: Request,
    ) -> io::Result<()> {
        let mut request = Ok(first);
        loop {
            let reply = match request {
                Ok(request) => self.in_turn(request, &mut caller).await,
                Err(refusal) => Some(Err(refusal)),
            };
            let Some(reply) = reply else { return Ok(()) };
            lines.write(encode_reply(&reply), WRITE).await?;
            if !lines.begin(IDLE).await? {
                return Ok(());
            }
            let Some(line) = lines.read(WHOLE).await? else { return Ok(()) };
            request = understand(line).await;
        }
    }

    /// Performs a request when it is its caller's turn. What is being done makes no room; whoever waits, or does not take
    /// its reply, does. None: it was told to make room.
    async fn in_turn(&self, request: Request, caller: &mut Caller) -> Option<Result<Reply, Refusal>> {
        caller.place.rest();
        let Ok(turn) = tokio::time::timeout(TURN, caller.turns.turn()).await else {
            let (agent, by) = (&self.shared.config.name, &caller.by);
            let what =
                format!("agent {agent} is busy with other requests of {by}: none ended within {TURN:?}");
            return Some(Err(Refusal::new(Code::NotNow, what)));
        };
        if !caller.place.hold() {
            return None;
        }
        let reply = self.perform(request, caller).await;
        drop(turn);
        caller.place.rest();
        Some(reply)
    }

    async fn perform(&self, request: Request, caller: &Caller) -> Result<Reply, Refusal> {
        let (agent, who, peer) = (self.shared.clone(), caller.who.clone(), caller.peer);
        let by = caller.by.clone();
        let done = tokio::task::spawn_blocking(move || {
            let who = who.as_ref();
            agent
                .admit(who, &request)
                .inspect_err(|e| rare::warn("control port: refused", peer, format_args!("{e}")))?;
            let reply = agent.handle(request, &by).inspect_err(|e| {
                if e.code == Code::OffLimits {
                    rare::warn("control port: refused", peer, format_args!("{e}"));
                }
            });
            reply.map(|reply| agent.seen_by(who, reply))
        });
        done.await.unwrap_or_else(|e| inside(&e))
    }
}

/// A caller that is no stranger any more.
struct Caller {
    /// By its certificate; none in plain text.
    who: Option<Identity>,
    /// As whom it is counted.
    by: Owner,
    turns: Queue,
    peer: SocketAddr,
    place: Pass,
}

/// Reads a request. A long one takes a while, which is not the runtime's.
async fn understand(line: Line) -> Result<Request, Refusal> {
    if line.text.len() < MAX_SMALL {
        return decode_request(&line.text);
    }
    tokio::task::spawn_blocking(move || decode_request(&line.text)).await.unwrap_or_else(|e| inside(&e))
}

fn inside<T>(e: &tokio::task::JoinError) -> Result<T, Refusal> {
    Err(Refusal::new(Code::Failed, format!("the request failed inside: {e}")))
}
