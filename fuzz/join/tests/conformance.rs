//! What has to hold for virtio-blk on every ring, transport and feature set.

use pvkit_guest::block::{BlockError, BlockOp, BlockQueue, Reason};
use pvkit_guest::fault::Fault;
use pvkit_guest::virtio::block::{Block, BlockOptions, QueueOf};
use pvkit_join::Join;
use pvkit_join::any::AnyTransport;
use pvkit_join::arena::ArenaSpace;
use pvkit_join::conformance::Combination;
use pvkit_join::disk::{RecordingDisk, pattern};
use pvkit_join::pci::AnyWire;
use pvkit_join::stepped::Steps;
use std::sync::Arc;

const SECTORS: u64 = 256;

type Transport = AnyTransport<AnyWire>;

struct Scene {
    block: Block<Transport>,
    queue: QueueOf<Vec<u8>, ArenaSpace, Transport>,
    join: Join,
    steps: Steps,
    disk: RecordingDisk,
}

impl Scene {
    fn new(with: &Combination) -> Self {
        let disk = RecordingDisk::new(SECTORS);
        let device = with.block_options();
        let (join, steps) = Join::stepped(with.kind, Arc::new(disk.clone()), device, 4 << 20);
        let (block, queue) =
            Block::open(join.transport(), join.space(), BlockOptions::default()).unwrap();
        assert_eq!(block.features() & Combination::decided(), with.features());
        Self {
            block,
            queue,
            join,
            steps,
            disk,
        }
    }

    fn submit(&mut self, op: BlockOp, buffer: Option<Vec<u8>>, tag: u64) {
        self.queue.submit(op, buffer, tag).unwrap();
    }

    fn read(&mut self, sector: u64) {
        self.submit(BlockOp::Read { sector }, Some(vec![0; 512]), sector);
        self.queue.publish();
        self.steps.run();
        let done = self.queue.complete().unwrap().expect("a completion");
        assert_eq!((done.tag, done.result), (sector, Ok(())));
        assert_eq!(done.buffer.unwrap(), pattern(sector, 512));
    }

    fn close(self) {
        let Self {
            block, queue, join, ..
        } = self;
        block.close(queue, &mut |_| {}).unwrap();
        assert_eq!((join.arena.in_use(), join.arena.leaked()), (0, 0));
    }
}

fn every_operation_does_what_it_says(with: &Combination) {
    let mut scene = Scene::new(with);
    for sector in [0, 7, SECTORS - 1] {
        scene.read(sector);
    }
    let data = pattern(1000, 8192);
    let ops = [
        (BlockOp::Write { sector: 16 }, Some(data.clone())),
        (BlockOp::Flush, None),
        (BlockOp::Read { sector: 16 }, Some(vec![0; 8192])),
        (BlockOp::GetId, Some(vec![0xee; 20])),
    ];
    for (tag, (op, buffer)) in (0..).zip(ops) {
        scene.submit(op, buffer, tag);
        scene.queue.publish();
        scene.steps.run();
        let done = scene.queue.complete().unwrap().expect("a completion");
        assert_eq!((done.tag, done.op, done.result), (tag, op, Ok(())));
        match op {
            BlockOp::Read { .. } => assert_eq!(done.buffer.unwrap(), data),
            BlockOp::GetId => assert!(done.buffer.unwrap().starts_with(b"pvkit\0")),
            _ => {}
        }
    }
    assert_eq!(
        scene.disk.disk.contents()[16 * 512..32 * 512],
        data[..],
        "what was written"
    );
    scene.close();
}

fn requests_of_all_lengths_fill_the_queue_again_and_again(with: &Combination) {
    let mut scene = Scene::new(with);
    scene.disk.allow(0);
    let (mut tag, mut open) = (0u64, 0u32);
    for round in 0..60u64 {
        // Until no more fits, whatever a request takes.
        loop {
            let sector = tag % 128;
            let bytes = 512 * (1 + (tag % 5) as usize);
            let op = BlockOp::Read { sector };
            match scene.queue.submit(op, Some(vec![0; bytes]), tag) {
                Ok(()) => (tag, open) = (tag + 1, open + 1),
                Err(refused) => {
                    assert_eq!(refused.reason, Reason::Full);
                    break;
                }
            }
        }
        scene.queue.publish();
        scene.disk.allow(1 + (round % 40) as usize * 7);
        scene.steps.poll(u32::MAX);
        while let Some(done) = scene.queue.complete().unwrap() {
            done.result.unwrap();
            let bytes = 512 * (1 + (done.tag % 5) as usize);
            assert_eq!(done.buffer.unwrap(), pattern(done.tag % 128, bytes));
            open -= 1;
        }
    }
    scene.disk.allow(usize::MAX);
    scene.steps.poll(u32::MAX);
    while let Some(done) = scene.queue.complete().unwrap() {
        done.result.unwrap();
        open -= 1;
    }
    assert_eq!(open, 0, "every request came back once");
    scene.close();
}

fn a_batch_costs_one_doorbell_and_one_interrupt(with: &Combination) {
    let mut scene = Scene::new(with);
    scene.steps.run();
    for batch in [1, 8, 64] {
        let (kicks, interrupts) = (scene.join.wire.kicks(), scene.join.interrupts.count());
        for round in 0..10 {
            assert!(!scene.queue.arm());
            for tag in 0..batch {
                scene.submit(BlockOp::Read { sector: tag }, Some(vec![0; 512]), tag);
            }
            scene.queue.publish();
            scene.steps.run();
            for _ in 0..batch {
                scene.queue.complete().unwrap().unwrap().result.unwrap();
            }
            assert_eq!(scene.join.wire.kicks() - kicks, round + 1);
            assert_eq!(scene.join.interrupts.count() - interrupts, round + 1);
            // A pin stays up until somebody asks why.
            scene.block.claim_events();
        }
    }
    scene.close();
}

fn a_driver_that_polls_is_not_interrupted(with: &Combination) {
    let mut scene = Scene::new(with);
    for round in 0..300 {
        scene.read(round % SECTORS);
    }
    assert_eq!(scene.join.interrupts.count(), 0);
    scene.close();
}

fn arming_sees_what_came_meanwhile(with: &Combination) {
    let mut scene = Scene::new(with);
    for round in 0..20 {
        for tag in 0..3 {
            scene.submit(BlockOp::Read { sector: tag }, Some(vec![0; 512]), tag);
        }
        scene.queue.publish();
        scene.steps.run();
        for left in (0..3).rev() {
            assert!(scene.queue.arm(), "round {round}: {} are there", left + 1);
            scene.queue.complete().unwrap().expect("a completion");
        }
        assert!(!scene.queue.arm());
    }
    scene.close();
}

fn recovering_under_load_hands_everything_back(with: &Combination) {
    let mut scene = Scene::new(with);
    for life in 0..6 {
        scene.disk.allow(2);
        let mut seen = [false; 12];
        for tag in 0..12 {
            scene.submit(BlockOp::Read { sector: tag }, Some(vec![0; 512]), tag);
            if tag == 8 {
                scene.queue.publish();
                scene.steps.poll(6);
            }
        }
        if life % 2 == 0 {
            while let Some(done) = scene.queue.complete().unwrap() {
                seen[done.tag as usize] = true;
            }
        }
        if life % 3 == 0 {
            scene.queue.retire(Fault::Timeout);
            assert_eq!(scene.queue.complete().unwrap_err(), Fault::Timeout);
        }
        scene.disk.allow(usize::MAX);
        let Scene { block, queue, .. } = &mut scene;
        let mut back = |done: pvkit_guest::block::Done<Vec<u8>>| {
            assert_eq!(done.result, Err(BlockError::Reset));
            let twice = std::mem::replace(&mut seen[done.tag as usize], true);
            assert!(!twice, "request {} came back twice", done.tag);
        };
        if life == 5 {
            block.reset_queue(queue, &mut back).unwrap();
        } else {
            block.recover(queue, &mut back).unwrap();
        }
        assert_eq!(seen, [true; 12]);
        for sector in 0..20 {
            scene.read(sector);
        }
    }
    scene.close();
}

pvkit_join::conformance!("virtio-blk":
    every_operation_does_what_it_says,
    requests_of_all_lengths_fill_the_queue_again_and_again,
    a_batch_costs_one_doorbell_and_one_interrupt,
    a_driver_that_polls_is_not_interrupted,
    arming_sees_what_came_meanwhile,
    recovering_under_load_hands_everything_back,
);
