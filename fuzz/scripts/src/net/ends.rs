//! The other end of the link, and the end of a script.

use super::action::Frame;
use super::{INBOX_BYTES, World};
use crate::buffer::Buffer;
use pvkit_join::arena::Arena;

/// Rounds in which everything that is on its way comes in.
const ROUNDS: usize = 20_000;

impl World {
    pub(super) fn host_send(&mut self, frame: &Frame) {
        if !self.far.is_plugged() || self.to_guest.cost() > INBOX_BYTES / 4 {
            return;
        }
        let made = self.to_guest.make(frame);
        if self.far.send(&made) {
            let fits = made.bytes.len() <= self.capacity();
            let sure = fits && !self.choosy && self.asked.is_none() && !self.retired;
            self.to_guest.sent(made, None, sure);
        }
    }

    pub(super) fn host_receive(&mut self, budget: u32) {
        for (frame, meta) in self.far.receive(budget) {
            if !self.meddled {
                self.to_host.came_in(0, &frame, &meta);
            }
        }
    }

    /// Whatever is on its way comes in.
    fn settle(&mut self) {
        for _ in 0..ROUNDS {
            let mut busy = false;
            for pair in 0..self.pairs.len() {
                use pvkit_guest::net::{NetRx, NetTx};
                let (tx, rx) = &mut self.pairs[pair];
                tx.publish();
                rx.publish();
            }
            self.run();
            for pair in 0..self.pairs.len() {
                while self.complete(pair) {
                    busy = true;
                }
                while self.receive(pair, false) {
                    busy = true;
                }
            }
            busy |= self.poll_command();
            self.host_receive(u32::MAX);
            if !busy {
                return;
            }
        }
        panic!("there is no end of frames");
    }

    /// The meddling ends: everything comes back, everything works.
    pub(super) fn end(mut self) -> Arena {
        self.wire.device().tell_the_truth();
        if !self.meddled {
            self.settle();
            self.to_host.check_end();
            self.to_guest.check_end();
            assert!(self.lent.is_empty(), "everything is sent");
            let drops: u64 = self
                .pairs
                .iter()
                .map(|(_, rx)| rx.counters().dropped())
                .sum();
            assert_eq!(drops, 0, "an honest device has no such frames");
        }
        if self.setup.drop {
            return self.end_without_proof();
        }
        assert!(self.recover(), "an honest device recovers");
        self.works();
        let Self {
            setup,
            arena,
            pools,
            net,
            pairs,
            wire,
            spare,
            lent,
            ..
        } = self;
        let mut back = Vec::new();
        net.close(pairs, &mut |buffer| back.push(buffer))
            .expect("an honest device resets");
        let received = back.iter().filter(|b| !lent.contains_key(&b.start()));
        assert_eq!(
            received.count(),
            usize::from(setup.pairs * setup.receive_buffers),
            "buffers to receive come back"
        );
        back.into_iter().chain(spare).for_each(Buffer::free);
        drop(wire);
        for pool in pools {
            // SAFETY: driver and device are gone, and all buffers with them.
            unsafe { pool.free() };
        }
        arena
    }

    /// Frames go both ways.
    fn works(&mut self) {
        // What is left in the switch was there before.
        self.far.unplug();
        self.far.plug();
        self.to_host.forget();
        self.to_guest.forget();
        self.meddled = false;
        let frame = Frame::plain();
        for _ in 0..3 {
            self.send(0, &frame);
            self.host_send(&frame);
        }
        assert_eq!(self.lent.len(), 3, "there is room in a ring that is empty");
        self.settle();
        self.to_host.check_end();
        self.to_guest.check_end();
        assert!(self.lent.is_empty(), "everything is sent");
    }

    /// The queues are dropped while the device has them.
    fn end_without_proof(self) -> Arena {
        let Self {
            setup,
            arena,
            pools,
            net,
            pairs,
            wire,
            spare,
            lent,
            ..
        } = self;
        drop(pairs);
        let guards = lent.values().map(|lent| lent.guards).sum::<usize>();
        spare.into_iter().for_each(Buffer::free);
        // The control half resets the device, and has its own queue back.
        drop(net);
        assert!(
            arena.leaked() <= arena.in_use(),
            "what is leaked is not free"
        );
        // Buffers in guest memory that were with nobody are dropped, and
        // their guards are no business of the driver.
        if !setup.inside {
            assert_eq!(arena.leaked() + guards, arena.in_use());
        }
        drop(wire);
        // SAFETY: driver and device are gone, and nobody else knows of the
        // memory.
        unsafe {
            arena.take_back();
            for pool in pools {
                pool.free();
            }
        }
        arena
    }
}
