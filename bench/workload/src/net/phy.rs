//! A network card as the TCP stack `smoltcp` wants it.
//!
//! Nothing is copied on the way in if a frame lies in one piece, and nothing on
//! the way out. Checksums and segmentation are left to the card as far as it
//! takes them.

use super::frame::MAX_BYTES;
use super::run::NetError;
use alloc::vec::Vec;
use core::num::NonZeroUsize;
use pvkit_guest::net::{
    Checksum, FrameMeta, HEADROOM, NetBuf, NetLimits, NetRx, NetTx, Offloads, Reason, RxFrame,
    SegmentKind, Segmentation,
};
use pvkit_protocol::frame::{ETHERNET_HEADER_BYTES, MAX_SEGMENTED_FRAME_BYTES};
use pvkit_protocol::inet::{Headers, protocol};
use smoltcp::phy::{self, ChecksumCapabilities, DeviceCapabilities, Medium, PacketMeta};
use smoltcp::time::Instant;

/// Longest frame that is left to the card to be cut: an IP packet of 65,535
/// bytes.
const LONG_BYTES: usize = ETHERNET_HEADER_BYTES + u16::MAX as usize;
/// Frames after which the card is told, if there are still more.
const PUBLISH_EVERY: u32 = 32;

/// A card for the stack, for as long as a connection lasts.
pub(super) struct Phy<'a, B, Tx, Rx> {
    rx: &'a mut Rx,
    /// Where frames go that do not lie in one piece.
    scratch: Vec<u8>,
    out: Out<'a, B, Tx>,
    receive: Offloads,
    unpublished: u32,
    /// Frames received.
    pub(super) received: u64,
}

/// The half that transmits, and its buffers.
struct Out<'a, B, Tx> {
    tx: &'a mut Tx,
    offloads: Offloads,
    short: Vec<B>,
    long: Vec<B>,
    /// Frames that the device has not been shown.
    queued: u32,
    sent: u64,
    meta: PacketMeta,
    error: Option<NetError>,
}

impl<'a, B: NetBuf, Tx: NetTx<B>, Rx: NetRx> Phy<'a, B, Tx, Rx> {
    /// A card whose driver has these halves, with `short` buffers for frames
    /// and, if it segments, `long` ones of [`long_buffer_bytes`].
    ///
    /// # Errors
    /// If there is no memory.
    pub(super) fn new(
        (tx, rx): (&'a mut Tx, &'a mut Rx),
        limits: &NetLimits,
        short: Vec<B>,
        long: Vec<B>,
    ) -> Result<Self, NetError> {
        let mut scratch = Vec::new();
        scratch
            .try_reserve_exact(MAX_SEGMENTED_FRAME_BYTES)
            .map_err(|_| NetError::Memory)?;
        scratch.resize(MAX_SEGMENTED_FRAME_BYTES, 0);
        Ok(Self {
            rx,
            scratch,
            out: Out {
                tx,
                offloads: limits.transmit,
                short,
                long,
                queued: 0,
                sent: 0,
                meta: PacketMeta::default(),
                error: None,
            },
            receive: limits.receive,
            unpublished: 0,
            received: 0,
        })
    }

    /// Frames sent.
    pub(super) fn sent(&self) -> u64 {
        self.out.sent
    }

    /// Ends a batch: the card sees all frames that were queued, and takes its
    /// buffers back.
    ///
    /// # Errors
    /// What went wrong since the last call.
    pub(super) fn flush(&mut self) -> Result<(), NetError> {
        self.out.publish();
        self.out.reap();
        self.out.error.take().map_or(Ok(()), Err)
    }

    /// There was nothing to be received for now: the card gets back what it may
    /// fill.
    pub(super) fn idle(&mut self) {
        if self.unpublished > 0 {
            self.unpublished = 0;
            self.rx.publish();
        }
    }
}

/// Bytes of a buffer for frames that the card is to cut.
pub(super) const fn long_buffer_bytes() -> usize {
    HEADROOM + LONG_BYTES
}

impl<B: NetBuf, Tx: NetTx<B>> Out<'_, B, Tx> {
    fn fail(&mut self, error: impl Into<NetError>) {
        self.error.get_or_insert(error.into());
    }

    fn publish(&mut self) {
        if self.queued > 0 {
            self.queued = 0;
            self.tx.publish();
        }
    }

    fn segments(&self) -> bool {
        self.offloads.contains(Offloads::CHECKSUM | Offloads::TSO4)
    }

    fn reap(&mut self) {
        loop {
            match self.tx.complete() {
                Ok(Some(buffer)) => self.put(buffer),
                Ok(None) => return,
                Err(fault) => return self.fail(fault),
            }
        }
    }

    fn put(&mut self, buffer: B) {
        if buffer.as_ref().len() >= long_buffer_bytes() {
            self.long.push(buffer);
        } else {
            self.short.push(buffer);
        }
    }

    /// Whether any frame could be sent now.
    fn is_ready(&mut self) -> bool {
        let ready = |out: &Self| {
            let long = !out.segments() || !out.long.is_empty();
            // A long frame may need more than one piece.
            long && !out.short.is_empty() && out.tx.room() >= 4
        };
        if !ready(self) {
            self.publish();
            self.reap();
        }
        ready(self) && self.error.is_none()
    }

    fn send(&mut self, mut buffer: B, bytes: usize) {
        let frame = buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes);
        let size = self.meta.segmentation_offload_size;
        let meta = finish(
            frame.unwrap_or(&mut []),
            self.offloads,
            size.map(Into::into),
        );
        match self.tx.submit(buffer, bytes, &meta) {
            Ok(()) => {
                self.sent += 1;
                self.queued += 1;
                if self.queued >= PUBLISH_EVERY {
                    self.publish();
                }
            }
            Err(refused) => {
                match refused.buffer {
                    Some(buffer) => self.put(buffer),
                    None => self.fail(NetError::BufferLost),
                }
                // A full queue loses the frame, as any wire may.
                if refused.reason != Reason::Full {
                    self.fail(NetError::Refused(refused.reason));
                }
            }
        }
    }
}

/// Leaves to the card what it takes: writes the sum of the pseudo header where
/// the checksum belongs, and says how the frame is to be cut.
fn finish(frame: &mut [u8], offloads: Offloads, segment: Option<u16>) -> FrameMeta {
    if !offloads.contains(Offloads::CHECKSUM) {
        return FrameMeta::PLAIN;
    }
    let Some(headers) = Headers::parse(frame).filter(|headers| headers.protocol == protocol::TCP)
    else {
        return FrameMeta::PLAIN;
    };
    let checksum = headers.partial_checksum();
    let Checksum::Partial { start, offset } = checksum else {
        return FrameMeta::PLAIN;
    };
    let end = if headers.end == 0 {
        frame.len()
    } else {
        (headers.end as usize).min(frame.len())
    };
    let bytes = end.saturating_sub(usize::from(start));
    let Some(sum) = headers.pseudo_header(frame, bytes as u32) else {
        return FrameMeta::PLAIN;
    };
    let at = usize::from(start) + usize::from(offset);
    if let Some(field) = frame.get_mut(at..at + 2) {
        field.copy_from_slice(&sum.fold().to_be_bytes());
    }
    FrameMeta {
        checksum,
        segments: segment.map(|size| Segmentation {
            kind: SegmentKind::Tcp4,
            ecn: false,
            size,
            header_bytes: headers.payload.unwrap_or(0),
        }),
    }
}

/// Whether a TCP segment's checksum is right; `true` for other frames, whose
/// checksums the stack checks.
fn is_right(frame: &[u8]) -> bool {
    let Some(headers) = Headers::parse(frame).filter(|headers| headers.protocol == protocol::TCP)
    else {
        return true;
    };
    let end = (headers.end as usize).min(frame.len());
    let Some(segment) = frame.get(usize::from(headers.transport)..end) else {
        return false;
    };
    headers
        .pseudo_header(frame, segment.len() as u32)
        .is_some_and(|sum| sum.bytes(segment).fold() == u16::MAX)
}

/// A frame on its way into the stack.
pub(super) struct Received<'a>(In<'a>);

enum In<'a> {
    Lent(RxFrame<'a>),
    Copied(&'a [u8]),
}

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, take: F) -> R {
        match self.0 {
            In::Lent(frame) => take(frame.as_slice().unwrap_or(&[])),
            In::Copied(frame) => take(frame),
        }
    }
}

/// A place for a frame on its way out.
pub(super) struct Slot<'a, 'b, B, Tx>(&'a mut Out<'b, B, Tx>);

impl<B: NetBuf, Tx: NetTx<B>> phy::TxToken for Slot<'_, '_, B, Tx> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, bytes: usize, write: F) -> R {
        let list = if bytes > MAX_BYTES {
            &mut self.0.long
        } else {
            &mut self.0.short
        };
        let Some(mut buffer) = list.pop() else {
            // Not without a look at `is_ready`; the frame is lost.
            return write(&mut alloc::vec![0; bytes]);
        };
        match buffer.as_mut().get_mut(HEADROOM..HEADROOM + bytes) {
            Some(place) => {
                let result = write(place);
                self.0.send(buffer, bytes);
                result
            }
            None => {
                self.0.put(buffer);
                write(&mut alloc::vec![0; bytes])
            }
        }
    }

    fn set_meta(&mut self, meta: PacketMeta) {
        self.0.meta = meta;
    }
}

impl<'b, B: NetBuf, Tx: NetTx<B>, Rx: NetRx> phy::Device for Phy<'b, B, Tx, Rx> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Slot<'a, 'b, B, Tx>
    where
        Self: 'a;

    fn receive(&mut self, _now: Instant) -> Option<(Received<'_>, Slot<'_, 'b, B, Tx>)> {
        if !self.out.is_ready() {
            return None;
        }
        self.unpublished += 1;
        if self.unpublished >= PUBLISH_EVERY {
            self.unpublished = 0;
            self.rx.publish();
        }
        self.out.meta = PacketMeta::default();
        let frame = match self.rx.recv() {
            Ok(Some(frame)) => frame,
            Ok(None) => return None,
            Err(fault) => {
                self.out.fail(fault);
                return None;
            }
        };
        self.received += 1;
        let unknown = frame.meta().checksum == Checksum::Unknown;
        let to_check = unknown && self.receive.contains(Offloads::CHECKSUM);
        let received = if frame.as_slice().is_some() {
            In::Lent(frame)
        } else {
            let bytes = frame.copy_to(&mut self.scratch);
            drop(frame);
            In::Copied(self.scratch.get(..bytes).unwrap_or(&[]))
        };
        let whole = match &received {
            In::Lent(frame) => frame.as_slice().unwrap_or(&[]),
            In::Copied(frame) => frame,
        };
        let received = if to_check && !is_right(whole) {
            // Dropped: the stack ignores what has no header.
            In::Copied(&[])
        } else {
            received
        };
        Some((Received(received), Slot(&mut self.out)))
    }

    fn transmit(&mut self, _now: Instant) -> Option<Slot<'_, 'b, B, Tx>> {
        self.out.meta = PacketMeta::default();
        self.out.is_ready().then_some(Slot(&mut self.out))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = MAX_BYTES;
        let sends = self.out.offloads.contains(Offloads::CHECKSUM);
        let receives = self.receive.contains(Offloads::CHECKSUM);
        let mut checksum = ChecksumCapabilities::default();
        checksum.tcp = match (sends, receives) {
            (true, true) => phy::Checksum::None,
            (true, false) => phy::Checksum::Rx,
            (false, true) => phy::Checksum::Tx,
            (false, false) => phy::Checksum::Both,
        };
        capabilities.checksum = checksum;
        if self.out.segments() {
            capabilities.segmentation.tcpv4 = NonZeroUsize::new(LONG_BYTES);
        }
        capabilities
    }
}
