//! virtio 1.3: negotiation, transports, queues, and a driver for each device.

pub mod block;
pub mod init;
pub mod net;
pub mod queue;
pub mod transport;

pub use block::{Block, BlockOptions, VirtioBlockQueue};
pub use net::{Net, NetOptions, VirtioNetRx, VirtioNetTx};
