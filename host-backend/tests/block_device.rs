//! A real block device as a disk: a loop device over a file.

use pvkit_host::disk::Submit;
use pvkit_host::disk::{Disk, DiskError, DiskLane, DiskOp, DiskRequest, FileDisk, FileOptions};
use pvkit_host::memory::IoBufs;
use std::io::Write;
use std::path::Path;
use std::process::Command;

/// Says why a check is skipped, also when the test's output is captured.
fn skipped(why: &str) {
    let _ = writeln!(std::io::stderr().lock(), "skipped: {why}");
}

/// A loop device, taken down when it is dropped.
struct Loop(String);

impl Loop {
    fn new(file: &Path, block_bytes: u32) -> Option<Self> {
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size"])
            .arg(block_bytes.to_string())
            .arg(file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let name = String::from_utf8_lossy(&output.stdout);
                Some(Self(name.trim().to_owned()))
            }
            _ => {
                skipped("no loop device can be set up here");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

fn run(lane: &mut dyn DiskLane, op: DiskOp, sector: u64) -> Result<(), DiskError> {
    let data = &IoBufs::new();
    match lane.submit(DiskRequest { op, sector, data }, 1) {
        Submit::Done(result) => return result,
        Submit::Full => panic!("the lane is empty"),
        Submit::Queued => {}
    }
    let mut ended = None;
    while ended.is_none() {
        lane.commit();
        lane.reap(&mut |_, result| ended = Some(result));
    }
    ended.unwrap()
}

#[test]
fn ranges_of_a_block_device_are_zeroed_and_discarded() {
    const BYTES: usize = 8 << 20;
    for block_bytes in [512, 4096] {
        let here = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let file = dir.path().join("disk.img");
        std::fs::write(&file, vec![0x5a; BYTES]).unwrap();
        let Some(device) = Loop::new(&file, block_bytes) else {
            return;
        };
        let disk = FileDisk::open(&device.0, FileOptions::default()).unwrap();
        let shape = disk.shape();
        assert_eq!(shape.sectors, BYTES as u64 / 512);
        assert_eq!(shape.secure_erase, None, "loop devices have none");
        assert_eq!(disk.lifetime(), None);
        let topology = shape.topology.expect("devices know theirs");
        assert!(topology.physical_block_bytes >= block_bytes);
        let mut lane = disk.lane(4).unwrap();
        let mut expected = vec![0x5a; BYTES];
        // The second is no whole number of blocks of 4,096 bytes.
        for (sector, sectors, unmap, fua) in [
            (8, 64, false, false),
            (101, 59, true, true),
            (4096, 1024, true, false),
        ] {
            let op = DiskOp::WriteZeroes {
                sectors,
                unmap,
                fua,
            };
            run(&mut *lane, op, sector).unwrap();
            expected[sector as usize * 512..][..sectors as usize * 512].fill(0);
            let content = std::fs::read(&device.0).unwrap();
            assert!(content == expected, "{block_bytes} {op:?} {sector}");
        }
        let erase = run(&mut *lane, DiskOp::SecureErase { sectors: 8 }, 0);
        assert_eq!(erase, Err(DiskError::Unsupported));
        if shape.discard.is_none() {
            skipped("the loop device does not discard");
            continue;
        }
        // Less than a block is left alone.
        run(&mut *lane, DiskOp::Discard { sectors: 3 }, 9).unwrap();
        run(&mut *lane, DiskOp::Discard { sectors: 2048 }, 8192).unwrap();
        run(&mut *lane, DiskOp::Flush, 0).unwrap();
        let content = std::fs::read(&device.0).unwrap();
        assert!(content[..4 << 20] == expected[..4 << 20]);
        assert!(content[5 << 20..] == expected[5 << 20..]);
    }
}
