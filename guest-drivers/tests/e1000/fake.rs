//! A chip that does as it is told, in the memory of the test; and a space that
//! counts what is lost.

use pvkit_guest::dma::{
    Direction, DmaError, DmaRegion, DmaSpace, LinearSpace, Segment, Segments, StillShared,
};
use pvkit_guest::emulated::e1000::{E1000, E1000Options, E1000Rx, E1000Tx};
use pvkit_guest::net::{HEADROOM, MacAddress};
use pvkit_guest::register::Registers;
use pvkit_protocol::emulated::e1000::descriptor::{BYTES, TX_DD, TX_STATUS_OFFSET};
use pvkit_protocol::emulated::e1000::register::{self, eerd};
use pvkit_protocol::emulated::e1000::{
    ContextDescriptor, Ctrl, DescriptorType, Eecd, Mdic, Rctl, RxDescriptor, RxError, RxStatus,
    Status, TuCommand, TxCommand, TxDescriptor, buffer_bytes, eeprom, phy,
};
use std::alloc::Layout;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use zerocopy::{FromZeros, IntoBytes};

pub(crate) const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
/// Bytes of the window.
const WINDOW: usize = 0x2_0000;

/// A frame that the chip would have sent.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sent {
    pub(crate) bytes: Vec<u8>,
    /// Lengths of its descriptors.
    pub(crate) pieces: Vec<u32>,
    /// The context that its command selects.
    pub(crate) context: Option<ContextDescriptor>,
    pub(crate) command: TxCommand,
    pub(crate) options: u8,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) registers: HashMap<u32, u32>,
    pub(crate) reads: HashMap<u32, u64>,
    pub(crate) writes: HashMap<u32, u64>,
    pub(crate) eeprom: Vec<u16>,
    /// A reset that is never over.
    pub(crate) stuck: bool,
    /// Nothing answers.
    pub(crate) gone: bool,
    pub(crate) sent: Vec<Sent>,
    /// Context descriptors seen.
    pub(crate) contexts: usize,
    /// Transmit descriptors that were reported.
    pub(crate) reports: usize,
    normal: Option<ContextDescriptor>,
    segmentation: Option<ContextDescriptor>,
    frame: Sent,
}

#[derive(Clone, Default)]
pub(crate) struct Chip(Arc<Mutex<State>>);

/// A copy of `N` bytes of the driver's memory.
fn load<const N: usize>(at: u64) -> [u8; N] {
    let from = std::ptr::with_exposed_provenance::<[u8; N]>(at as usize);
    // SAFETY: the driver gave the chip this address; tests end before it is
    // freed.
    unsafe { from.read_unaligned() }
}

fn load_bytes(at: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| load::<1>(at + i)[0]).collect()
}

fn store(at: u64, bytes: &[u8]) {
    for (i, byte) in bytes.iter().enumerate() {
        let to = std::ptr::with_exposed_provenance_mut::<u8>(at as usize + i);
        // SAFETY: as for `load`; the driver lends the chip this memory.
        unsafe { to.write_volatile(*byte) };
    }
}

impl State {
    fn get(&self, register: u32) -> u32 {
        self.registers.get(&register).copied().unwrap_or(0)
    }

    fn set(&mut self, register: u32, value: u32) {
        self.registers.insert(register, value);
    }

    fn base(&self, low: u32) -> u64 {
        u64::from(self.get(low + 4)) << 32 | u64::from(self.get(low))
    }

    fn count(&self, low: u32) -> u32 {
        self.get(low + 8) / BYTES as u32
    }

    fn power_on(&mut self) {
        self.registers.clear();
        let [a, b, c, d, e, f] = MAC.0;
        if !self.eeprom.is_empty() {
            self.set(register::RAL, u32::from_le_bytes([a, b, c, d]));
            let high = u32::from_le_bytes([e, f, 0, 0]) | register::RAH_AV;
            self.set(register::RAH, high);
            self.set(register::EECD, Eecd::PRES.bits());
        }
        self.set(
            register::STATUS,
            (Status::LU | Status::FD | Status::SPEED_1000).bits(),
        );
    }

    fn read(&mut self, register: u32) -> u32 {
        *self.reads.entry(register).or_default() += 1;
        if self.gone {
            return u32::MAX;
        }
        let value = self.get(register);
        if register == register::ICR {
            self.set(register, 0);
        }
        value
    }

    fn write(&mut self, register: u32, value: u32) {
        *self.writes.entry(register).or_default() += 1;
        match register {
            register::CTRL if value & Ctrl::RST.bits() != 0 => {
                self.power_on();
                self.set(register, if self.stuck { value } else { 0 });
            }
            register::EERD => {
                let index = (value >> eerd::ADDRESS_SHIFT) as usize;
                let word = self.eeprom.get(index).copied();
                let done = word.map_or(0, |word| u32::from(word) << eerd::DATA_SHIFT | eerd::DONE);
                self.set(register, value | done);
            }
            register::MDIC => {
                let data = match Mdic::from_bits_retain(value).register() {
                    phy::ID1 => phy::ID >> 16,
                    phy::ID2 => phy::ID & 0xffff,
                    phy::STATUS => 0,
                    _ => Mdic::ERROR.bits(),
                };
                self.set(register, value & !0xffff | Mdic::READY.bits() | data);
            }
            register::IMS => self.set(register, self.get(register) | value),
            register::IMC => self.set(register::IMS, self.get(register::IMS) & !value),
            _ => self.set(register, value),
        }
    }

    fn finish(&mut self, data: &TxDescriptor) {
        let data = data.data();
        let bytes = load_bytes(data.address.get(), data.length() as usize);
        if self.frame.bytes.is_empty() {
            self.frame.options = data.options;
        }
        self.frame.bytes.extend(bytes);
        self.frame.pieces.push(data.length());
        self.frame.command = TxDescriptor::from(data).command();
        if self.frame.command.contains(TxCommand::EOP) {
            self.frame.context = if self.frame.command.contains(TxCommand::TSE) {
                self.segmentation.take()
            } else {
                self.normal
            };
            self.sent.push(std::mem::take(&mut self.frame));
        }
    }
}

impl Chip {
    pub(crate) fn new() -> Self {
        let chip = Self::default();
        {
            let mut state = chip.state();
            state.eeprom = eeprom::image(MAC).to_vec();
            state.power_on();
        }
        chip
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    pub(crate) fn get(&self, register: u32) -> u32 {
        self.state().get(register)
    }

    pub(crate) fn set(&self, register: u32, value: u32) {
        self.state().set(register, value);
    }

    /// Register reads so far, and writes to one register, and to all.
    pub(crate) fn accesses(&self, register: u32) -> (u64, u64, u64) {
        let state = self.state();
        let writes = state.writes.get(&register).copied().unwrap_or(0);
        (
            state.reads.values().sum(),
            writes,
            state.writes.values().sum(),
        )
    }

    /// Takes up to `most` descriptors of the transmit ring.
    pub(crate) fn transmit(&self, most: usize) -> usize {
        let mut state = self.state();
        let (base, count) = (state.base(register::TDBAL), state.count(register::TDBAL));
        let mut done = 0;
        while done < most && state.get(register::TDH) != state.get(register::TDT) {
            let head = state.get(register::TDH);
            let at = base + u64::from(head) * BYTES as u64;
            let mut descriptor = TxDescriptor::new_zeroed();
            descriptor
                .as_mut_bytes()
                .copy_from_slice(&load::<BYTES>(at));
            assert_eq!(descriptor.status & TX_DD, 0, "an old descriptor");
            match descriptor.kind() {
                DescriptorType::Context => {
                    let context = descriptor.context();
                    state.contexts += 1;
                    if context.command().contains(TuCommand::TSE) {
                        state.segmentation = Some(context);
                    } else {
                        state.normal = Some(context);
                    }
                }
                DescriptorType::Data => state.finish(&descriptor),
                other => panic!("{other:?}"),
            }
            if descriptor.command().contains(TxCommand::RS) {
                state.reports += 1;
                store(at + TX_STATUS_OFFSET as u64, &[TX_DD]);
            }
            state.set(register::TDH, (head + 1) % count);
            done += 1;
        }
        done
    }

    /// Writes a receive descriptor wherever it likes.
    pub(crate) fn forge(&self, place: u32, length: u16, status: RxStatus, errors: RxError) {
        let at = self.state().base(register::RDBAL) + u64::from(place) * BYTES as u64;
        let mut descriptor = RxDescriptor::new_zeroed();
        descriptor
            .as_mut_bytes()
            .copy_from_slice(&load::<BYTES>(at));
        descriptor.length.set(length);
        descriptor.status = status.bits();
        descriptor.errors = errors.bits();
        store(at, descriptor.as_bytes());
    }

    /// Uses the next receive descriptor up, for whatever it likes; `None` if
    /// there is none.
    pub(crate) fn put(
        &self,
        data: &[u8],
        length: u16,
        status: RxStatus,
        errors: RxError,
    ) -> Option<u32> {
        let (head, at) = {
            let state = self.state();
            let head = state.get(register::RDH);
            if head == state.get(register::RDT) {
                return None;
            }
            (
                head,
                state.base(register::RDBAL) + u64::from(head) * BYTES as u64,
            )
        };
        let address = u64::from_le_bytes(load::<8>(at));
        store(address, data);
        self.forge(head, length, status, errors);
        let mut state = self.state();
        let count = state.count(register::RDBAL);
        state.set(register::RDH, (head + 1) % count);
        Some(head)
    }

    /// Receives a frame as the chip does; `false` if there is no room.
    pub(crate) fn receive(&self, frame: &[u8]) -> bool {
        let size = buffer_bytes(Rctl::from_bits_retain(self.get(register::RCTL))) as usize;
        let pieces = frame.len().div_ceil(size);
        let free = {
            let state = self.state();
            let count = state.count(register::RDBAL);
            (state.get(register::RDT) + count - state.get(register::RDH)) % count
        };
        if (free as usize) < pieces {
            return false;
        }
        for (index, piece) in frame.chunks(size).enumerate() {
            let mut status = RxStatus::DD | RxStatus::IXSM;
            status.set(RxStatus::EOP, index + 1 == pieces);
            self.put(piece, piece.len() as u16, status, RxError::empty());
        }
        true
    }
}

// SAFETY: it touches the maps of registers only.
unsafe impl Registers for Chip {
    fn len(&self) -> usize {
        WINDOW
    }
    fn read_u8(&self, _: usize) -> u8 {
        panic!("registers have 32 bits")
    }
    fn read_u16(&self, _: usize) -> u16 {
        panic!("registers have 32 bits")
    }
    fn read_u32(&self, offset: usize) -> u32 {
        self.state().read(offset as u32)
    }
    unsafe fn write_u8(&self, _: usize, _: u8) {
        panic!("registers have 32 bits")
    }
    unsafe fn write_u16(&self, _: usize, _: u16) {
        panic!("registers have 32 bits")
    }
    unsafe fn write_u32(&self, offset: usize, value: u32) {
        self.state().write(offset as u32, value);
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
}

#[derive(Default)]
struct Counts {
    leaked: AtomicUsize,
    regions: AtomicUsize,
    mapped: AtomicUsize,
    /// Nothing more can be mapped.
    frozen: AtomicBool,
    /// Buffers that cannot be unmapped, from now on.
    stuck: AtomicUsize,
}

/// Memory that the chip reaches where it is, in pieces that end at multiples of
/// `piece` bytes from the start of a buffer to be sent.
#[derive(Clone)]
pub(crate) struct Space {
    inner: LinearSpace,
    counts: Arc<Counts>,
    piece: usize,
}

impl Space {
    pub(crate) fn new(piece: usize) -> Self {
        Self {
            // SAFETY: the fake chip reaches the memory of this process.
            inner: unsafe { LinearSpace::new(0) },
            counts: Arc::default(),
            piece,
        }
    }

    /// Bytes that were lost.
    pub(crate) fn leaked(&self) -> usize {
        self.counts.leaked.load(Ordering::SeqCst)
    }

    /// Regions that exist, and buffers that are mapped.
    pub(crate) fn live(&self) -> (usize, usize) {
        (
            self.counts.regions.load(Ordering::SeqCst),
            self.counts.mapped.load(Ordering::SeqCst),
        )
    }

    /// The next `count` buffers cannot be taken back.
    pub(crate) fn keep(&self, count: usize) {
        self.counts.stuck.store(count, Ordering::SeqCst);
    }

    /// Refuses to map anything, or lifts that.
    pub(crate) fn freeze(&self, on: bool) {
        self.counts.frozen.store(on, Ordering::SeqCst);
    }
}

// SAFETY: it is the linear space, which counts and cuts.
unsafe impl DmaSpace for Space {
    type Addr = u64;

    fn alloc(&self, layout: Layout) -> Result<DmaRegion<Self>, DmaError> {
        let (_, ptr, addr, layout) = self.inner.alloc(layout)?.into_parts();
        self.counts.regions.fetch_add(1, Ordering::SeqCst);
        ptr.as_ptr().expose_provenance();
        // SAFETY: the parts are those of the region that was taken apart.
        Ok(unsafe { DmaRegion::from_parts(self.clone(), ptr, addr, layout) })
    }

    unsafe fn dealloc(&self, ptr: NonNull<u8>, addr: u64, layout: Layout) {
        self.counts.regions.fetch_sub(1, Ordering::SeqCst);
        // SAFETY: passed on.
        unsafe { self.inner.dealloc(ptr, addr, layout) };
    }

    unsafe fn map(
        &self,
        buffer: NonNull<[u8]>,
        direction: Direction,
        out: &mut Segments<'_, u64>,
    ) -> Result<(), DmaError> {
        if self.counts.frozen.load(Ordering::SeqCst) {
            return Err(DmaError::OutOfMemory { bytes: 0, align: 1 });
        }
        let start = buffer.cast::<u8>().as_ptr().expose_provenance() as u64;
        let piece = match direction {
            Direction::ToDevice => self.piece,
            Direction::FromDevice => buffer.len(),
        };
        for at in (0..buffer.len()).step_by(piece) {
            out.push(Segment {
                addr: start + at as u64,
                len: piece.min(buffer.len() - at) as u32,
            })?;
        }
        self.counts.mapped.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    unsafe fn unmap(
        &self,
        _: NonNull<[u8]>,
        _: Direction,
        _: &[Segment<u64>],
        _: usize,
    ) -> Result<(), StillShared> {
        let stuck = &self.counts.stuck;
        let less = |left: usize| left.checked_sub(1);
        if stuck
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
            .is_ok()
        {
            return Err(StillShared);
        }
        self.counts.mapped.fetch_sub(1, Ordering::SeqCst);
        Ok(())
    }

    fn leaked(&self, bytes: usize) {
        self.counts.leaked.fetch_add(bytes, Ordering::SeqCst);
    }
}

pub(crate) type Tx = E1000Tx<Vec<u8>, Space, Chip>;
pub(crate) type Rx = E1000Rx<Box<[u8]>, Space, Chip>;

/// A card on a fake chip.
pub(crate) struct Card {
    pub(crate) chip: Chip,
    pub(crate) space: Space,
    pub(crate) control: E1000<Chip>,
    pub(crate) tx: Tx,
    pub(crate) rx: Rx,
}

/// Opens a card on a chip; buffers to be sent are cut into pieces.
pub(crate) fn open_on(chip: &Chip, piece: usize, options: E1000Options) -> Card {
    let space = Space::new(piece);
    let bytes = options.buffer_bytes as usize;
    let (control, tx, rx) = E1000::open(chip.clone(), space.clone(), options, &mut || {
        Some(vec![0; bytes].into_boxed_slice())
    })
    .unwrap();
    Card {
        chip: chip.clone(),
        space,
        control,
        tx,
        rx,
    }
}

/// Opens a card.
pub(crate) fn open(options: E1000Options) -> Card {
    open_on(&Chip::new(), 1 << 20, options)
}

/// Options with small rings and no moderation.
pub(crate) fn small() -> E1000Options {
    E1000Options {
        transmit_descriptors: 16,
        receive_descriptors: 16,
        report_every: 4,
        repost_every: 4,
        interrupts_per_second: 0,
        ..E1000Options::default()
    }
}

/// A buffer with a frame behind its headroom.
pub(crate) fn buffer(frame: &[u8]) -> Vec<u8> {
    let mut buffer = vec![0xee; HEADROOM];
    buffer.extend(frame);
    buffer
}

/// A frame of no protocol, with a number in it.
pub(crate) fn plain(number: u32, bytes: usize) -> Vec<u8> {
    let mut frame: Vec<u8> = (0..bytes).map(|at| (at as u32 + number) as u8).collect();
    frame[12..14].copy_from_slice(&0x88b5u16.to_be_bytes());
    frame[14..18].copy_from_slice(&number.to_be_bytes());
    frame
}
