//! A stream by TCP, from the peer or to it.

use super::counted::Counted;
use super::frame::MAX_BYTES;
use super::run::{NetError, NetOutcome, NetTarget, Runner};
use super::stream::{self, FETCH, GUEST, MAGIC, PEER, PORT, PREFIX, Request, STORE, Verdict};
use crate::run::{Machine, Outcome};
use crate::script::Mark;
use alloc::vec;
use alloc::vec::Vec;
use pvkit_guest::net::pool::Sender;
use pvkit_guest::net::smoltcp::SmoltcpDevice;
use pvkit_guest::net::{HEADROOM, NetBuf, NetRx, NetTx, Offloads};
use pvkit_guest::storage::Storage;
use pvkit_protocol::frame::ETHERNET_HEADER_BYTES;
use sha2::{Digest, Sha256};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp::{Socket, SocketBuffer};
use smoltcp::time::{Duration, Instant};
use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};
use thiserror::Error;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, IntoBytes};

/// Bytes that may be on their way in each direction.
const WINDOW: usize = 1 << 20;
/// Frames that may be on their way.
const BUFFERS: usize = 64;
/// Longest frame that is left to the card to be cut.
const LONG_BYTES: usize = ETHERNET_HEADER_BYTES + u16::MAX as usize;
/// Bytes that are made or compared at once.
const PIECE: usize = 64 * 1024;
/// How long nothing may move.
const PATIENCE_MS: u64 = 5000;

/// Why a stream failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum TcpError {
    /// The stack does not even start to connect, or to read or write.
    #[error("the TCP socket is not open ({0})")]
    Socket(&'static str),
    /// The peer closed, or refused.
    #[error("the TCP connection ended after {0} bytes")]
    Closed(u64),
    /// Nothing moves.
    #[error("the TCP connection stands still after {0} bytes")]
    Stalled(u64),
    /// A byte is wrong.
    #[error("byte {0} of the TCP stream is wrong")]
    Data(u64),
    /// The peer got wrong bytes.
    #[error("the peer got a TCP stream whose byte {0} is wrong")]
    AtPeer(u64),
    /// The hashes differ.
    #[error("the hashes of the TCP stream differ")]
    Hash,
}

/// Runs a job: fetches a stream from the peer (`fetch`), or sends one.
pub(super) fn run<B, T, M>(
    runner: &mut Runner<'_, B, T, M>,
    number: u32,
    fetch: bool,
) -> Result<NetOutcome, NetError>
where
    B: NetBuf,
    T: NetTarget<B>,
    M: Machine,
{
    let limits = runner.target.limits();
    let segments = limits
        .transmit
        .contains(Offloads::CHECKSUM | Offloads::TSO4);
    let bytes = HEADROOM + if segments { LONG_BYTES } else { MAX_BYTES };
    let mut buffers = Vec::new();
    for _ in 0..BUFFERS {
        buffers.push(runner.target.buffer(bytes).ok_or(NetError::Memory)?);
    }
    let job = runner.job;
    let kicks_before = runner.target.kicks();
    let mut connection = {
        let (tx, rx) = runner.target.halves();
        let mut buffers = buffers.into_iter();
        let places = Storage::heap(BUFFERS, || buffers.next());
        let sender = Sender::new(Counted::new(tx), places);
        let device = SmoltcpDevice::heap(sender, Counted::new(rx), &limits);
        Connection::new(
            device,
            &mut *runner.machine,
            job.ticks_per_ms.get(),
            runner.mac.0,
        )
    };
    let bytes = job.stream_bytes.get();
    let request = Request {
        magic: MAGIC,
        operation: U32::new(if fetch { FETCH } else { STORE }),
        bytes: U64::new(bytes),
        seed: job.seed,
        hash: U32::new(u32::from(job.hash != 0)),
    };
    connection.connect(number)?;
    // Neither making the connection nor ending it is measured.
    connection.machine.mark(Mark::Start(number));
    let counts = connection.machine.counts();
    let before = connection.frames();
    let start = connection.machine.now();
    connection.write_all(request.as_bytes())?;
    let mut hash = Sha256::new();
    let seed = job.seed.get();
    let mut verdict = [0; size_of::<Verdict>()];
    if fetch {
        connection.fetch(bytes, |offset, data| {
            let right = stream::right_bytes(data, offset, seed);
            if job.hash != 0 {
                hash.update(data);
            }
            if right == data.len() {
                Ok(())
            } else {
                Err(TcpError::Data(offset + right as u64))
            }
        })?;
    } else {
        connection.store(bytes, seed, |data| {
            if job.hash != 0 {
                hash.update(data);
            }
        })?;
        connection.read_exact(&mut verdict)?;
    }
    let end = connection.machine.now();
    let mut counts = connection.machine.counts().since(&counts);
    connection.machine.mark(Mark::End(number));
    let after = connection.frames();
    let (sent, received) = (after.0 - before.0, after.1 - before.1);
    if fetch {
        connection.read_exact(&mut verdict)?;
    }
    connection.close();
    drop(connection);
    // Those of making and ending it are among them: a few.
    counts.kicks = runner.target.kicks().saturating_sub(kicks_before);

    let verdict = Verdict::read_from_bytes(&verdict).map_err(|_| TcpError::Closed(bytes))?;
    if verdict.wrong.get() != 0 || verdict.bytes.get() != bytes {
        return Err(TcpError::AtPeer(verdict.bytes.get()).into());
    }
    if job.hash != 0 && hash.finalize()[..] != verdict.digest {
        return Err(TcpError::Hash.into());
    }
    Ok(NetOutcome {
        common: Outcome {
            start,
            end,
            requests: sent + received,
            counts,
            verified_bytes: bytes,
            ..Outcome::default()
        },
        sent,
        received,
        stream_bytes: bytes,
        ..NetOutcome::default()
    })
}

/// A connection, and the stack below it.
struct Connection<'m, T, R, B: 'static, M> {
    device: SmoltcpDevice<T, R, B>,
    machine: &'m mut M,
    ticks_per_ms: u64,
    interface: Interface,
    sockets: SocketSet<'static>,
    socket: SocketHandle,
    moved: u64,
}

impl<T: NetTx<B>, R: NetRx, B: NetBuf, M: Machine>
    Connection<'_, Counted<'_, T>, Counted<'_, R>, B, M>
{
    /// Frames sent and received so far.
    fn frames(&mut self) -> (u64, u64) {
        let (sender, rx) = self.device.queues();
        (sender.queue().frames, rx.frames)
    }
}

impl<'m, T: NetTx<B>, R: NetRx, B: NetBuf, M: Machine> Connection<'m, T, R, B, M> {
    fn new(
        mut device: SmoltcpDevice<T, R, B>,
        machine: &'m mut M,
        ticks_per_ms: u32,
        mac: [u8; 6],
    ) -> Self {
        let ticks_per_ms = u64::from(ticks_per_ms);
        let mut config = Config::new(EthernetAddress(mac).into());
        config.random_seed = machine.now();
        let now = instant(machine.now(), ticks_per_ms);
        let mut interface = Interface::new(config, &mut device, now);
        interface.update_ip_addrs(|addresses| {
            let address = IpAddress::Ipv4(GUEST.into());
            // There is room for more than one.
            let _ = addresses.push(IpCidr::new(address, PREFIX));
        });
        let buffer = || SocketBuffer::new(vec![0; WINDOW]);
        let mut socket = Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_timeout(Some(Duration::from_millis(PATIENCE_MS)));
        let mut sockets = SocketSet::new(Vec::new());
        let socket = sockets.add(socket);
        Self {
            device,
            machine,
            ticks_per_ms,
            interface,
            sockets,
            socket,
            moved: 0,
        }
    }

    fn poll(&mut self) -> Result<(), NetError> {
        let now = instant(self.machine.now(), self.ticks_per_ms);
        self.interface
            .poll(now, &mut self.device, &mut self.sockets);
        self.device.flush();
        self.device
            .take_fault()
            .map_or(Ok(()), |fault| Err(fault.into()))
    }

    /// Polls until `step` says that it is done; `step` says how many bytes it
    /// has moved.
    fn until(
        &mut self,
        mut step: impl FnMut(&mut Socket<'static>) -> Result<Step, TcpError>,
    ) -> Result<(), NetError> {
        let patience = PATIENCE_MS * self.ticks_per_ms;
        let mut heard = self.machine.now();
        loop {
            self.poll()?;
            let now = self.machine.now();
            match step(self.sockets.get_mut::<Socket<'static>>(self.socket))? {
                Step::Done => return Ok(()),
                Step::Moved(bytes) if bytes > 0 => {
                    self.moved += bytes;
                    heard = now;
                }
                Step::Moved(_) => {
                    if now.saturating_sub(heard) > patience {
                        return Err(TcpError::Stalled(self.moved).into());
                    }
                }
            }
        }
    }

    fn connect(&mut self, number: u32) -> Result<(), NetError> {
        let peer = (IpAddress::Ipv4(PEER.into()), PORT);
        // A port that the last job's connection did not have.
        let port = 49_152 + (number % 16_000) as u16;
        let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
        socket
            .connect(self.interface.context(), peer, port)
            .map_err(|_| TcpError::Socket("connect"))?;
        self.until(|socket| {
            if socket.may_send() {
                Ok(Step::Done)
            } else if socket.is_open() {
                Ok(Step::Moved(0))
            } else {
                Err(TcpError::Closed(0))
            }
        })
    }

    fn write_all(&mut self, data: &[u8]) -> Result<(), NetError> {
        let mut done = 0;
        let moved = self.moved;
        self.until(|socket| {
            let rest = data.get(done..).unwrap_or(&[]);
            if rest.is_empty() {
                return Ok(Step::Done);
            }
            let count = socket
                .send_slice(rest)
                .map_err(|_| TcpError::Closed(moved))?;
            done += count;
            Ok(Step::Moved(count as u64))
        })?;
        // It is on its way before anybody waits for what follows.
        self.poll()
    }

    fn read_exact(&mut self, out: &mut [u8]) -> Result<(), NetError> {
        let mut done = 0;
        let moved = self.moved;
        self.until(|socket| {
            let rest = out.get_mut(done..).unwrap_or(&mut []);
            if rest.is_empty() {
                return Ok(Step::Done);
            }
            let count = socket
                .recv_slice(rest)
                .map_err(|_| TcpError::Closed(moved))?;
            done += count;
            Ok(Step::Moved(count as u64))
        })
    }

    /// Receives `bytes` bytes, and shows each piece to `look`, with its offset.
    fn fetch(
        &mut self,
        bytes: u64,
        mut look: impl FnMut(u64, &[u8]) -> Result<(), TcpError>,
    ) -> Result<(), NetError> {
        let mut done = 0;
        self.until(|socket| {
            if done == bytes {
                return Ok(Step::Done);
            }
            let most = (bytes - done).min(usize::MAX as u64) as usize;
            let looked = socket
                .recv(|data| {
                    let count = data.len().min(most);
                    (count, (count, look(done, data.get(..count).unwrap_or(&[]))))
                })
                .map_err(|_| TcpError::Closed(done))?;
            let (count, result) = looked;
            result?;
            done += count as u64;
            Ok(Step::Moved(count as u64))
        })
    }

    /// Sends a stream of `bytes` bytes, and shows each piece to `look`.
    fn store(
        &mut self,
        bytes: u64,
        seed: u32,
        mut look: impl FnMut(&[u8]),
    ) -> Result<(), NetError> {
        let mut done = 0;
        self.until(|socket| {
            if done == bytes {
                return Ok(Step::Done);
            }
            let most = (bytes - done).min(PIECE as u64) as usize;
            let count = socket
                .send(|place| {
                    let count = place.len().min(most);
                    let place = place.get_mut(..count).unwrap_or(&mut []);
                    stream::fill(place, done, seed);
                    look(place);
                    (count, count)
                })
                .map_err(|_| TcpError::Closed(done))?;
            done += count as u64;
            Ok(Step::Moved(count as u64))
        })
    }

    /// Ends the connection, as far as that takes no time.
    fn close(&mut self) {
        self.sockets.get_mut::<Socket<'static>>(self.socket).close();
        let start = self.machine.now();
        while self.machine.now().saturating_sub(start) < 20 * self.ticks_per_ms {
            let socket = self.sockets.get_mut::<Socket<'static>>(self.socket);
            if !socket.is_active() || self.poll().is_err() {
                break;
            }
        }
    }
}

/// What a step of a connection did.
enum Step {
    Done,
    Moved(u64),
}

fn instant(ticks: u64, ticks_per_ms: u64) -> Instant {
    let micros = u128::from(ticks) * 1000 / u128::from(ticks_per_ms.max(1));
    Instant::from_micros(i64::try_from(micros).unwrap_or(i64::MAX))
}
