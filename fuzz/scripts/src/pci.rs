//! Configuration space, base address registers, MSI-X and common
//! configuration, from both sides: what the fuzz target `pci_config` runs.
//!
//! The first byte chooses. Either a guest writes what the script says to a
//! virtio function, through every way there is; then a driver finds the device
//! and uses it. Or the script is a function's configuration space and what its
//! registers read as, and a driver looks at it.
//!
//! Nobody panics and every call returns; what a guest cannot write stays as it
//! is; a driver looks at registers only where they are, and not for ever.
#![forbid(unsafe_code)]

use super::{clean_arena, keep_arena, play};
use arbitrary::{Arbitrary, Result, Unstructured};
use pvkit_guest::block::{BlockOp, BlockQueue};
use pvkit_guest::pci::Msix;
use pvkit_guest::virtio::block::{Block, BlockOptions};
use pvkit_guest::virtio::transport::PciTransport;
use pvkit_host::disk::MemoryDisk;
use pvkit_host::pci::PciFunction;
use pvkit_host::virtio::block::{Block as Device, BlockOptions as DeviceOptions};
use pvkit_host::virtio::transport::PciOptions;
use pvkit_hostile::function::{LyingFunction, PLACE as LIAR, Wall};
use pvkit_join::arena::Arena;
use pvkit_join::disk::pattern;
use pvkit_join::pci::{PLACE, VirtioPci};
use pvkit_join::stepped::{Steps, stepped};
use pvkit_join::unchecked::{Poke, memory_pool, message};
use pvkit_protocol::pci::{capability, header};
use pvkit_protocol::virtio::pci::common;
use std::sync::Arc;

const ARENA_BYTES: usize = 256 * 1024;
const SECTORS: u64 = 64;
/// Longest script.
const ACTIONS: usize = 512;
/// Bytes of configuration space that a driver looks at, at the most: some 60
/// capabilities, each with its registers, and what it writes.
const MOST_ACCESSES: u32 = 20_000;

/// One thing that a guest does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// A read of configuration space, by the ports.
    ReadConfig { offset: u8, width: u8 },
    /// A write of configuration space, by the ports.
    WriteConfig { offset: u8, width: u8, value: u32 },
    /// A read of what a base address register decodes, wherever it is.
    ReadBar { bar: u8, offset: u16, width: u8 },
    /// A write of it.
    WriteBar {
        bar: u8,
        offset: u16,
        width: u8,
        value: u64,
    },
    /// A field of the common configuration, with its own width.
    Common { field: u8, value: u32 },
    /// A word of the MSI-X table.
    Table { word: u8, value: u32 },
    /// A write anywhere in memory space, by the bus.
    Memory { address: u32, value: u32 },
    /// Whatever the ring says is done.
    Run,
}

impl<'a> Arbitrary<'a> for Action {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        Ok(match u8::arbitrary(u)? % 9 {
            0 => Self::ReadConfig {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            1 | 2 => Self::WriteConfig {
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            3 => Self::ReadBar {
                bar: u.arbitrary()?,
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
            },
            4 => Self::WriteBar {
                bar: u.arbitrary()?,
                offset: u.arbitrary()?,
                width: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            5 => Self::Common {
                field: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            6 => Self::Table {
                word: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            7 => Self::Memory {
                address: u.arbitrary()?,
                value: u.arbitrary()?,
            },
            _ => Self::Run,
        })
    }
}

/// Fields of the common configuration that can be written, and their widths.
const FIELDS: [(usize, usize); 15] = [
    (common::DEVICE_FEATURE_SELECT, 4),
    (common::DRIVER_FEATURE_SELECT, 4),
    (common::DRIVER_FEATURE, 4),
    (common::CONFIG_MSIX_VECTOR, 2),
    (common::DEVICE_STATUS, 1),
    (common::QUEUE_SELECT, 2),
    (common::QUEUE_SIZE, 2),
    (common::QUEUE_MSIX_VECTOR, 2),
    (common::QUEUE_ENABLE, 2),
    (common::QUEUE_DESC, 4),
    (common::QUEUE_DESC + 4, 4),
    (common::QUEUE_DRIVER, 4),
    (common::QUEUE_DEVICE, 4),
    (common::QUEUE_DEVICE + 4, 4),
    (common::QUEUE_RESET, 2),
];

/// Plays the script that `data` holds.
///
/// # Panics
/// If an invariant does not hold.
pub fn pci_config(data: &[u8]) {
    let mut bytes = Unstructured::new(data);
    let Ok(first) = u8::arbitrary(&mut bytes) else {
        return;
    };
    let arena = clean_arena(ARENA_BYTES);
    if first & 1 == 0 {
        guest_writes(first >> 1, &arena, &mut bytes);
    } else {
        function_lies(&arena, bytes.take_rest());
    }
    keep_arena(arena);
}

/// A guest does what the script says; then a driver uses the device.
fn guest_writes(vectors: u8, arena: &Arena, bytes: &mut Unstructured<'_>) {
    let disk = MemoryDisk::from_bytes(pattern(0, SECTORS as usize * 512));
    let device = Device::new(Arc::new(disk), DeviceOptions::default()).expect("block options");
    let (executor, steps) = stepped();
    let options = match vectors % 4 {
        0 => PciOptions::default(),
        // None, and one for all.
        few @ (1 | 2) => PciOptions::default().with_vectors(u16::from(few) - 1),
        _ => PciOptions::default().with_vectors(2048),
    };
    let memory = arena.guest_memory().clone();
    let pci = VirtioPci::new(Box::new(device), memory, Box::new(executor), options);
    let config = pci.config();
    let fixed = |pci: &VirtioPci| {
        let config = pci.config();
        let list: Vec<_> = config.capabilities(PLACE).collect();
        (config.read_u32(PLACE, header::VENDOR), list)
    };
    let before = fixed(&pci);
    play(bytes, ACTIONS, |action| act(&pci, &steps, action));
    assert_eq!(fixed(&pci), before, "what a guest cannot write");
    // What was left there would otherwise be where the driver looks.
    for bar in 0..header::BARS {
        config.poke_u32(PLACE, header::bar(bar), 0);
    }
    use_it(&pci, &steps, arena);
}

fn act(pci: &VirtioPci, steps: &Steps, action: Action) {
    let config = pci.config();
    match action {
        Action::ReadConfig { offset, width } => match width % 3 {
            0 => _ = config.read_u8(PLACE, offset),
            1 => _ = config.read_u16(PLACE, offset & !1),
            _ => _ = config.read_u32(PLACE, offset & !3),
        },
        Action::WriteConfig {
            offset,
            width,
            value,
        } => match width % 3 {
            0 => config.poke_u8(PLACE, offset, value as u8),
            1 => config.poke_u16(PLACE, offset & !1, value as u16),
            _ => config.poke_u32(PLACE, offset & !3, value),
        },
        Action::ReadBar { bar, offset, width } => {
            let mut data = [0x5a; 16];
            let (data, _) = data.split_at_mut(usize::from(width % 17));
            pci.device().read_bar(bar, offset.into(), data);
        }
        Action::WriteBar {
            bar,
            offset,
            width,
            value,
        } => {
            let data = [value; 2].map(u64::to_le_bytes);
            let (data, _) = data.as_flattened().split_at(usize::from(width % 17));
            pci.device().write_bar(bar, offset.into(), data);
        }
        Action::Common { field, value } => {
            let (offset, width) = FIELDS[usize::from(field) % FIELDS.len()];
            let data = &value.to_le_bytes()[..width];
            pci.device().write_bar(0, offset as u64, data);
        }
        Action::Table { word, value } => {
            let data = value.to_le_bytes();
            pci.device().write_bar(2, 4 * u64::from(word), &data);
        }
        Action::Memory { address, value } => {
            pci.root.mmio_write(address.into(), &value.to_le_bytes());
        }
        Action::Run => _ = steps.run(),
    }
}

/// The right way, from finding the device to a byte of its disk.
fn use_it(pci: &VirtioPci, steps: &Steps, arena: &Arena) {
    let mut free = pci.free();
    let mut transport = pci.transport(&mut free);
    let has_vectors = pci.device().vectors() > 0;
    let mut options = BlockOptions::default();
    if has_vectors {
        let msix = pci.msix(&mut free);
        transport = transport.with_msix(&msix);
        options.queue_vector = Some(0);
    }
    let opened = Block::open(transport, arena.space(), options);
    let (block, mut queue) = opened.expect("a device that was reset works");
    let before = pci.interrupts.all.count();
    assert!(!queue.arm());
    let op = BlockOp::Read { sector: 9 };
    queue.submit(op, Some(vec![0; 512]), 1).expect("room");
    queue.publish();
    steps.run();
    let done = queue.complete().expect("no fault").expect("a completion");
    assert_eq!(done.result, Ok(()));
    assert_eq!(done.buffer.as_deref(), Some(&*pattern(9, 512)));
    if has_vectors {
        assert_eq!(pci.interrupts.all.count(), before + 1, "by message");
    }
    block.close(queue, &mut |_| {}).expect("a reset");
}

/// The script is a function's configuration space, and what its registers read
/// as; a driver looks at it.
fn function_lies(arena: &Arena, script: &[u8]) {
    let liar = LyingFunction::honest();
    let mut script = script.iter().copied();
    let mut next = || script.next().unwrap_or(0);
    // How much of the honest function is left.
    for _ in 0..next() {
        let (at, byte) = (next(), next());
        // Virtio's own number, so that there is something to look at.
        if at >= 4 {
            liar.put(at, &[byte]);
        }
    }
    for _ in 0..next() & 31 {
        let (at, mask) = (next(), next());
        liar.allow(at, &[mask]);
    }
    let count = liar.config().capabilities(LIAR).count();
    assert!(count <= usize::from(capability::MOST));
    let noise: Vec<u8> = script.collect();
    let map = |bar: pvkit_guest::pci::MemoryBar| {
        // As much as a kernel would map.
        let wall = Wall::new(usize::try_from(bar.size.min(1 << 20)).ok()?);
        *wall.noise.lock().ok()? = noise.iter().copied().collect();
        Some(wall)
    };
    let mut free = memory_pool(0xc000_0000, u64::MAX);
    let config = liar.config();
    let Some(function) = config.function(LIAR) else {
        return;
    };
    let transport = PciTransport::new(&config, &function, &mut free, map);
    let msix = Msix::enable(&config, LIAR, &mut free, map);
    assert!(liar.accesses() < MOST_ACCESSES, "{}", liar.accesses());
    let Ok(transport) = transport else { return };
    let mut transport = transport.with_reset_reads(64);
    let mut options = BlockOptions {
        queue_size: 16,
        max_segments: 2,
        ..BlockOptions::default()
    };
    if let Ok(mut msix) = msix {
        for vector in [0, msix.vectors() - 1] {
            msix.set(vector, message(u64::MAX, 1)).expect("a vector");
        }
        transport = transport.with_msix(&msix);
        options.queue_vector = Some(0);
        options.config_vector = Some(0);
    }
    if let Ok((block, queue)) = Block::open::<Vec<u8>, _>(transport, arena.space(), options) {
        block.claim_events();
        block.claim_config_events();
        // Registers that have nothing more to say read as 0, so a reset ends.
        block.close(queue, &mut |_| {}).expect("a reset");
    }
}
