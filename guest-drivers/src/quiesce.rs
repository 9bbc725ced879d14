//! Proof that a device has let go of memory.
//!
//! A device is told where its queues lie, and what is in them, until it is
//! reset: that ends a life, and only then may the memory of that life be used
//! for something else. A [`Quiesced`] is the proof; only those make one who can
//! know, in an `unsafe` call that says so.

use core::sync::atomic::{AtomicU32, Ordering};

/// The life of a device between two resets. A queue belongs to the life in
/// which the device was told about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueIdentity {
    device: u32,
    life: u32,
    queue: u16,
}

impl QueueIdentity {
    /// Whether both are the same queue of the same device, in whatever life.
    pub(crate) fn is_queue(self, other: Self) -> bool {
        (self.device, self.queue) == (other.device, other.queue)
    }
}

/// Counts the lives of one device, for implementations of a transport or a
/// driver of a chip.
#[derive(Debug)]
pub struct Lives {
    device: u32,
    life: u32,
}

/// What every device is called after 2^32 - 1 others: no proof is about it.
const NAMELESS: u32 = u32::MAX;

impl Lives {
    /// A device that is not known to be in any life yet.
    #[must_use]
    pub fn new() -> Self {
        static DEVICES: AtomicU32 = AtomicU32::new(0);
        Self::named(&DEVICES)
    }

    /// The next device of a count, which never comes around: two devices of
    /// one name would free each other's memory.
    fn named(devices: &AtomicU32) -> Self {
        let next = |count: u32| count.checked_add(1);
        // Only tells devices apart: no order with other memory is needed.
        let device = devices.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
        Self {
            device: device.unwrap_or(NAMELESS),
            life: 0,
        }
    }

    /// The identity of a queue that is set up now.
    #[must_use]
    pub fn queue(&self, queue: u16) -> QueueIdentity {
        QueueIdentity {
            device: self.device,
            life: self.life,
            queue,
        }
    }

    /// The device was reset: a new life begins, and this proves that the old
    /// ones are over.
    ///
    /// # Safety
    /// The device does not access any queue or buffer that it was told about
    /// before this call.
    pub unsafe fn over(&mut self) -> Quiesced {
        let ended = self.life;
        self.life = self.life.wrapping_add(1);
        Quiesced {
            device: self.device,
            ended,
            queue: None,
        }
    }

    /// One queue was reset; the others live on.
    ///
    /// # Safety
    /// The device does not access this queue, or a buffer in it, as it was
    /// told before this call.
    pub unsafe fn queue_over(&mut self, queue: u16) -> Quiesced {
        let ended = self.life;
        self.life = self.life.wrapping_add(1);
        Quiesced {
            device: self.device,
            ended,
            queue: Some(queue),
        }
    }
}

impl Default for Lives {
    fn default() -> Self {
        Self::new()
    }
}

/// The proof that a device has let go of queues and buffers that it was told
/// about before.
#[derive(Debug)]
pub struct Quiesced {
    device: u32,
    ended: u32,
    queue: Option<u16>,
}

impl Quiesced {
    /// Whether the proof is about this queue, in this life or an earlier one.
    pub(crate) fn covers(&self, queue: QueueIdentity) -> bool {
        self.device == queue.device
            && self.device != NAMELESS
            && self.ended.wrapping_sub(queue.life) < u32::MAX / 2
            && self.queue.is_none_or(|index| index == queue.queue)
    }
}

#[cfg(test)]
mod tests {
    use super::{AtomicU32, Lives};

    #[test]
    fn devices_without_a_name_of_their_own_are_never_proved_over() {
        let devices = AtomicU32::new(u32::MAX - 1);
        let [last, mut one, mut two] = [(); 3].map(|()| Lives::named(&devices));
        assert_ne!(last.queue(0), one.queue(0));
        for queue in [last.queue(0), one.queue(0), two.queue(0)] {
            // SAFETY: there is no device.
            let proofs = unsafe { [one.over(), two.over()] };
            assert!(proofs.iter().all(|proof| !proof.covers(queue)));
        }
    }

    #[test]
    fn a_proof_covers_what_was_set_up_before_it() {
        let (mut one, mut two) = (Lives::new(), Lives::new());
        let (old, other) = (one.queue(0), two.queue(0));
        // SAFETY: there is no device.
        let (proof, foreign) = unsafe { (one.over(), two.over()) };
        let new = one.queue(0);
        assert!(proof.covers(old));
        assert!(!proof.covers(new), "the queue was set up after the reset");
        assert!(!proof.covers(other), "another device");
        assert!(foreign.covers(other));

        let (kept, gone) = (one.queue(1), one.queue(2));
        // SAFETY: there is no device.
        let proof = unsafe { one.queue_over(2) };
        assert!(proof.covers(gone));
        assert!(!proof.covers(kept));
        assert!(!proof.covers(one.queue(2)));
        // SAFETY: there is no device.
        let proof = unsafe { one.over() };
        assert!(proof.covers(kept), "a later reset covers earlier lives");
    }
}
