//! The card of old on real KVM, with guests of a few instructions.
#![cfg(feature = "vmm")]

mod common;

use common::{Code, elf, have_kvm, write};
use pvkit_host::emulated::e1000::E1000Options;
use pvkit_host::executor::ThreadOptions;
use pvkit_host::link::{
    Delivered, FrameSink, Link, LinkCounters, LinkError, LinkEvents, LinkLane, LinkShape, Sent,
    TxFrame, Waits,
};
use pvkit_host::memory::GuestMemory;
use pvkit_host::vmm::{Stop, Vm, VmOptions};
use pvkit_host::worker::Interest;
use pvkit_protocol::emulated::e1000::register as reg;
use pvkit_protocol::emulated::e1000::{
    Cause, LegacyDescriptor, Rctl, RxDescriptor, RxStatus, Tctl, TxCommand, ports,
};
use pvkit_protocol::frame::{FrameMeta, MacAddress, Offloads};
use pvkit_protocol::pci::{Bdf, Command, header};
use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use zerocopy::IntoBytes;

/// Where the monitor puts the card's registers and ports.
const REGISTERS: u32 = 0xe000_0000;
const PORTS: u16 = 0xc000;
const PLACE: Bdf = Bdf::new(2, 0);
const MAC: MacAddress = MacAddress([0x52, 0x54, 0, 1, 2, 3]);
/// Memory that the guest's code does not use.
const TX_RING: u32 = 0x20_0000;
const RX_RING: u32 = 0x20_1000;
const TX_BUFFER: u32 = 0x20_2000;
const RX_BUFFER: u32 = 0x20_4000;

/// A link whose other end sends everything back.
#[derive(Debug, Default, Clone)]
struct Echo {
    frames: Arc<Mutex<VecDeque<Vec<u8>>>>,
    counters: Arc<LinkCounters>,
}

impl Link for Echo {
    fn shape(&self) -> LinkShape {
        LinkShape {
            mtu: 1500,
            lanes: 1,
            cheap: Offloads::empty(),
            speed_mbps: None,
        }
    }
    fn is_up(&self) -> bool {
        true
    }
    fn connect(&self, _events: Arc<dyn LinkEvents>) {}
    fn lane(&self, _index: u16) -> Result<Box<dyn LinkLane>, LinkError> {
        Ok(Box::new(self.clone()))
    }
    fn set_receive(&self, _offloads: Offloads) -> Result<(), LinkError> {
        Ok(())
    }
    fn use_lanes(&self, _count: u16) -> Result<(), LinkError> {
        Ok(())
    }
}

impl LinkLane for Echo {
    fn send(&mut self, frame: &TxFrame<'_>) -> Sent {
        let mut bytes = vec![0; frame.bytes()];
        let (head, rest) = bytes.split_at_mut(frame.head.len());
        head.copy_from_slice(frame.head);
        frame.rest.gather(rest);
        self.frames.lock().unwrap().push_back(bytes);
        Sent::Done
    }
    fn flush(&mut self) {}
    fn receive(&mut self, sink: &mut dyn FrameSink, budget: u32) -> u32 {
        let mut frames = self.frames.lock().unwrap();
        let mut taken = 0;
        while taken < budget
            && let Some(frame) = frames.front()
            && sink.deliver(frame, &FrameMeta::PLAIN) == Delivered::Taken
        {
            frames.pop_front();
            taken += 1;
        }
        taken
    }
    fn arm(&mut self, waits: Waits) -> bool {
        waits.receive && !self.frames.lock().unwrap().is_empty()
    }
    fn sources<'a>(&'a self, _waits: Waits, _each: &mut dyn FnMut(BorrowedFd<'a>, Interest)) {}
    fn counters(&self) -> Arc<LinkCounters> {
        self.counters.clone()
    }
}

fn set(code: Code, register: u32, value: u32) -> Code {
    code.store(REGISTERS + register, value)
}

fn read<const N: usize>(memory: &GuestMemory, addr: u32) -> [u8; N] {
    let mut bytes = [0; N];
    memory.snapshot().read(u64::from(addr), &mut bytes).unwrap();
    bytes
}

#[test]
fn a_guest_sends_itself_a_frame() {
    if !have_kvm() {
        return;
    }
    let mut vm = Vm::new(VmOptions {
        memory_bytes: 32 << 20,
        vcpus: 1,
    })
    .unwrap();
    // No spinning: the tail's register is what wakes the worker.
    let threads = ThreadOptions {
        spin: Duration::ZERO,
        ..ThreadOptions::default()
    };
    let options = E1000Options::new(MAC);
    let (place, counters) = vm
        .add_e1000(Arc::new(Echo::default()), &options, threads)
        .unwrap();
    assert_eq!(place, PLACE);

    let mut frame = Vec::from(MAC.0);
    frame.extend(MAC.0);
    frame.extend([0x88, 0xb5]);
    frame.extend((0..500u32).map(|n| (n * 11) as u8));
    let transmit = LegacyDescriptor {
        address: u64::from(TX_BUFFER).into(),
        length: (frame.len() as u16).into(),
        command: (TxCommand::EOP | TxCommand::RS).bits(),
        ..LegacyDescriptor::default()
    };
    let receive = RxDescriptor {
        address: u64::from(RX_BUFFER).into(),
        ..RxDescriptor::default()
    };
    let memory = vm.memory().clone();
    for (addr, bytes) in [
        (TX_RING, transmit.as_bytes()),
        (RX_RING, receive.as_bytes()),
        (TX_BUFFER, &frame),
    ] {
        let snapshot = memory.snapshot();
        snapshot.write(u64::from(addr), bytes).unwrap();
    }

    let command = Command::MEMORY | Command::IO | Command::BUS_MASTER;
    let mut code = Code::new()
        .out32(0xcf8, PLACE.config_address(header::COMMAND))
        .out32(0xcfc, u32::from(command.bits()));
    for (register, value) in [
        (reg::RDBAL, RX_RING),
        (reg::RDLEN, 128),
        (reg::RDT, 1),
        (reg::RCTL, (Rctl::EN | Rctl::SECRC).bits()),
        (reg::TDBAL, TX_RING),
        (reg::TDLEN, 128),
        (reg::TCTL, Tctl::EN.bits()),
    ] {
        code = set(code, register, value);
    }
    // The mask through the ports, the bell through memory.
    code = code
        .out32(PORTS + ports::IOADDR, reg::IMS)
        .out32(PORTS + ports::IODATA, Cause::RXT0.bits());
    code = set(code, reg::TDT, 1);
    code = code.wait_while8(RX_RING + 12, 0).exit(0);

    let directory = tempfile::tempdir().unwrap();
    let image = write(directory.path(), "guest", &elf(&code.0));
    vm.load(&image, "", None).unwrap();
    let stopper = vm.stopper();
    let (over, wait) = std::sync::mpsc::channel::<()>();
    let watch = std::thread::spawn(move || {
        if wait.recv_timeout(Duration::from_secs(20)).is_err() {
            stopper.stop();
        }
    });
    let stop = vm.run().unwrap();
    let _ = over.send(());
    watch.join().unwrap();

    assert_eq!(stop, Stop::DebugExit(0));
    assert_eq!(read::<514>(&memory, RX_BUFFER)[..], frame);
    let status = RxStatus::from_bits_retain(read::<16>(&memory, RX_RING)[12]);
    assert!(status.contains(RxStatus::DD | RxStatus::EOP));
    // The machine has stopped, and with it the worker.
    assert_eq!((counters.sent.get(), counters.received.get()), (1, 1));
    assert_eq!(counters.interrupts.get(), 1);
    assert_eq!(counters.bad_frames.get() + counters.dma_faults.get(), 0);
}
