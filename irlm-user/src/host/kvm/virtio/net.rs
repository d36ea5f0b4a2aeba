//! A network card (virtio 1.2, section 5.1) on a TAP device (Documentation/networking/tuntap.rst): frames as they are, no
//! offloads, one pair of queues.

use super::super::{KvmError, Result};
use super::block;
use super::queue::{Broken, Guest, serve};
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};

/// The queues' numbers.
pub(super) const RECEIVE: usize = 0;
pub(super) const SEND: usize = 1;

/// Feature: the card has an address of its own.
const MAC: u64 = 1 << 5;
/// Before every frame, on both sides (`struct virtio_net_hdr_v1`): what offloads would need, so all zeros but for the number
/// of buffers, which is one.
const HEADER: usize = 12;
/// The longest frame with its header: no offloads, so nothing longer than jumbo frames comes from either side.
const LONGEST: usize = HEADER + 14 + 9216;
/// Frames after which others get their turn with the device.
const AT_ONCE: usize = 64;
pub(super) struct Net {
    wire: File,
    mac: [u8; 6],
    frame: Vec<u8>,
}

impl Net {
    pub(super) fn open(tap: &str, mac: [u8; 6]) -> Result<Self> {
        let wire = open_tap(tap).map_err(|e| KvmError::Device {
            name: tap.to_owned(),
            what: format!(
                "no TAP device can be had: {e} (it takes CAP_NET_ADMIN, or a device made for this user)"
            ),
        })?;
        Ok(Self::on(wire, mac))
    }

    /// On whatever carries a header and a frame with each read and write, and does not block.
    pub(super) fn on(wire: File, mac: [u8; 6]) -> Self {
        Self { wire, mac, frame: vec![0; LONGEST] }
    }

    /// The device file, to be waited for.
    pub(super) fn wire(&self) -> Option<File> {
        self.wire.try_clone().ok()
    }

    pub(super) fn features(&self) -> u64 {
        MAC
    }

    pub(super) fn mac(&self) -> u64 {
        let [a, b, c, d, e, f] = self.mac;
        u64::from_le_bytes([a, b, c, d, e, f, 0, 0])
    }

    pub(super) fn config(&self) -> [u8; block::CONFIG] {
        let mut out = [0; block::CONFIG];
        out[..6].copy_from_slice(&self.mac);
        out
    }

    /// Sends all frames that the driver has put up; whether it wants to hear of it. What the wire does not take is lost, as on
    /// any wire.
    pub(super) fn send(&mut self, queue: &mut Queue, guest: &Guest) -> std::result::Result<bool, Broken> {
        serve(queue, guest, |chain| {
            let mut from = chain.reader(guest)?;
            let n = from.available_bytes();
            if (HEADER + 14..=LONGEST).contains(&n) && from.read_exact(&mut self.frame[..n]).is_ok() {
                self.frame[..HEADER].fill(0);
                if let Err(e) = self.wire.write(&self.frame[..n]) {
                    tracing::debug!("network card: a frame is lost: {e}");
                }
            }
            Ok(0)
        })
    }

    /// Takes frames as long as there are some and the driver has buffers.
    pub(super) fn take(&mut self, queue: &mut Queue, guest: &Guest) -> std::result::Result<Took, Broken> {
        if !queue.ready() || !queue.is_valid(guest) {
            return Ok(Took { any: false, hungry: true });
        }
        let mut took = Took { any: false, hungry: false };
        for _ in 0..AT_ONCE {
            let Some(chain) = queue.pop_descriptor_chain(guest) else {
                // Buffers that come from here on are told.
                took.hungry = !queue.enable_notification(guest)?;
                break;
            };
            let head = chain.head_index();
            let mut to = chain.writer(guest)?;
            let n = match self.wire.read(&mut self.frame) {
                Ok(n) if n >= HEADER && n <= to.available_bytes() => n,
                other => {
                    queue.go_to_previous_position();
                    match other {
                        // Too long for the driver's buffers: lost.
                        Ok(1..) => continue,
                        Ok(0) => took.hungry = true,
                        Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
                        Err(e) => {
                            tracing::warn!("network card: {e}");
                            took.hungry = true;
                        }
                    }
                    break;
                }
            };
            self.frame[..HEADER].fill(0);
            self.frame[10] = 1;
            to.write_all(&self.frame[..n]).map_err(|_| Broken::InvalidChain)?;
            queue.add_used(guest, head, n as u32)?;
            took.any = true;
        }
        took.any = took.any && queue.needs_notification(guest)?;
        Ok(took)
    }
}

/// What a look at the wire came to.
pub(super) struct Took {
    /// The driver wants to hear of frames.
    pub(super) any: bool,
    /// Nothing can be taken before the driver or whoever runs the VM says something.
    pub(super) hungry: bool,
}

/// `struct ifreq` as far as TUNSETIFF looks (linux/if.h).
#[repr(C)]
struct IfReq {
    name: [u8; 16],
    flags: libc::c_short,
    rest: [u8; 22],
}

fn open_tap(name: &str) -> io::Result<File> {
    if name.is_empty() || name.len() >= 16 || name.contains(['/', '\0', '%']) {
        return Err(io::Error::new(ErrorKind::InvalidInput, "a name has 1 to 15 letters"));
    }
    let file =
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open("/dev/net/tun")?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    let mut req = IfReq { name: [0; 16], flags: flags as libc::c_short, rest: [0; 22] };
    req.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the fd is open, and TUNSETIFF reads and writes one `struct ifreq`, which `req` is: 40 bytes.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut req) };
    if rc != 0 {
        return Err(io::Error::last_os_error());
    }
    let header: libc::c_int = 12;
    // SAFETY: the fd is open, and TUNSETVNETHDRSZ reads one int.
    let rc = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) };
    if rc == 0 { Ok(file) } else { Err(io::Error::last_os_error()) }
}

const _: () = assert!(size_of::<IfReq>() == 40 && HEADER == 12);
