//! An arriving VM for which a QEMU waits: its stream is re-made and written to it over a UNIX socket; a thread listens to
//! its return path.

use super::back::{self, Sender};
use super::direct::Watch;
use super::emit::{Gather, OutError};
use super::loader::{LoadError, Loader};
use super::{TargetGroup, TargetSpec, TargetVmShared};
use crate::core::qemu::{BlockList, Emitter};
use crate::core::target::Output;
use crate::core::wire::messages::HelloOk;
use crate::flow::Tagged;
use crate::flow::front::{monitor, process_of};
use crate::host::sched::Process;
use crate::net::conn::{hand_over, send_hello_ok, write_all_vectored};
use crate::net::qmp::Qmp;
use std::io::IoSlice;
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// A QEMU.
pub(super) struct Qemu<'a> {
    group: &'a TargetGroup,
    spec: &'a TargetSpec,
    shared: &'a Arc<TargetVmShared>,
    qmp: Option<Qmp>,
    /// The QEMU that waits (or waited) for this VM; none other is ever touched.
    process: Option<Process>,
    stream: Option<UnixStream>,
    gather: Option<Gather>,
    /// Of a QEMU that loads from another QEMU: the way back to the source, and who has the monitor meanwhile.
    direct: Option<Sender>,
    watch: Option<Watch>,
}

impl<'a> Qemu<'a> {
    pub(super) fn new(
        group: &'a TargetGroup,
        spec: &'a TargetSpec,
        shared: &'a Arc<TargetVmShared>,
        process: Option<Process>,
    ) -> Self {
        Self {
            group,
            spec,
            shared,
            qmp: None,
            process,
            stream: None,
            gather: None,
            direct: None,
            watch: None,
        }
    }

    fn monitor(&mut self) -> Result<&mut Qmp, String> {
        if let Some(watch) = self.watch.take() {
            self.qmp = watch.end();
        }
        if self.qmp.is_none() {
            let path = self.spec.front.socket();
            self.qmp = Some(monitor(path, self.group.timeouts.peer, self.process)?);
        }
        self.qmp.as_mut().ok_or_else(|| "no monitor".to_owned())
    }

    /// The monitor of the QEMU that waits, set up for what comes.
    fn waiting(&self) -> Result<Qmp, String> {
        let mut qmp = monitor(self.spec.front.socket(), self.group.timeouts.setup, self.process)?;
        let state = qmp.query_status().map_err(|e| e.to_string())?;
        if state.status != "inmigrate" {
            return Err(format!(
                "{}: the target QEMU is {:?}, not waiting for a migration: start it with -incoming defer -S",
                self.spec.front, state.status
            ));
        }
        qmp.set_capabilities(&[
            ("xbzrle", false),
            ("compress", false),
            ("multifd", false),
            ("postcopy-ram", false),
            ("x-ignore-shared", false),
            ("mapped-ram", false),
            ("events", true),
        ])
        .map_err(|e| e.to_string())?;
        Ok(qmp)
    }
}

impl Loader for Qemu<'_> {
    fn pages(&mut self) -> Result<&mut dyn Output<Error = OutError>, OutError> {
        let gather = self.gather.as_mut().ok_or(OutError::NoBlocks)?;
        Ok(gather)
    }

    fn meet(&mut self) -> Result<Option<Process>, String> {
        let met = monitor(self.spec.front.socket(), self.group.timeouts.setup, None)?;
        self.process = process_of(&met);
        Ok(self.process)
    }

    fn set_up(&mut self, sender: &Sender) -> Result<(), String> {
        let setup = self.group.timeouts.setup;
        let mut qmp = self.waiting()?;
        let path = self.group.socket_dir.join(format!("t{}.sock", self.spec.vm.0));
        let _ = std::fs::remove_file(&path);
        qmp.migrate_incoming(&format!("unix:{}", path.display())).map_err(|e| e.to_string())?;
        self.qmp = Some(qmp);
        let until = Instant::now() + setup;
        let qemu = loop {
            match UnixStream::connect(&path) {
                Ok(s) => break s,
                Err(e) if Instant::now() > until => return Err(format!("{}: {e}", path.display())),
                Err(_) => std::thread::sleep(Duration::from_millis(5)),
            }
        };
        let _ = std::fs::remove_file(&path);
        qemu.set_write_timeout(Some(Duration::from_millis(500))).map_err(|e| e.to_string())?;
        let listening = qemu.try_clone().map_err(|e| e.to_string())?;
        let (sender, shared) = (sender.clone(), self.shared.clone());
        std::thread::Builder::new()
            .name(format!("irlm-rp-{}", self.spec.name))
            .spawn(move || back::listen(&listening, &sender, &shared))
            .map_err(|e| e.to_string())?;
        self.stream = Some(qemu);
        Ok(())
    }

    fn set_up_direct(&mut self, sender: &Sender) -> Result<(), String> {
        self.qmp = Some(self.waiting()?);
        self.direct = Some(sender.clone());
        Ok(())
    }

    fn take_stream(&mut self, conn: TcpStream, tag: Tagged, version: u16) -> Result<(), String> {
        let Some(sender) = self.direct.clone().filter(|_| self.watch.is_none()) else {
            return Err("a QEMU's stream came that nobody waits for".into());
        };
        hand_over(&conn, self.group.timeouts.peer).map_err(|e| e.to_string())?;
        let qmp = self.monitor()?;
        qmp.give("irlm", conn.as_fd()).map_err(|e| e.to_string())?;
        qmp.migrate_incoming("fd:irlm").map_err(|e| e.to_string())?;
        send_hello_ok(&conn, HelloOk { version, window_log: 0, slots: 0 }).map_err(|e| e.to_string())?;
        // From here on the connection is QEMU's alone: a copy kept here would keep it open when QEMU ends.
        drop(conn);
        let qmp = self.qmp.take().ok_or("no monitor")?;
        self.watch = Some(Watch::start(qmp, tag, &sender, self.shared).map_err(|e| e.to_string())?);
        Ok(())
    }

    fn is_open(&self) -> bool {
        self.stream.is_some() || self.direct.is_some()
    }

    fn blocks(&mut self, list: BlockList) -> Result<(), LoadError> {
        self.gather = Some(Gather::new(Emitter::new(Arc::new(list))));
        Ok(())
    }

    fn verbatim(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        match &mut self.gather {
            Some(gather) => {
                gather.verbatim(bytes);
                self.write(&[])
            }
            // What comes before QEMU's RAM section.
            None => self.state(bytes),
        }
    }

    fn end_ram(&mut self) {
        if let Some(gather) = &mut self.gather {
            gather.end();
        }
    }

    fn write(&mut self, body: &[u8]) -> Result<(), LoadError> {
        let (Some(stream), Some(gather)) = (&self.stream, &mut self.gather) else { return Ok(()) };
        let started = Instant::now();
        let stall = self.group.timeouts.stall;
        let n = gather.write(stream, body, || started.elapsed() < stall).map_err(LoadError::Qemu)?;
        self.shared.loaded_bytes.fetch_add(n, Ordering::Relaxed);
        Ok(())
    }

    fn state(&mut self, bytes: &[u8]) -> Result<(), LoadError> {
        let Some(mut stream) = self.stream.as_ref() else { return Ok(()) };
        let started = Instant::now();
        let stall = self.group.timeouts.stall;
        write_all_vectored(&mut stream, &mut [IoSlice::new(bytes)], || started.elapsed() < stall)
            .map_err(LoadError::Qemu)?;
        self.shared.loaded_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn end_stream(&mut self) {
        // QEMU's loader fails on the early end and says so, or has loaded everything already.
        if let Some(q) = &self.stream {
            let _ = q.shutdown(std::net::Shutdown::Write);
        }
    }

    fn alive(&mut self) -> Result<(), String> {
        self.monitor().and_then(|q| q.query_status().map_err(|e| e.to_string())).map(drop)
    }

    fn run(&mut self) -> Result<(), String> {
        let result = self.monitor().and_then(|q| q.cont().map_err(|e| e.to_string()));
        if result.is_err() {
            self.qmp = None;
        }
        result
    }

    fn discard(&mut self) -> Result<(), String> {
        if let Some(q) = self.stream.take() {
            let _ = q.shutdown(std::net::Shutdown::Both);
        }
        let met = self.process.is_some();
        let result = match self.monitor() {
            // Never met, so never touched: it may wait for another VM by now.
            Ok(_) if !met => Err("its QEMU was never met".to_owned()),
            Err(e) => Err(e),
            Ok(q) => match q.query_status() {
                Ok(s) if s.running => Err("it runs, which it must not: left alone".to_owned()),
                Ok(_) => q.quit().map_err(|e| e.to_string()),
                Err(e) => Err(e.to_string()),
            },
        };
        self.qmp = None;
        result
    }

    fn close(&mut self) {
        if let Some(watch) = self.watch.take() {
            self.qmp = watch.end();
        }
        self.stream = None;
        self.gather = None;
    }
}
