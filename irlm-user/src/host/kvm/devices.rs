//! What the guest can talk to: by port a serial port, the keyboard controller's reset line, and a port that ends a test
//! guest; by address virtio devices. Whatever else it reads is all ones, and what it writes there is lost, as on a
//! bus where nobody answers.

use super::memory::Memory;
use super::virtio::{BASE, Device, DeviceSpec, WINDOW};
use super::{Result, call};
use kvm_ioctls::VmFd;
use std::io::{self, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub(super) use vm_superio::serial::SerialState;

/// First port of the serial port, and how many it has.
const COM1: u16 = 0x3f8;
const COM1_PORTS: u16 = 8;
/// The serial port's interrupt.
const COM1_GSI: u32 = 4;
/// The keyboard controller; this byte written to it resets the machine.
const I8042: u16 = 0x64;
const I8042_RESET: u8 = 0xfe;
/// A write here ends the machine: for guests of tests, as QEMU's isa-debug-exit.
const TEST_EXIT: u16 = 0xf4;

/// Bytes that a saved serial port has besides its input queue.
const STATE_BYTES: usize = 9;
/// Most bytes in its input queue.
const FIFO: usize = 64;

/// The serial port's interrupt line.
#[derive(Debug)]
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

type Output = Box<dyn Write + Send>;
type Com1 = Serial<Line, NoEvents, Output>;

/// What a write came to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Wrote {
    /// Nothing special.
    Done,
    /// The guest ends itself.
    End(&'static str),
}

/// All devices of one VM.
pub(super) struct Devices {
    serial: Mutex<Com1>,
    virtio: Vec<Device>,
}

impl std::fmt::Debug for Devices {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Devices")
    }
}

impl Devices {
    /// Their lines go to `vm`, what the guest writes to its serial port to `out`.
    pub(super) fn new(vm: &VmFd, out: Output, more: &[DeviceSpec], memory: &Arc<Memory>) -> Result<Self> {
        let fail = |source| super::KvmError::Call { what: "cannot make the serial port's interrupt", source };
        let event = EventFd::new(EFD_NONBLOCK).map_err(fail)?;
        call("cannot connect the serial port's interrupt", vm.register_irqfd(&event, COM1_GSI))?;
        let device = |(n, spec)| Device::new(spec, n, Some(vm), memory);
        let virtio = more.iter().enumerate().map(device).collect::<Result<_>>()?;
        Ok(Self { serial: Mutex::new(Serial::new(Line(event), out)), virtio })
    }

    /// Disks, network cards and the balloon.
    pub(super) fn virtio(&self) -> &[Device] {
        &self.virtio
    }

    /// The device that has an address, and the offset in its registers.
    fn at(&self, address: u64) -> Option<(&Device, u64)> {
        let at = address.checked_sub(BASE)?;
        Some((self.virtio.get(usize::try_from(at / WINDOW).ok()?)?, at % WINDOW))
    }

    /// The guest reads at an address that is no memory.
    pub(super) fn read_address(&self, address: u64, data: &mut [u8]) {
        match self.at(address) {
            Some((device, offset)) => device.read(offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes there.
    pub(super) fn write_address(&self, address: u64, data: &[u8]) {
        if let Some((device, offset)) = self.at(address) {
            device.write(offset, data);
        }
    }

    fn serial(&self) -> MutexGuard<'_, Com1> {
        self.serial.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The guest reads a port.
    pub(super) fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match port.wrapping_sub(COM1) {
            at if at < COM1_PORTS => {
                if let [byte] = data {
                    *byte = self.serial().read(at as u8);
                }
            }
            // Nothing in its output queue, nothing waiting in its input queue.
            _ if port == I8042 => data.fill(0),
            _ => {}
        }
    }

    /// The guest writes to a port.
    pub(super) fn write(&self, port: u16, data: &[u8]) -> Wrote {
        match (port.wrapping_sub(COM1), data) {
            (at, bytes) if at < COM1_PORTS => {
                let mut serial = self.serial();
                for b in bytes {
                    if let Err(e) = serial.write(at as u8, *b) {
                        tracing::debug!("serial port: {e}");
                    }
                }
                Wrote::Done
            }
            (_, [I8042_RESET]) if port == I8042 => Wrote::End("the guest reset its machine"),
            (_, [code, ..]) if port == TEST_EXIT => {
                tracing::debug!(code, "the guest wrote to its exit port");
                Wrote::End("the guest ended itself")
            }
            _ => Wrote::Done,
        }
    }

    /// What somebody typed; what does not fit the port's queue is dropped, as on a line without flow control.
    pub(super) fn input(&self, bytes: &[u8]) {
        let mut serial = self.serial();
        let room = serial.fifo_capacity().min(bytes.len());
        if let Err(e) = serial.enqueue_raw_bytes(&bytes[..room]) {
            tracing::debug!("serial port: {e}");
        }
    }

    /// The serial port as bytes.
    pub(super) fn save(&self) -> Vec<u8> {
        let s = self.serial().state();
        let mut out = vec![
            s.baud_divisor_low,
            s.baud_divisor_high,
            s.interrupt_enable,
            s.interrupt_identification,
            s.line_control,
            s.line_status,
            s.modem_control,
            s.modem_status,
            s.scratch,
        ];
        out.extend_from_slice(&s.in_buffer);
        out
    }

    /// The serial port as it was; `false` for bytes that are none.
    pub(super) fn load(&self, bytes: &[u8]) -> bool {
        let Some(state) = serial_state(bytes) else { return false };
        let mut serial = self.serial();
        let (Ok(event), out) = (
            serial.interrupt_evt().0.try_clone(),
            std::mem::replace(serial.writer_mut(), Box::new(io::sink())),
        ) else {
            return false;
        };
        match Serial::from_state(&state, Line(event), NoEvents, out) {
            Ok(s) => *serial = s,
            Err(_) => return false,
        }
        true
    }
}

/// A saved serial port.
pub(super) fn serial_state(bytes: &[u8]) -> Option<SerialState> {
    let (&[low, high, enable, identification, line, line_status, modem, modem_status, scratch], input) =
        bytes.split_first_chunk::<STATE_BYTES>()?;
    (input.len() <= FIFO).then(|| SerialState {
        baud_divisor_low: low,
        baud_divisor_high: high,
        interrupt_enable: enable,
        interrupt_identification: identification,
        line_control: line,
        line_status,
        modem_control: modem,
        modem_status,
        scratch,
        in_buffer: input.to_vec(),
    })
}
