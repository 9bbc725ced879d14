//! What the receiver of a frame does not take, done in software: checksums
//! completed, and frames cut into segments.
//!
//! All of it works on a private copy of a frame, in place, and is a pure
//! function: [`finish`] takes any bytes and any [`FrameMeta`].
#![forbid(unsafe_code)]

use pvkit_protocol::frame::{BadFrame, Checksum, FrameMeta, Offloads, SegmentKind, Segmentation};
use pvkit_protocol::inet::{
    Headers, IPV4_CHECKSUM, IPV6_HEADER_BYTES, IpVersion, Sum, TCP_CHECKSUM, UDP_CHECKSUM, protocol,
};

/// Where things stand in an IPv4 header (RFC 791 §3.1).
const IPV4_TOTAL_LENGTH: usize = 2;
const IPV4_IDENTIFICATION: usize = 4;
/// Where the length of what follows stands in an IPv6 header (RFC 8200 §3).
const IPV6_PAYLOAD_LENGTH: usize = 4;
/// Where things stand in a TCP header (RFC 9293 §3.1).
const TCP_SEQUENCE: usize = 4;
const TCP_FLAGS: usize = 13;
/// Flags of TCP that end something: only the last segment has them.
const TCP_FIN_PSH: u8 = 0x01 | 0x08;
/// "Congestion window reduced": only the first segment has it (RFC 3168
/// §6.1.2).
const TCP_CWR: u8 = 0x80;
/// Where the length stands in a UDP header (RFC 768).
const UDP_LENGTH: usize = 4;

/// The agreement that a frame needs which starts with `head`: as
/// [`FrameMeta::needs`], with the version of IP that it has.
#[must_use]
pub fn needs(head: &[u8], meta: &FrameMeta) -> Offloads {
    let mut needs = meta.needs();
    let v6 = || Headers::parse(head).is_some_and(|headers| headers.version == IpVersion::V6);
    if needs.contains(Offloads::USO4) && v6() {
        needs.remove(Offloads::USO4);
        needs.insert(Offloads::USO6);
    }
    needs
}

/// Whether a receiver that takes `takes` gets such a frame as it is.
#[must_use]
pub fn is_taken(head: &[u8], meta: &FrameMeta, takes: Offloads) -> bool {
    if *meta == FrameMeta::PLAIN {
        return true;
    }
    takes.contains(needs(head, meta))
}

/// What [`finish`] makes of a frame that it cuts: how many frames, and how many
/// bytes in all, at most.
#[must_use]
pub fn cut_size(bytes: usize, segments: &Segmentation) -> (usize, usize) {
    let header = usize::from(segments.header_bytes);
    let payload = bytes.saturating_sub(header);
    let frames = payload.div_ceil(usize::from(segments.size).max(1));
    (frames, payload + frames * header)
}

/// What a receiver is told of a frame that is passed on as it is. One that
/// leaves all checksums to be found in the frame is not told about them.
#[must_use]
pub fn told(meta: &FrameMeta, takes: Offloads) -> FrameMeta {
    let mut told = *meta;
    if told.checksum == Checksum::Valid && !takes.contains(Offloads::CHECKSUM) {
        told.checksum = Checksum::Unknown;
    }
    told
}

/// Makes of a frame what a receiver gets that takes `takes`, and hands it to
/// `each`, in order, as headers and what follows them: once for a frame that is
/// not cut, then with nothing in the second part. Returns whether there was
/// something to do.
///
/// The lengths, the identification and the checksums that segments have are
/// made anew, whatever stood in the frame. If its IP header says that the packet
/// ends before the frame does, only the packet is cut.
///
/// # Errors
/// [`BadFrame`] if it cannot be done: the frame is not what `meta` says. Then
/// `each` was not called. Frames that were [checked](FrameMeta::check) do not
/// come to this, but for one: a segment that is longer than its IP header can
/// say.
pub fn finish(
    frame: &mut [u8],
    meta: &FrameMeta,
    takes: Offloads,
    mut each: impl FnMut(&[u8], &[u8], &FrameMeta),
) -> Result<bool, BadFrame> {
    if is_taken(frame, meta, takes) {
        each(frame, &[], &told(meta, takes));
        return Ok(false);
    }
    match (&meta.segments, meta.checksum) {
        (Some(segments), _) => cut(frame, segments, takes, each)?,
        (None, Checksum::Partial { start, offset }) => {
            complete(frame, start, offset).ok_or(BadFrame::Checksum { start, offset })?;
            each(frame, &[], &FrameMeta::PLAIN);
        }
        // Nothing else needs an agreement.
        (None, _) => each(frame, &[], &told(meta, takes)),
    }
    Ok(true)
}

/// Completes a partial checksum; `None` if its field is outside of the frame.
fn complete(frame: &mut [u8], start: u16, offset: u16) -> Option<()> {
    let summed = frame.get_mut(usize::from(start)..)?;
    let at = usize::from(offset);
    summed.get(at..at + 2)?;
    let checksum = Sum::new().bytes(summed).finish();
    put(summed, at, not_none(checksum, offset))
}

/// A UDP checksum of 0 says that there is none; its other value is sent
/// instead (RFC 768).
fn not_none(checksum: u16, offset: u16) -> u16 {
    match checksum {
        0 if offset == UDP_CHECKSUM => 0xffff,
        checksum => checksum,
    }
}

fn put(bytes: &mut [u8], at: usize, word: u16) -> Option<()> {
    let field = bytes.get_mut(at..at + 2)?;
    field.copy_from_slice(&word.to_be_bytes());
    Some(())
}

fn cut(
    frame: &mut [u8],
    segments: &Segmentation,
    takes: Offloads,
    mut each: impl FnMut(&[u8], &[u8], &FrameMeta),
) -> Result<(), BadFrame> {
    let header_bytes = usize::from(segments.header_bytes);
    let size = usize::from(segments.size);
    let mut template = Template::new(frame, segments, takes).ok_or(BadFrame::Segmentation)?;
    let end = match template.headers.end as usize {
        end if end > header_bytes && end < frame.len() => end,
        _ => frame.len(),
    };
    let (header, payload) = match frame.get_mut(..end) {
        Some(packet) if size != 0 && header_bytes < end => packet.split_at_mut(header_bytes),
        _ => return Err(BadFrame::Segmentation),
    };
    let count = payload.chunks(size).len();
    for (index, chunk) in payload.chunks(size).enumerate() {
        // No later segment is longer than the first: if one cannot be made,
        // that is the first.
        let meta = template
            .write(header, chunk, index == 0, index + 1 == count)
            .ok_or(BadFrame::Segmentation)?;
        each(header, chunk, &meta);
    }
    Ok(())
}

/// What the headers of the segments have in common, and where the next one is.
struct Template {
    headers: Headers,
    kind: SegmentKind,
    /// Partial checksums are left to the receiver.
    partial: bool,
    identification: u16,
    sequence: u32,
    flags: u8,
}

impl Template {
    fn new(frame: &[u8], segments: &Segmentation, takes: Offloads) -> Option<Self> {
        let header = frame.get(..usize::from(segments.header_bytes))?;
        let headers = Headers::parse(header)?;
        let (version, transport) = match segments.kind {
            SegmentKind::Tcp4 => (IpVersion::V4, protocol::TCP),
            SegmentKind::Tcp6 => (IpVersion::V6, protocol::TCP),
            SegmentKind::Udp => (headers.version, protocol::UDP),
        };
        let as_said = headers.version == version
            && headers.protocol == transport
            && headers.payload == Some(segments.header_bytes);
        if !as_said {
            return None;
        }
        let network = usize::from(headers.network);
        let transport = usize::from(headers.transport);
        let mut template = Self {
            headers,
            kind: segments.kind,
            partial: takes.contains(Offloads::CHECKSUM),
            identification: 0,
            sequence: 0,
            flags: 0,
        };
        if headers.version == IpVersion::V4 {
            let at = network + IPV4_IDENTIFICATION;
            template.identification = u16::from_be_bytes(*header.get(at..)?.first_chunk()?);
        }
        if segments.kind != SegmentKind::Udp {
            let at = transport + TCP_SEQUENCE;
            template.sequence = u32::from_be_bytes(*header.get(at..)?.first_chunk()?);
            template.flags = *header.get(transport + TCP_FLAGS)?;
        }
        Some(template)
    }

    /// Makes the header of the next segment.
    fn write(
        &mut self,
        header: &mut [u8],
        chunk: &[u8],
        first: bool,
        last: bool,
    ) -> Option<FrameMeta> {
        let network = usize::from(self.headers.network);
        let transport = usize::from(self.headers.transport);
        let packet = header.len() - network + chunk.len();
        match self.headers.version {
            IpVersion::V4 => {
                let ip = header.get_mut(network..transport)?;
                put(ip, IPV4_TOTAL_LENGTH, u16::try_from(packet).ok()?)?;
                put(ip, IPV4_IDENTIFICATION, self.identification)?;
                put(ip, IPV4_CHECKSUM, 0)?;
                let checksum = Sum::new().bytes(ip).finish();
                put(ip, IPV4_CHECKSUM, checksum)?;
                self.identification = self.identification.wrapping_add(1);
            }
            IpVersion::V6 => {
                let bytes = packet - usize::from(IPV6_HEADER_BYTES);
                let bytes = u16::try_from(bytes).ok()?;
                put(header, network + IPV6_PAYLOAD_LENGTH, bytes)?;
            }
        }
        // Not more than the packet, which was just seen to fit.
        let datagram = (header.len() - transport + chunk.len()) as u32;
        let offset = if self.kind == SegmentKind::Udp {
            put(header, transport + UDP_LENGTH, datagram as u16)?;
            UDP_CHECKSUM
        } else {
            let at = transport + TCP_SEQUENCE;
            let sequence = header.get_mut(at..at + 4)?;
            sequence.copy_from_slice(&self.sequence.to_be_bytes());
            self.sequence = self.sequence.wrapping_add(chunk.len() as u32);
            let mut flags = self.flags;
            if !first {
                flags &= !TCP_CWR;
            }
            if !last {
                flags &= !TCP_FIN_PSH;
            }
            *header.get_mut(transport + TCP_FLAGS)? = flags;
            TCP_CHECKSUM
        };
        let field = transport + usize::from(offset);
        let sum = self.headers.pseudo_header(header, datagram)?;
        let mut meta = FrameMeta::PLAIN;
        if self.partial {
            put(header, field, sum.fold())?;
            meta.checksum = Checksum::Partial {
                start: self.headers.transport,
                offset,
            };
        } else {
            put(header, field, 0)?;
            // Headers of TCP and UDP are of even length.
            let sum = sum.bytes(header.get(transport..)?).bytes(chunk);
            put(header, field, not_none(sum.finish(), offset))?;
        }
        Some(meta)
    }
}

#[cfg(test)]
mod tests;
