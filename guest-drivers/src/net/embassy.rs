//! A driver for [embassy-net](https://docs.rs/embassy-net), over any driver
//! here.
//!
//! embassy-net changes received frames in place, so they are copied once. It
//! has no way to say that a poll is over, so each frame is shown to the device
//! by itself; a device that is busy is still not rung. Likewise, the receive
//! queue is armed before each look at it.
#![forbid(unsafe_code)]

use super::pool::{SendError, Sender};
use super::{NetBuf, NetLimits, NetRx, NetTx, Offloads, RxFrame, offload};
use crate::fault::Fault;
use crate::storage::Storage;
use core::task::{Context, Waker};
use embassy_net_driver::{
    Capabilities, Checksum, Driver, HardwareAddress, LinkState, RxToken, TxToken,
};
use pvkit_protocol::frame::ETHERNET_HEADER_BYTES;

/// What a kernel knows and a queue does not: whom to wake at an interrupt, and
/// whether the link is up.
pub trait Signals {
    /// From now on, an interrupt of either queue, or of the configuration,
    /// wakes this one.
    fn register(&mut self, waker: &Waker);
    /// Whether the link is up.
    fn link_up(&mut self) -> bool {
        true
    }
}

impl<F: FnMut(&Waker)> Signals for F {
    fn register(&mut self, waker: &Waker) {
        self(waker);
    }
}

/// What an [`EmbassyDevice`] has lost so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct EmbassyCounters {
    /// Received frames with wrong checksums.
    pub bad_checksums: u64,
    /// Received frames that did not fit the scratch buffer.
    pub too_long: u64,
    /// Frames that were made, and that the queue did not take.
    pub unsent: u64,
}

/// A pair of queues as embassy-net's driver.
///
/// ```no_run
/// use pvkit_guest::net::embassy::EmbassyDevice;
/// use pvkit_guest::net::pool::Sender;
/// use pvkit_guest::net::{NetLimits, NetRx, NetTx};
///
/// # fn store(_: &core::task::Waker) {}
/// fn driver(
///     tx: impl NetTx<Vec<u8>>,
///     rx: impl NetRx,
///     limits: &NetLimits,
/// ) -> impl embassy_net_driver::Driver {
///     let sender = Sender::heap(tx, 64, || vec![0u8; 2048]);
///     // The handler of the interrupt wakes what was stored last.
///     EmbassyDevice::heap(sender, rx, limits, |waker: &core::task::Waker| store(waker))
/// }
/// ```
#[derive(Debug)]
pub struct EmbassyDevice<T, R, B: 'static, W> {
    sender: Sender<T, B>,
    rx: R,
    signals: W,
    limits: NetLimits,
    scratch: Storage<u8>,
    /// Longest frame that all transmit buffers hold.
    buffer_bytes: usize,
    lost: Lost,
    unsent: u64,
    fault: Option<Fault>,
}

/// Received frames that were lost.
#[derive(Debug, Default)]
struct Lost {
    bad_checksums: u64,
    too_long: u64,
}

impl<B: NetBuf, T: NetTx<B>, R: NetRx, W: Signals> EmbassyDevice<T, R, B, W> {
    /// A driver of these queues, with room in `scratch` for the longest frame
    /// that is received: longer ones are dropped.
    pub fn new(
        sender: Sender<T, B>,
        rx: R,
        limits: &NetLimits,
        signals: W,
        scratch: impl Into<Storage<u8>>,
    ) -> Self {
        Self {
            buffer_bytes: sender.frame_bytes(),
            sender,
            rx,
            signals,
            limits: *limits,
            scratch: scratch.into(),
            lost: Lost::default(),
            unsent: 0,
            fault: None,
        }
    }

    /// The same with room for every frame on the heap, 64 KiB.
    #[cfg(feature = "alloc")]
    pub fn heap(sender: Sender<T, B>, rx: R, limits: &NetLimits, signals: W) -> Self {
        let bytes = pvkit_protocol::frame::MAX_SEGMENTED_FRAME_BYTES;
        let scratch = Storage::heap(bytes, || 0);
        Self::new(sender, rx, limits, signals, scratch)
    }

    /// What was lost so far.
    #[must_use]
    pub fn counters(&self) -> EmbassyCounters {
        EmbassyCounters {
            bad_checksums: self.lost.bad_checksums,
            too_long: self.lost.too_long,
            unsent: self.unsent,
        }
    }

    /// A fault of either queue, once. embassy-net has no way to say it.
    pub fn take_fault(&mut self) -> Option<Fault> {
        self.fault.take()
    }

    /// The transmit queue with its buffers, and the receive queue: to recover
    /// them, say.
    pub fn queues(&mut self) -> (&mut Sender<T, B>, &mut R) {
        (&mut self.sender, &mut self.rx)
    }

    fn ready(&mut self) -> bool {
        self.sender.ready().unwrap_or_else(|fault| {
            self.fault = Some(fault);
            false
        })
    }

    /// Whether a frame can be sent; if not, the task is woken when that
    /// changes.
    fn can_send(&mut self, cx: &Context<'_>) -> bool {
        if self.ready() {
            return true;
        }
        self.signals.register(cx.waker());
        if !self.sender.arm() {
            return false;
        }
        // What was sent before the queue was armed does not interrupt.
        if self.ready() {
            return true;
        }
        // It was not enough for a frame, and nothing is armed now: look again.
        cx.waker().wake_by_ref();
        false
    }
}

/// A frame that was received.
#[derive(Debug)]
pub struct Received<'a> {
    frame: RxFrame<'a>,
    scratch: &'a mut [u8],
    lost: &'a mut Lost,
    /// embassy-net does not check it.
    check: bool,
}

impl RxToken for Received<'_> {
    /// What embassy-net must not see is an empty frame to it, which it drops.
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, f: F) -> R {
        let bytes = self.frame.bytes();
        let Some(frame) = self.scratch.get_mut(..bytes) else {
            self.lost.too_long += 1;
            return f(&mut []);
        };
        self.frame.copy_to(frame);
        if self.check && !offload::may_pass(frame, self.frame.meta()) {
            self.lost.bad_checksums += 1;
            return f(&mut []);
        }
        f(frame)
    }
}

/// Room for a frame to send.
#[derive(Debug)]
pub struct Room<'a, T, B: 'static> {
    sender: &'a mut Sender<T, B>,
    limits: &'a NetLimits,
    unsent: &'a mut u64,
    fault: &'a mut Option<Fault>,
}

impl<B: NetBuf, T: NetTx<B>> TxToken for Room<'_, T, B> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        let mut make = Some(f);
        let mut made = None;
        let sent = self.sender.send_with(len, |frame| {
            made = make.take().map(|make| make(frame));
            ((), offload::leave(frame, self.limits, None))
        });
        if let Err(error) = sent {
            *self.unsent += 1;
            if let SendError::Fault(fault) = error {
                *self.fault = Some(fault);
            }
        }
        self.sender.publish();
        match (made, make) {
            (Some(made), _) => made,
            // Only for frames longer than the capabilities allow: the queue had
            // room when this was made.
            (None, Some(make)) => make(&mut []),
            (None, None) => unreachable!("either it was called, or it is still here"),
        }
    }
}

impl<B: NetBuf, T: NetTx<B>, R: NetRx, W: Signals> Driver for EmbassyDevice<T, R, B, W> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Room<'a, T, B>
    where
        Self: 'a;

    fn receive(&mut self, cx: &mut Context<'_>) -> Option<(Received<'_>, Room<'_, T, B>)> {
        if !self.can_send(cx) {
            return None;
        }
        self.signals.register(cx.waker());
        if !self.rx.arm() {
            return None;
        }
        let frame = match self.rx.recv() {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                // There was something, and it was no frame: look again.
                cx.waker().wake_by_ref();
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
            unsent: &mut self.unsent,
            fault: &mut self.fault,
        };
        Some((received, room))
    }

    fn transmit(&mut self, cx: &mut Context<'_>) -> Option<Room<'_, T, B>> {
        self.can_send(cx).then_some(Room {
            sender: &mut self.sender,
            limits: &self.limits,
            unsent: &mut self.unsent,
            fault: &mut self.fault,
        })
    }

    fn link_state(&mut self, cx: &mut Context<'_>) -> LinkState {
        self.signals.register(cx.waker());
        if self.signals.link_up() {
            LinkState::Up
        } else {
            LinkState::Down
        }
    }

    fn capabilities(&self) -> Capabilities {
        let mut capabilities = Capabilities::default();
        let frame = usize::from(self.limits.mtu) + ETHERNET_HEADER_BYTES;
        capabilities.max_transmission_unit = frame.min(self.buffer_bytes);
        let received = self.limits.receive.contains(Offloads::CHECKSUM);
        let sent = self.limits.transmit.contains(Offloads::CHECKSUM);
        let transport = match (received, sent) {
            (false, false) => Checksum::Both,
            (false, true) => Checksum::Rx,
            (true, false) => Checksum::Tx,
            (true, true) => Checksum::None,
        };
        capabilities.checksum.tcp = transport;
        capabilities.checksum.udp = transport;
        capabilities
    }

    fn hardware_address(&self) -> HardwareAddress {
        HardwareAddress::Ethernet(self.limits.mac.unwrap_or_default().0)
    }
}

#[cfg(all(test, feature = "alloc"))]
mod tests {
    use super::{EmbassyDevice, Signals};
    use crate::net::fake::{FakeRx, FakeTx};
    use crate::net::pool::Sender;
    use crate::net::{FrameMeta, MacAddress, NetLimits, Offloads};
    use alloc::sync::Arc;
    use alloc::task::Wake;
    use alloc::vec;
    use core::sync::atomic::{AtomicUsize, Ordering};
    use core::task::{Context, Waker};
    use embassy_net_driver::{Driver, HardwareAddress, LinkState, RxToken, TxToken};

    struct Wakes(AtomicUsize);

    impl Wake for Wakes {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// A queue may have sent something, and still have no room: then it is not
    /// armed, and the task has to come back by itself.
    #[test]
    fn a_task_that_is_not_served_is_woken() {
        let limits = NetLimits {
            mac: None,
            mtu: 1500,
            transmit: Offloads::empty(),
            receive: Offloads::empty(),
            pairs: 1,
        };
        let sender = Sender::heap(FakeTx::new(1), 2, || vec![0; 2048]);
        let signals = |_: &Waker| {};
        let mut device = EmbassyDevice::heap(sender, FakeRx::default(), &limits, signals);
        let wakes = Arc::new(Wakes(AtomicUsize::new(0)));
        let waker = Waker::from(wakes.clone());
        let mut cx = Context::from_waker(&waker);
        let room = device.transmit(&mut cx).expect("room");
        room.consume(60, |frame| frame.fill(9));
        assert!(device.transmit(&mut cx).is_none());
        assert_eq!(wakes.0.load(Ordering::Relaxed), 0, "it is armed");
        device.sender.queue_mut().late.push_back(vec![0; 2048]);
        assert!(device.transmit(&mut cx).is_none(), "the ring is full");
        assert_eq!(wakes.0.load(Ordering::Relaxed), 1);
    }

    #[derive(Default)]
    struct Counted {
        registered: usize,
        down: bool,
    }

    impl Signals for &mut Counted {
        fn register(&mut self, _: &Waker) {
            self.registered += 1;
        }
        fn link_up(&mut self) -> bool {
            !self.down
        }
    }

    #[test]
    fn frames_go_both_ways_and_tasks_are_woken() {
        let limits = NetLimits {
            mac: Some(MacAddress::local(3)),
            mtu: 1500,
            transmit: Offloads::empty(),
            receive: Offloads::empty(),
            pairs: 1,
        };
        let mut signals = Counted::default();
        let sender = Sender::heap(FakeTx::new(8), 1, || vec![0; 2048]);
        let mut device = EmbassyDevice::heap(sender, FakeRx::default(), &limits, &mut signals);
        let mut cx = Context::from_waker(Waker::noop());
        assert!(device.receive(&mut cx).is_none());
        let pieces = vec![vec![1; 50], vec![2; 50]];
        device.rx.frames.push_back((pieces, FrameMeta::PLAIN));
        let (received, room) = device.receive(&mut cx).expect("a frame");
        received.consume(|frame| {
            frame[0] = 7;
            assert_eq!((frame.len(), frame[50]), (100, 2));
        });
        room.consume(60, |frame| frame.fill(9));
        assert_eq!(device.sender.queue().published, 1);
        assert!(device.transmit(&mut cx).is_none(), "the only buffer");
        assert_eq!(device.sender.queue_mut().serve().len(), 1);
        assert!(device.transmit(&mut cx).is_some());
        assert!(device.link_state(&mut cx) == LinkState::Up);
        assert_eq!(device.capabilities().max_transmission_unit, 1514);
        let mac = HardwareAddress::Ethernet(MacAddress::local(3).0);
        assert_eq!(device.hardware_address(), mac);
        drop(device);
        assert_eq!(signals.registered, 4);
        signals.down = true;
        assert!(!(&mut signals).link_up());
    }
}
