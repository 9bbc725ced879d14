//! What the tests of joined ATA disks share.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test file uses its own part"
)]

pub mod raw;

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Done};
use pvkit_guest::dma::{DmaBuf, DmaBufMut};
use pvkit_guest::emulated::ata::{Ata, AtaError, AtaOptions, Completion, Drive, Mode};
use pvkit_guest::register::PortIo;
use pvkit_host::disk::{
    Disk, DiskError, DiskLane, DiskOp, DiskRequest, DiskShape, MemoryDisk, Submit,
};
use pvkit_host::emulated::ata::DriveOptions;
use pvkit_host::event::EventFd;
use pvkit_host::memory::IoBufs;
use pvkit_host::worker::Interest;
use pvkit_join::arena::ArenaSpace;
use pvkit_join::ide::IdeJoin;
use pvkit_join::port::PortWire;
use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

pub type Driver<B = Vec<u8>> = Ata<B, PortWire, ArenaSpace>;

/// Every way in which the driver works.
pub const WAYS: [(Mode, Completion); 4] = [
    (Mode::Pio, Completion::Polled),
    (Mode::Pio, Completion::Interrupt),
    (Mode::Dma, Completion::Polled),
    (Mode::Dma, Completion::Interrupt),
];

pub const DMA: AtaOptions = AtaOptions {
    mode: Mode::Dma,
    completion: Completion::Polled,
    drive: Drive::Zero,
    max_segments: 16,
    max_bytes: 1 << 20,
    max_polls: 16,
};
pub const PIO: AtaOptions = AtaOptions {
    mode: Mode::Pio,
    ..DMA
};

pub fn options(mode: Mode, completion: Completion) -> AtaOptions {
    AtaOptions {
        mode,
        completion,
        ..DMA
    }
}

/// Bytes that differ from sector to sector.
pub fn pattern(first_sector: u64, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|i| {
            let sector = first_sector + (i / 512) as u64;
            let mix = sector.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            (mix as u8).wrapping_add(i as u8)
        })
        .collect()
}

/// A driver and a machine whose worker is stepped by hand.
pub struct Pair<B: DmaBufMut = Vec<u8>> {
    pub ata: Driver<B>,
    pub join: IdeJoin,
    pub disk: GateDisk,
}

pub fn machine(disk: &GateDisk) -> IdeJoin {
    IdeJoin::new(
        [Some(DriveOptions::new(Arc::new(disk.clone()))), None],
        16 << 20,
    )
}

pub fn pair(sectors: u64, options: AtaOptions) -> Pair {
    pair_of(GateDisk::new(sectors), options)
}

pub fn pair_of<B: DmaBufMut>(disk: GateDisk, options: AtaOptions) -> Pair<B> {
    let join = machine(&disk);
    let ata = open(&join, options).unwrap();
    Pair { ata, join, disk }
}

pub fn open<B: DmaBufMut>(join: &IdeJoin, options: AtaOptions) -> Result<Driver<B>, AtaError> {
    let [primary, _] = join.channels();
    let ata = Ata::open(join.wire.clone(), join.arena.space(), primary, options);
    let _ = join.wire.take_accesses();
    ata
}

impl<B: DmaBufMut> Pair<B> {
    /// One request, start to end, with the worker's help if it needs it.
    pub fn run(&mut self, op: BlockOp, buffer: Option<B>) -> Done<B> {
        self.ata
            .submit(op, buffer, 7)
            .unwrap_or_else(|refused| panic!("{}", refused.reason));
        self.ata.publish();
        for _ in 0..100 {
            if let Some(done) = self.ata.complete().unwrap() {
                assert_eq!((done.tag, done.op), (7, op));
                return done;
            }
            self.join.run();
        }
        panic!("no completion: {:?}", self.ata);
    }

    /// Everything must be freed when driver and machine are gone.
    pub fn assert_nothing_leaks(self) {
        let Self { ata, join, .. } = self;
        ata.close(&mut |_| {}).unwrap();
        assert_eq!(join.arena.in_use(), 0);
        assert_eq!(join.arena.leaked(), 0);
    }
}

impl Pair {
    pub fn read(&mut self, sector: u64, bytes: usize) -> Vec<u8> {
        let done = self.run(BlockOp::Read { sector }, Some(vec![0; bytes]));
        done.result.unwrap();
        done.buffer.unwrap()
    }

    pub fn write(&mut self, sector: u64, data: Vec<u8>) -> Result<(), BlockError> {
        self.run(BlockOp::Write { sector }, Some(data)).result
    }
}

/// How a [`GateDisk`] treats requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gate {
    /// Done at once.
    Open,
    /// Queued, and done as soon as they are reaped.
    Async,
    /// Queued, and not done before the gate is opened again.
    Hold,
    /// There is no room.
    Full,
    /// Queued, but the host does not hear of it.
    Uncommitted,
    /// Done at once, with an error.
    Fail(DiskError),
    /// Queued, then done with an error.
    FailLater(DiskError),
}

/// A disk in memory that notes every operation, and treats requests as it is
/// told.
#[derive(Debug, Clone)]
pub struct GateDisk {
    pub disk: MemoryDisk,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    gate: Mutex<Gate>,
    ops: Mutex<Vec<(DiskOp, u64, u64)>>,
    ready: EventFd,
}

impl GateDisk {
    pub fn new(sectors: u64) -> Self {
        Self::over(MemoryDisk::from_bytes(pattern(0, sectors as usize * 512)))
    }

    pub fn over(disk: MemoryDisk) -> Self {
        Self {
            disk,
            shared: Arc::new(Shared {
                gate: Mutex::new(Gate::Open),
                ops: Mutex::default(),
                ready: EventFd::new().unwrap(),
            }),
        }
    }

    pub fn set(&self, gate: Gate) {
        *self.shared.gate.lock().unwrap() = gate;
        self.shared.ready.notify();
    }

    /// Operations since the last call: what, first sector, bytes.
    pub fn take_ops(&self) -> Vec<(DiskOp, u64, u64)> {
        std::mem::take(&mut *self.shared.ops.lock().unwrap())
    }
}

impl Disk for GateDisk {
    fn shape(&self) -> DiskShape {
        self.disk.shape()
    }
    fn lane(&self, depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        Ok(Box::new(GateLane {
            lane: self.disk.lane(depth)?,
            shared: self.shared.clone(),
            depth,
            held: Vec::new(),
            committed: 0,
        }))
    }
}

#[derive(Debug)]
struct GateLane {
    lane: Box<dyn DiskLane>,
    shared: Arc<Shared>,
    depth: u16,
    held: Vec<(DiskOp, u64, IoBufs, u16)>,
    /// How many of those the host knows about.
    committed: usize,
}

impl GateLane {
    fn run(&mut self, request: DiskRequest<'_>, tag: u16) -> Result<(), DiskError> {
        match self.lane.submit(request, tag) {
            Submit::Done(result) => result,
            other => panic!("memory disks are done at once: {other:?}"),
        }
    }
}

impl DiskLane for GateLane {
    fn submit(&mut self, request: DiskRequest<'_>, tag: u16) -> Submit {
        assert!(tag < self.depth, "tag {tag} of {}", self.depth);
        assert!(self.held.len() < usize::from(self.depth), "too many");
        let gate = *self.shared.gate.lock().unwrap();
        if gate == Gate::Full {
            return Submit::Full;
        }
        let noted = (request.op, request.sector, request.data.bytes());
        self.shared.ops.lock().unwrap().push(noted);
        match gate {
            Gate::Open => Submit::Done(self.run(request, tag)),
            Gate::Fail(error) => Submit::Done(Err(error)),
            _ => {
                let mut data = IoBufs::new();
                data.copy_from(request.data);
                self.held.push((request.op, request.sector, data, tag));
                if !matches!(gate, Gate::Hold | Gate::Uncommitted) {
                    self.shared.ready.notify();
                }
                Submit::Queued
            }
        }
    }
    fn commit(&mut self) -> bool {
        if *self.shared.gate.lock().unwrap() == Gate::Uncommitted {
            return false;
        }
        self.committed = self.held.len();
        true
    }
    fn reap(&mut self, each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        let gate = *self.shared.gate.lock().unwrap();
        if matches!(gate, Gate::Hold | Gate::Uncommitted) {
            return 0;
        }
        self.shared.ready.take();
        let held: Vec<_> = self.held.drain(..self.committed).collect();
        self.committed = 0;
        for (op, sector, data, tag) in &held {
            let request = DiskRequest {
                op: *op,
                sector: *sector,
                data,
            };
            let result = match gate {
                Gate::FailLater(error) => Err(error),
                _ => self.run(request, *tag),
            };
            each(*tag, result);
        }
        held.len()
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn sources<'a>(&'a self, each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {
        each(self.shared.ready.as_fd(), Interest::Readable);
    }
}

/// A disk of any size, of which only sectors that were written take memory.
#[derive(Debug, Clone, Default)]
pub struct SparseDisk {
    pub sectors: u64,
    pub written: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
}

impl Disk for SparseDisk {
    fn shape(&self) -> DiskShape {
        DiskShape::new(self.sectors)
    }
    fn lane(&self, _depth: u16) -> Result<Box<dyn DiskLane>, DiskError> {
        Ok(Box::new(SparseLane(self.clone())))
    }
}

#[derive(Debug)]
struct SparseLane(SparseDisk);

impl DiskLane for SparseLane {
    fn submit(&mut self, request: DiskRequest<'_>, _tag: u16) -> Submit {
        let bytes = request.data.bytes();
        if let Err(error) = self.0.shape().check(request.op, request.sector, bytes) {
            return Submit::Done(Err(error));
        }
        let mut data = vec![0; bytes as usize];
        let mut written = self.0.written.lock().unwrap();
        let sectors = (request.sector..).zip(data.chunks_mut(512));
        match request.op {
            DiskOp::Read => {
                for (sector, data) in sectors {
                    if let Some(content) = written.get(&sector) {
                        data.copy_from_slice(content);
                    }
                }
                request.data.scatter(&data);
            }
            DiskOp::Write { .. } => {
                request.data.gather(&mut data);
                for (sector, data) in (request.sector..).zip(data.chunks(512)) {
                    written.insert(sector, data.to_vec());
                }
            }
            // The others are refused by their shape.
            _ => {}
        }
        Submit::Done(Ok(()))
    }
    fn commit(&mut self) -> bool {
        true
    }
    fn reap(&mut self, _each: &mut dyn FnMut(u16, Result<(), DiskError>)) -> usize {
        0
    }
    fn in_flight(&self) -> usize {
        0
    }
    fn sources<'a>(&'a self, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
}

/// A buffer of several pieces, each in a heap block of its own.
#[derive(Debug, PartialEq, Eq)]
pub struct Pieces(pub Vec<Box<[u8]>>);

impl Pieces {
    /// Pieces of these lengths with consecutive parts of `data`; each begins
    /// `skew` bytes into its block.
    pub fn new(lengths: &[usize], data: &[u8]) -> Self {
        let mut rest = data;
        let pieces = lengths
            .iter()
            .map(|&length| {
                let (now, later) = rest.split_at(length);
                rest = later;
                now.into()
            })
            .collect();
        assert!(rest.is_empty());
        Self(pieces)
    }

    pub fn zeroed(lengths: &[usize]) -> Self {
        Self::new(lengths, &vec![0; lengths.iter().sum()])
    }

    pub fn content(&self) -> Vec<u8> {
        self.0.concat()
    }
}

pub struct RawPieces(Vec<NonNull<[u8]>>);

// SAFETY: it stands for exclusive ownership of heap blocks.
unsafe impl Send for RawPieces {}

// SAFETY: the blocks stay where they are; the raw form gives no access.
unsafe impl DmaBuf for Pieces {
    type Raw = RawPieces;
    fn bytes(&self) -> usize {
        self.0.iter().map(|piece| piece.len()).sum()
    }
    fn into_raw(self) -> RawPieces {
        let leak = |piece: Box<[u8]>| NonNull::from(Box::leak(piece));
        RawPieces(self.0.into_iter().map(leak).collect())
    }
    fn segments(raw: &RawPieces, each: &mut dyn FnMut(NonNull<[u8]>)) {
        for piece in raw.0.iter().filter(|piece| !piece.is_empty()) {
            each(*piece);
        }
    }
    unsafe fn from_raw(raw: RawPieces) -> Self {
        // SAFETY: the pointers come from `Box::leak` in `into_raw`, once each.
        let own = |piece: NonNull<[u8]>| unsafe { Box::from_raw(piece.as_ptr()) };
        Self(raw.0.into_iter().map(own).collect())
    }
}
// SAFETY: bytes, held exclusively.
unsafe impl DmaBufMut for Pieces {}

/// What a lie is told about: a port, how many bytes of it, and the truth.
pub type Lie = dyn FnMut(u16, u32) -> u32 + Send;

/// Ports whose reads pass through a lie.
#[derive(Clone)]
pub struct Liar {
    pub wire: PortWire,
    pub lie: Arc<Mutex<Lie>>,
}

impl Liar {
    pub fn new(wire: &PortWire, lie: impl FnMut(u16, u32) -> u32 + Send + 'static) -> Self {
        Self {
            wire: wire.clone(),
            lie: Arc::new(Mutex::new(lie)),
        }
    }

    fn tell(&self, port: u16, truth: u32) -> u32 {
        (self.lie.lock().unwrap())(port, truth)
    }
}

// SAFETY: each call is the access that its name says, to the wire; lies are
// told about the values only.
unsafe impl PortIo for Liar {
    fn read_u8(&self, port: u16) -> u8 {
        self.tell(port, u32::from(self.wire.read_u8(port))) as u8
    }
    fn read_u16(&self, port: u16) -> u16 {
        self.tell(port, u32::from(self.wire.read_u16(port))) as u16
    }
    fn read_u32(&self, port: u16) -> u32 {
        self.tell(port, self.wire.read_u32(port))
    }
    unsafe fn write_u8(&self, port: u16, value: u8) {
        self.wire.write_u8(port, value);
    }
    unsafe fn write_u16(&self, port: u16, value: u16) {
        self.wire.write_u16(port, value);
    }
    unsafe fn write_u32(&self, port: u16, value: u32) {
        self.wire.write_u32(port, value);
    }
    unsafe fn alias(&self) -> Self {
        self.clone()
    }
    unsafe fn read_words(&self, port: u16, words: NonNull<[u16]>) {
        let start = words.cast::<u16>();
        // SAFETY: passed on; then each word is inside of what may be written.
        unsafe {
            self.wire.read_words(port, words);
            for index in 0..words.len() {
                let word = start.add(index);
                let truth = word.read_unaligned();
                word.write_unaligned(self.tell(port, u32::from(truth)) as u16);
            }
        }
    }
    unsafe fn write_words(&self, port: u16, words: NonNull<[u16]>) {
        // SAFETY: passed on.
        unsafe { self.wire.write_words(port, words) };
    }
}

/// A xorshift generator: the same numbers in every run.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }
}
