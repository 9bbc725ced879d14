//! Proof that a device has let go of memory.
//!
//! A device is told where its queues lie, and what is in them, until it is
//! reset. The time between two resets is a *reset epoch*; only when an epoch
//! has ended may the memory that the device knew in it be used for something
//! else. A [`Quiesced`] is the proof of that. It is made in an `unsafe` call,
//! by code that knows that the device has stopped.

use core::sync::atomic::{AtomicU32, Ordering};

/// A queue of a device, and the reset epoch in which the device was told about
/// it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueIdentity {
    device: DeviceNumber,
    epoch: u64,
    queue: u16,
}

impl QueueIdentity {
    /// Whether both are the same queue of the same device, in any epoch.
    pub(crate) fn is_queue(self, other: Self) -> bool {
        self.device.0.is_some() && (self.device, self.queue) == (other.device, other.queue)
    }
}

/// Tells the devices of a program apart. `None` for all devices after the
/// first 2^32 - 1: no proof covers a queue of theirs, so their memory is never
/// freed while they could still use it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DeviceNumber(Option<u32>);

/// Counts the resets of one device, for implementations of a transport or of a
/// driver.
#[derive(Debug)]
pub struct ResetEpoch {
    device: DeviceNumber,
    /// Resets so far, of the device or of one of its queues. 64 bits do not
    /// wrap: at one reset per nanosecond they last 584 years.
    epoch: u64,
}

impl ResetEpoch {
    /// The first epoch of a device. Whatever the device was told before is not
    /// in it.
    #[must_use]
    pub fn new() -> Self {
        static DEVICES: AtomicU32 = AtomicU32::new(0);
        Self::numbered(&DEVICES)
    }

    /// Takes the next number of a counter, which stops at its maximum: two
    /// devices of one number would free each other's memory.
    fn numbered(devices: &AtomicU32) -> Self {
        let next = |count: u32| count.checked_add(1);
        // Only tells devices apart: no order with other memory is needed.
        let number = devices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        Self {
            device: DeviceNumber(number.ok()),
            epoch: 0,
        }
    }

    /// The identity of a queue that is set up in this epoch.
    #[must_use]
    pub fn queue(&self, queue: u16) -> QueueIdentity {
        QueueIdentity {
            device: self.device,
            epoch: self.epoch,
            queue,
        }
    }

    /// The device was reset: begins an epoch, and proves that those before it
    /// have ended for all queues.
    ///
    /// # Safety
    /// The device does not access any queue or buffer that it was told about
    /// before this call.
    pub unsafe fn end(&mut self) -> Quiesced {
        self.next(None)
    }

    /// One queue was reset: begins an epoch, and proves that those before it
    /// have ended for this queue.
    ///
    /// # Safety
    /// The device does not access this queue, or a buffer in it, as it was
    /// told before this call.
    pub unsafe fn end_queue(&mut self, queue: u16) -> Quiesced {
        self.next(Some(queue))
    }

    fn next(&mut self, queue: Option<u16>) -> Quiesced {
        let ended = self.epoch;
        // A counter that cannot go on proves nothing any more.
        let device = match ended.checked_add(1) {
            Some(next) => {
                self.epoch = next;
                self.device
            }
            None => DeviceNumber(None),
        };
        Quiesced {
            device,
            ended,
            queue,
        }
    }
}

impl Default for ResetEpoch {
    fn default() -> Self {
        Self::new()
    }
}

/// The proof that a device has let go of queues and buffers that it was told
/// about before.
#[derive(Debug)]
pub struct Quiesced {
    device: DeviceNumber,
    /// The last epoch that has ended.
    ended: u64,
    /// The one queue that it is about, or all.
    queue: Option<u16>,
}

impl Quiesced {
    /// Whether the proof is about this queue, in the epoch in which the device
    /// was told about it.
    pub(crate) fn covers(&self, queue: QueueIdentity) -> bool {
        self.device == queue.device
            && self.device.0.is_some()
            && self.ended >= queue.epoch
            && self.queue.is_none_or(|index| index == queue.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::{AtomicU32, ResetEpoch};

    #[test]
    fn devices_without_a_number_are_never_proved_quiesced() {
        let devices = AtomicU32::new(u32::MAX - 1);
        let [last, mut one, mut two] = [(); 3].map(|()| ResetEpoch::numbered(&devices));
        assert_ne!(last.queue(0), one.queue(0));
        for queue in [last.queue(0), one.queue(0), two.queue(0)] {
            // SAFETY: there is no device.
            let proofs = unsafe { [one.end(), two.end()] };
            assert!(proofs.iter().all(|proof| !proof.covers(queue)));
        }
        assert!(!one.queue(0).is_queue(two.queue(0)));
    }

    #[test]
    fn proof_covers_queues_set_up_before_it() {
        let (mut one, mut two) = (ResetEpoch::new(), ResetEpoch::new());
        let (old, other) = (one.queue(0), two.queue(0));
        // SAFETY: there is no device.
        let (proof, foreign) = unsafe { (one.end(), two.end()) };
        let new = one.queue(0);
        assert!(proof.covers(old));
        assert!(!proof.covers(new), "the queue was set up after the reset");
        assert!(!proof.covers(other), "another device");
        assert!(foreign.covers(other));

        let (kept, gone) = (one.queue(1), one.queue(2));
        // SAFETY: there is no device.
        let proof = unsafe { one.end_queue(2) };
        assert!(proof.covers(gone));
        assert!(!proof.covers(kept));
        assert!(!proof.covers(one.queue(2)));
        // SAFETY: there is no device.
        let proof = unsafe { one.end() };
        assert!(proof.covers(kept), "a later reset covers earlier epochs");
    }

    /// With 32 bits and a comparison over half the range, a proof of long ago
    /// covered a queue that the device has now, and a new proof did not cover
    /// an old queue.
    #[test]
    fn proofs_hold_across_many_resets() {
        for resets in [1_u64 << 31, (1 << 31) + 5, 1 << 32, u64::MAX - 1] {
            let mut device = ResetEpoch::new();
            let old = device.queue(0);
            // SAFETY: there is no device.
            let early = unsafe { device.end() };
            device.epoch = resets;
            let live = device.queue(0);
            assert!(!early.covers(live), "after {resets} resets");
            // SAFETY: there is no device.
            let late = unsafe { device.end() };
            assert!(late.covers(live) && late.covers(old), "{resets} resets");
        }
    }

    #[test]
    fn exhausted_counter_proves_nothing() {
        let mut device = ResetEpoch::new();
        device.epoch = u64::MAX;
        let queue = device.queue(0);
        // SAFETY: there is no device.
        let proof = unsafe { device.end() };
        assert!(!proof.covers(queue));
    }
}
