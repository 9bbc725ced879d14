//! What the e1000's driver and device do together: frames of all lengths,
//! checksums and segments, interrupts, links that go down, recovery.

use pvkit_guest::emulated::e1000::{
    Cause, E1000, E1000Interrupts, E1000Options, E1000Rx, E1000Tx, Masking,
};
use pvkit_guest::net::{Checksum, FrameMeta, HEADROOM, NetRx, NetTx, Offloads};
use pvkit_host::link::switch::{Endpoint, Switch, SwitchOptions};
use pvkit_join::arena::ArenaSpace;
use pvkit_join::e1000::E1000Join;
use pvkit_join::net::Received;
use pvkit_join::packets::{Packet, payload};
use pvkit_join::pci::AnyWire;
use pvkit_join::stepped::Steps;
use pvkit_protocol::frame::MacAddress;

const GUEST: MacAddress = MacAddress::local(1);
const HOST: MacAddress = MacAddress::local(9);

struct Joined {
    join: E1000Join,
    steps: Steps,
    switch: Switch,
    host: Option<Endpoint>,
    card: E1000<AnyWire>,
    tx: E1000Tx<Vec<u8>, ArenaSpace, AnyWire>,
    rx: E1000Rx<Vec<u8>, ArenaSpace, AnyWire>,
    handler: E1000Interrupts<AnyWire>,
}

fn options() -> E1000Options {
    E1000Options {
        transmit: Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6,
        interrupts_per_second: 0,
        link_interrupts: true,
        ..E1000Options::default()
    }
}

fn join(options: E1000Options) -> Joined {
    let switch = Switch::new(SwitchOptions::default());
    let host = switch.endpoint().unwrap();
    let (join, steps) = E1000Join::stepped(switch.port().unwrap(), GUEST, 8 << 20);
    let stock = &mut || Some(vec![0; options.buffer_bytes as usize]);
    let (card, tx, rx) = E1000::open(join.registers(), join.arena.space(), options, stock).unwrap();
    assert_eq!(card.mac(), GUEST);
    let mut handler = card.interrupts();
    handler.claim().unwrap();
    Joined {
        join,
        steps,
        switch,
        host: Some(host),
        card,
        tx,
        rx,
        handler,
    }
}

fn raw(to: MacAddress, from: MacAddress, bytes: usize) -> Vec<u8> {
    let mut frame = [to.0, from.0, [0x88, 0xb5, 0, 0, 0, 0]].concat();
    frame.truncate(14);
    frame.extend(payload(bytes as u8, bytes - 14));
    frame
}

impl Joined {
    fn submit(&mut self, frame: &[u8], meta: &FrameMeta) {
        let mut buffer = vec![0; HEADROOM];
        buffer.extend(frame);
        let sent = self.tx.submit(buffer, frame.len(), meta);
        sent.map_err(|refused| refused.reason).unwrap();
    }

    /// Shows the card what was submitted, which is one write; and has it sent.
    fn publish(&mut self) {
        let before = (self.join.wire.kicks(), self.join.wire.accesses());
        self.tx.publish();
        let after = (self.join.wire.kicks(), self.join.wire.accesses());
        assert_eq!(after, (before.0 + 1, before.1), "one write of TDT");
        self.steps.run();
    }

    fn sent(&mut self) -> usize {
        let mut count = 0;
        while self.tx.complete().unwrap().is_some() {
            count += 1;
        }
        count
    }

    fn host_got(&mut self) -> Vec<(Vec<u8>, FrameMeta)> {
        let mut got = Received::default();
        self.host.as_mut().unwrap().receive(&mut got, u32::MAX);
        got.0
    }

    fn host_send(&mut self, frame: &[u8], meta: &FrameMeta) {
        let host = self.host.as_mut().unwrap();
        host.send(frame, meta).unwrap();
        host.flush();
        self.steps.run();
    }

    fn guest_got(&mut self) -> Vec<(Vec<u8>, FrameMeta)> {
        let mut got = Vec::new();
        while let Some(frame) = self.rx.recv().unwrap() {
            let mut bytes = vec![0; frame.bytes()];
            assert_eq!(frame.copy_to(&mut bytes), bytes.len());
            got.push((bytes, *frame.meta()));
        }
        self.rx.publish();
        got
    }

    fn close(self) {
        let arena = self.join.arena.clone();
        let mut stock = 0;
        self.card
            .close(self.tx, self.rx, &mut |_| {}, &mut |_| stock += 1)
            .unwrap();
        assert!(stock > 0, "buffers to receive come back");
        assert_eq!((arena.in_use(), arena.leaked()), (0, 0));
    }
}

fn packets(payload: usize) -> [Packet; 4] {
    [(false, false), (true, false), (false, true), (true, true)].map(|(v6, udp)| Packet {
        v6,
        udp,
        payload,
        seed: payload as u8,
        port: 4000,
    })
}

#[test]
fn frames_of_all_lengths_go_both_ways() {
    let mut joined = join(options());
    for bytes in (14..200).chain([256, 512, 1024, 1500, 1514, 1518]) {
        let frame = raw(HOST, GUEST, bytes);
        joined.submit(&frame, &FrameMeta::PLAIN);
        joined.publish();
        assert_eq!(joined.sent(), 1);
        let got = joined.host_got();
        assert_eq!(got.len(), 1);
        // Wires carry no shorter ones: what is missing is padded.
        assert_eq!(got[0].0[..bytes], frame);
        assert!(got[0].0.len() == bytes || got[0].0.len() == 60, "{bytes}");
        let frame = raw(GUEST, HOST, bytes);
        joined.host_send(&frame, &FrameMeta::PLAIN);
        let got = joined.guest_got();
        assert_eq!(got.len(), 1, "{bytes}");
        assert_eq!(got[0].0[..bytes], frame);
        assert!(got[0].0.len() == bytes || got[0].0.len() == 60, "{bytes}");
    }
    assert_eq!(joined.join.counters.bad_frames.get(), 0);
    joined.close();
}

#[test]
fn checksums_are_left_to_the_card_both_ways() {
    let mut joined = join(options());
    for bytes in [0, 1, 64, 999, 1400] {
        for packet in packets(bytes) {
            let (frame, meta) = packet.frame(HOST, GUEST, 0);
            joined.submit(&frame, &meta);
            joined.publish();
            let got = joined.host_got();
            assert_eq!(got.len(), 1);
            assert_eq!(got[0].1.checksum, Checksum::Unknown);
            let short = frame.len().max(60) - frame.len();
            let whole = &got[0].0
                [..got[0].0.len().max(frame.len()) - short.min(got[0].0.len() - frame.len())];
            let (_, data) = packet.check(whole, &got[0].1);
            assert_eq!(data, payload(packet.seed, bytes));
            let (frame, meta) = packet.frame(GUEST, HOST, 0);
            joined.host_send(&frame, &meta);
            let got = joined.guest_got();
            assert_eq!(got.len(), 1);
            let (_, data) = packet.check(&got[0].0[..frame.len()], &FrameMeta::PLAIN);
            assert_eq!(data, payload(packet.seed, bytes));
            // Checksums over IPv6 the chip does not look at.
            if !packet.v6 {
                assert_eq!(got[0].1.checksum, Checksum::Valid, "{packet:?}");
            }
        }
    }
    joined.sent();
    joined.close();
}

#[test]
fn long_packets_are_cut_and_every_byte_arrives() {
    let mut joined = join(options());
    for bytes in [1401, 8000, 20_001, 60_000] {
        for packet in packets(bytes).into_iter().filter(|packet| !packet.udp) {
            let (frame, meta) = packet.frame(HOST, GUEST, 1400);
            joined.submit(&frame, &meta);
            joined.publish();
            let got = joined.host_got();
            assert_eq!(got.len(), bytes.div_ceil(1400));
            let mut all = Vec::<u8>::new();
            for (frame, meta) in &got {
                let (from, data) = packet.check(frame, meta);
                assert_eq!(from, all.len());
                all.extend(data);
            }
            assert_eq!(all, payload(packet.seed, bytes));
            assert_eq!(joined.sent(), 1);
        }
    }
    assert_eq!(joined.join.counters.segmented.get(), 8);
    joined.close();
}

#[test]
fn a_batch_is_one_write_and_rings_wrap() {
    let small = E1000Options {
        transmit_descriptors: 8,
        receive_descriptors: 8,
        ..options()
    };
    let mut joined = join(small);
    let mut total = 0;
    for round in 0..100 {
        let count = 1 + round % 7;
        for index in 0..count {
            joined.submit(&raw(HOST, GUEST, 100 + index), &FrameMeta::PLAIN);
        }
        joined.publish();
        assert_eq!(joined.sent(), count);
        let got = joined.host_got();
        assert_eq!(got.len(), count);
        for (index, (frame, _)) in got.iter().enumerate() {
            assert_eq!(*frame, raw(HOST, GUEST, 100 + index));
            joined.host_send(&raw(GUEST, HOST, 100 + index), &FrameMeta::PLAIN);
        }
        let got = joined.guest_got();
        assert_eq!(got.len(), count);
        for (index, (frame, _)) in got.iter().enumerate() {
            assert_eq!(*frame, raw(GUEST, HOST, 100 + index));
        }
        total += count as u64;
    }
    assert_eq!(joined.join.counters.sent.get(), total);
    assert_eq!(joined.join.counters.received.get(), total);
    joined.close();
}

#[test]
fn interrupts_come_when_they_were_asked_for() {
    let claimed = E1000Options {
        masking: Masking::Claimed,
        ..options()
    };
    let mut joined = join(claimed);
    let interrupts = joined.join.interrupts.all.clone();
    for round in 0..10 {
        assert!(!joined.rx.arm());
        let before = interrupts.count();
        joined.host_send(&raw(GUEST, HOST, 64), &FrameMeta::PLAIN);
        assert_eq!(interrupts.count(), before + 1, "{round}");
        let cause = joined.handler.claim().unwrap().expect("its interrupt");
        assert!(cause.intersects(Cause::RXT0), "{cause:?}");
        assert!(!joined.join.interrupts.lines().contains(&true));
        // Nobody asks, but the chip remembers it.
        joined.host_send(&raw(GUEST, HOST, 64), &FrameMeta::PLAIN);
        assert_eq!(interrupts.count(), before + 1, "{round}");
        assert_eq!(joined.guest_got().len(), 2);
        assert!(!joined.rx.arm());
        assert_eq!(interrupts.count(), before + 2, "{round}");
        assert!(joined.handler.claim().unwrap().is_some());
    }
    // What came in before is said at once.
    joined.host_send(&raw(GUEST, HOST, 64), &FrameMeta::PLAIN);
    assert!(joined.rx.arm());
    assert_eq!(joined.guest_got().len(), 1);
    joined.close();
}

#[test]
fn moderation_holds_interrupts_back() {
    let moderated = E1000Options {
        interrupts_per_second: 60,
        ..options()
    };
    let mut joined = join(moderated);
    joined.rx.arm();
    for _ in 0..50 {
        joined.host_send(&raw(GUEST, HOST, 64), &FrameMeta::PLAIN);
        joined.handler.claim().unwrap();
    }
    assert_eq!(joined.guest_got().len(), 50);
    let counters = &joined.join.counters;
    assert!(counters.moderated.get() > 0, "{counters:?}");
    joined.close();
}

#[test]
fn a_link_goes_down_and_up() {
    let mut joined = join(options());
    assert!(joined.card.link().unwrap().up);
    joined.host = None;
    joined.steps.run();
    assert!(!joined.card.link().unwrap().up);
    let cause = joined.handler.claim().unwrap().expect("its interrupt");
    assert!(cause.contains(Cause::LSC), "{cause:?}");
    // Nobody hears it, and the buffer is back.
    joined.submit(&raw(HOST, GUEST, 80), &FrameMeta::PLAIN);
    joined.publish();
    joined.host = Some(joined.switch.endpoint().unwrap());
    joined.steps.run();
    assert!(joined.card.link().unwrap().up);
    joined.sent();
    joined.submit(&raw(HOST, GUEST, 90), &FrameMeta::PLAIN);
    joined.publish();
    let got = joined.host_got();
    assert_eq!(got.last().map(|(frame, _)| frame.len()), Some(90));
    joined.close();
}

#[test]
fn recovery_hands_back_what_was_not_sent() {
    let mut joined = join(options());
    for round in 0..5 {
        joined.submit(&raw(HOST, GUEST, 80), &FrameMeta::PLAIN);
        joined.submit(&raw(HOST, GUEST, 80), &FrameMeta::PLAIN);
        let mut back = 0;
        let Joined { card, tx, rx, .. } = &mut joined;
        card.recover(tx, rx, &mut |_| back += 1).unwrap();
        assert_eq!(back, 2);
        joined.steps.run();
        joined.submit(&raw(HOST, GUEST, 80 + round), &FrameMeta::PLAIN);
        joined.publish();
        assert_eq!(joined.sent(), 1);
        assert_eq!(joined.host_got().len(), 1);
        joined.host_send(&raw(GUEST, HOST, 70), &FrameMeta::PLAIN);
        assert_eq!(joined.guest_got().len(), 1);
    }
    // The driver's own, and what it was reset by.
    assert!(joined.join.counters.resets.get() >= 5);
    joined.close();
}
