//! The disk as the neutral contract sees it: a queue of depth 1.
#![forbid(unsafe_code)]

use super::direct::Direct;
use super::engine::Engine;
use super::identify::Info;
use super::probe;
use super::registers::{Address, Code, Registers};
use super::{AtaError, AtaOptions, Channel, Completion, Mode};
use crate::block::{
    BlockError, BlockLimits, BlockOp, BlockQueue, Done, Reason, Refused, SECTOR_BYTES,
};
use crate::dma::{Direction, DmaBufMut, DmaSpace, Segment};
use crate::fault::Fault;
use crate::register::{OwnedPorts, PortIo};
use crate::storage::Storage;
use core::fmt;
use pvkit_protocol::emulated::ata::{Status, command};

/// Counters of one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct AtaCounters {
    /// Requests published.
    pub posted: u64,
    /// Requests taken back.
    pub completed: u64,
    /// How often the status was read and the drive was still at work.
    pub busy_polls: u64,
    /// Faults of the drive or its controller.
    pub faults: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Live,
    /// A fault was found and not yet reported.
    Faulty(Fault),
    /// The fault was reported; nothing works until the drive is recovered.
    Retired,
}

/// How far a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// The drive does not know it.
    Submitted,
    /// The drive works on it.
    Running,
    Over(Result<(), BlockError>),
}

/// Where the data of a request is.
enum Data<B: DmaBufMut> {
    /// There is none, or the bus master's engine has it.
    Elsewhere,
    /// The processor moves it, block by block.
    Direct(Direct<B>),
}

/// The one request.
struct Request<B: DmaBufMut> {
    tag: u64,
    op: BlockOp,
    stage: Stage,
    data: Data<B>,
    /// Length of the buffer.
    bytes: usize,
    /// Bytes that the processor has moved.
    moved: usize,
}

/// A disk.
///
/// Dropping it while a bus-master transfer may still run leaks the buffer and
/// the table of regions, for nothing proves that the controller has let go of
/// them; [`close`](Ata::close) gives everything back.
pub struct Ata<B: DmaBufMut, P: PortIo, S: DmaSpace<Addr = u64>> {
    registers: Registers<P>,
    /// The bus master, for DMA.
    engine: Option<Engine<B, P, S>>,
    options: AtaOptions,
    info: Info,
    /// Bytes of a PIO block.
    block_bytes: usize,
    request: Option<Request<B>>,
    state: State,
    counters: AtaCounters,
}

impl<B: DmaBufMut, P: PortIo, S: DmaSpace<Addr = u64>> fmt::Debug for Ata<B, P, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ata")
            .field("registers", &self.registers.status_port())
            .field("options", &self.options)
            .field("state", &self.state)
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl<B: DmaBufMut, P: PortIo, S: DmaSpace<Addr = u64>> Ata<B, P, S> {
    /// Resets the drives of a channel, gets to know the one that `options`
    /// name, and makes it ready. Private memory comes from the heap.
    ///
    /// # Errors
    /// [`AtaError`] says why there is no disk to be used.
    #[cfg(feature = "alloc")]
    pub fn open(
        ports: P,
        space: S,
        channel: Channel,
        options: AtaOptions,
    ) -> Result<Self, AtaError> {
        let room = match options.mode {
            Mode::Pio => 0,
            Mode::Dma => usize::from(options.max_segments.max(1)),
        };
        let storage = Storage::heap(room, Segment::default);
        Self::open_in(ports, space, channel, options, storage)
    }

    /// The same with private memory that the caller provides: room for
    /// [`AtaOptions::max_segments`], in DMA mode.
    ///
    /// # Errors
    /// [`AtaError`], also if the storage is too small.
    pub fn open_in(
        ports: P,
        space: S,
        channel: Channel,
        options: AtaOptions,
        room: Storage<Segment<u64>>,
    ) -> Result<Self, AtaError> {
        let ports = OwnedPorts::new(ports);
        let registers = Registers::new(ports.clone(), channel, options.drive);
        let polls = options.max_polls.max(1);
        let master = match options.mode {
            Mode::Pio => None,
            Mode::Dma => {
                let (have, need) = (room.len(), usize::from(options.max_segments.max(1)));
                if have < need {
                    return Err(AtaError::Storage { have, need });
                }
                Some(channel.bus_master.ok_or(AtaError::NoBusMaster)?)
            }
        };
        registers.reset(polls)?;
        let (info, block) = probe::identify(&registers, &options)?;
        let engine = match master {
            None => None,
            Some(base) => {
                let mut engine = Engine::new(ports, base, space, room, options.max_bytes)?;
                // Whoever had the bus master before may have left it running.
                engine.stop();
                engine.wait_stopped(polls)?;
                engine.show_table()?;
                Some(engine)
            }
        };
        registers.set_completion(options.completion);
        Ok(Self {
            registers,
            engine,
            options,
            info,
            block_bytes: usize::from(block) * SECTOR_BYTES as usize,
            request: None,
            state: State::Live,
            counters: AtaCounters::default(),
        })
    }

    /// What the disk has done so far.
    #[must_use]
    pub fn counters(&self) -> AtaCounters {
        self.counters
    }

    /// Sectors of a PIO block: how many one interrupt, or one look at the
    /// status, is good for.
    #[must_use]
    pub fn sectors_per_block(&self) -> usize {
        self.block_bytes / SECTOR_BYTES as usize
    }

    /// Retires the disk, because the caller's clock says that it does not
    /// answer any more ([`Fault::Timeout`]). The next
    /// [`complete`](BlockQueue::complete) reports the fault.
    pub fn retire(&mut self, fault: Fault) {
        if self.state == State::Live {
            self.counters.faults += 1;
            self.state = State::Faulty(fault);
        }
    }

    /// Stops the bus master, resets the drive and makes it ready again. The
    /// outstanding request comes back through `each` with
    /// [`BlockError::Reset`]; the disk then works as before, with whatever
    /// size it now has. Both drives of the channel are reset.
    ///
    /// # Errors
    /// [`AtaError`]. If drive and bus master could not be stopped, the request
    /// does not come back; otherwise it has. The disk stays retired.
    pub fn recover(&mut self, each: &mut dyn FnMut(Done<B>)) -> Result<(), AtaError> {
        self.state = State::Retired;
        self.stop()?;
        self.hand_back(each);
        let (info, block) = probe::identify(&self.registers, &self.options)?;
        if info.serial != self.info.serial {
            return Err(AtaError::Replaced);
        }
        self.info = info;
        self.block_bytes = usize::from(block) * SECTOR_BYTES as usize;
        if let Some(engine) = &self.engine {
            engine.show_table()?;
        }
        self.registers.set_completion(self.options.completion);
        self.state = State::Live;
        Ok(())
    }

    /// Stops the drive for good. The outstanding request comes back through
    /// `each`. The drive's interrupt stays masked.
    ///
    /// # Errors
    /// [`AtaError`]: the drive or its bus master does not stop, so a buffer
    /// that the bus master has is leaked.
    pub fn close(mut self, each: &mut dyn FnMut(Done<B>)) -> Result<(), AtaError> {
        self.state = State::Retired;
        self.stop()?;
        self.hand_back(each);
        Ok(())
    }

    /// Makes sure that the drive does nothing and the bus master reaches no
    /// memory.
    fn stop(&mut self) -> Result<(), AtaError> {
        let polls = self.options.max_polls.max(1);
        if let Some(engine) = &mut self.engine {
            engine.stop();
        }
        self.registers.reset(polls)?;
        if let Some(engine) = &mut self.engine {
            engine.wait_stopped(polls)?;
        }
        Ok(())
    }

    /// Hands back the outstanding request of a drive that was stopped.
    fn hand_back(&mut self, each: &mut dyn FnMut(Done<B>)) {
        if let Some(request) = self.request.take() {
            each(self.done(request, Err(BlockError::Reset)));
        }
    }

    /// Puts a request that is over together.
    fn done(&mut self, request: Request<B>, result: Result<(), BlockError>) -> Done<B> {
        let engine = self.engine.as_mut();
        Done {
            tag: request.tag,
            op: request.op,
            buffer: match request.data {
                Data::Direct(buffer) => buffer.give_back(),
                Data::Elsewhere => engine.and_then(|engine| engine.unload(result.is_ok())),
            },
            result,
        }
    }

    /// Shows the drive the request.
    fn start(&mut self) -> Result<(), Fault> {
        let Some(request) = &mut self.request else {
            return Ok(());
        };
        if request.stage != Stage::Submitted {
            return Ok(());
        }
        self.counters.posted += 1;
        request.stage = Stage::Running;
        let (sector, write) = match request.op {
            BlockOp::Read { sector } => (sector, false),
            BlockOp::Write { sector } => (sector, true),
            BlockOp::Flush => {
                self.registers.command(if self.info.flush_ext {
                    command::FLUSH_CACHE_EXT
                } else {
                    command::FLUSH_CACHE
                });
                return Ok(());
            }
            BlockOp::GetId => {
                // The answer is known since the drive was opened.
                if let Data::Direct(buffer) = &mut request.data {
                    buffer.fill(&self.info.serial);
                }
                request.stage = Stage::Over(Ok(()));
                return Ok(());
            }
            // Refused by the limits.
            BlockOp::Discard { .. }
            | BlockOp::WriteZeroes { .. }
            | BlockOp::SecureErase { .. }
            | BlockOp::GetLifetime => {
                request.stage = Stage::Over(Err(BlockError::Unsupported));
                return Ok(());
            }
        };
        // At most 65,536 (`max_bytes`).
        let count = (request.bytes as u64 / SECTOR_BYTES) as u32;
        let address = Address::new(sector, count);
        match &mut self.engine {
            Some(engine) => {
                let code = if write { DMA_WRITE } else { DMA_READ };
                self.registers.issue(code, address);
                engine.start();
                Ok(())
            }
            None => {
                let one = self.block_bytes == SECTOR_BYTES as usize;
                let code = match (write, one) {
                    (false, true) => PIO_READ,
                    (false, false) => PIO_READ_MULTIPLE,
                    (true, true) => PIO_WRITE,
                    (true, false) => PIO_WRITE_MULTIPLE,
                };
                self.registers.issue(code, address);
                // The drive does not interrupt for the first block of a write.
                if write { self.advance() } else { Ok(()) }
            }
        }
    }

    /// Looks at the drive, and does what it is ready for.
    fn advance(&mut self) -> Result<(), Fault> {
        let Self {
            registers,
            engine,
            options,
            block_bytes,
            request: Some(request),
            counters,
            ..
        } = self
        else {
            return Ok(());
        };
        // Each turn moves a block, and there are no more than the buffer has.
        while request.stage == Stage::Running {
            let fault = |value: u8| Fault::Register {
                register: registers.status_port(),
                value: u32::from(value),
            };
            let status = registers.status().map_err(fault)?;
            if status.contains(Status::BSY) {
                counters.busy_polls += 1;
                return Ok(());
            }
            let failed = status.intersects(Status::ERR | Status::DF);
            let wants_data = status.contains(Status::DRQ);
            let fault = fault(status.bits());
            if !status.contains(Status::DRDY) {
                return Err(fault);
            }
            let over = if failed { Err(BlockError::Io) } else { Ok(()) };
            match (&mut request.data, engine.as_mut()) {
                _ if request.op == BlockOp::Flush => {
                    if wants_data {
                        return Err(fault);
                    }
                    request.stage = Stage::Over(over);
                }
                (Data::Elsewhere, Some(engine)) => {
                    if wants_data && !failed {
                        // The drive and the bus master are still at it.
                        counters.busy_polls += 1;
                        return Ok(());
                    }
                    let moved = engine.finish(failed, options.max_polls.max(1))?;
                    request.stage = Stage::Over(if moved { over } else { Err(BlockError::Io) });
                }
                (Data::Direct(_), _) if failed => request.stage = Stage::Over(over),
                (Data::Direct(buffer), _) => {
                    let write = matches!(request.op, BlockOp::Write { .. });
                    let left = request.bytes - request.moved;
                    match (wants_data, left) {
                        // All of a write has arrived.
                        (false, 0) => {
                            request.stage = Stage::Over(over);
                            break;
                        }
                        (true, 1..) => {}
                        _ => return Err(fault),
                    }
                    let (from, to) = (request.moved, request.moved + left.min(*block_bytes));
                    if write {
                        buffer.write(registers.ports(), registers.data_port(), from, to);
                    } else {
                        buffer.read(registers.ports(), registers.data_port(), from, to);
                    }
                    request.moved = to;
                    if !write && to == request.bytes {
                        // The status before the last block covers it.
                        request.stage = Stage::Over(over);
                    }
                }
                (Data::Elsewhere, None) => return Err(fault),
            }
        }
        Ok(())
    }

    /// Retires the disk if there was a fault.
    fn note(&mut self, result: Result<(), Fault>) {
        if let Err(fault) = result {
            self.retire(fault);
        }
    }
}

const DMA_READ: Code = Code {
    short: command::READ_DMA,
    long: command::READ_DMA_EXT,
};
const DMA_WRITE: Code = Code {
    short: command::WRITE_DMA,
    long: command::WRITE_DMA_EXT,
};
const PIO_READ: Code = Code {
    short: command::READ_SECTORS,
    long: command::READ_SECTORS_EXT,
};
const PIO_WRITE: Code = Code {
    short: command::WRITE_SECTORS,
    long: command::WRITE_SECTORS_EXT,
};
const PIO_READ_MULTIPLE: Code = Code {
    short: command::READ_MULTIPLE,
    long: command::READ_MULTIPLE_EXT,
};
const PIO_WRITE_MULTIPLE: Code = Code {
    short: command::WRITE_MULTIPLE,
    long: command::WRITE_MULTIPLE_EXT,
};

impl<B: DmaBufMut, P: PortIo, S: DmaSpace<Addr = u64>> BlockQueue<B> for Ata<B, P, S> {
    fn limits(&self) -> &BlockLimits {
        &self.info.limits
    }

    fn depth(&self) -> u16 {
        1
    }

    fn submit(&mut self, op: BlockOp, buffer: Option<B>, tag: u64) -> Result<(), Refused<B>> {
        let bytes = buffer.as_ref().map(B::bytes);
        let checked = match (self.state, &self.request) {
            (State::Live, None) => self.info.limits.check(op, bytes),
            (State::Live, Some(_)) => Err(Reason::Full),
            _ => Err(Reason::Retired),
        };
        if let Err(reason) = checked {
            return Err(Refused { reason, buffer });
        }
        let direction = match op {
            BlockOp::Write { .. } => Direction::ToDevice,
            _ => Direction::FromDevice,
        };
        let data = match (buffer, &mut self.engine) {
            (None, _) => Data::Elsewhere,
            (Some(buffer), Some(engine)) if op != BlockOp::GetId => {
                engine
                    .load(buffer, direction)
                    .map_err(|(buffer, error)| Refused {
                        reason: Reason::Dma(error),
                        buffer,
                    })?;
                Data::Elsewhere
            }
            (Some(buffer), _) => Data::Direct(Direct::new(buffer)),
        };
        self.request = Some(Request {
            tag,
            op,
            stage: Stage::Submitted,
            data,
            bytes: bytes.unwrap_or(0),
            moved: 0,
        });
        Ok(())
    }

    /// Gives the drive the command. The first block of a PIO write is moved
    /// here too, as far as the drive is ready for it.
    fn publish(&mut self) {
        if self.state == State::Live {
            let result = self.start();
            self.note(result);
        }
    }

    fn complete(&mut self) -> Result<Option<Done<B>>, Fault> {
        if self.state == State::Live {
            let result = self.advance();
            self.note(result);
        }
        match self.state {
            State::Live => {}
            State::Faulty(fault) => {
                self.state = State::Retired;
                return Err(fault);
            }
            State::Retired => return Ok(None),
        }
        let over = self
            .request
            .take_if(|request| matches!(request.stage, Stage::Over(_)));
        let Some(request) = over else {
            return Ok(None);
        };
        let Stage::Over(result) = request.stage else {
            return Ok(None);
        };
        self.counters.completed += 1;
        Ok(Some(self.done(request, result)))
    }

    /// By interrupt, the drive always interrupts: nothing has to be asked for.
    /// A disk that is polled sends none, so there is never a reason to sleep
    /// while a request is outstanding.
    fn arm(&mut self) -> bool {
        match self.state {
            State::Live => self.request.as_ref().is_some_and(|request| {
                let polled = self.options.completion == Completion::Polled;
                matches!(request.stage, Stage::Over(_))
                    || (polled && request.stage == Stage::Running)
            }),
            State::Faulty(_) => true,
            State::Retired => false,
        }
    }
}
