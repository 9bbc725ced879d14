//! A device of several lanes: what one queue does is no matter of the others,
//! but a reset waits for all.

use super::{Ready, SECTORS, options};
use pvkit_host::state::{RestoreError, SavedState};
use pvkit_host::virtio::block::Block;
use pvkit_host::virtio::device::{
    ConfigEvents, Device, Identity, LaneResources, LaneState, StartError,
};
use pvkit_host::virtio::queue::Fault;
use pvkit_host::worker::{Failure, Progress, Worker};
use pvkit_hostile::guest::{Guest, HOLE, LOW, Machine, readable, writable};
use pvkit_join::disk::{RecordingDisk, pattern};
use pvkit_join::stepped::{Steps, stepped};
use pvkit_protocol::virtio::block::RequestType;
use pvkit_protocol::virtio::mmio::{self, InterruptStatus};
use pvkit_protocol::virtio::{DeviceStatus, Features};
use std::sync::Arc;

/// Three disks behind one set of registers, each with a queue.
#[derive(Debug)]
struct Three([Block; 3]);

impl Device for Three {
    fn identity(&self) -> Identity {
        Identity {
            lanes: vec![0..1, 1..2, 2..3],
            queue_sizes: vec![self.0[0].identity().queue_sizes[0]; 3],
            ..self.0[0].identity()
        }
    }
    fn connect(&mut self, events: Arc<dyn ConfigEvents>) {
        for block in &mut self.0 {
            block.connect(events.clone());
        }
    }
    fn read_config(&self, offset: u32, out: &mut [u8]) {
        self.0[0].read_config(offset, out);
    }
    fn write_config(&mut self, _offset: u32, _data: &[u8]) {}
    fn start(
        &mut self,
        lane: u16,
        resources: LaneResources,
        features: Features,
        at: Option<&LaneState>,
    ) -> Result<Box<dyn Worker>, StartError> {
        self.0[usize::from(lane)].start(0, resources, features, at)
    }
    fn stopped(&mut self, lane: u16, worker: Box<dyn Worker>) -> LaneState {
        self.0[usize::from(lane)].stopped(0, worker)
    }
    fn save(&self) -> SavedState {
        self.0[0].save()
    }
    fn restore(&mut self, state: &SavedState) -> Result<(), RestoreError> {
        self.0[0].restore(state)
    }
    fn reset(&mut self) {}
}

struct Lanes {
    guests: [Guest; 3],
    disks: [RecordingDisk; 3],
    steps: Steps,
}

impl Lanes {
    /// Negotiated, and no queue set up.
    fn new() -> Self {
        let machine = Machine::new(super::KIND);
        let disks = [(); 3].map(|()| RecordingDisk::new(SECTORS));
        let blocks = [0, 1, 2].map(|n: usize| {
            let disk: RecordingDisk = disks[n].clone();
            Block::new(Arc::new(disk), options()).unwrap()
        });
        let counters = blocks[0].counters();
        let (executor, steps) = stepped();
        let base = LOW.start;
        let mut first = machine
            .guest_of(Box::new(Three(blocks)), counters, base, Box::new(executor))
            .stepped_by(steps.clone());
        assert!(first.negotiate(Features::VERSION_1));
        let guests = [
            first.at_queue(0, base),
            first.at_queue(1, base + 0x10000),
            first.at_queue(2, base + 0x20000),
        ];
        Self {
            guests,
            disks,
            steps,
        }
    }

    fn start(&mut self, queues: &[usize]) {
        for queue in queues {
            self.guests[*queue].set_up_queue();
        }
        self.guests[0].go();
    }

    /// Reads a sector through a queue.
    fn works(&mut self, queue: usize) -> bool {
        let guest = &mut self.guests[queue];
        let header = guest.set_header(0, RequestType::IN, 9);
        let data = guest.layout.data;
        guest.poke(data, &[0xee; 513]);
        guest.post(&[readable(header, 16), writable(data, 513)]);
        guest.kick();
        self.steps.run();
        guest.used() == [(0, 513)] && guest.peek(data, 512) == pattern(9, 512)
    }
}

#[test]
fn a_queue_that_cannot_start_beside_two_that_can() {
    let mut lanes = Lanes::new();
    lanes.guests[1].layout.descriptors = HOLE;
    lanes.start(&[0, 1, 2]);
    let status = lanes.guests[0].status();
    assert!(status.contains(DeviceStatus::DEVICE_NEEDS_RESET));
    let causes = lanes.guests[0].interrupt_status();
    assert!(causes.contains(InterruptStatus::CONFIG_CHANGE));
    for _ in 0..20 {
        assert!(lanes.works(0) && lanes.works(2), "the others work");
    }
    lanes.guests[1].kick();
    assert!(lanes.guests[0].reset());
}

#[test]
fn a_queue_that_breaks_beside_two_that_do_not() {
    let mut lanes = Lanes::new();
    lanes.start(&[0, 1, 2]);
    assert!(lanes.works(0) && lanes.works(1) && lanes.works(2));
    lanes.guests[1].set_index(0x4000);
    let progress = lanes.steps.poll(64);
    let fault = Fault::IndexJump {
        from: 1,
        to: 0x4000,
        size: 8,
    };
    assert_eq!(
        progress,
        [
            Progress::Drained,
            Progress::Broken(Failure::new(fault)),
            Progress::Drained
        ]
    );
    let status = lanes.guests[2].status();
    assert!(status.contains(DeviceStatus::DEVICE_NEEDS_RESET));
    for _ in 0..20 {
        assert!(lanes.works(0) && lanes.works(2), "the others work");
    }
    // A second one breaks, too; the last goes on.
    lanes.guests[0].set_index(0x4000);
    assert!(matches!(lanes.steps.poll(64)[0], Progress::Broken(_)));
    assert!(lanes.works(2));
    assert!(lanes.guests[0].reset());
    assert!(lanes.guests[0].status().is_empty());
    assert!(lanes.guests[0].negotiate(Features::VERSION_1));
    lanes.start(&[0, 1, 2]);
    assert!(lanes.works(0) && lanes.works(1) && lanes.works(2));
}

#[test]
fn a_reset_waits_for_every_lane() {
    for busy in 0..3 {
        let mut lanes = Lanes::new();
        lanes.start(&[0, 1, 2]);
        lanes.disks[busy].allow(0);
        assert!(!lanes.works(busy), "the disk holds it");
        lanes.guests[0].set_status(DeviceStatus::empty());
        for _ in 0..50 {
            let status = lanes.guests[0].status();
            assert_eq!(status, DeviceStatus::all_of_a_driver(), "lane {busy}");
        }
        // The lanes that have stopped stay so.
        for queue in (0..3).filter(|queue| *queue != busy) {
            assert!(!lanes.works(queue));
        }
        lanes.disks[busy].allow(1);
        assert!(lanes.guests[0].reset_finishes(), "lane {busy}");
        let before = lanes.guests[0].remember();
        lanes.steps.poll(64);
        assert_eq!(lanes.guests[0].changed(&before, &[]), [0; 0]);
    }
}

#[test]
fn queues_that_are_not_enabled_do_not_run() {
    let mut lanes = Lanes::new();
    lanes.start(&[1]);
    assert_eq!(lanes.steps.poll(64), [Progress::Drained]);
    assert!(lanes.works(1));
    for queue in [0, 2] {
        // Too late, until the next life.
        lanes.guests[queue].set_up_queue();
        assert_eq!(lanes.guests[queue].register(mmio::QUEUE_READY), 0);
        assert!(!lanes.works(queue));
    }
    let status = lanes.guests[0].status();
    assert_eq!(status, DeviceStatus::all_of_a_driver());
    assert!(lanes.guests[0].reset());
    assert_eq!(lanes.steps.poll(64), []);
}
