//! The control half: opening, recovering and closing a card, and its link.
#![forbid(unsafe_code)]

use super::chip::Chip;
use super::interrupt::E1000Interrupts;
use super::receive::{E1000Rx, ReceiveSetup};
use super::ring::{Ring, RingStorage, reset};
use super::transmit::{E1000Tx, TransmitSetup};
use super::{ControlCounters, E1000Error, E1000Options, eeprom, phy};
use crate::dma::{DmaBuf, DmaSpace};
use crate::fault::Fault;
use crate::net::{LinkStatus, MacAddress, NetBuf, NetLimits, Offloads};
use crate::quiesce::ResetEpoch;
use crate::register::{OwnedRegisters, Registers};
use crate::storage::Storage;
use core::fmt;
use pvkit_protocol::emulated::e1000::phy as phy_register;
use pvkit_protocol::emulated::e1000::register::{self, statistic};
use pvkit_protocol::emulated::e1000::{
    Cause, Ctrl, Rctl, RxChecksum, Status, Tctl, buffer_bytes, interval_nanos,
};
use pvkit_protocol::frame::max_frame_bytes;

/// Numbers of the rings, for proofs of a reset.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
/// Bytes of the check sequence that a frame has on the wire.
const CHECK_SEQUENCE: usize = 4;
/// Longest frame on the wire without [`Rctl::LPE`] (SDM §13.4.22).
const MAX_SHORT: usize = 1522;
/// Longest frame on the wire with it.
const MAX_LONG: usize = 16_384;
/// Gaps between frames for copper, as the manual has them (SDM §13.4.34).
const TIPG: u32 = 10 | 8 << 10 | 6 << 20;
/// Collision threshold and distance, full duplex (SDM §13.4.33).
const COLLISIONS: u32 = 0x0f << 4 | 0x40 << 12;

/// A card that was opened, with its halves.
pub type Opened<B, C, S, R> = Result<(E1000<R>, E1000Tx<B, S, R>, E1000Rx<C, S, R>), E1000Error>;

/// The private memory of a card's rings.
///
/// With the `alloc` feature, [`E1000Storage::heap`] makes it.
#[derive(Debug)]
pub struct E1000Storage<B: DmaBuf, C: DmaBuf> {
    /// Of the ring that transmits.
    pub transmit: RingStorage<B>,
    /// Of the ring that receives, with one segment for each buffer.
    pub receive: RingStorage<C>,
    /// One place for each descriptor of the ring that receives.
    pub stock: Storage<Option<C>>,
}

impl<B: DmaBuf, C: DmaBuf> E1000Storage<B, C> {
    /// Storage on the heap.
    #[cfg(feature = "alloc")]
    #[must_use]
    pub fn heap(options: &E1000Options) -> Self {
        let receive = options.receive_descriptors;
        Self {
            transmit: RingStorage::heap(options.transmit_descriptors, options.max_segments.max(1)),
            receive: RingStorage::heap(receive, 1),
            stock: Storage::heap(receive.into(), || None),
        }
    }
}

/// The control half of a card.
pub struct E1000<R> {
    chip: Chip<R>,
    options: E1000Options,
    epoch: ResetEpoch,
    limits: NetLimits,
    mac: MacAddress,
    rctl: Rctl,
}

impl<R> fmt::Debug for E1000<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("E1000")
            .field("chip", &self.chip)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

/// Checks options, and says what the receive control register is for them.
fn receive_control(options: &E1000Options) -> Result<Rctl, E1000Error> {
    let sizes = (0..4u32)
        .flat_map(|bits| [Rctl::empty(), Rctl::BSEX].map(|bsex| bsex.bits() | bits << 16))
        .map(Rctl::from_bits_retain);
    let bytes = options.buffer_bytes;
    // One value is reserved, and read as another size: that comes first.
    let size = sizes.into_iter().find(|rctl| buffer_bytes(*rctl) == bytes);
    let size = size.ok_or(E1000Error::BufferBytes { bytes })?;
    let wire = max_frame_bytes(options.mtu) + CHECK_SEQUENCE;
    if wire > MAX_LONG {
        return Err(E1000Error::Mtu { mtu: options.mtu });
    }
    let longest = wire / bytes as usize + 1;
    for (descriptors, least) in [
        (options.transmit_descriptors, 8),
        (options.receive_descriptors, 4 * longest),
    ] {
        let fits = (8..=4096).contains(&descriptors) && usize::from(descriptors) >= least;
        if !fits || !descriptors.is_power_of_two() {
            return Err(E1000Error::RingSize { descriptors });
        }
    }
    let offloads = options.transmit;
    let can = Offloads::CHECKSUM | Offloads::TSO4 | Offloads::TSO6;
    let alone = !offloads.is_empty() && !offloads.contains(Offloads::CHECKSUM);
    if alone || !can.contains(offloads) {
        return Err(E1000Error::Offloads(offloads));
    }
    let mut rctl = size | Rctl::EN | Rctl::BAM | Rctl::MPE | Rctl::SECRC;
    rctl.set(Rctl::LPE, wire > MAX_SHORT);
    rctl.set(Rctl::UPE, options.promiscuous);
    Ok(rctl)
}

/// The value of [`register::ITR`] for at most so many interrupts a second.
fn interval(per_second: u32) -> u32 {
    const SECOND: u64 = 1_000_000_000;
    match per_second {
        0 => 0,
        // Fits 32 bits, for the first factor does.
        count => (SECOND / interval_nanos(1))
            .div_ceil(count.into())
            .min(0xffff) as u32,
    }
}

impl<R: Registers> E1000<R> {
    /// Resets and configures a card, and starts it. Private memory comes from
    /// the heap. `stock` makes the buffers for frames to be received, one for
    /// each descriptor, of
    /// [`buffer_bytes`](E1000Options::buffer_bytes) bytes or more; each lies in
    /// one piece for the device.
    ///
    /// # Errors
    /// [`E1000Error`]. The card is left reset, or was not touched.
    #[cfg(feature = "alloc")]
    pub fn open<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        registers: R,
        space: S,
        options: E1000Options,
        stock: &mut dyn FnMut() -> Option<C>,
    ) -> Opened<B, C, S, R> {
        receive_control(&options)?;
        let storage = E1000Storage::heap(&options);
        Self::open_in(registers, space, options, stock, storage)
    }

    /// [`open`](E1000::open) with private memory that the caller provides.
    ///
    /// # Errors
    /// [`E1000Error`], also if the storage is too small.
    pub fn open_in<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        registers: R,
        space: S,
        options: E1000Options,
        stock: &mut dyn FnMut() -> Option<C>,
        storage: E1000Storage<B, C>,
    ) -> Opened<B, C, S, R> {
        let rctl = receive_control(&options)?;
        let chip = Chip::new(OwnedRegisters::new(registers), options.max_polls);
        let mut epoch = ResetEpoch::new();
        reset(&chip, &mut epoch)?;
        let mac = eeprom::address(&chip)?;
        let limits = NetLimits {
            mac: Some(mac),
            mtu: options.mtu,
            transmit: options.transmit,
            receive: Offloads::empty(),
            pairs: 1,
        };
        let batch = |wanted: u16, descriptors: u16| wanted.clamp(1, descriptors / 4);
        let E1000Storage {
            transmit,
            receive,
            stock: mut places,
        } = storage;
        let mut tx = E1000Tx::new(
            Ring::new(
                &space,
                chip.registers(),
                register::TDBAL,
                options.transmit_descriptors,
                options.max_segments,
                epoch.queue(TRANSMIT),
                transmit,
            )?,
            chip.registers(),
            TransmitSetup {
                limits,
                masking: options.masking,
                delays: options.delays,
                report_every: batch(options.report_every, options.transmit_descriptors),
            },
        );
        let need = usize::from(options.receive_descriptors);
        let have = places.len();
        let what = "places for buffers";
        for place in places
            .get_mut(..need)
            .ok_or(E1000Error::Storage { what, have, need })?
        {
            *place = stock();
        }
        let mut rx = E1000Rx::new(
            Ring::new(
                &space,
                chip.registers(),
                register::RDBAL,
                options.receive_descriptors,
                1,
                epoch.queue(RECEIVE),
                receive,
            )?,
            chip.registers(),
            ReceiveSetup {
                masking: options.masking,
                buffer_bytes: options.buffer_bytes,
                max_frame: max_frame_bytes(options.mtu),
                repost_every: batch(options.repost_every, options.receive_descriptors),
                read_back: options.read_back,
                checksums: options.receive_checksums,
            },
            places,
        )?;
        let mut card = Self {
            chip,
            options,
            epoch,
            limits,
            mac,
            rctl,
        };
        card.start(&mut tx, &mut rx);
        Ok((card, tx, rx))
    }

    /// Programs the chip, which was just reset, and starts it.
    fn start<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        &mut self,
        tx: &mut E1000Tx<B, S, R>,
        rx: &mut E1000Rx<C, S, R>,
    ) {
        let Self {
            chip,
            options,
            epoch,
            mac,
            rctl,
            ..
        } = self;
        let [a, b, c, d, e, f] = mac.0;
        let delays = &options.delays;
        let mut checksums = RxChecksum::empty();
        checksums.set(
            RxChecksum::IPOFL | RxChecksum::TUOFL,
            options.receive_checksums,
        );
        for word in 0..register::MTA_WORDS as u32 {
            chip.write(register::MTA + 4 * word, 0);
        }
        for (register, value) in [
            (register::RAL, u32::from_le_bytes([a, b, c, d])),
            (
                register::RAH,
                u32::from_le_bytes([e, f, 0, 0]) | register::RAH_AV,
            ),
            (register::RDTR, delays.receive.into()),
            (register::RADV, delays.receive_at_most.into()),
            (register::TIDV, delays.transmit.into()),
            (register::TADV, delays.transmit_at_most.into()),
            (register::ITR, interval(options.interrupts_per_second)),
            (register::RXCSUM, checksums.bits()),
            (register::TIPG, TIPG),
            (register::CTRL, (Ctrl::SLU | Ctrl::ASDE | Ctrl::FD).bits()),
        ] {
            chip.write(register, value);
        }
        tx.ring_mut().expose(chip, epoch.queue(TRANSMIT));
        rx.ring_mut().expose(chip, epoch.queue(RECEIVE));
        chip.write(register::TCTL, (Tctl::EN | Tctl::PSP).bits() | COLLISIONS);
        chip.write(register::RCTL, rctl.bits());
        rx.ring_tail();
        if options.link_interrupts {
            chip.write(register::IMS, Cause::LSC.bits());
        }
    }

    /// What the card can do.
    #[must_use]
    pub fn limits(&self) -> &NetLimits {
        &self.limits
    }

    /// Its address.
    #[must_use]
    pub fn mac(&self) -> MacAddress {
        self.mac
    }

    /// Register accesses of this half.
    #[must_use]
    pub fn counters(&self) -> ControlCounters {
        self.chip.counters()
    }

    /// The part of the card that a handler of its interrupt has.
    #[must_use]
    pub fn interrupts(&self) -> E1000Interrupts<R> {
        E1000Interrupts::new(self.chip.registers(), self.options.masking)
    }

    /// The state of the link: one register read.
    ///
    /// # Errors
    /// [`Fault::Register`]: there is no device any more.
    pub fn link(&self) -> Result<LinkStatus, Fault> {
        let value = self.chip.read(register::STATUS);
        if value == u32::MAX {
            return Err(Fault::Register {
                register: register::STATUS as u16,
                value,
            });
        }
        let status = Status::from_bits_retain(value);
        let up = status.contains(Status::LU);
        let speed = if status.contains(Status::SPEED_1000) {
            1000
        } else if status.contains(Status::SPEED_100) {
            100
        } else {
            10
        };
        Ok(LinkStatus {
            up,
            speed_mbps: up.then_some(speed),
            full_duplex: up.then_some(status.contains(Status::FD)),
        })
    }

    /// Frames that found no room since this was asked last, as the chip counts
    /// them: one register read.
    #[must_use]
    pub fn missed(&self) -> u32 {
        self.chip.read(statistic::MPC)
    }

    /// The identifier of the PHY, with its revision.
    ///
    /// # Errors
    /// [`E1000Error::Timeout`] or [`E1000Error::Phy`].
    pub fn phy_id(&self) -> Result<u32, E1000Error> {
        let high = self.phy_read(phy_register::ID1)?;
        let low = self.phy_read(phy_register::ID2)?;
        Ok(u32::from(high) << 16 | u32::from(low))
    }

    /// Reads a register of the PHY.
    ///
    /// # Errors
    /// [`E1000Error::Timeout`] or [`E1000Error::Phy`].
    pub fn phy_read(&self, number: u8) -> Result<u16, E1000Error> {
        phy::read(&self.chip, number)
    }

    /// Writes a register of the PHY.
    ///
    /// # Errors
    /// [`E1000Error::Timeout`] or [`E1000Error::Phy`].
    pub fn phy_write(&self, number: u8, value: u16) -> Result<(), E1000Error> {
        phy::write(&self.chip, number, value)
    }

    /// Whether both halves are those of this card.
    fn check_own<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        &self,
        tx: &E1000Tx<B, S, R>,
        rx: &E1000Rx<C, S, R>,
    ) -> Result<(), E1000Error> {
        let own = tx.ring().identity().is_queue(self.epoch.queue(TRANSMIT))
            && rx.ring().identity().is_queue(self.epoch.queue(RECEIVE));
        own.then_some(()).ok_or(E1000Error::ForeignHalf)
    }

    /// Resets the card, and takes back what it had.
    fn take_back<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        &mut self,
        tx: &mut E1000Tx<B, S, R>,
        rx: &mut E1000Rx<C, S, R>,
        each: &mut dyn FnMut(B),
    ) -> Result<(), E1000Error> {
        tx.stop();
        rx.stop();
        let proof = reset(&self.chip, &mut self.epoch)?;
        let ours = tx.ring_mut().reclaim(&proof, &mut |_, buffer| {
            if let Some(buffer) = buffer {
                each(buffer);
            }
        });
        let ours = rx.reclaim(&proof) && ours;
        ours.then_some(()).ok_or(E1000Error::ForeignHalf)
    }

    /// Resets the card and starts it again. Every buffer that the half that
    /// transmits has comes back through `each`, sent or not; frames received
    /// and not yet looked at are lost. Both halves then work as before.
    ///
    /// # Errors
    /// [`E1000Error`]; the halves stay retired, and recovering can be tried
    /// again. Buffers come back as soon as the card has been reset, whatever
    /// goes wrong after that, and none before. With a half of another card
    /// ([`E1000Error::ForeignHalf`]) nothing happens.
    /// [`E1000Error::Stock`] if buffers for frames to be received were lost:
    /// see [`E1000Rx::restock`].
    pub fn recover<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        &mut self,
        tx: &mut E1000Tx<B, S, R>,
        rx: &mut E1000Rx<C, S, R>,
        each: &mut dyn FnMut(B),
    ) -> Result<(), E1000Error> {
        self.check_own(tx, rx)?;
        self.take_back(tx, rx, each)?;
        rx.restart()?;
        tx.restart();
        self.start(tx, rx);
        Ok(())
    }

    /// Stops the card for good: buffers come back through `sent`, whether their
    /// frames were sent or not, and those for frames to be received through
    /// `stock`. The rings' memory is freed.
    ///
    /// # Errors
    /// [`E1000Error`]: the device does not let go, or a half belongs to another
    /// card. Rings and buffers are leaked.
    pub fn close<B: NetBuf, C: NetBuf, S: DmaSpace<Addr = u64>>(
        mut self,
        mut tx: E1000Tx<B, S, R>,
        mut rx: E1000Rx<C, S, R>,
        sent: &mut dyn FnMut(B),
        stock: &mut dyn FnMut(C),
    ) -> Result<(), E1000Error> {
        self.check_own(&tx, &rx)?;
        self.take_back(&mut tx, &mut rx, sent)?;
        rx.empty(stock);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_bound_the_interrupts_of_a_second() {
        assert_eq!(interval(0), 0);
        for count in [60, 8000, 20_000, 1_000_000, u32::MAX] {
            let nanos = interval_nanos(interval(count));
            assert!(nanos * u64::from(count) >= 1_000_000_000, "{count}");
        }
        assert_eq!(interval(8000), 489);
        assert_eq!(interval(1), 0xffff);
    }

    #[test]
    fn options_that_the_chip_cannot_do_are_refused() {
        let good = E1000Options::default();
        let rctl = |options: E1000Options| receive_control(&options);
        let plain = rctl(good).unwrap();
        assert_eq!(buffer_bytes(plain), 2048);
        assert!(!plain.intersects(Rctl::LPE | Rctl::BSEX | Rctl::UPE));
        for bytes in [256, 512, 1024, 2048, 4096, 8192, 16_384] {
            let options = E1000Options {
                buffer_bytes: bytes,
                ..good
            };
            assert_eq!(rctl(options).map(buffer_bytes), Ok(bytes));
        }
        let long = rctl(E1000Options { mtu: 9000, ..good });
        assert!(long.unwrap().contains(Rctl::LPE));
        let bytes = 32_768;
        assert_eq!(
            rctl(E1000Options {
                buffer_bytes: bytes,
                ..good
            }),
            Err(E1000Error::BufferBytes { bytes })
        );
        let mtu = 16_363;
        assert_eq!(
            rctl(E1000Options { mtu, ..good }),
            Err(E1000Error::Mtu { mtu })
        );
        assert!(
            rctl(E1000Options {
                mtu: mtu - 1,
                ..good
            })
            .is_ok()
        );
        for descriptors in [0, 4, 24, 8192] {
            let options = E1000Options {
                receive_descriptors: descriptors,
                ..good
            };
            assert_eq!(rctl(options), Err(E1000Error::RingSize { descriptors }));
        }
        for offloads in [Offloads::TSO4, Offloads::CHECKSUM | Offloads::USO4] {
            let options = E1000Options {
                transmit: offloads,
                ..good
            };
            assert_eq!(rctl(options), Err(E1000Error::Offloads(offloads)));
        }
    }
}
