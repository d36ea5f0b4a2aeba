//! Who may ask for what. Every request of the control protocol, every purpose of a data connection and every message to
//! the index is in one table.

use super::role::{Identity, Role};
use crate::wire::index_msg::IndexMsg;
use crate::wire::messages::Purpose;

macro_rules! asks {
    ($($name:ident, $text:literal, $class:ident;)*) => {
        /// What can be asked for, over all connections.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        pub enum Ask {
            $(#[doc = concat!("`", $text, "`.")] $name,)*
        }

        impl Ask {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$name),*];

            /// Its name in logs.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)* }
            }

            fn class(self) -> Class {
                match self { $(Self::$name => Class::$class,)* }
            }
        }
    };
}

asks! {
    Hello, "hello", Greet;
    Status, "status", Look;
    PrepareStatus, "prepare-status", Look;
    History, "history", Look;
    PolicyShow, "policy-show", Look;
    Preflight, "preflight", Move;
    Prepare, "prepare", Move;
    Observe, "observe", Move;
    Route, "route", Move;
    Start, "start", Move;
    Cancel, "cancel", Move;
    Settle, "settle", Move;
    Forget, "forget", Move;
    BudgetShare, "budget-share", Move;
    BudgetClaim, "budget-claim", Move;
    PolicySet, "policy-set", Port;
    Released, "released", AsHost;
    DataVm, "a VM connection", AsHost;
    DataPush, "a push connection", AsHost;
    DataPeer, "a peer connection", AsHost;
    DataSettle, "a settle connection", AsHost;
    DataDemand, "a demand connection", AsHost;
    DataDirect, "a direct connection", AsHost;
    DataStream, "a stream connection", AsHost;
    DataProbe, "a probe connection", AsHost;
    DataLend, "a lend connection", AsHost;
    IndexOpen, "the index's open", Rack;
    IndexPlanNow, "the index's plan-now", Rack;
    IndexClose, "the index's close", Rack;
    IndexHello, "the index's hello", AtIndex;
    IndexRegister, "the index's register", AtIndex;
    IndexRegisterDone, "the index's register-done", AtIndex;
    IndexPlanRequest, "the index's plan-request", AtIndex;
    IndexLate, "the index's late", AtIndex;
    IndexSketches, "the index's sketches", AtIndex;
    IndexModelsRequest, "the index's models-request", AtIndex;
}

/// Asks that the same people may ask for.
#[derive(Clone, Copy)]
enum Class {
    /// Tells nothing that matters.
    Greet,
    /// Changes nothing.
    Look,
    /// Touches the VMs of one group.
    Move,
    /// Changes what the whole host does.
    Port,
    /// A word between agents about a host's own VMs or contents.
    AsHost,
    /// Makes and ends a group at the index.
    Rack,
    /// A word of an agent to the index.
    AtIndex,
}

impl Class {
    fn takes(self) -> &'static str {
        match self {
            Self::Greet => "an operator, coordinator, viewer or agent",
            Self::Look => "an operator, a viewer or a coordinator",
            Self::Move | Self::Rack => "an operator or a coordinator",
            Self::Port => "an operator",
            Self::AsHost | Self::AtIndex => "an agent",
        }
    }
}

impl From<&Purpose> for Ask {
    fn from(purpose: &Purpose) -> Self {
        match purpose {
            Purpose::Vm { .. } => Self::DataVm,
            Purpose::Push { .. } => Self::DataPush,
            Purpose::Peer { .. } => Self::DataPeer,
            Purpose::Settle { .. } => Self::DataSettle,
            Purpose::Demand { .. } => Self::DataDemand,
            Purpose::Direct { .. } => Self::DataDirect,
            Purpose::Stream { .. } => Self::DataStream,
            Purpose::Probe { .. } => Self::DataProbe,
            Purpose::Lend { .. } => Self::DataLend,
        }
    }
}

impl Ask {
    /// What a message to the index asks for; none for what only an index says.
    #[must_use]
    pub fn of_index(msg: &IndexMsg) -> Option<Self> {
        Some(match msg {
            IndexMsg::Hello { .. } => Self::IndexHello,
            IndexMsg::Open { .. } => Self::IndexOpen,
            IndexMsg::Register { .. } => Self::IndexRegister,
            IndexMsg::RegisterDone { .. } => Self::IndexRegisterDone,
            IndexMsg::PlanRequest { .. } => Self::IndexPlanRequest,
            IndexMsg::Late { .. } => Self::IndexLate,
            IndexMsg::PlanNow { .. } => Self::IndexPlanNow,
            IndexMsg::Close => Self::IndexClose,
            IndexMsg::Sketches { .. } => Self::IndexSketches,
            IndexMsg::ModelsRequest { .. } => Self::IndexModelsRequest,
            IndexMsg::HelloOk { .. }
            | IndexMsg::Registered { .. }
            | IndexMsg::PlanPart { .. }
            | IndexMsg::LateReply { .. }
            | IndexMsg::Planned { .. }
            | IndexMsg::Done
            | IndexMsg::Error { .. }
            | IndexMsg::ModelsPart { .. } => return None,
        })
    }
}

/// What a request is about, as far as whoever is asked knows it.
#[derive(Clone, Copy, Default, Debug)]
pub struct Subject<'a> {
    /// The trust domains of the group; none: it is about no group, or about one that is not known here.
    pub tenants: Option<&'a [String]>,
    /// The host as which it is said, by its name in the group (for `released` the VM's source host); none: there is no
    /// such host in the group, or, at an index, hosts have no names.
    pub host: Option<&'a str>,
}

/// Why somebody may not ask for something. One line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Refused {
    /// Not with that role.
    #[error("{who} may not ask for {ask}: that takes {takes}", ask = .ask.name())]
    Role {
        /// Who.
        who: String,
        /// What.
        ask: Ask,
        /// Who may.
        takes: &'static str,
    },
    /// Not for these VMs.
    #[error("{who} may not ask for {ask} of tenant {tenant:?}", ask = .ask.name())]
    Tenant {
        /// Who.
        who: String,
        /// What.
        ask: Ask,
        /// The first label that is none of its own.
        tenant: String,
    },
    /// A coordinator's word about a group that is not known here.
    #[error("{who} asks for {ask} of a group that is not known here", ask = .ask.name())]
    NoGroup {
        /// Who.
        who: String,
        /// What.
        ask: Ask,
    },
    /// In another host's name.
    #[error("{who} asks for {ask} in the name of host {host:?}", ask = .ask.name())]
    Host {
        /// Who.
        who: String,
        /// What.
        ask: Ask,
        /// Whose name; empty if the group has no such host.
        host: String,
    },
}

/// Whether this peer may ask for this. One of its roles is enough.
///
/// # Errors
/// Why not: of several roles the reason that comes nearest.
pub fn may(who: &Identity, ask: Ask, about: Subject<'_>) -> Result<(), Refused> {
    let takes = ask.class().takes();
    let mut why = Refused::Role { who: who.to_string(), ask, takes };
    for role in &who.roles {
        match as_role(role, ask, about) {
            Verdict::Yes => return Ok(()),
            Verdict::Never => {}
            Verdict::Tenant(tenant) => why = Refused::Tenant { who: who.to_string(), ask, tenant },
            Verdict::NoGroup => why = Refused::NoGroup { who: who.to_string(), ask },
            Verdict::Host => {
                let host = about.host.unwrap_or_default().to_owned();
                why = Refused::Host { who: who.to_string(), ask, host };
            }
        }
    }
    Err(why)
}

enum Verdict {
    Yes,
    Never,
    Tenant(String),
    NoGroup,
    Host,
}

fn as_role(role: &Role, ask: Ask, about: Subject<'_>) -> Verdict {
    match (ask.class(), role) {
        (Class::Greet, Role::Operator | Role::Coordinator(_) | Role::Viewer | Role::Agent(_))
        | (Class::Look | Class::Move | Class::Port | Class::Rack, Role::Operator)
        | (Class::Look, Role::Viewer) => Verdict::Yes,
        (class @ (Class::Look | Class::Move | Class::Rack), Role::Coordinator(mine)) => {
            match (about.tenants, class) {
                // A group of no trust domain would be nobody's.
                (None | Some([]), Class::Move) => Verdict::NoGroup,
                (None, _) => Verdict::Yes,
                (Some(all), _) => match all.iter().find(|t| !mine.has(t)) {
                    Some(other) => Verdict::Tenant(other.clone()),
                    None => Verdict::Yes,
                },
            }
        }
        (Class::AtIndex, Role::Agent(_)) if about.host.is_none() => Verdict::Yes,
        (Class::AsHost | Class::AtIndex, Role::Agent(mine)) => {
            if about.host == Some(mine.as_str()) {
                Verdict::Yes
            } else {
                Verdict::Host
            }
        }
        (Class::Greet, Role::Index)
        | (Class::Look | Class::Move | Class::Port | Class::Rack, Role::Agent(_) | Role::Index)
        | (Class::Move | Class::Port | Class::Rack, Role::Viewer)
        | (Class::Port, Role::Coordinator(_))
        | (
            Class::AsHost | Class::AtIndex,
            Role::Operator | Role::Coordinator(_) | Role::Viewer | Role::Index,
        ) => Verdict::Never,
    }
}
