//! What the network cards are plugged into, and the peer at its other end.
//!
//! - [`tap`]: a tap in a network namespace of its own, where the host's stack
//!   is the other end; frames are counted by the interface.
//! - [`in_process`]: a link that answers in the thread that asks: the cost of
//!   the transport alone, and what is left where no taps can be made.

pub mod in_process;
mod packet;
mod server;
mod sys;
pub mod tap;

use pvkit_protocol::frame::MacAddress;

/// The address of every peer: each is alone with its guest.
pub const PEER_MAC: MacAddress = MacAddress::local(0x5052);
