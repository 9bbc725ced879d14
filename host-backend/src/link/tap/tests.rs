//! What an older kernel does not know.

use super::*;
use crate::link::{Sent, TxFrame};
use crate::memory::IoBufs;
use pvkit_protocol::frame::{Checksum, FrameMeta, SegmentKind, Segmentation};
use std::process::Command;

/// Runs a command in this thread's network namespace; `false` if it fails.
fn ip(args: &[&str]) -> bool {
    let status = Command::new("ip").args(args).status();
    status.is_ok_and(|status| status.success())
}

/// How many frames an interface got from its reader.
fn frames(name: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
    let line = text.lines().find_map(|line| {
        let (own, counts) = line.split_once(':')?;
        (own.trim() == name).then(|| counts.to_owned())
    });
    line.unwrap()
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse()
        .unwrap()
}

#[test]
fn datagrams_are_cut_for_a_kernel_that_cannot() {
    let run = || {
        #[expect(
            deprecated,
            reason = "descriptors stay shared: only the network is not"
        )]
        let alone = rustix::thread::unshare(rustix::thread::UnshareFlags::NEWNET);
        if alone.is_err() {
            return eprintln!("skipped: no network namespace");
        }
        let mut tap = match Tap::open("tap0", &TapOptions::default()) {
            Ok(tap) => tap,
            Err(error) => return eprintln!("skipped: {error}"),
        };
        if !ip(&["link", "set", "tap0", "up"]) {
            return eprintln!("skipped: no ip(8)");
        }
        Arc::get_mut(&mut tap.0).unwrap().uso = false;
        assert!(
            !tap.shape()
                .cheap
                .intersects(Offloads::USO4 | Offloads::USO6)
        );
        tap.set_receive(Offloads::all()).unwrap();
        let mut lane = tap.lane(0).unwrap();
        let mut frame = vec![2; 12];
        frame.extend([8, 0, 0x45, 0, 0x0f, 0xbc, 0, 0, 0, 0, 64, 17, 0, 0]);
        frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0, 7, 0, 9, 0x0f, 0xa8, 0, 0]);
        frame.extend([5; 4000]);
        let checksum = Checksum::Partial {
            start: 34,
            offset: 6,
        };
        let segments = Some(Segmentation {
            kind: SegmentKind::Udp,
            ecn: false,
            size: 1000,
            header_bytes: 42,
        });
        let before = frames("tap0");
        let sent = lane.send(&TxFrame {
            head: &frame,
            rest: &IoBufs::new(),
            meta: FrameMeta { checksum, segments },
        });
        assert_eq!(sent, Sent::Done);
        assert_eq!(frames("tap0") - before, 4);
        let counters = lane.counters();
        assert_eq!((counters.sent.get(), counters.finished.get()), (1, 1));
        assert_eq!(counters.send_drops.get(), 0);
    };
    std::thread::spawn(run).join().unwrap();
}
