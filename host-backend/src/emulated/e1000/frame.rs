//! A frame that descriptors are put together to, and the work on it that the
//! driver left to the device.
#![forbid(unsafe_code)]

use crate::memory::{Access, IoBufs, MemoryError, Snapshot};
use pvkit_protocol::emulated::e1000::{
    ContextDescriptor, LegacyDescriptor, PacketOptions, TuCommand,
};
use pvkit_protocol::frame::{
    BadFrame, Checksum, ETHERNET_HEADER_BYTES, FrameMeta, MAX_SEGMENTED_FRAME_BYTES,
    MIN_WIRE_FRAME_BYTES, Offloads, SegmentKind, Segmentation, VLAN_TAG_BYTES,
};
use pvkit_protocol::inet::{
    Headers, IPV4_CHECKSUM, IPV6_HEADER_BYTES, IpVersion, Sum, TCP_CHECKSUM,
};
use std::sync::Arc;
use thiserror::Error;

/// Bytes that are copied out of the guest: every offset of a context
/// descriptor, with a field behind it, lies in them.
const HEAD_COPY: usize = 260;
const HEAD_ROOM: usize = HEAD_COPY + VLAN_TAG_BYTES;
/// Most pieces of memory of a frame, besides its head: fewer than a system
/// call takes.
const MAX_PIECES: usize = 512;
/// Most descriptors of a frame.
const MAX_DESCRIPTORS: u32 = 1024;
/// What a link does with frames for this device.
const AGREED: Offloads = Offloads::CHECKSUM
    .union(Offloads::TSO4)
    .union(Offloads::TSO6)
    .union(Offloads::TSO_ECN);

/// "Congestion window reduced", in the second byte of a TCP header's flags.
const TCP_CWR: u8 = 0x80;
const TCP_FLAGS: usize = 13;

/// Why a frame is dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub(super) enum FrameFault {
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Bad(#[from] BadFrame),
    #[error("a frame of more than {MAX_PIECES} pieces")]
    Pieces,
    #[error("a descriptor of type {0}")]
    Type(u8),
}

/// A checksum as descriptors tell it, counted from the frame's first byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Span {
    start: u8,
    offset: u8,
    /// The last byte that counts; 0 for the end of the frame.
    end: u16,
    /// A sum of 0 is stored as all ones, as UDP has it.
    never_zero: bool,
}

/// What the last descriptor of a frame says of all of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ending<'a> {
    /// Its VLAN tag and the type of such frames, if one is to be inserted.
    pub(super) vlan: Option<(u16, u16)>,
    /// It is a legacy descriptor that wants a checksum.
    pub(super) legacy: Option<LegacyDescriptor>,
    /// Contexts: for checksums, and for segments.
    pub(super) contexts: &'a [ContextDescriptor; 2],
    /// Short frames are padded.
    pub(super) pads: bool,
    /// Longest frame that is not cut.
    pub(super) max: usize,
}

/// A frame in the making.
#[derive(Debug)]
pub(super) struct Frame {
    head: [u8; HEAD_ROOM],
    head_bytes: usize,
    rest: IoBufs,
    bytes: usize,
    descriptors: u32,
    /// What its first descriptor wants; none for legacy ones.
    options: PacketOptions,
    segmented: bool,
    fault: Option<FrameFault>,
    /// Where sums are made that a link does not make; as long as the longest
    /// frame once it was needed.
    scratch: Vec<u8>,
}

impl Frame {
    pub(super) fn new() -> Self {
        Self {
            head: [0; HEAD_ROOM],
            head_bytes: 0,
            rest: IoBufs::new(),
            bytes: 0,
            descriptors: 0,
            options: PacketOptions::empty(),
            segmented: false,
            fault: None,
            scratch: Vec::new(),
        }
    }

    /// Forgets all that was added, and the guest's memory.
    pub(super) fn clear(&mut self) {
        self.rest.clear();
        self.end();
    }

    /// The frame is over.
    pub(super) fn end(&mut self) {
        self.head_bytes = 0;
        self.bytes = 0;
        self.descriptors = 0;
        self.fault = None;
    }

    pub(super) fn head(&self) -> &[u8] {
        self.head.get(..self.head_bytes).unwrap_or(&[])
    }

    pub(super) fn rest(&self) -> &IoBufs {
        &self.rest
    }

    pub(super) fn is_started(&self) -> bool {
        self.descriptors != 0
    }

    /// Whether it will be dropped, so that nothing of it need be kept.
    pub(super) fn is_lost(&self) -> bool {
        self.fault.is_some()
    }

    /// Notes why it cannot be sent; the first reason counts.
    pub(super) fn fail(&mut self, fault: FrameFault) {
        self.fault.get_or_insert(fault);
    }

    /// One more descriptor belongs to it, which says this of the frame if it
    /// is the first.
    pub(super) fn begin(
        &mut self,
        memory: &Arc<Snapshot>,
        options: PacketOptions,
        segmented: bool,
    ) {
        if self.descriptors == 0 {
            self.rest.start(memory);
            self.options = options;
            self.segmented = segmented;
        }
        self.count();
    }

    /// One more descriptor stands among its own.
    pub(super) fn count(&mut self) {
        self.descriptors = self.descriptors.saturating_add(1);
        if self.descriptors > MAX_DESCRIPTORS {
            self.fail(FrameFault::Pieces);
        }
    }

    /// A buffer follows.
    #[inline]
    pub(super) fn push(&mut self, memory: &Snapshot, addr: u64, bytes: u32) {
        if self.is_lost() {
            return;
        }
        if let Err(fault) = self.add(memory, addr, bytes as usize) {
            self.fail(fault);
        }
    }

    #[inline]
    fn add(&mut self, memory: &Snapshot, addr: u64, bytes: usize) -> Result<(), FrameFault> {
        self.bytes += bytes;
        if self.bytes > MAX_SEGMENTED_FRAME_BYTES {
            return Err(BadFrame::Long {
                bytes: self.bytes,
                max: MAX_SEGMENTED_FRAME_BYTES,
            }
            .into());
        }
        let copied = bytes.min(HEAD_COPY.saturating_sub(self.head_bytes));
        let room = self.head_bytes..self.head_bytes + copied;
        if let Some(room) = self.head.get_mut(room).filter(|room| !room.is_empty()) {
            memory.read(addr, room)?;
            self.head_bytes += copied;
        }
        if bytes > copied {
            let left = (bytes - copied) as u64;
            self.rest
                .push(addr.wrapping_add(copied as u64), left, Access::Read)?;
            if self.rest.as_iovecs().len() > MAX_PIECES {
                return Err(FrameFault::Pieces);
            }
        }
        Ok(())
    }

    /// The frame is complete: does what is left to the device, and returns
    /// what is left to the link.
    pub(super) fn finish(&mut self, ending: &Ending<'_>) -> Result<FrameMeta, FrameFault> {
        if let Some(fault) = self.fault {
            return Err(fault);
        }
        let [plain, segments] = ending.contexts;
        let context = if self.segmented { segments } else { plain };
        let span = match (&ending.legacy, self.options.contains(PacketOptions::TXSM)) {
            (Some(legacy), _) => Some(Span {
                start: legacy.checksum_start,
                offset: legacy.checksum_offset,
                end: 0,
                never_zero: false,
            }),
            (None, true) => Some(Span {
                start: context.transport_start,
                offset: context.transport_offset,
                end: context.transport_end.get(),
                never_zero: !context.command().contains(TuCommand::TCP),
            }),
            (None, false) => None,
        };
        if self.options.contains(PacketOptions::IXSM) && !self.segmented {
            self.store_sum(Span {
                start: context.ip_start,
                offset: context.ip_offset,
                end: context.ip_end.get(),
                never_zero: false,
            })?;
        }
        let mut checksum = match span {
            None => Checksum::Unknown,
            Some(span) => self.transport_sum(span)?,
        };
        let mut shift = 0;
        if let Some((kind, tag)) = ending.vlan {
            self.insert_tag(kind, tag)?;
            shift = VLAN_TAG_BYTES as u16;
            if let Checksum::Partial { start, .. } = &mut checksum {
                *start += shift;
            }
        }
        if ending.pads && !self.segmented {
            self.pad();
        }
        let mut meta = FrameMeta {
            checksum,
            segments: None,
        };
        if self.segmented {
            meta.segments = Some(self.segmentation(context, checksum)?);
        }
        let meta = meta.check(self.head(), self.bytes, ending.max, AGREED)?;
        if let Some(segments) = meta.segments {
            if segments.header_bytes != u16::from(context.header_bytes) + shift {
                return Err(BadFrame::Segmentation.into());
            }
            self.complete_headers()?;
        }
        Ok(meta)
    }

    fn segmentation(
        &self,
        context: &ContextDescriptor,
        checksum: Checksum,
    ) -> Result<Segmentation, BadFrame> {
        let command = context.command();
        let Checksum::Partial { start, .. } = checksum else {
            return Err(BadFrame::Segmentation);
        };
        if !command.contains(TuCommand::TCP) {
            return Err(BadFrame::Segmentation);
        }
        let flags = self.head().get(usize::from(start) + TCP_FLAGS);
        Ok(Segmentation {
            kind: if command.contains(TuCommand::IP) {
                SegmentKind::Tcp4
            } else {
                SegmentKind::Tcp6
            },
            ecn: flags.is_some_and(|flags| flags & TCP_CWR != 0),
            size: context.segment_bytes.get(),
            header_bytes: 0,
        })
    }

    /// Leaves a sum to the link, if it is one as links make them.
    fn transport_sum(&mut self, span: Span) -> Result<Checksum, FrameFault> {
        let to_the_end = span.end == 0 || usize::from(span.end) + 1 >= self.bytes;
        if to_the_end
            && usize::from(span.start) >= ETHERNET_HEADER_BYTES
            && let Some(offset) = span.offset.checked_sub(span.start)
        {
            return Ok(Checksum::Partial {
                start: u16::from(span.start),
                offset: u16::from(offset),
            });
        }
        self.store_sum(span)?;
        Ok(Checksum::Unknown)
    }

    /// Makes a sum.
    fn store_sum(&mut self, span: Span) -> Result<(), FrameFault> {
        let bad = BadFrame::Checksum {
            start: u16::from(span.start),
            offset: u16::from(span.offset),
        };
        let start = usize::from(span.start);
        let end = match usize::from(span.end) {
            0 => self.bytes,
            last => self.bytes.min(last + 1),
        };
        let sum = if let Some(bytes) = self.head().get(start..end) {
            Sum::new().bytes(bytes).finish()
        } else {
            if self.scratch.is_empty() {
                self.scratch = vec![0; MAX_SEGMENTED_FRAME_BYTES];
            }
            let (head, tail) = self
                .scratch
                .split_at_mut_checked(self.head_bytes)
                .ok_or(bad)?;
            head.copy_from_slice(self.head.get(..self.head_bytes).ok_or(bad)?);
            self.rest.gather(tail);
            let bytes = self.scratch.get(start..end).ok_or(bad)?;
            Sum::new().bytes(bytes).finish()
        };
        let sum = if sum == 0 && span.never_zero {
            0xffff
        } else {
            sum
        };
        let place = usize::from(span.offset);
        let head = self.head.get_mut(..self.head_bytes).ok_or(bad)?;
        let field = head.get_mut(place..place + 2).ok_or(bad)?;
        field.copy_from_slice(&sum.to_be_bytes());
        Ok(())
    }

    /// Puts a VLAN tag behind the addresses.
    fn insert_tag(&mut self, kind: u16, tag: u16) -> Result<(), BadFrame> {
        const ADDRESSES: usize = 12;
        let short = BadFrame::Short { bytes: self.bytes };
        if self.head_bytes < ETHERNET_HEADER_BYTES {
            return Err(short);
        }
        let behind = ADDRESSES + VLAN_TAG_BYTES;
        self.head.copy_within(ADDRESSES..self.head_bytes, behind);
        let [a, b] = kind.to_be_bytes();
        let [c, d] = tag.to_be_bytes();
        let place = self.head.get_mut(ADDRESSES..behind).ok_or(short)?;
        place.copy_from_slice(&[a, b, c, d]);
        self.head_bytes += VLAN_TAG_BYTES;
        self.bytes += VLAN_TAG_BYTES;
        Ok(())
    }

    /// Makes a short frame as long as those on wires.
    fn pad(&mut self) {
        if self.bytes < MIN_WIRE_FRAME_BYTES
            && let Some(room) = self.head.get_mut(self.head_bytes..MIN_WIRE_FRAME_BYTES)
        {
            // All of it is in the head.
            room.fill(0);
            self.head_bytes = MIN_WIRE_FRAME_BYTES;
            self.bytes = MIN_WIRE_FRAME_BYTES;
        }
    }

    /// The chip fills in lengths for each segment, so drivers leave them out.
    /// A link wants a packet whose headers are right for all of it.
    fn complete_headers(&mut self) -> Result<(), BadFrame> {
        let headers = Headers::parse(self.head()).ok_or(BadFrame::Segmentation)?;
        let network = usize::from(headers.network);
        let transport = usize::from(headers.transport);
        let length = |from: usize| {
            self.bytes
                .checked_sub(from)
                .and_then(|bytes| u16::try_from(bytes).ok())
                .ok_or(BadFrame::Segmentation)
        };
        let segment = length(transport)?;
        match headers.version {
            IpVersion::V4 => {
                let total = length(network)?;
                self.put(network + 2, total)?;
                self.put(network + IPV4_CHECKSUM, 0)?;
                let header = self.head().get(network..transport);
                let header = header.ok_or(BadFrame::Segmentation)?;
                let sum = Sum::new().bytes(header).finish();
                self.put(network + IPV4_CHECKSUM, sum)?;
            }
            IpVersion::V6 => {
                let payload = length(network + usize::from(IPV6_HEADER_BYTES))?;
                self.put(network + 4, payload)?;
            }
        }
        let pseudo = headers
            .pseudo_header(self.head(), u32::from(segment))
            .ok_or(BadFrame::Segmentation)?;
        self.put(transport + usize::from(TCP_CHECKSUM), pseudo.fold())
    }

    fn put(&mut self, at: usize, value: u16) -> Result<(), BadFrame> {
        let head = self.head.get_mut(..self.head_bytes);
        let place = head.and_then(|head| head.get_mut(at..at + 2));
        place
            .ok_or(BadFrame::Segmentation)?
            .copy_from_slice(&value.to_be_bytes());
        Ok(())
    }

    /// Its length as it was last known.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
