//! What every device does with a queue of its driver.

use virtio_queue::{DescriptorChain, Queue, QueueT as _};
use vm_memory::GuestMemoryMmap;
use vm_memory::bitmap::AtomicBitmap;

/// Guest memory as devices see it.
pub(super) type Guest = GuestMemoryMmap<AtomicBitmap>;

/// Why a queue cannot go on: the driver has broken the rules.
pub(super) type Broken = virtio_queue::Error;

/// Does `work` with all that the driver has put up: the bytes written for each chain. Whether the
/// driver wants to hear of it.
pub(super) fn serve<'a>(
    queue: &mut Queue,
    guest: &'a Guest,
    mut work: impl FnMut(DescriptorChain<&'a Guest>) -> Result<u32, Broken>,
) -> Result<bool, Broken> {
    if !queue.is_valid(guest) {
        return Err(Broken::QueueNotReady);
    }
    let mut done = false;
    loop {
        queue.disable_notification(guest)?;
        while let Some(chain) = queue.pop_descriptor_chain(guest) {
            let head = chain.head_index();
            let written = work(chain)?;
            queue.add_used(guest, head, written)?;
            done = true;
        }
        // What came before notifications were on again is not told.
        if !queue.enable_notification(guest)? {
            break;
        }
    }
    Ok(done && queue.needs_notification(guest)?)
}
