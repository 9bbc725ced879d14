//! Batches of completions of which the device names only the last.
#![forbid(unsafe_code)]

use super::Shared;
use super::ring::Used;
use crate::dma::{DmaBuf, DmaSpace};
use crate::fault::Fault;

/// With IN_ORDER, one completion stands for all chains up to the one it names
/// (virtio 1.3 §2.7.9): takes them one by one, the oldest first. What it skips
/// was used to the full.
pub(super) fn next_in_order<B: DmaBuf, X: 'static, S: DmaSpace<Addr = u64>>(
    shared: &mut Shared<B, X, S>,
    batch: &mut Option<Used>,
    shown: u64,
) -> Result<Option<Used>, Fault> {
    let last = match *batch {
        Some(last) => {
            shared.ring.next_of_batch(last.id)?;
            last
        }
        None => {
            let Some(last) = shared.ring.next_used()? else {
                return Ok(None);
            };
            // If the device has it, the walk from the oldest comes to it.
            let slot = shared.slots.get(usize::from(last.id));
            let has = slot
                .and_then(|slot| slot.0.as_ref())
                .is_some_and(|request| request.number < shown);
            if !has {
                return Err(Fault::NotInFlight { id: last.id });
            }
            last
        }
    };
    let oldest = shared.ring.oldest_id();
    if oldest == last.id {
        *batch = None;
        return Ok(Some(last));
    }
    *batch = Some(last);
    Ok(Some(Used {
        id: oldest,
        len: u32::MAX,
        exact: false,
    }))
}
