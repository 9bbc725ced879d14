//! A tap in a network namespace of its own, with the peer at the host's end.
//!
//! Descriptors keep the namespace that they were made in, so the tap can be
//! used by any thread, and by another process. Data frames of the guest are
//! counted by the interface, which costs nothing: nobody receives them unless
//! they are compared or sent back.

use super::PEER_MAC;
use super::packet::{Batches, PacketSocket};
use super::server;
use super::sys::{self, Interface};
use anyhow::{Context, Result, anyhow};
use pvkit_protocol::frame::ethertype;
use pvkit_workload::net::control::{FRAME_BYTES, Mode};
use pvkit_workload::net::frame::MAX_BYTES;
use pvkit_workload::net::peer::Peer;
use pvkit_workload::net::stream::{PEER, PORT, PREFIX};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The interface's name. Each has a namespace of its own.
pub(crate) const NAME: &str = "pvkit";
/// Frames that may wait for the tap's reader.
const QUEUE_FRAMES: i32 = 4096;
/// Frames that the generator lets wait there: what is beyond is lost.
const MOST_WAITING: u64 = 2048;
/// How long the generator waits when so many do.
const FULL_WAIT: Duration = Duration::from_micros(50);
/// After so many frames it looks at the interface again.
const LOOK_EVERY: u64 = 512;
/// The writer of a frame counts it after others may have it.
const SETTLE: Duration = Duration::from_micros(200);

/// A tap, and the threads at its other end, which end with it.
#[derive(Debug)]
pub struct TapWire {
    tap: Option<OwnedFd>,
    stop: Option<UnixStream>,
    thread: Option<JoinHandle<()>>,
}

impl TapWire {
    /// Makes a tap.
    ///
    /// # Errors
    /// If this process may not, or the host has no taps.
    pub fn new() -> Result<Self> {
        let (made, result) = mpsc::channel();
        let (stop, stopped) = UnixStream::pair()?;
        let thread =
            thread::Builder::new()
                .name("net-peer".to_owned())
                .spawn(move || match set_up(stopped) {
                    Ok((tap, end)) => {
                        let _ = made.send(Ok(tap));
                        end.run();
                    }
                    Err(error) => _ = made.send(Err(error)),
                })?;
        let tap = result
            .recv()
            .map_err(|_| anyhow!("the peer's thread ended"))
            .flatten();
        let mut wire = Self {
            tap: None,
            stop: Some(stop),
            thread: Some(thread),
        };
        wire.tap = Some(tap?);
        Ok(wire)
    }

    /// The tap, which has vnet headers.
    ///
    /// # Errors
    /// If it was taken before.
    pub fn take(&mut self) -> Result<OwnedFd> {
        self.tap.take().context("the tap is taken")
    }
}

impl Drop for TapWire {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the peer at the end of a tap has panicked");
        }
    }
}

/// Makes a namespace for this thread, and everything in it.
fn set_up(stop: UnixStream) -> Result<(OwnedFd, HostEnd)> {
    sys::enter_new_network().context("a network namespace")?;
    sys::wake_in_time();
    // Otherwise the host announces itself, which disturbs the counts. Where
    // there is no such file, there is no IPv6.
    let _ = fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    let tap = sys::make_tap(NAME).context("a tap (/dev/net/tun)")?;
    let interface = Interface::new(NAME)?;
    let index = interface.index()?;
    let set = "the tap's interface";
    interface.set_mac(PEER_MAC).context(set)?;
    interface.set_queue_length(QUEUE_FRAMES).context(set)?;
    let address = Ipv4Addr::from(PEER);
    interface.bring_up(address, PREFIX).context(set)?;
    let packets = "a packet socket";
    let control = PacketSocket::new(ethertype::LOCAL_2, index).context(packets)?;
    let batches = Batches::new(index).context(packets)?;
    let listener = TcpListener::bind((address, PORT)).context("the TCP server")?;
    let server_stop = stop.try_clone()?;
    // It inherits the namespace.
    let server = thread::Builder::new()
        .name("net-server".to_owned())
        .spawn(move || server::serve(&listener, &server_stop))?;
    let end = HostEnd {
        peer: Peer::new(PEER_MAC),
        index,
        control,
        data: None,
        batches,
        statistics: Statistics::open()?,
        controls: 0,
        started: Instant::now(),
        sent_before: 0,
        sent: 0,
        stop,
        server: Some(server),
    };
    Ok((tap, end))
}

/// The counters of the interface.
#[derive(Debug)]
struct Statistics(File);

/// What it has counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Counts {
    /// Frames of the guest.
    received: u64,
    /// Frames to the guest, those that were lost included.
    sent: u64,
}

impl Statistics {
    /// Those of the thread's namespace.
    fn open() -> io::Result<Self> {
        File::open("/proc/thread-self/net/dev").map(Self)
    }

    fn read(&self) -> io::Result<Counts> {
        let mut text = [0; 2048];
        let bytes = self.0.read_at(&mut text, 0)?;
        let text = String::from_utf8_lossy(text.get(..bytes).unwrap_or(&[]));
        parse(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }
}

/// Reads the interface's line of `/proc/net/dev`: bytes, packets, errors and
/// drops of what was received, ..., and the same of what was sent.
fn parse(text: &str) -> Option<Counts> {
    let line = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(NAME)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = line
        .split_whitespace()
        .map_while(|word| word.parse().ok())
        .collect();
    Some(Counts {
        received: *numbers.get(1)?,
        sent: numbers.get(9)? + numbers.get(11)?,
    })
}

/// The host's end of the tap.
struct HostEnd {
    peer: Peer,
    index: i32,
    control: PacketSocket,
    /// Open only while data frames are compared, or sent back.
    data: Option<PacketSocket>,
    batches: Batches,
    statistics: Statistics,
    /// Control frames received.
    controls: u64,
    started: Instant,
    /// What the interface had sent before the generator began.
    sent_before: u64,
    /// Frames that the generator has sent.
    sent: u64,
    stop: UnixStream,
    server: Option<JoinHandle<()>>,
}

impl HostEnd {
    fn run(mut self) {
        if let Err(error) = self.serve() {
            // The guest misses the answers, and the run ends by that.
            log::warn!("the peer at the end of a tap: {error}");
        }
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }

    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn serve(&mut self) -> io::Result<()> {
        let mut timeout = None;
        let mut frame = [0; 2 * MAX_BYTES];
        loop {
            if self.wait(timeout)? {
                return Ok(());
            }
            self.answer_requests()?;
            self.receive_data(&mut frame)?;
            timeout = self.generate(&mut frame)?;
        }
    }

    /// Waits until there is something to do; `true` if that is to end.
    fn wait(&self, timeout: Option<Duration>) -> io::Result<bool> {
        let mut fds = vec![
            PollFd::new(&self.stop, PollFlags::IN),
            PollFd::new(&self.control, PollFlags::IN),
        ];
        if let Some(data) = &self.data {
            fds.push(PollFd::new(data, PollFlags::IN));
        }
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs() as i64,
            tv_nsec: i64::from(timeout.subsec_nanos()),
        });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.first().is_some_and(|stop| !stop.revents().is_empty()))
    }

    /// Takes the control frames that have come.
    fn take_requests(&mut self) -> io::Result<Vec<[u8; FRAME_BYTES]>> {
        let mut requests = Vec::new();
        // Longer ones are cut, shorter ones make no sense.
        let mut frame = [0; FRAME_BYTES];
        while self.control.receive(&mut frame)?.is_some() {
            self.controls += 1;
            requests.push(std::mem::replace(&mut frame, [0; FRAME_BYTES]));
        }
        Ok(requests)
    }

    fn answer_requests(&mut self) -> io::Result<()> {
        let mut requests = self.take_requests()?;
        if requests.is_empty() {
            return Ok(());
        }
        let mut counts = self.statistics.read()?;
        if !self.peer.is_generating() {
            // Until the counters stand still, and no request is among them that
            // has not been seen: a guest may ask twice.
            for _ in 0..50 {
                thread::sleep(SETTLE);
                let more = self.take_requests()?;
                let now = self.statistics.read()?;
                let still = more.is_empty() && now == counts;
                requests.extend(more);
                counts = now;
                if still {
                    break;
                }
            }
        }
        for request in &requests {
            self.answer(request, counts)?;
        }
        Ok(())
    }

    fn answer(&mut self, frame: &[u8], counts: Counts) -> io::Result<()> {
        let received = counts.received.saturating_sub(self.controls);
        let generating = self.peer.is_generating();
        let Some(answer) = self.peer.control(frame, Some(received), self.now_us()) else {
            return Ok(());
        };
        if self.peer.is_generating() && !generating {
            self.sent_before = counts.sent;
            self.sent = 0;
        }
        match self.peer.mode() {
            Mode::Count => self.data = None,
            Mode::Check | Mode::Echo if self.data.is_none() => {
                self.data = Some(PacketSocket::new(ethertype::LOCAL_1, self.index)?);
            }
            Mode::Check | Mode::Echo => {}
        }
        self.control.send(&answer)
    }

    fn receive_data(&mut self, frame: &mut [u8]) -> io::Result<()> {
        let Some(data) = &self.data else {
            return Ok(());
        };
        while let Some(bytes) = data.receive(frame)? {
            let Some(frame) = frame.get_mut(..bytes) else {
                continue;
            };
            if self.peer.data(frame) {
                self.peer.turn_around(frame);
                data.send(frame)?;
            }
        }
        Ok(())
    }

    /// Sends what is due; returns how long nothing is.
    fn generate(&mut self, frame: &mut [u8]) -> io::Result<Option<Duration>> {
        if !self.peer.is_generating() {
            return Ok(None);
        }
        let counts = self.statistics.read()?;
        let gone = counts.sent.saturating_sub(self.sent_before);
        let waiting = self.sent.saturating_sub(gone);
        let now = self.now_us();
        let mut due = self.peer.due(now, LOOK_EVERY);
        // A rate is kept even if frames are lost by that.
        if self.peer.next_us().is_none() {
            due = due.min(MOST_WAITING.saturating_sub(waiting));
            if due == 0 {
                return Ok(Some(FULL_WAIT));
            }
        }
        for _ in 0..due {
            let bytes = self.peer.next(frame, now);
            if bytes == 0 {
                break;
            }
            self.sent += 1;
            self.batches.push(frame.get(..bytes).unwrap_or(&[]));
            if self.batches.is_full() {
                self.batches.flush()?;
            }
        }
        self.batches.flush()?;
        if !self.peer.is_generating() {
            return Ok(None);
        }
        let next = self.peer.next_us().unwrap_or(0);
        let wait = Duration::from_micros(next.saturating_sub(self.now_us()));
        Ok(Some(wait))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvkit_protocol::frame::MacAddress;
    use pvkit_workload::net::control::{Message, Subject};
    use pvkit_workload::net::frame;
    use std::io::{Read, Write};
    use zerocopy::little_endian::U64;

    const GUEST: MacAddress = MacAddress::local(7);
    /// The header of legacy virtio, with which taps start.
    const HEADER: usize = 10;

    /// A guest that reads and writes the tap itself.
    struct Guest {
        tap: File,
        number: u32,
        _wire: TapWire,
    }

    fn guest() -> Option<Guest> {
        match TapWire::new() {
            Ok(mut wire) => Some(Guest {
                tap: wire.take().unwrap().into(),
                number: 0,
                _wire: wire,
            }),
            Err(error) => {
                let _ = writeln!(io::stderr().lock(), "skipped: no tap: {error:#}");
                None
            }
        }
    }

    impl Guest {
        fn send(&mut self, frame: &[u8]) {
            let mut whole = vec![0; HEADER];
            whole.extend_from_slice(frame);
            self.tap.write_all(&whole).unwrap();
        }

        fn receive(&mut self) -> Vec<u8> {
            let mut frame = vec![0; 4096];
            let bytes = self.tap.read(&mut frame).unwrap();
            frame[HEADER..bytes].to_vec()
        }

        fn ask(&mut self, mut message: Message) -> Message {
            self.number += 1;
            message.number.set(self.number);
            let mut frame = [0; FRAME_BYTES];
            message.write(&mut frame, MacAddress::BROADCAST, GUEST);
            self.send(&frame);
            loop {
                let frame = self.receive();
                if let Some((answer, from)) = Message::read(&frame)
                    && answer.is_answer()
                    && answer.number == message.number
                {
                    assert_eq!(from, PEER_MAC);
                    return answer;
                }
            }
        }

        fn send_data(&mut self, count: u64) {
            for sequence in 0..count {
                let mut frame = [0; 64];
                frame::fill(&mut frame, PEER_MAC, GUEST, sequence, 5);
                self.send(&frame);
            }
        }
    }

    #[test]
    fn the_interface_counts_exactly_what_the_guest_sends() {
        let Some(mut guest) = guest() else { return };
        let mut expected = guest
            .ask(Message::request(Subject::Counters, 0))
            .received
            .get();
        for count in [0, 1, 7, 1000, 0, 3] {
            guest.send_data(count);
            expected += count;
            let answer = guest.ask(Message::request(Subject::Counters, 0));
            assert_eq!(answer.received.get(), expected, "{count}");
        }
    }

    /// A guest that gets no answer soon asks again.
    #[test]
    fn a_request_that_comes_twice_counts_for_no_data() {
        let Some(mut guest) = guest() else { return };
        let before = guest.ask(Message::request(Subject::Counters, 0));
        for _ in 0..20 {
            guest.number += 1;
            let message = Message::request(Subject::Counters, guest.number);
            let mut frame = [0; FRAME_BYTES];
            message.write(&mut frame, MacAddress::BROADCAST, GUEST);
            for _ in 0..4 {
                guest.send(&frame);
            }
            for _ in 0..4 {
                let (answer, _) = Message::read(&guest.receive()).unwrap();
                assert_eq!(answer.received, before.received);
            }
        }
    }

    #[test]
    fn frames_are_compared_and_sent_back() {
        let Some(mut guest) = guest() else { return };
        let before = guest.ask(Message::mode_request(Mode::Check, 0));
        guest.send_data(20);
        let mut frame = [0; 64];
        frame::fill(&mut frame, PEER_MAC, GUEST, 20, 5);
        frame[50] ^= 1;
        guest.send(&frame);
        let mut answer = before;
        for _ in 0..1000 {
            answer = guest.ask(Message::request(Subject::Counters, 0));
            if answer.checked.get() == 21 {
                break;
            }
        }
        let counts = [answer.checked, answer.wrong, answer.wrong_sequence];
        assert_eq!(counts.map(U64::get), [21, 1, 20]);
        guest.ask(Message::mode_request(Mode::Echo, 0));
        frame::fill(&mut frame, PEER_MAC, GUEST, 33, 6);
        guest.send(&frame);
        let back = guest.receive();
        frame::check(&back, 33, 64).unwrap();
        assert_eq!(frame::source(&back), Some(PEER_MAC));
        guest.ask(Message::mode_request(Mode::Count, 0));
        guest.send(&frame);
        let answer = guest.ask(Message::request(Subject::Counters, 0));
        assert_eq!(answer.received.get(), before.received.get() + 23);
    }

    #[test]
    fn a_slow_reader_loses_nothing_and_the_end_is_said() {
        let Some(mut guest) = guest() else { return };
        for rate in [0, 200_000] {
            let mut request = Message::request(Subject::Generate, 0);
            request.frame_bytes.set(64);
            request.rate.set(rate);
            request.count.set(20_000);
            request.limit_us.set(60_000_000);
            guest.ask(request);
            if rate == 0 {
                // The queue of the tap is shorter than that.
                thread::sleep(Duration::from_millis(50));
            }
            let mut expected = 0;
            loop {
                let frame = guest.receive();
                match frame::sequence(&frame) {
                    Some(found) => {
                        assert_eq!(found, expected);
                        expected += 1;
                    }
                    None => {
                        let (message, _) = Message::read(&frame).unwrap();
                        assert_eq!(message.subject(), Some(Subject::Finished));
                        break;
                    }
                }
            }
            assert_eq!(expected, 20_000);
            guest.ask(Message::request(Subject::Stop, 0));
        }
    }

    #[test]
    fn lines_of_the_kernel_are_read() {
        let text = "Inter-|   Receive\n face |bytes\n    lo:       1       2    0    0\n \
                    pvkit:   10   11   0   12    0     0          0         0   20   21    0    \
                    22    0     0       0          0\n";
        let counts = parse(text).unwrap();
        assert_eq!((counts.received, counts.sent), (11, 43));
        assert_eq!(parse("pvkit: 1 2 3"), None);
        assert_eq!(parse("pvkit0: 1 2 3 4 5 6 7 8 9 10 11 12"), None);
    }
}
