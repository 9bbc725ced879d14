//! A device for [smoltcp](https://docs.rs/smoltcp), over any driver here.
//!
//! Where the device makes checksums, they are left to it, and where it cuts TCP
//! into segments, smoltcp hands over frames of up to 64 KiB. What it has checked
//! on the way in is not checked again; what it has not, is checked here.
#![forbid(unsafe_code)]

use super::pool::{SendError, Sender};
use super::{NetBuf, NetLimits, NetRx, NetTx, Offloads, RxFrame, offload};
use crate::fault::Fault;
use crate::storage::Storage;
use core::num::{NonZeroU16, NonZeroUsize};
use pvkit_protocol::frame::ETHERNET_HEADER_BYTES;
use pvkit_protocol::inet::IpVersion;
use smoltcp::phy::{
    Checksum, ChecksumCapabilities, Device, DeviceCapabilities, Medium, PacketMeta, RxToken,
    TxToken,
};
use smoltcp::time::Instant;

/// Frames that are queued before the device is shown them in the middle of a
/// poll.
const BATCH: usize = 64;

/// What a [`SmoltcpDevice`] has lost so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SmoltcpCounters {
    /// Received frames with wrong checksums.
    pub bad_checksums: u64,
    /// Received frames that lay in several pieces and did not fit the scratch
    /// buffer.
    pub too_long: u64,
    /// Frames that were made, and that the queue did not take.
    pub unsent: u64,
}

/// Received frames that were lost.
#[derive(Debug, Default)]
struct Lost {
    bad_checksums: u64,
    too_long: u64,
}

/// A pair of queues as smoltcp's device.
///
/// Frames that are queued are shown to the device when a poll finds nothing
/// more to receive, or has queued many. After every
/// `Interface::poll`, [`flush`](SmoltcpDevice::flush) shows it the last of
/// them.
///
/// ```no_run
/// use pvkit_guest::net::pool::Sender;
/// use pvkit_guest::net::smoltcp::SmoltcpDevice;
/// use pvkit_guest::net::{NetLimits, NetRx, NetTx};
/// use smoltcp::iface::{Config, Interface, SocketSet, SocketStorage};
/// use smoltcp::time::Instant;
/// use smoltcp::wire::EthernetAddress;
///
/// fn run(tx: impl NetTx<Vec<u8>>, rx: impl NetRx, limits: &NetLimits, now: impl Fn() -> Instant) {
///     let sender = Sender::heap(tx, 64, || vec![0u8; 2048]);
///     let mut device = SmoltcpDevice::heap(sender, rx, limits);
///     let mac = limits.mac.unwrap_or_default();
///     let config = Config::new(EthernetAddress(mac.0).into());
///     let mut interface = Interface::new(config, &mut device, now());
///     let mut sockets = [SocketStorage::EMPTY; 4];
///     let mut sockets = SocketSet::new(&mut sockets[..]);
///     loop {
///         interface.poll(now(), &mut device, &mut sockets);
///         device.flush();
///     }
/// }
/// ```
#[derive(Debug)]
pub struct SmoltcpDevice<T, R, B: 'static> {
    sender: Sender<T, B>,
    rx: R,
    limits: NetLimits,
    /// Where frames in several pieces are put together.
    scratch: Storage<u8>,
    /// Longest frame that all transmit buffers hold.
    buffer_bytes: usize,
    /// Frames that were queued and not shown.
    queued: usize,
    lost: Lost,
    unsent: u64,
    fault: Option<Fault>,
}

impl<B: NetBuf, T: NetTx<B>, R: NetRx> SmoltcpDevice<T, R, B> {
    /// A device of these queues, with room in `scratch` for the longest frame
    /// that is received in several pieces: longer ones are dropped.
    ///
    /// Frames to send are as long as the buffers allow that are in stock now.
    /// Only if those hold more than the MTU and its headers are there frames to
    /// be cut into segments.
    pub fn new(
        sender: Sender<T, B>,
        rx: R,
        limits: &NetLimits,
        scratch: impl Into<Storage<u8>>,
    ) -> Self {
        Self {
            buffer_bytes: sender.frame_bytes(),
            sender,
            rx,
            limits: *limits,
            scratch: scratch.into(),
            queued: 0,
            lost: Lost::default(),
            unsent: 0,
            fault: None,
        }
    }

    /// The same with room for every frame on the heap, 64 KiB.
    #[cfg(feature = "alloc")]
    pub fn heap(sender: Sender<T, B>, rx: R, limits: &NetLimits) -> Self {
        let bytes = pvkit_protocol::frame::MAX_SEGMENTED_FRAME_BYTES;
        let scratch = Storage::heap(bytes, || 0);
        Self::new(sender, rx, limits, scratch)
    }

    /// Shows the queues everything that was queued and recycled.
    pub fn flush(&mut self) {
        self.queued = 0;
        self.sender.publish();
        self.rx.publish();
    }

    /// Asks for an interrupt at the next frame, and, if no frame can be sent
    /// now, when one can; `true` if it is time to poll already.
    pub fn arm(&mut self) -> bool {
        self.flush();
        let room = !self.can_send() && self.sender.arm();
        self.rx.arm() || room
    }

    /// What was lost so far.
    #[must_use]
    pub fn counters(&self) -> SmoltcpCounters {
        SmoltcpCounters {
            bad_checksums: self.lost.bad_checksums,
            too_long: self.lost.too_long,
            unsent: self.unsent,
        }
    }

    /// A fault of either queue, once. smoltcp has no way to say it.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// The transmit queue with its buffers, and the receive queue: to recover
    /// them, say.
    pub fn queues(&mut self) -> (&mut Sender<T, B>, &mut R) {
        (&mut self.sender, &mut self.rx)
    }

    /// Takes it apart.
    pub fn into_queues(self) -> (Sender<T, B>, R) {
        (self.sender, self.rx)
    }

    fn can_send(&mut self) -> bool {
        let ready = self.sender.ready().unwrap_or_else(|fault| {
            self.fault = Some(fault);
            false
        });
        // Nothing comes back that was never shown.
        if !ready || self.queued >= BATCH {
            self.queued = 0;
            self.sender.publish();
        }
        ready
    }

    /// The longest frame that the device cuts, if there is one.
    fn segmented(&self, offload: Offloads, version: IpVersion) -> Option<NonZeroUsize> {
        let needs = offload | Offloads::CHECKSUM;
        let longest = offload::longest_segmented(version).min(self.buffer_bytes);
        let ordinary = usize::from(self.limits.mtu) + ETHERNET_HEADER_BYTES;
        NonZeroUsize::new(longest)
            .filter(|_| self.limits.transmit.contains(needs) && longest > ordinary)
    }
}

/// A frame that was received.
#[derive(Debug)]
pub struct Received<'a> {
    frame: RxFrame<'a>,
    scratch: &'a mut [u8],
    lost: &'a mut Lost,
    /// smoltcp does not check it.
    check: bool,
}

impl RxToken for Received<'_> {
    /// What smoltcp must not see is an empty frame to it, which it drops.
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        let frame = match self.frame.as_slice() {
            Some(frame) => frame,
            None if self.frame.bytes() > self.scratch.len() => {
                self.lost.too_long += 1;
                return f(&[]);
            }
            None => {
                let bytes = self.frame.copy_to(self.scratch);
                self.scratch.get(..bytes).unwrap_or(&[])
            }
        };
        if self.check && !offload::may_pass(frame, self.frame.meta()) {
            self.lost.bad_checksums += 1;
            return f(&[]);
        }
        f(frame)
    }
}

/// Room for a frame to send.
#[derive(Debug)]
pub struct Room<'a, T, B: 'static> {
    sender: &'a mut Sender<T, B>,
    limits: &'a NetLimits,
    queued: &'a mut usize,
    unsent: &'a mut u64,
    fault: &'a mut Option<Fault>,
    segment: Option<NonZeroU16>,
}

impl<B: NetBuf, T: NetTx<B>> TxToken for Room<'_, T, B> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let segment = self.segment.map(NonZeroU16::get);
        let mut make = Some(f);
        let mut made = None;
        let sent = self.sender.send_with(len, |frame| {
            made = make.take().map(|make| make(frame));
            ((), offload::leave(frame, self.limits, segment))
        });
        match sent {
            Ok(()) => *self.queued += 1,
            Err(error) => {
                *self.unsent += 1;
                if let SendError::Fault(fault) = error {
                    *self.fault = Some(fault);
                }
            }
        }
        match (made, make) {
            (Some(made), _) => made,
            // Only for frames longer than the capabilities allow: the queue had
            // room when this was made.
            (None, Some(make)) => make(&mut []),
            (None, None) => unreachable!("either it was called, or it is still here"),
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.segment = meta.segmentation_offload_size;
    }
}

impl<B: NetBuf, T: NetTx<B>, R: NetRx> Device for SmoltcpDevice<T, R, B> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Room<'a, T, B>
    where
        Self: 'a;

    fn receive(&mut self, _: Instant) -> Option<(Received<'_>, Room<'_, T, B>)> {
        if !self.can_send() {
            return None;
        }
        let frame = match self.rx.recv() {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                if self.queued > 0 {
                    self.queued = 0;
                    self.sender.publish();
                }
                return None;
            }
            Err(fault) => {
                self.fault = Some(fault);
                return None;
            }
        };
        let received = Received {
            frame,
            scratch: &mut self.scratch,
            lost: &mut self.lost,
            check: self.limits.receive.contains(Offloads::CHECKSUM),
        };
        let room = Room {
            sender: &mut self.sender,
            limits: &self.limits,
            queued: &mut self.queued,
            unsent: &mut self.unsent,
            fault: &mut self.fault,
            segment: None,
        };
        Some((received, room))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room<'_, T, B>> {
        self.can_send().then_some(Room {
            sender: &mut self.sender,
            limits: &self.limits,
            queued: &mut self.queued,
            unsent: &mut self.unsent,
            fault: &mut self.fault,
            segment: None,
        })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        let frame = usize::from(self.limits.mtu) + ETHERNET_HEADER_BYTES;
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = frame.min(self.buffer_bytes);
        let received = self.limits.receive.contains(Offloads::CHECKSUM);
        let sent = self.limits.transmit.contains(Offloads::CHECKSUM);
        let transport = || match (received, sent) {
            (false, false) => Checksum::Both,
            (false, true) => Checksum::Rx,
            (true, false) => Checksum::Tx,
            (true, true) => Checksum::None,
        };
        let mut checksum = ChecksumCapabilities::default();
        checksum.tcp = transport();
        checksum.udp = transport();
        capabilities.checksum = checksum;
        capabilities.segmentation.tcpv4 = self.segmented(Offloads::TSO4, IpVersion::V4);
        capabilities.segmentation.tcpv6 = self.segmented(Offloads::TSO6, IpVersion::V6);
        capabilities
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{SmoltcpCounters, SmoltcpDevice};
    use crate::net::fake::{FakeRx, FakeTx};
    use crate::net::pool::Sender;
    use crate::net::{Checksum, FrameMeta, MacAddress, NetLimits, Offloads};
    use alloc::vec;
    use alloc::vec::Vec;
    use smoltcp::iface::{Config, Interface, SocketSet, SocketStorage};
    use smoltcp::phy::{self, Device, RxToken, TxToken};
    use smoltcp::socket::tcp;
    use smoltcp::time::Instant;
    use smoltcp::wire::{EthernetAddress, IpAddress, IpCidr};

    type Fake = SmoltcpDevice<FakeTx, FakeRx, Vec<u8>>;

    fn device(transmit: Offloads, receive: Offloads, buffer: usize) -> Fake {
        let limits = NetLimits {
            mac: None,
            mtu: 1500,
            transmit,
            receive,
            pairs: 1,
        };
        let sender = Sender::heap(FakeTx::new(8), 4, || vec![0; 16 + buffer]);
        SmoltcpDevice::heap(sender, FakeRx::default(), &limits)
    }

    /// A datagram whose checksum is wrong.
    fn datagram() -> Vec<u8> {
        let mut frame = vec![0x11; 60];
        frame[12..16].copy_from_slice(&[8, 0, 0x45, 0]);
        frame[16..18].copy_from_slice(&46u16.to_be_bytes());
        frame[20..24].copy_from_slice(&[0x40, 0, 64, 17]);
        frame[40..42].copy_from_slice(&[0x12, 0x34]);
        frame
    }

    fn receive(device: &mut Fake, frame: Vec<Vec<u8>>, meta: FrameMeta) -> Vec<u8> {
        device.rx.frames.push_back((frame, meta));
        let (received, _) = device.receive(Instant::ZERO).expect("a frame");
        received.consume(<[u8]>::to_vec)
    }

    #[test]
    fn capabilities_follow_the_limits() {
        let none = device(Offloads::empty(), Offloads::empty(), 1514);
        let capabilities = none.capabilities();
        assert_eq!(capabilities.max_transmission_unit, 1514);
        assert!(matches!(capabilities.checksum.tcp, phy::Checksum::Both));
        assert_eq!(capabilities.segmentation.tcpv4, None);
        let all = device(Offloads::all(), Offloads::all(), 65_549).capabilities();
        assert!(matches!(all.checksum.udp, phy::Checksum::None));
        assert!(matches!(all.checksum.ipv4, phy::Checksum::Both));
        let longest = all.segmentation.tcpv4.expect("segmentation");
        assert_eq!(longest.get(), 14 + 65_535);
        let short = device(Offloads::all(), Offloads::all(), 1514).capabilities();
        assert_eq!(short.segmentation.tcpv4, None, "buffers are too short");
    }

    #[test]
    fn what_nobody_has_checked_is_checked() {
        let valid = FrameMeta {
            checksum: Checksum::Valid,
            segments: None,
        };
        let mut asked = device(Offloads::empty(), Offloads::CHECKSUM, 1514);
        let frame = datagram();
        assert_eq!(
            receive(&mut asked, vec![frame.clone()], FrameMeta::PLAIN),
            []
        );
        assert_eq!(asked.counters().bad_checksums, 1);
        assert_eq!(receive(&mut asked, vec![frame.clone()], valid), frame);
        // Otherwise smoltcp does it.
        let mut unasked = device(Offloads::empty(), Offloads::empty(), 1514);
        let same = receive(&mut unasked, vec![frame.clone()], FrameMeta::PLAIN);
        assert_eq!(same, frame);
    }

    #[test]
    fn pieces_are_put_together() {
        let mut device = device(Offloads::empty(), Offloads::empty(), 1514);
        let frame: Vec<u8> = (0..100).collect();
        let pieces = vec![
            frame[..40].to_vec(),
            frame[40..41].to_vec(),
            frame[41..].to_vec(),
        ];
        assert_eq!(receive(&mut device, pieces, FrameMeta::PLAIN), frame);
        let pieces = vec![vec![1; 40_000], vec![2; 40_000]];
        assert_eq!(receive(&mut device, pieces, FrameMeta::PLAIN), []);
        assert_eq!(device.counters().too_long, 1);
    }

    #[test]
    fn frames_are_shown_in_batches_and_buffers_come_back() {
        let mut device = device(Offloads::CHECKSUM, Offloads::empty(), 1514);
        for sent in 0..4 {
            let room = device.transmit(Instant::ZERO).expect("room");
            assert_eq!(
                room.consume(60, |frame| {
                    frame.copy_from_slice(&datagram());
                    sent
                }),
                sent
            );
        }
        assert_eq!(device.sender.queue().published, 0);
        assert!(device.transmit(Instant::ZERO).is_none(), "no more buffers");
        assert_eq!(device.sender.queue().published, 4);
        let sent = device.sender.queue_mut().serve();
        let (frame, meta) = &sent[0];
        let partial = Checksum::Partial {
            start: 34,
            offset: 6,
        };
        assert_eq!(meta.checksum, partial);
        assert_ne!(frame[40..42], [0x12, 0x34], "the sum of the pseudo header");
        assert!(device.transmit(Instant::ZERO).is_some());
    }

    #[test]
    fn who_waits_for_room_hears_of_it() {
        let mut device = device(Offloads::empty(), Offloads::empty(), 1514);
        while let Some(room) = device.transmit(Instant::ZERO) {
            room.consume(60, |frame| frame.fill(1));
        }
        assert!(!device.arm());
        assert_eq!(device.sender.queue().armed, 1);
        let sent = device.sender.queue_mut().serve_late();
        assert_eq!(sent, 4);
        assert!(device.arm(), "there is room");
        assert!(device.transmit(Instant::ZERO).is_some());
        assert!(!device.arm());
        assert_eq!(device.sender.queue().armed, 2, "not while there is room");
    }

    /// Hands the frames of one to the other, in pieces if they are long.
    fn carry(from: &mut Fake, to: &mut Fake, longest: &mut usize) {
        from.flush();
        let limits = from.limits;
        for (frame, meta) in from.sender.queue_mut().serve() {
            let checked = meta.check(&frame, frame.len(), 1518, limits.transmit);
            *longest = frame.len().max(*longest);
            let pieces = frame.chunks(2000).map(<[u8]>::to_vec).collect();
            to.rx
                .frames
                .push_back((pieces, checked.expect("a good frame")));
        }
    }

    /// TCP from one interface to another, which is what there is of the stack
    /// that this device is for.
    fn transfer(transmit: Offloads, receive: Offloads, buffer: usize) -> usize {
        const BYTES: usize = 300_000;
        let byte = |index: usize| (index * 31 / 7) as u8;
        let mut devices = [0; 2].map(|_| device(transmit, receive, buffer));
        let mut interfaces = [1u8, 2].map(|host| {
            let mac = MacAddress::local(host.into());
            let config = Config::new(EthernetAddress(mac.0).into());
            let device = &mut devices[usize::from(host) - 1];
            let mut interface = Interface::new(config, device, Instant::ZERO);
            interface.update_ip_addrs(|addresses| {
                let address = IpCidr::new(IpAddress::v4(10, 0, 0, host), 24);
                addresses.push(address).expect("room for an address");
            });
            interface
        });
        let mut memory = [0; 4].map(|_| vec![0; 65_535]);
        let [one, two, three, four] = &mut memory;
        let socket =
            |rx, tx| tcp::Socket::new(tcp::SocketBuffer::new(rx), tcp::SocketBuffer::new(tx));
        let sockets = [
            socket(&mut one[..], &mut two[..]),
            socket(&mut three[..], &mut four[..]),
        ];
        let mut places = [0; 2].map(|_| [SocketStorage::EMPTY; 1]);
        let [first, second] = &mut places;
        let mut sets = [
            SocketSet::new(&mut first[..]),
            SocketSet::new(&mut second[..]),
        ];
        let [client, server] = sockets;
        let handles = [sets[0].add(client), sets[1].add(server)];
        let server = sets[1].get_mut::<tcp::Socket<'_>>(handles[1]);
        server.listen(80).unwrap();
        let client = sets[0].get_mut::<tcp::Socket<'_>>(handles[0]);
        let to = (IpAddress::v4(10, 0, 0, 2), 80);
        client.connect(interfaces[0].context(), to, 5000).unwrap();

        let (mut sent, mut got, mut longest) = (0, 0, 0);
        for step in 0..20_000 {
            let now = Instant::from_millis(step);
            for index in 0..2 {
                interfaces[index].poll(now, &mut devices[index], &mut sets[index]);
            }
            let [one, two] = &mut devices;
            carry(one, two, &mut longest);
            carry(two, one, &mut 0);
            let client = sets[0].get_mut::<tcp::Socket<'_>>(handles[0]);
            if client.can_send() && sent < BYTES {
                sent += client
                    .send(|room| {
                        let count = room.len().min(BYTES - sent);
                        for (index, place) in room[..count].iter_mut().enumerate() {
                            *place = byte(sent + index);
                        }
                        (count, count)
                    })
                    .unwrap();
            }
            let server = sets[1].get_mut::<tcp::Socket<'_>>(handles[1]);
            if server.can_recv() {
                let received = server.recv(|data| {
                    for (index, found) in data.iter().enumerate() {
                        assert_eq!(*found, byte(got + index), "byte {}", got + index);
                    }
                    (data.len(), data.len())
                });
                got += received.unwrap();
            }
            if got == BYTES {
                break;
            }
        }
        assert_eq!(got, BYTES);
        for device in &devices {
            assert_eq!(device.counters(), SmoltcpCounters::default());
        }
        longest
    }

    #[test]
    fn tcp_with_and_without_offloads() {
        let none = Offloads::empty();
        assert_eq!(transfer(none, none, 1514), 1514);
        // Nobody has checked it, so it is checked here.
        assert_eq!(transfer(none, Offloads::CHECKSUM, 1514), 1514);
        assert_eq!(transfer(Offloads::CHECKSUM, Offloads::CHECKSUM, 1514), 1514);
        let all = Offloads::CHECKSUM | Offloads::TSO4;
        assert!(transfer(all, all, 65_549) > 10_000, "long frames");
    }
}
