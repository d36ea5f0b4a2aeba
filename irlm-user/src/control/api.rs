//! The words of the control protocol: one JSON object a line, over TCP, from the coordinator (and other commands) to
//! agents, and between agents where plain QEMU needs a word of them. Versioned; a reader ignores fields it does not
//! know and answers requests it does not know with an error, so that agents can be upgraded one by one.
//!
//! Request: `{"v":1,"req":{"do":"status","group":"rack-7"}}`. Reply: `{"v":1,"ok":{"is":"status",…}}` or
//! `{"v":1,"err":{"code":"unknown-group","msg":"…"}}`. Times are Unix nanoseconds of the agent's own clock; 0 or
//! absent means "not yet".

// Who may ask for what.
mod asks;
// What an agent sees of VMs beforehand.
mod facts;
// What an agent is told of a group.
mod group;
// A request as it is heard.
pub mod heard;
// What became of groups.
mod history;
// What went by multicast.
mod multicast;
// What is said of a port's policy.
mod port;
// Certificates.
mod keys;
// How VMs write.
pub mod sampling;
// What an agent says of a group.
mod status;
// What moving pages cost.
mod work;

pub use crate::control::terms::{Method, Token};
pub use facts::{Identity, Moved, OnRecord, Preflight, VmFacts};
pub use group::{GroupSpec, SourceSpec, TargetSpec, VmSpec};
pub use history::HistoryRow;
pub use keys::{Certificate, KeysStatus};
pub use multicast::MulticastCounters;
pub use port::{PolicyClass, PolicyStatus};
pub use sampling::{HostWrites, SamplerStatus, VmWrites};
pub use status::{
    BpfClass, BpfCounters, GroupStatus, HostCounters, Incoming, LEFT_AGAIN, PageCounts, Phase, PreparePhase,
    PrepareStatus, Role, ShareStatus, Traffic, VmStatus,
};
pub use work::Work;

use crate::flow::MoveError;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::net::SocketAddr;

/// Version of this protocol; a request of another version is refused by name.
pub const VERSION: u32 = 1;

/// Longest line on a control connection, bytes: a `prepare` of 8192 VMs on one host is below 3 MiB.
pub const MAX_LINE: usize = 4 << 20;

/// Longest message of a refusal, bytes: it may cite what was asked.
pub const MAX_MSG: usize = 4096;

/// What an operator decides about a VM in doubt.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Decision {
    /// Target: run it. The operator has made sure that the source's copy is gone or paused for good.
    Run,
    /// Target: throw the copy away. Source: this copy is given up.
    Discard,
    /// Source: run it on. The operator has made sure that the target's copy does not and will not run.
    Resume,
}

/// Which roles of an agent a start is for: no source begins before all targets are ready, also where one agent is both.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartPart {
    /// Both at once, as older coordinators ask.
    #[default]
    Both,
    /// The VMs that arrive.
    Targets,
    /// The VMs that leave.
    Sources,
}

impl StartPart {
    /// Whether arriving VMs are meant.
    #[must_use]
    pub fn targets(self) -> bool {
        self != Self::Sources
    }

    /// Whether leaving VMs are meant.
    #[must_use]
    pub fn sources(self) -> bool {
        self != Self::Targets
    }
}

/// Defines the requests twice. As they are said each is one object, whose `do` names it. As they are heard the name is known
/// before the fields are read ([`heard`]): otherwise serde keeps a copy of any object at all until it has found the name.
macro_rules! requests {
    ($(#[$doc:meta])* pub enum Request { $($variants:tt)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize)]
        #[serde(tag = "do", rename_all = "kebab-case")]
        pub enum Request { $($variants)* }

        #[derive(Deserialize)]
        #[serde(remote = "Request", rename_all = "kebab-case")]
        enum RequestByName { $($variants)* }
    };
}

requests! {
    /// What can be asked of an agent.
    pub enum Request {
        /// Who are you? Answer: [`Reply::Hello`].
        Hello,
        /// Look at the group's VMs here and at the host, and say what would be refused; changes nothing, keeps nothing. Answer:
        /// [`Reply::Preflight`].
        Preflight {
            /// The group.
            spec: Box<GroupSpec>,
            /// Only the VMs, not what the host lacks.
            #[serde(default)]
            vms_only: bool,
        },
        /// Learn the group, reach the monitors, start reading guests (method `irlm`), open the target monitors (plain
        /// methods). Answer: [`Reply::Prepare`], at once; asking again with the same token changes nothing.
        Prepare {
            /// The group.
            spec: Box<GroupSpec>,
        },
        /// How far is the preparation? Answer: [`Reply::Prepare`].
        PrepareStatus {
            /// The group.
            group: String,
        },
        /// Watch for so many seconds how this host's VMs of the group write; moves nothing, keeps nothing. Answer, after that
        /// time: [`Reply::Observed`].
        Observe {
            /// The group.
            spec: Box<GroupSpec>,
            /// For how long, at most [`sampling::MAX_SECONDS`].
            seconds: u32,
            /// One dirtying in so many is looked at by place.
            #[serde(default = "one")]
            one_in: u32,
        },
        /// From the group's coordinator, when all source hosts have said what their links give
        /// ([`PrepareStatus::direct`]): whether the group's QEMUs stream to each other. One answer for all, so that nobody
        /// waits for a host that goes another way. Answer: [`Reply::Done`].
        Route {
            /// The group.
            group: String,
            /// Its secret.
            token: Token,
            /// They do.
            direct: bool,
        },
        /// Push and migrate. Sent to target hosts first. Answer: [`Reply::Done`].
        Start {
            /// The group.
            group: String,
            /// Leave arrived VMs paused (the target owns them; someone else lets them run).
            #[serde(default)]
            leave_paused: bool,
            /// Plain methods: where the targets listen.
            #[serde(default)]
            incoming: Vec<Incoming>,
            /// Which of the agent's roles.
            #[serde(default)]
            part: StartPart,
        },
        /// How does it stand? Answer: [`Reply::Status`].
        Status {
            /// One group, or all.
            #[serde(default)]
            group: Option<String>,
        },
        /// Stop everything of the group that has not been given up yet; those VMs run on at the source. Answer:
        /// [`Reply::Done`].
        Cancel {
            /// The group.
            group: String,
        },
        /// An operator's word on a VM in doubt. Answer, within some ten seconds: [`Reply::Settled`]; [`Code::NotNow`] if this
        /// host's copy is not in doubt.
        Settle {
            /// The group.
            group: String,
            /// The VM's name.
            vm: String,
            /// What to do.
            decision: Decision,
        },
        /// Drop a finished group at once; it would go by itself a little later. What it came to stays in the history. Refused
        /// while a VM of it is neither here nor there. Answer: [`Reply::Done`].
        Forget {
            /// The group.
            group: String,
        },
        /// What became of groups, also of those that are not kept any more. Answer: [`Reply::History`].
        History {
            /// One group, or all.
            #[serde(default)]
            group: Option<String>,
        },
        /// From the source agent to the target agent, plain methods: the source's QEMU has completed and will not run
        /// again; the target may. May be repeated. Answer: [`Reply::Done`] once the target runs (or is left paused).
        Released {
            /// The group.
            group: String,
            /// Its secret: only the group's own agents say this word.
            token: Token,
            /// The VM's number.
            vm: u16,
            /// How its owner had it at the source.
            #[serde(default)]
            guest: crate::core::handover::GuestState,
        },
        /// Another policy for the port from now on. It lasts until the agent ends; then its file counts again. If it
        /// cannot be had the old one stays. Answer: [`Reply::Policy`].
        PolicySet {
            /// The text of a policy file.
            text: String,
        },
        /// What is in force on the port? Answer: [`Reply::Policy`].
        PolicyShow,
        /// From the group's coordinator: this host's share of the group's budget on the core link. Of two shares the one
        /// of the higher number counts, whenever it comes. Answer: [`Reply::Share`], once it is in force.
        BudgetShare {
            /// The group.
            group: String,
            /// The group's secret, or that of the last [`Request::BudgetClaim`]: only one divides.
            token: Token,
            /// Counts up with every share that the coordinator sends this host.
            seq: u64,
            /// The share, bit/s.
            bits: u64,
        },
        /// From whoever divides the group's budget, every second, and from who takes over from one that has not been heard
        /// for 4 s: this host is to listen to shares of this term and with this secret, and to no others. Answer:
        /// [`Reply::Share`]; [`Code::NotNow`] if somebody else divides.
        BudgetClaim {
            /// The group.
            group: String,
            /// What the shares will bear: the group's secret from its own coordinator, else a fresh one.
            token: Token,
            /// 0 for the coordinator that starts the group; one more for each that takes over.
            term: u32,
        },
    }
}

/// Answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Hello`].
    Hello {
        /// The host's name by its own configuration.
        name: String,
        /// The program's version.
        version: String,
        /// The agent's clock, so that a caller can tell how far clocks are apart.
        now_ns: u64,
        /// Where it takes data connections; an address of no host means all its addresses.
        #[serde(default)]
        data: Option<SocketAddr>,
        /// The hosts as whose agent the caller is taken, by its certificate; none in plain text.
        #[serde(default)]
        you: Option<Vec<String>>,
    },
    /// To [`Request::Preflight`].
    Preflight(Box<Preflight>),
    /// To [`Request::Prepare`] and [`Request::PrepareStatus`].
    Prepare(PrepareStatus),
    /// To [`Request::Observe`].
    Observed(HostWrites),
    /// To [`Request::Status`].
    Status {
        /// The host's name by its own configuration.
        name: String,
        /// The agent's clock.
        now_ns: u64,
        /// The groups it knows.
        groups: Vec<GroupStatus>,
        /// How it watches VMs' writes, the best first.
        #[serde(default)]
        samplers: Vec<SamplerStatus>,
        /// Its certificates; none: it speaks plain text.
        #[serde(default)]
        keys: Option<KeysStatus>,
    },
    /// To [`Request::Settle`]: what the decision came to.
    Settled {
        /// For people.
        line: String,
        /// It was seen to be so. Otherwise the agent keeps trying.
        done: bool,
    },
    /// To [`Request::History`], the newest first.
    History {
        /// The host's name by its own configuration.
        name: String,
        /// The VMs.
        rows: Vec<HistoryRow>,
        /// How many older ones there are.
        #[serde(default)]
        left_off: u64,
    },
    /// To [`Request::PolicySet`] and [`Request::PolicyShow`].
    Policy(Box<PolicyStatus>),
    /// To [`Request::BudgetShare`] and [`Request::BudgetClaim`]: what is in force.
    Share {
        /// The highest number heard.
        seq: u64,
        /// Its share, bit/s.
        bits: u64,
    },
    /// Done, or taken in hand.
    Done,
}

fn one() -> u32 {
    1
}

/// Why a request was not done, for programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// The caller's certificate does not allow it.
    NotAllowed,
    /// The agent touches that for no caller (`[allow]` of its configuration).
    OffLimits,
    /// Another version of the protocol.
    Version,
    /// A request this agent has never heard of.
    UnknownRequest,
    /// Not understood.
    BadRequest,
    /// No such group or VM here.
    UnknownGroup,
    /// A group of that name with another token is under way.
    Conflict,
    /// Not at this point.
    NotNow,
    /// It was tried, and failed.
    Failed,
    /// A code of a later version.
    #[serde(other)]
    Other,
}

/// A request that was not done: one line for people, one code for programs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}")]
pub struct Refusal {
    /// For programs.
    pub code: Code,
    /// For people: what, where, what to do.
    pub msg: String,
}

impl Refusal {
    /// A refusal. What it cites of somebody's words stays one line that a terminal can show.
    pub fn new(code: Code, msg: impl Into<String>) -> Self {
        let mut msg = msg.into();
        if msg.contains(char::is_control) {
            msg = msg.replace(char::is_control, " ");
        }
        msg.truncate(msg.floor_char_boundary(MAX_MSG));
        Self { code, msg }
    }

    /// That something was tried, and failed.
    pub fn failed(msg: impl std::fmt::Display) -> Self {
        Self::new(Code::Failed, msg.to_string())
    }
}

impl From<MoveError> for Refusal {
    fn from(e: MoveError) -> Self {
        Self::failed(e)
    }
}

/// The line (without its newline) for a request.
#[must_use]
pub fn encode_request(r: &Request) -> String {
    serde_json::json!({ "v": VERSION, "req": r }).to_string()
}

/// A reply as it is said.
#[derive(Serialize)]
struct Said<'a> {
    v: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<&'a Reply>,
    #[serde(skip_serializing_if = "Option::is_none")]
    err: Option<&'a Refusal>,
}

/// The line (without its newline) for a reply.
#[must_use]
pub fn encode_reply(r: &Result<Reply, Refusal>) -> String {
    let said = Said { v: VERSION, ok: r.as_ref().ok(), err: r.as_ref().err() };
    serde_json::to_string(&said).unwrap_or_else(|e| {
        let what = Value::from(format!("an answer that cannot be said: {e}"));
        format!("{{\"v\":{VERSION},\"err\":{{\"code\":\"failed\",\"msg\":{what}}}}}")
    })
}

/// Reads a reply line; the outer error is a line that is no reply.
pub fn decode_reply(line: &[u8]) -> Result<Result<Reply, Refusal>, String> {
    let no_reply = |e: &dyn std::fmt::Display| Refusal::new(Code::BadRequest, e.to_string()).msg;
    let mut v: Value = serde_json::from_slice(line).map_err(|e| no_reply(&format_args!("not JSON: {e}")))?;
    if let Some(err) = v.get_mut("err") {
        let said: Refusal = serde_json::from_value(err.take()).map_err(|e| no_reply(&e))?;
        return Ok(Err(Refusal::new(said.code, said.msg)));
    }
    if v["v"] != VERSION {
        return Err(no_reply(&format_args!("control protocol version {}, not {VERSION}", v["v"])));
    }
    serde_json::from_value(v["ok"].take()).map(Ok).map_err(|e| no_reply(&e))
}

#[cfg(test)]
mod tests;
