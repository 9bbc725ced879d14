//! The end of a script.

use super::action::Action;
use super::{Driver, World};
use crate::buffer::Buffer;
use crate::net::Frame;
use pvkit_host::worker::Progress;
use pvkit_join::arena::Arena;

impl World {
    /// Whatever is on its way comes in.
    fn settle(&mut self) {
        for _ in 0..20_000 {
            self.drive(Action::PublishTx);
            self.drive(Action::PublishRx);
            self.run();
            let mut busy = false;
            while self.complete() {
                busy = true;
            }
            while self.receive(false) {
                busy = true;
            }
            self.host_receive(u32::MAX);
            if !busy {
                return;
            }
        }
        panic!("there is no end of frames");
    }

    /// The meddling ends: everything comes back, everything works.
    pub(super) fn end(mut self) -> Arena {
        self.registers.device().lies.clear();
        if self.driver.is_none() {
            self.open();
        } else {
            if !self.meddled {
                self.settle();
                self.to_host.check_end();
                self.to_guest.check_end();
                assert!(self.lent.is_empty(), "everything is sent");
            }
            if self.drop {
                return self.end_without_proof();
            }
            assert!(self.recover(), "an honest card recovers");
        }
        self.works();
        let Self {
            options,
            join,
            pools,
            driver: Some(driver),
            spare,
            registers,
            ..
        } = self
        else {
            unreachable!("a driver has the card");
        };
        let mut stock = Vec::new();
        let Driver { card, tx, rx, .. } = driver;
        card.close(
            tx,
            rx,
            &mut |_| panic!("nothing is outstanding"),
            &mut |buffer| stock.push(buffer),
        )
        .expect("an honest card resets");
        assert_eq!(stock.len(), usize::from(options.receive_descriptors));
        stock.into_iter().chain(spare).for_each(Buffer::free);
        drop(registers);
        let arena = join.arena.clone();
        drop(join);
        for pool in pools {
            // SAFETY: driver and card are gone, and all buffers with them.
            unsafe { pool.free() };
        }
        arena
    }

    /// Frames go both ways.
    fn works(&mut self) {
        self.far.unplug();
        // The card's inbox is empty, and it has heard of the link.
        while self.steps.poll(u32::MAX).contains(&Progress::More) {
            while self.receive(false) {}
            self.drive(Action::PublishRx);
        }
        while self.receive(false) {}
        self.plug();
        self.steps.run();
        self.to_host.forget();
        self.to_guest.forget();
        (self.meddled, self.unheard) = (false, false);
        let frame = Frame::plain();
        for _ in 0..3 {
            self.send(&frame);
            self.host_send(&frame);
        }
        assert_eq!(self.lent.len(), 3, "there is room in a ring that is empty");
        self.settle();
        self.to_host.check_end();
        self.to_guest.check_end();
        assert!(self.lent.is_empty(), "everything is sent");
    }

    /// The halves are dropped while the card has their buffers.
    fn end_without_proof(self) -> Arena {
        let Self {
            join,
            inside,
            pools,
            driver,
            spare,
            lent,
            registers,
            ..
        } = self;
        drop(driver);
        let guards: usize = lent.values().map(|(_, guards)| guards).sum();
        spare.into_iter().for_each(Buffer::free);
        let arena = join.arena.clone();
        assert!(
            arena.leaked() <= arena.in_use(),
            "what is leaked is not free"
        );
        if !inside {
            assert_eq!(arena.leaked() + guards, arena.in_use());
        }
        drop((registers, join));
        // SAFETY: driver and card are gone, and nobody else knows of the
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
