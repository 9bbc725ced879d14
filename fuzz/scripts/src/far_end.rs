//! The other end of a network card's link, which comes and goes.
#![forbid(unsafe_code)]

use super::net::Made;
use pvkit_host::link::switch::{Endpoint, Switch, SwitchOptions, SwitchPort};
use pvkit_join::net::Received;
use pvkit_protocol::frame::{DEFAULT_MTU, FrameMeta, Offloads, max_frame_bytes};
use std::sync::Arc;

/// Most bytes that wait in the switch.
pub(super) const INBOX_BYTES: usize = 1 << 20;

/// A switch, and who is plugged into it beside the card.
#[derive(Debug)]
pub(super) struct FarEnd {
    switch: Switch,
    end: Option<Endpoint>,
    /// What it takes upon itself.
    takes: Offloads,
}

impl FarEnd {
    /// Nobody yet, and the port of a card with so many lanes.
    pub(super) fn new(lanes: u16, takes_all: bool) -> (Self, Arc<SwitchPort>) {
        let options = SwitchOptions {
            lanes,
            inbox_bytes: INBOX_BYTES,
            addresses: 64,
            ..SwitchOptions::default()
        };
        let switch = Switch::new(options);
        let port = switch.port().expect("a port");
        let takes = match takes_all {
            true => Offloads::all(),
            false => Offloads::empty(),
        };
        let end = None;
        (Self { switch, end, takes }, port)
    }

    /// Whether anybody is there.
    pub(super) fn is_plugged(&self) -> bool {
        self.end.is_some()
    }

    /// From now on somebody is there. Whether nobody was.
    pub(super) fn plug(&mut self) -> bool {
        if self.is_plugged() {
            return false;
        }
        let end = self.switch.endpoint().expect("a port");
        end.set_receive(self.takes);
        self.end = Some(end);
        true
    }

    pub(super) fn unplug(&mut self) {
        self.end = None;
    }

    /// Sends a frame; whether it is on its way.
    pub(super) fn send(&mut self, made: &Made) -> bool {
        let Some(end) = &mut self.end else {
            return false;
        };
        let sent = end.send(&made.bytes, &made.meta).is_ok();
        if sent {
            end.flush();
        }
        sent
    }

    /// Takes up to `budget` frames, each of which is what is said of it.
    pub(super) fn receive(&mut self, budget: u32) -> Vec<(Vec<u8>, FrameMeta)> {
        let mut got = Received::default();
        if let Some(end) = &mut self.end {
            end.receive(&mut got, budget);
        }
        let max = max_frame_bytes(DEFAULT_MTU);
        for (frame, meta) in &got.0 {
            let checked = meta.check(frame, frame.len(), max, self.takes);
            assert_eq!(checked, Ok(*meta), "a frame is what is said of it");
        }
        got.0
    }
}
