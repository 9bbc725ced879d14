//! Frames whose rest lies in guest memory, in pieces.
#![allow(unreachable_pub, reason = "a module of a test")]

use pvkit_host::link::{LinkLane, Sent, TxFrame};
use pvkit_host::memory::{Access, GuestMemory, IoBufs};
use pvkit_protocol::frame::{FrameMeta, HEAD_BYTES};
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Sends a frame as a device does: its head copied, and the rest of it in
/// pieces of so many bytes in the guest's memory, with gaps between them.
pub fn send(lane: &mut dyn LinkLane, frame: &[u8], piece: usize, meta: FrameMeta) -> Sent {
    let map = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
    let snapshot = GuestMemory::new(Arc::new(map)).unwrap().snapshot();
    let (head, tail) = frame.split_at(frame.len().min(HEAD_BYTES));
    let mut rest = IoBufs::new();
    rest.start(&snapshot);
    let mut addr = 13;
    for piece in tail.chunks(piece) {
        snapshot.write(addr, piece).unwrap();
        rest.push(addr, piece.len() as u64, Access::Read).unwrap();
        addr += piece.len() as u64 + 7;
    }
    let sent = lane.send(&TxFrame {
        head,
        rest: &rest,
        meta,
    });
    lane.flush();
    sent
}
