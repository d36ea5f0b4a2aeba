//! The programs without an interface, run on packets made by hand (`BPF_PROG_TEST_RUN`): what they make of any bytes,
//! and what a packet costs. For tests and benchmarks.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use aya::programs::{ProgramError, SchedClassifier, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use irlm_common::{EGRESS_PROGRAM, EMPTY_PROGRAM, FlowClass, INGRESS_PROGRAM};

use super::attach::program;
use super::counters::Counters;
use super::error::{BpfError, chain};
use super::key::key;
use super::lines::Reader;
use super::object::OBJECT;
use super::tables::{Marking, Tables, TagPolicy};

/// Which program runs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Trialled {
    /// The one for packets that leave.
    Egress,
    /// The one for packets that arrive.
    Ingress,
    /// One that does nothing: what the harness itself costs.
    Nothing,
}

/// What came of a run.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ran {
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// What the program returned.
    pub verdict: i32,
    /// `skb->priority` afterwards; it was 0.
    pub priority: u32,
    /// `skb->mark` afterwards; it was 0.
    pub mark: u32,
}

/// Bytes of `struct __sk_buff`, and where two fields of it are.
const CONTEXT: usize = 192;
const MARK_AT: usize = 8;
const PRIORITY_AT: usize = 32;

/// Loaded programs with maps of their own. May be used by several threads, as the kernel's programs are by several CPUs.
pub struct Trial {
    ebpf: Ebpf,
    tables: Mutex<Tables>,
    // Held for its thread: lines go to the log as in earnest.
    _lines: Reader,
}

impl std::fmt::Debug for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Trial").finish_non_exhaustive()
    }
}

impl Trial {
    /// Loads this build's programs.
    pub fn load() -> Result<Self, BpfError> {
        if OBJECT.is_empty() {
            return Err(BpfError::NoObject);
        }
        let mut ebpf = EbpfLoader::new().load(OBJECT)?;
        let lines = Reader::start(&mut ebpf, "trial").map_err(|e| BpfError::Trial(e.to_string()))?;
        for name in [EGRESS_PROGRAM, INGRESS_PROGRAM, EMPTY_PROGRAM] {
            program(&mut ebpf, name)?.load()?;
        }
        let mut tables = Tables::of(&mut ebpf)?;
        tables.claim("trial", 0)?;
        Ok(Self { ebpf, tables: Mutex::new(tables), _lines: lines })
    }

    /// Registers a flow of protocol `proto`.
    pub fn add_flow(
        &self,
        proto: u8,
        local: SocketAddr,
        remote: SocketAddr,
        class: FlowClass,
    ) -> Result<(), BpfError> {
        let flow = |error| BpfError::Flow { local, remote, text: chain(&error) };
        self.tables().add(key(proto, local, remote), class).map_err(flow)
    }

    /// As [`super::Classifier::set_policy`].
    pub fn set_policy(&self, policy: &TagPolicy) -> Result<(), BpfError> {
        self.tables().set_policy(&policy.classes, &policy.classes, &policy.rack_prefixes)
    }

    /// As [`super::Classifier::set_policy_by_scope`].
    pub fn set_policy_by_scope(
        &self,
        policy: &TagPolicy,
        rack: &[Marking; irlm_common::SLOTS as usize],
    ) -> Result<(), BpfError> {
        self.tables().set_policy(&policy.classes, rack, &policy.rack_prefixes)
    }

    /// As [`super::Classifier::counters`].
    pub fn counters(&self) -> Result<Counters, BpfError> {
        self.tables().counters()
    }

    /// Runs a program once on a packet of at least 15 bytes, which is the least that the kernel takes.
    pub fn run(&self, which: Trialled, packet: &[u8]) -> Result<Ran, BpfError> {
        let (context, mut after) = ([0; CONTEXT], [0; CONTEXT]);
        let mut out = vec![0; packet.len()];
        let options = TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&context),
            ctx_out: Some(&mut after),
            ..TestRunOptions::default()
        };
        let result = self.program(which)?.test_run(options).map_err(refused)?;
        out.truncate(result.data_size_out as usize);
        let field = |at: usize| after[at..].first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
        Ok(Ran {
            packet: out,
            verdict: result.return_value.cast_signed(),
            priority: field(PRIORITY_AT),
            mark: field(MARK_AT),
        })
    }

    /// Runs a program `times` on a packet; the mean time of one run, as the kernel takes it.
    pub fn time(&self, which: Trialled, packet: &[u8], times: u32) -> Result<Duration, BpfError> {
        let options =
            TestRunOptions { data_in: Some(packet), repeat: times.max(1), ..TestRunOptions::default() };
        Ok(self.program(which)?.test_run(options).map_err(refused)?.duration)
    }

    fn program(&self, which: Trialled) -> Result<&SchedClassifier, BpfError> {
        let name = match which {
            Trialled::Egress => EGRESS_PROGRAM,
            Trialled::Ingress => INGRESS_PROGRAM,
            Trialled::Nothing => EMPTY_PROGRAM,
        };
        Ok(self.ebpf.program(name).ok_or(BpfError::Missing(name))?.try_into()?)
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        // What it guards is consistent between statements.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::needless_pass_by_value, reason = "as map_err gives it")]
fn refused(error: ProgramError) -> BpfError {
    BpfError::Trial(chain(&error))
}
