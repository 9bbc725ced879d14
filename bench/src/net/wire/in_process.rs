//! A link whose other end answers in the thread that asks: the device's worker.
//! No system call, and no third thread: the cost of the transport alone.

use super::PEER_MAC;
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape, Sent,
    TxFrame, Waits,
};
use pvkit_host::worker::Interest;
use pvkit_protocol::frame::{DEFAULT_MTU, FrameMeta, Offloads};
use pvkit_workload::net::frame::MAX_BYTES;
use pvkit_workload::net::peer::Peer;
use std::collections::VecDeque;
use std::mem;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Most frames that wait for the device.
const MOST_WAITING: usize = 4096;

/// The link.
#[derive(Debug, Clone)]
pub struct InProcess(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Away while a lane is open.
    end: Mutex<Option<Box<End>>>,
    counters: Arc<LinkCounters>,
}

/// The other end.
#[derive(Debug)]
struct End {
    peer: Peer,
    /// Frames for the device, but those that are generated.
    waiting: VecDeque<Vec<u8>>,
    started: Instant,
    out: [u8; MAX_BYTES],
    /// Bytes of a generated frame in `out` that the device had no room for.
    left: usize,
    copy: Vec<u8>,
}

impl Default for InProcess {
    fn default() -> Self {
        let end = End {
            peer: Peer::new(PEER_MAC),
            waiting: VecDeque::new(),
            started: Instant::now(),
            out: [0; MAX_BYTES],
            left: 0,
            copy: Vec::new(),
        };
        Self(Arc::new(Shared {
            end: Mutex::new(Some(Box::new(end))),
            counters: Arc::default(),
        }))
    }
}

impl Link for InProcess {
    fn shape(&self) -> LinkShape {
        LinkShape {
            mtu: DEFAULT_MTU,
            lanes: 1,
            cheap: Offloads::empty(),
            speed_mbps: None,
        }
    }

    fn is_up(&self) -> bool {
        true
    }

    /// It is always up.
    fn connect(&self, _events: Arc<dyn LinkEvents>) {}

    fn lane(&self, index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        let mut end = self.0.end.lock().unwrap_or_else(PoisonError::into_inner);
        let end = end.take().filter(|_| index == 0);
        let end = end.ok_or(LinkError::NoLane { index, lanes: 1 })?;
        Ok(Box::new(Lane {
            shared: self.0.clone(),
            end: Some(end),
        }))
    }

    /// Its frames never leave any work.
    fn set_receive(&self, _offloads: Offloads) -> Result<(), LinkError> {
        Ok(())
    }

    fn use_lanes(&self, count: u16) -> Result<(), LinkError> {
        if count == 1 {
            Ok(())
        } else {
            Err(LinkError::NoLane {
                index: count.saturating_sub(1),
                lanes: 1,
            })
        }
    }
}

#[derive(Debug)]
struct Lane {
    shared: Arc<Shared>,
    /// Always there, until this is dropped.
    end: Option<Box<End>>,
}

impl Drop for Lane {
    fn drop(&mut self) {
        let mut end = self
            .shared
            .end
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *end = self.end.take();
    }
}

impl End {
    fn now_us(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    fn put(&mut self, frame: Vec<u8>) -> bool {
        let room = self.waiting.len() < MOST_WAITING;
        if room {
            self.waiting.push_back(frame);
        }
        room
    }

    fn has_frames(&self) -> bool {
        self.left > 0 || !self.waiting.is_empty() || self.peer.due(self.now_us(), 1) > 0
    }
}

impl LinkLane for Lane {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let Some(end) = &mut self.end else {
            return Sent::Done;
        };
        let counters = &self.shared.counters;
        // A frame that is to be cut has nobody here who wants it.
        if frame.meta.segments.is_some() {
            counters.send_drops.add(1);
            return Sent::Done;
        }
        counters.sent.add(1);
        counters.sent_bytes.add(frame.bytes() as u64);
        let mut copy = mem::take(&mut end.copy);
        copy.clear();
        copy.extend_from_slice(frame.head);
        copy.resize(frame.bytes(), 0);
        frame
            .rest
            .gather(copy.get_mut(frame.head.len()..).unwrap_or(&mut []));
        let now = end.now_us();
        let lost = if let Some(answer) = end.peer.control(&copy, None, now) {
            !end.put(answer.to_vec())
        } else if end.peer.data(&copy) {
            end.peer.turn_around(&mut copy);
            !end.put(mem::take(&mut copy))
        } else {
            false
        };
        if lost {
            counters.receive_drops.add(1);
        }
        end.copy = copy;
        Sent::Done
    }

    fn flush(&mut self) {}

    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        let Some(end) = &mut self.end else { return 0 };
        let mut taken = 0;
        let mut bytes = 0;
        while taken < budget {
            let Some(frame) = end.waiting.front() else {
                break;
            };
            if sink.deliver(frame, &FrameMeta::PLAIN) == Delivered::Full {
                return taken;
            }
            bytes += frame.len() as u64;
            end.waiting.pop_front();
            taken += 1;
        }
        let now = end.now_us();
        let due = u64::from(end.left > 0) + end.peer.due(now, u64::from(budget - taken));
        for _ in 0..due.min(u64::from(budget - taken)) {
            if end.left == 0 {
                end.left = end.peer.next(&mut end.out, now);
            }
            let frame = end.out.get(..end.left).unwrap_or(&[]);
            if frame.is_empty() || sink.deliver(frame, &FrameMeta::PLAIN) == Delivered::Full {
                break;
            }
            bytes += frame.len() as u64;
            end.left = 0;
            taken += 1;
        }
        let counters = &self.shared.counters;
        counters.received.add(u64::from(taken));
        counters.received_bytes.add(bytes);
        taken
    }

    fn arm(&mut self, waits: Waits) -> bool {
        waits.receive && self.end.as_ref().is_some_and(|end| end.has_frames())
    }

    /// Only the device's own worker makes frames, and the clock.
    fn sources<'a>(&'a self, _waits: Waits, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}

    fn deadline(&self) -> Option<Instant> {
        let end = self.end.as_ref()?;
        let next = end.peer.next_us()?;
        Some(end.started + Duration::from_micros(next))
    }

    fn counters(&self) -> Arc<LinkCounters> {
        self.shared.counters.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pvkit_host::memory::IoBufs;
    use pvkit_protocol::frame::MacAddress;
    use pvkit_workload::net::control::{FRAME_BYTES, Message, Mode, Subject};
    use pvkit_workload::net::frame;

    const GUEST: MacAddress = MacAddress::local(7);

    fn send(lane: &mut dyn LinkLane, frame: &[u8]) {
        let frame = TxFrame {
            head: frame,
            rest: &IoBufs::new(),
            meta: FrameMeta::PLAIN,
        };
        assert_eq!(lane.send(&frame), Sent::Done);
    }

    struct Frames {
        frames: Vec<Vec<u8>>,
        room: usize,
    }

    impl FrameSink for Frames {
        fn deliver(&mut self, frame: &[u8], _meta: &FrameMeta) -> Delivered {
            if self.room == 0 {
                return Delivered::Full;
            }
            self.room -= 1;
            self.frames.push(frame.to_vec());
            Delivered::Taken
        }
    }

    fn receive(lane: &mut dyn LinkLane, room: usize) -> Vec<Vec<u8>> {
        let mut sink = Frames {
            frames: Vec::new(),
            room,
        };
        let taken = lane.receive(&mut sink, 1000);
        assert_eq!(taken as usize, sink.frames.len());
        sink.frames
    }

    fn ask(lane: &mut dyn LinkLane, message: Message) -> Message {
        let mut frame = [0; FRAME_BYTES];
        message.write(&mut frame, MacAddress::BROADCAST, GUEST);
        send(lane, &frame);
        let answer = receive(lane, 1);
        let (answer, from) = Message::read(&answer[0]).unwrap();
        assert!(answer.is_answer() && from == PEER_MAC);
        answer
    }

    #[test]
    fn it_counts_answers_and_generates_in_the_caller_s_thread() {
        let link = InProcess::default();
        let mut lane = link.lane(0).unwrap();
        assert!(link.lane(0).is_err(), "it is open");
        drop(lane);
        lane = link.lane(0).unwrap();
        let waits = Waits {
            receive: true,
            send: false,
        };
        let mut data = [0; 64];
        frame::fill(&mut data, PEER_MAC, GUEST, 1, 2);
        send(&mut *lane, &data);
        let answer = ask(&mut *lane, Message::request(Subject::Counters, 1));
        assert_eq!(answer.received.get(), 1);
        assert!(!lane.arm(waits));

        ask(&mut *lane, Message::mode_request(Mode::Echo, 2));
        send(&mut *lane, &data);
        assert!(lane.arm(waits));
        let back = receive(&mut *lane, 10);
        frame::check(&back[0], 1, 64).unwrap();

        let mut request = Message::request(Subject::Generate, 3);
        request.frame_bytes.set(1514);
        request.count.set(100);
        request.limit_us.set(u64::MAX);
        ask(&mut *lane, request);
        // A device without room loses nothing.
        let mut frames = Vec::new();
        for room in [0, 1, 7, 1000, 1000, 1000] {
            frames.extend(receive(&mut *lane, room));
        }
        assert!(frames.len() > 100);
        for (sequence, frame) in frames[..100].iter().enumerate() {
            frame::check(frame, sequence as u64, 1514).unwrap();
        }
        assert!(Message::read(&frames[100]).is_some());
        assert!(!lane.arm(waits));
    }
}
