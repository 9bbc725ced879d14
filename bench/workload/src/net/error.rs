//! Why a job on a network card fails.

use super::control::Subject;
use super::frame::Mismatch;
use super::tcp::TcpError;
use pvkit_guest::fault::Fault;
use pvkit_guest::net::Reason;
use thiserror::Error;

/// Why a job failed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NetError {
    /// A field of the job makes no sense.
    #[error("the job's {field} = {value} makes no sense")]
    Job {
        /// The field.
        field: &'static str,
        /// Its value.
        value: u64,
    },
    /// No memory for buffers or bookkeeping.
    #[error("no memory for the job")]
    Memory,
    /// The card has no address.
    #[error("the network card has no address")]
    NoAddress,
    /// The driver refused a frame.
    #[error("the driver refused a frame: {0}")]
    Refused(Reason),
    /// The device broke the protocol.
    #[error("the device is broken: {0}")]
    Fault(#[from] Fault),
    /// A buffer did not come back.
    #[error("a buffer did not come back")]
    BufferLost,
    /// The device does not send.
    #[error("the device sends nothing any more; it has {sent} frames")]
    Stalled {
        /// Frames that it has.
        sent: u64,
    },
    /// The peer does not answer.
    #[error("the peer does not answer ({0:?})")]
    NoAnswer(Subject),
    /// Nothing comes in, although the peer sends.
    #[error("nothing comes in, although the peer sends; {received} frames came")]
    NothingReceived {
        /// Frames that came before.
        received: u64,
    },
    /// A frame came in that is not what was sent.
    #[error("wrong data: {0}")]
    Data(#[from] Mismatch),
    /// The peer got frames that are not what was sent.
    #[error("the peer got {wrong} wrong frames of {checked}: frame {sequence}, byte {offset}")]
    WrongAtPeer {
        /// How many.
        wrong: u64,
        /// Of how many.
        checked: u64,
        /// The first of them.
        sequence: u64,
        /// Where it was wrong.
        offset: u64,
    },
    /// Frames came twice, or in another order.
    #[error("frame {found} came after frame {before}")]
    Order {
        /// The one that came first.
        before: u64,
        /// The other one.
        found: u64,
    },
    /// Frames were lost that must not be.
    #[error("of {sent} frames that were sent slowly, {received} came")]
    Lost {
        /// How many were sent.
        sent: u64,
        /// How many came.
        received: u64,
    },
    /// A TCP connection failed.
    #[error(transparent)]
    Tcp(#[from] TcpError),
}
