//! The driver and the device of an e1000, over a switch: what the fuzz target
//! `e1000` runs.
//!
//! The first byte of the input chooses. Either the driver has the card, and
//! frames go both ways; or a guest without one has set up two rings by hand.
//! Then the script goes on as that of [`net_join`](super::net_join), and so do
//! the invariants: what was not meddled with works, and whatever was done to
//! the card, a driver that resets it can use it.

mod action;
mod ends;

use super::buffer::{Buffer, Pool};
use super::far_end::{FarEnd, INBOX_BYTES};
use super::net::{Frame, GUEST, HOST, MOST_PAYLOAD, Traffic};
use super::{clean_arena, keep_arena, play};
use action::{Action, Meddling, register};
use arbitrary::{Arbitrary, Unstructured};
use pvkit_guest::emulated::e1000::{
    E1000, E1000Interrupts, E1000Options, E1000Rx, E1000Tx, Masking,
};
use pvkit_guest::net::{HEADROOM, NetRx, NetTx, Offloads, Reason};
use pvkit_host::bus::BusDevice;
use pvkit_host::pci::PciFunction;
use pvkit_join::arena::{Arena, ArenaSpace, BASE};
use pvkit_join::e1000::E1000Join;
use pvkit_join::pci::BarWindow;
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::wire::{Window, Wire};
use pvkit_protocol::emulated::e1000::{Rctl, Tctl, register as r};
use pvkit_protocol::frame::{DEFAULT_MTU, FrameMeta, max_frame_bytes};
use pvkit_protocol::inet::Headers;
use std::collections::BTreeMap;

const ARENA_BYTES: usize = 1 << 20;
/// Longest script.
const ACTIONS: usize = 256;
/// Private buffers to transmit.
const PLACES: usize = 12;
/// Bytes of a buffer to transmit.
const BUFFER_BYTES: usize = HEADROOM + 256 + MOST_PAYLOAD;
/// Where a guest without a driver has its rings.
const BY_HAND: [(u32, u64); 2] = [(r::RDBAL, BASE + 0x1000), (r::TDBAL, BASE + 0x2000)];
/// How far the other registers of a ring are from the first.
const LENGTH: u32 = r::TDLEN - r::TDBAL;

/// Plays the script that `data` holds.
///
/// # Panics
/// If an invariant does not hold.
pub fn e1000(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok([by_hand, bits]) = <[u8; 2]>::arbitrary(&mut bytes) else {
        return;
    };
    let mut world = World::new(bits, clean_arena(ARENA_BYTES));
    if by_hand & 1 != 0 {
        world.set_up_by_hand();
    } else {
        world.open();
    }
    play(&mut bytes, ACTIONS, |action| world.act(action));
    keep_arena(world.end());
}

/// The card's registers, which lie.
#[derive(Debug)]
struct Liar {
    window: BarWindow,
    lies: Vec<(u64, u32, u8)>,
}

impl Window for Liar {
    fn window_bytes(&self) -> usize {
        self.window.window_bytes()
    }
    fn is_doorbell(&self, offset: usize) -> bool {
        self.window.is_doorbell(offset)
    }
}

impl BusDevice for Liar {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.window.read(offset, data);
        for (register, mask, left) in &mut self.lies {
            if *register == offset {
                *left -= 1;
                for (byte, mask) in data.iter_mut().zip(mask.to_le_bytes()) {
                    *byte ^= mask;
                }
            }
        }
        self.lies.retain(|(.., left)| *left > 0);
    }
    fn write(&mut self, offset: u64, data: &[u8]) {
        self.window.write(offset, data);
    }
}

type Registers = Wire<Liar>;

struct Driver {
    card: E1000<Registers>,
    tx: E1000Tx<Buffer, ArenaSpace, Registers>,
    rx: E1000Rx<Buffer, ArenaSpace, Registers>,
    handler: E1000Interrupts<Registers>,
}

struct World {
    options: E1000Options,
    /// Buffers to receive lie in guest memory.
    inside: bool,
    drop: bool,
    join: E1000Join,
    steps: Steps,
    registers: Registers,
    far: FarEnd,
    driver: Option<Driver>,
    /// Of buffers to transmit, and of those to receive.
    pools: [Pool; 2],
    spare: Vec<Buffer>,
    /// By where they start: what they hold, and the bytes of guest memory
    /// around them.
    lent: BTreeMap<usize, (Vec<u8>, usize)>,
    to_host: Traffic,
    to_guest: Traffic,
    /// The card may not have heard that the link is up.
    unheard: bool,
    meddled: bool,
    /// The halves have reported a fault each since they were reset.
    faulty: [bool; 2],
}

impl World {
    fn new(bits: u8, arena: Arena) -> Self {
        let options = E1000Options {
            transmit_descriptors: if bits & 1 == 0 { 8 } else { 16 },
            receive_descriptors: if bits & 2 == 0 { 8 } else { 16 },
            max_segments: 2,
            buffer_bytes: if bits & 4 == 0 { 2048 } else { 1024 },
            transmit: Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6,
            masking: match bits & 8 {
                0 => Masking::Never,
                _ => Masking::Claimed,
            },
            interrupts_per_second: 0,
            link_interrupts: true,
            max_polls: 64,
            ..E1000Options::default()
        };
        let (far, port) = FarEnd::new(1, bits & 64 != 0);
        let (executor, steps) = stepped();
        let join = E1000Join::over(arena, port, GUEST, Box::new(executor));
        let registers = join.attach(|bar| {
            Wire::new(Liar {
                window: join.window(bar),
                lies: Vec::new(),
            })
        });
        let stock = usize::from(options.receive_descriptors);
        let inside = bits & 16 != 0;
        let mut world = Self {
            inside,
            drop: bits & 32 != 0,
            pools: [
                Pool::new(PLACES, BUFFER_BYTES),
                Pool::new(
                    if inside { 0 } else { stock },
                    options.buffer_bytes as usize,
                ),
            ],
            options,
            join,
            steps,
            registers,
            far,
            driver: None,
            spare: Vec::new(),
            lent: BTreeMap::new(),
            to_host: Traffic::new(HOST),
            to_guest: Traffic::new(GUEST),
            unheard: true,
            meddled: false,
            faulty: [false; 2],
        };
        world.plug();
        world.steps.run();
        world.unheard = false;
        world
    }

    /// A driver takes the card.
    fn open(&mut self) {
        let Self {
            options,
            inside,
            join,
            pools,
            ..
        } = self;
        let bytes = options.buffer_bytes as usize;
        let arena = &join.arena;
        let stock = &mut || match inside {
            true => Buffer::inside(arena, bytes),
            false => Buffer::outside(&mut pools[1], bytes),
        };
        let opened = E1000::open(self.registers.clone(), arena.space(), *options, stock);
        let (card, tx, rx) = opened.expect("an honest card");
        let handler = card.interrupts();
        self.driver = Some(Driver {
            card,
            tx,
            rx,
            handler,
        });
    }

    /// Writes a register behind everybody's back.
    fn write(&self, register: u32, value: u32) {
        let mut card = self.join.card();
        card.write_bar(0, register.into(), &value.to_le_bytes());
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.join.card().read_bar(0, register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set_up_by_hand(&mut self) {
        self.meddled = true;
        for (first, ring) in BY_HAND {
            self.write(first, ring as u32);
            self.write(first + LENGTH, 256);
        }
        for index in 0..16 {
            let buffer = BASE + 0x4000 + 2048 * index;
            let descriptor = BY_HAND[0].1 + 16 * index;
            self.poke(descriptor, &buffer.to_le_bytes());
        }
        self.write(r::RCTL, (Rctl::EN | Rctl::BAM | Rctl::UPE).bits());
        self.write(r::TCTL, Tctl::EN.bits());
        self.write(r::RDT, 15);
    }

    fn poke(&self, addr: u64, bytes: &[u8]) {
        // There is not RAM everywhere.
        let _ = self.join.arena.snapshot().write(addr, bytes);
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(frame) => self.send(&frame),
            Action::HostSend(frame) => self.host_send(&frame),
            Action::Complete(count) => {
                for _ in 0..count % 32 {
                    if !self.complete() {
                        break;
                    }
                }
            }
            Action::Receive(count) => {
                for _ in 0..count % 32 {
                    if !self.receive(count & 0x80 != 0) {
                        break;
                    }
                }
            }
            Action::HostReceive(count) => self.host_receive(count.into()),
            Action::Recover => _ = self.recover(),
            Action::Unplug => {
                self.far.unplug();
                self.unheard = true;
                self.to_host.doubt();
                self.to_guest.doubt();
            }
            Action::Plug => self.plug(),
            Action::Poll(budget) => _ = self.steps.poll(u32::from(budget % 32) + 1),
            Action::Run => self.run(),
            Action::ArmDevice => _ = self.steps.arm(),
            Action::Read { bar, offset, width } => {
                // Some read and clear.
                self.meddled = true;
                let mut data = [0; 16];
                let data = &mut data[..usize::from(width % 17)];
                let offset = u64::from(offset % 0x2_0010);
                self.join.card().read_bar(bar % 3, offset, data);
            }
            Action::WriteBar {
                bar,
                offset,
                width,
                value,
            } => {
                self.meddled = true;
                let data = [value; 2].map(u64::to_le_bytes);
                let data = &data.as_flattened()[..usize::from(width % 17)];
                let offset = u64::from(offset % 0x2_0010);
                self.join.card().write_bar(bar % 3, offset, data);
            }
            Action::Meddle(how) => self.meddle(how),
            Action::PublishTx
            | Action::PublishRx
            | Action::Arm(_)
            | Action::Claim
            | Action::Link => self.drive(action),
        }
    }

    /// What only a driver does, and what comes of it is not looked at.
    fn drive(&mut self, action: Action) {
        let Some(driver) = &mut self.driver else {
            return;
        };
        match action {
            Action::PublishTx => driver.tx.publish(),
            Action::PublishRx => driver.rx.publish(),
            Action::Arm(half) => match half % 4 {
                0 => _ = driver.tx.arm(),
                1 => _ = driver.rx.arm(),
                2 => driver.tx.disarm(),
                _ => driver.rx.disarm(),
            },
            Action::Claim => {
                let claimed = driver.handler.claim();
                assert!(self.meddled || claimed.is_ok(), "{claimed:?}");
            }
            _ => {
                let link = driver.card.link();
                let up = self.far.is_plugged();
                let right = link.is_ok_and(|link| self.unheard || link.up == up);
                assert!(self.meddled || right, "{link:?}");
            }
        }
    }

    fn meddle(&mut self, how: Meddling) {
        self.meddled = true;
        match how {
            Meddling::Write {
                register: number,
                value,
            } => self.write(register(number), value),
            Meddling::Lie {
                register: number,
                mask,
                times,
            } => {
                let lies = &mut self.registers.device().lies;
                if lies.len() < 8 && times > 0 {
                    lies.push((register(number).into(), mask, times));
                }
            }
            Meddling::Descriptor { which, word, value } => {
                let (first, _) = BY_HAND[usize::from(which >> 7)];
                let ring = u64::from(self.read(first));
                let at = ring + 16 * u64::from(which % 16) + 4 * u64::from(word % 4);
                let value = match word % 8 {
                    0 => BASE as u32 + value % ARENA_BYTES as u32,
                    _ => value,
                };
                self.poke(at, &value.to_le_bytes());
            }
            Meddling::Flip { offset, bit } => {
                let addr = BASE + u64::from(offset) % ARENA_BYTES as u64;
                let mut byte = [0];
                let memory = self.join.arena.snapshot();
                memory.read(addr, &mut byte).expect("RAM");
                self.poke(addr, &[byte[0] ^ 1 << (bit % 8)]);
            }
        }
    }

    fn plug(&mut self) {
        self.unheard |= self.far.plug();
    }

    fn run(&mut self) {
        if self.meddled {
            self.steps.poll(64);
        } else {
            self.steps.run();
            self.unheard = false;
        }
    }

    /// Frames as a wire has them: no short ones, which would be padded.
    fn as_on_wires(frame: &Frame) -> Frame {
        let mut frame = *frame;
        if frame.raw {
            frame.bytes = 60 + frame.bytes % 1459;
        }
        frame
    }

    fn buffer(&mut self, inside: bool) -> Option<Buffer> {
        let (pool, arena) = (&mut self.pools[0], &self.join.arena);
        Buffer::spare(&mut self.spare, pool, arena, inside, BUFFER_BYTES)
    }

    fn send(&mut self, frame: &Frame) {
        if self.driver.is_none() || self.to_host.cost() > INBOX_BYTES / 4 {
            return;
        }
        let Some(mut buffer) = self.buffer(frame.inside) else {
            return;
        };
        let made = self.to_host.make(&Self::as_on_wires(frame));
        let bytes = made.bytes.len();
        buffer.bytes_mut()[HEADROOM..HEADROOM + bytes].copy_from_slice(&made.bytes);
        let start = buffer.start();
        let guards = match buffer.is_outside() {
            true => 0,
            false => buffer.guards() + BUFFER_BYTES - bytes,
        };
        let Some(driver) = &mut self.driver else {
            return;
        };
        match driver.tx.submit(buffer, bytes, &made.meta) {
            Ok(()) => {
                assert!(!self.faulty[0], "the half is retired");
                self.lent.insert(start, (made.bytes.clone(), guards));
                let sure = self.far.is_plugged() && !self.unheard && made.honest;
                self.to_host.sent(made, Some(0), sure);
            }
            Err(refused) => {
                let buffer = refused.buffer.expect("the buffer comes back");
                assert_eq!(buffer.start(), start, "the buffer is its own");
                self.spare.push(buffer);
                let retired = matches!(refused.reason, Reason::Retired);
                assert!(self.meddled || !retired);
            }
        }
    }

    fn complete(&mut self) -> bool {
        let Some(driver) = &mut self.driver else {
            return false;
        };
        match driver.tx.complete() {
            Ok(Some(buffer)) => {
                assert!(!self.faulty[0], "the half is retired");
                Self::back(&mut self.lent, &mut self.spare, self.meddled, buffer);
                true
            }
            Ok(None) => false,
            Err(fault) => {
                assert!(self.meddled && !self.faulty[0], "{fault}");
                self.faulty[0] = true;
                false
            }
        }
    }

    /// A buffer to transmit is back.
    fn back(
        lent: &mut BTreeMap<usize, (Vec<u8>, usize)>,
        spare: &mut Vec<Buffer>,
        meddled: bool,
        buffer: Buffer,
    ) {
        let (frame, _) = lent.remove(&buffer.start()).expect("it comes back once");
        if !meddled {
            assert!(buffer.guards_hold(), "memory beside a buffer");
            let now = &buffer.as_ref()[HEADROOM..HEADROOM + frame.len()];
            // A sum that the driver makes stands in the frame.
            assert_eq!(now[..14], frame[..14], "what is sent stays");
        }
        spare.push(buffer);
    }

    fn receive(&mut self, forget: bool) -> bool {
        let Some(driver) = &mut self.driver else {
            return false;
        };
        match driver.rx.recv() {
            Ok(Some(frame)) => {
                assert!(!self.faulty[1], "the half is retired");
                let mut bytes = vec![0; frame.bytes()];
                assert_eq!(frame.copy_to(&mut bytes), bytes.len());
                let meta = *frame.meta();
                if forget {
                    std::mem::forget(frame);
                }
                let max = max_frame_bytes(DEFAULT_MTU);
                let checked = meta.check(&bytes, bytes.len(), max, Offloads::empty());
                assert_eq!(checked, Ok(meta), "a frame is what is said of it");
                if !self.meddled {
                    came_in(&mut self.to_guest, &bytes, &meta);
                }
                true
            }
            Ok(None) => false,
            Err(fault) => {
                assert!(self.meddled && !self.faulty[1], "{fault}");
                self.faulty[1] = true;
                false
            }
        }
    }

    fn host_send(&mut self, frame: &Frame) {
        if !self.far.is_plugged() || self.to_guest.cost() > INBOX_BYTES / 4 {
            return;
        }
        let made = self.to_guest.make(&Self::as_on_wires(frame));
        if self.far.send(&made) {
            let sure = !self.unheard && made.honest;
            self.to_guest.sent(made, None, sure);
        }
    }

    fn host_receive(&mut self, budget: u32) {
        for (frame, meta) in self.far.receive(budget) {
            if !self.meddled {
                came_in(&mut self.to_host, &frame, &meta);
            }
        }
    }

    fn recover(&mut self) -> bool {
        let Self {
            driver: Some(driver),
            lent,
            spare,
            meddled,
            ..
        } = self
        else {
            return false;
        };
        let Driver { card, tx, rx, .. } = driver;
        let result = card.recover(tx, rx, &mut |buffer| {
            Self::back(lent, spare, *meddled, buffer);
        });
        assert!(self.meddled || result.is_ok(), "{result:?}");
        self.to_host.doubt();
        self.to_guest.doubt();
        // The link is up again once the card has looked.
        self.unheard = true;
        self.faulty = [result.is_err(); 2];
        if result.is_ok() {
            assert!(self.lent.is_empty(), "a reset hands everything back");
        }
        result.is_ok()
    }
}

/// A frame came in, and may be padded.
fn came_in(traffic: &mut Traffic, frame: &[u8], meta: &FrameMeta) {
    let end = Headers::parse(frame).map_or(0, |headers| headers.end as usize);
    let frame = match end {
        0 => frame,
        end => &frame[..end.min(frame.len())],
    };
    traffic.came_in(0, frame, meta);
}
