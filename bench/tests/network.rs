//! The guest image on network cards: what frames cost where the count is exact,
//! that they are what was sent, and TCP from end to end.

mod common;

use common::{alone, skipped};
use pvkit_bench::image;
use pvkit_bench::machine::Machine;
use pvkit_bench::net::pass::{self, NetMeasurement, NetTask};
use pvkit_bench::net::plan::base_row;
use pvkit_bench::net::row::{Card, NetRow, NetVmm, WireKind};
use pvkit_bench::net::wire::tap::TapWire;
use pvkit_bench::pass::{Settings, qemu};
use pvkit_bench::scratch::Scratch;
use pvkit_host::vmm;
use pvkit_workload::net::job::NetWork;
use pvkit_workload::script::Completion;
use std::time::Duration;

const CARDS: [Card; 3] = [Card::VirtioNet, Card::VirtioNetPci, Card::E1000];
const FRAMES: [NetWork; 3] = [NetWork::Transmit, NetWork::Receive, NetWork::RoundTrip];

struct Bench {
    image: Scratch,
    settings: Settings,
    wires: Vec<WireKind>,
}

/// What there is to test with; says what is missing.
fn bench() -> Option<Bench> {
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        skipped("/dev/kvm cannot be opened");
        return None;
    };
    let mut wires = vec![WireKind::InProcess];
    match TapWire::new() {
        Ok(_) => wires.push(WireKind::Tap),
        Err(error) => skipped(&format!("no tap: {error:#}")),
    }
    Some(Bench {
        image: image::write().unwrap(),
        settings: Settings::new(tsc_khz, Duration::from_millis(30)),
        wires,
    })
}

fn tasks(rows: &[NetRow], hash: bool) -> Vec<NetTask> {
    (1..)
        .zip(rows)
        .map(|(round, row)| NetTask {
            index: round as usize - 1,
            row: *row,
            round,
            hash,
        })
        .collect()
}

impl Bench {
    fn run(&self, rows: &[NetRow], hash: bool) -> Vec<NetMeasurement> {
        let tasks = tasks(rows, hash);
        pass::run(self.image.path(), &tasks, &self.settings, &|_| {}).unwrap()
    }
}

/// What must be so, whatever the card: nothing is lost that is sent slowly, and
/// bytes were compared in both directions.
fn check(row: &NetRow, measurement: &NetMeasurement) {
    let NetMeasurement {
        report, latencies, ..
    } = measurement;
    assert!(report.job.requests.get() > 0, "{row}");
    assert!(report.job.verified_bytes.get() > 10_000, "{row}");
    if row.work == NetWork::RoundTrip {
        assert_eq!(latencies.len() as u64, report.received.get(), "{row}");
    }
    if row.work != NetWork::Receive || row.wire == WireKind::InProcess {
        // Its sender waits for nobody, but loses nothing on the way.
        assert_eq!(report.received, report.sent, "{row}");
    }
    if row.completion == Completion::Polled {
        assert_eq!(report.job.interrupts.get(), 0, "{row}");
        assert_eq!(report.job.halts.get(), 0, "{row}");
    }
}

#[test]
fn frames_go_through_every_card_and_cost_what_they_must() {
    let _alone = alone();
    let Some(bench) = bench() else { return };
    for &wire in &bench.wires {
        let mut rows = Vec::new();
        for card in CARDS {
            for work in FRAMES {
                for completion in [Completion::Polled, Completion::Interrupt] {
                    rows.push(NetRow {
                        completion,
                        wire,
                        ..base_row(card, work)
                    });
                }
            }
        }
        for measurement in &bench.run(&rows, false) {
            let row = &rows[measurement.index];
            check(row, measurement);
            let job = &measurement.report.job;
            let frames = job.requests.get();
            let host = measurement.host.expect("both marks came");
            let exits = host.exits.total() - host.exits.interrupted;
            match (row.card, row.work) {
                (Card::VirtioNet | Card::VirtioNetPci, NetWork::Transmit) => {
                    // Doorbells do not leave the kernel, and there is one for
                    // a burst, or none.
                    assert_eq!(exits, 0, "{row}: {:?}", host.exits);
                    let kicks = job.kicks.get();
                    assert!(100 * kicks <= frames.max(100), "{row}: {kicks} of {frames}");
                }
                (Card::E1000, NetWork::Transmit) => {
                    // One write for a burst of 256, or what there is room for.
                    let accesses = job.mmio_reads.get() + job.mmio_writes.get();
                    assert_eq!(exits, accesses, "{row}: {:?}", host.exits);
                    assert_eq!(accesses, job.kicks.get(), "{row}");
                    assert!(100 * exits <= frames.max(100), "{row}: {exits} of {frames}");
                }
                (Card::E1000, NetWork::RoundTrip) => {
                    assert!(exits >= frames, "{row}: each frame is rung for");
                }
                (Card::VirtioNetPci, _) => assert_eq!(exits, 0, "{row}: {:?}", host.exits),
                _ => {}
            }
        }
    }
}

#[test]
fn a_rate_is_received_by_interrupt() {
    let _alone = alone();
    let Some(bench) = bench() else { return };
    for &wire in &bench.wires {
        let mut rows = Vec::new();
        for card in CARDS {
            for moderation in [true, false] {
                rows.push(NetRow {
                    rate: 20_000,
                    completion: Completion::Interrupt,
                    moderation,
                    wire,
                    ..base_row(card, NetWork::Receive)
                });
            }
        }
        let mut halts = 0;
        for measurement in &bench.run(&rows, false) {
            let row = &rows[measurement.index];
            check(row, measurement);
            halts += measurement.report.job.halts.get();
        }
        assert!(halts > 0, "nobody ever slept");
    }
}

#[test]
fn files_go_both_ways_by_tcp_and_the_hashes_are_right() {
    const MIB: u32 = 64;
    let _alone = alone();
    let Some(bench) = bench() else { return };
    if !bench.wires.contains(&WireKind::Tap) {
        return;
    }
    let mut rows = Vec::new();
    for card in [Card::VirtioNet, Card::E1000] {
        for work in [NetWork::TcpReceive, NetWork::TcpSend] {
            rows.push(NetRow {
                stream_mib: MIB,
                ..base_row(card, work)
            });
        }
    }
    rows.push(NetRow {
        offloads: false,
        stream_mib: 8,
        ..base_row(Card::VirtioNetPci, NetWork::TcpReceive)
    });
    rows.push(NetRow {
        offloads: false,
        stream_mib: 8,
        ..base_row(Card::VirtioNetPci, NetWork::TcpSend)
    });
    for measurement in &bench.run(&rows, true) {
        let row = &rows[measurement.index];
        let report = &measurement.report;
        let bytes = u64::from(row.stream_mib) << 20;
        // A wrong hash, or byte, at either end fails the run.
        assert_eq!(report.stream_bytes.get(), bytes, "{row}");
        assert_eq!(report.job.verified_bytes.get(), bytes, "{row}");
        let frames = report.received.get() + report.sent.get();
        let whole_frames = bytes / 1460;
        if row.card == Card::E1000 {
            // Neither side counts what ends the connection.
            let host = measurement.host.expect("both marks came");
            let exits = host.exits.total() - host.exits.interrupted;
            let job = &report.job;
            let accesses = job.mmio_reads.get() + job.mmio_writes.get();
            assert_eq!(exits, accesses, "{row}: {:?}", host.exits);
        }
        if row.card.is_virtio() && row.offloads {
            assert_ne!(report.offloads.get(), 0, "{row}");
            assert!(frames < whole_frames / 4, "{row}: {frames} frames");
        }
        if row.card.is_virtio() && !row.offloads {
            assert_eq!(report.offloads.get(), 0, "{row}");
            assert!(frames >= whole_frames, "{row}: {frames} frames");
        }
    }
}

#[test]
fn the_same_image_drives_qemu_s_cards() {
    let _alone = alone();
    let Some(bench) = bench() else { return };
    if !bench.wires.contains(&WireKind::Tap) {
        return;
    }
    let tsc_khz = bench.settings.tsc_khz;
    let software_kvm = Machine::look(&std::env::temp_dir(), tsc_khz).software_kvm;
    let qemu = match qemu::find(software_kvm) {
        Ok(qemu) => qemu,
        Err(error) => return skipped(&format!("{error:#}")),
    };
    let mut rows = Vec::new();
    for card in [Card::VirtioNetPci, Card::E1000] {
        for work in FRAMES
            .into_iter()
            .chain([NetWork::TcpReceive, NetWork::TcpSend])
        {
            rows.push(NetRow {
                vmm: NetVmm::Qemu,
                spin_us: None,
                stream_mib: 1,
                ..base_row(card, work)
            });
        }
    }
    let tasks = tasks(&rows, true);
    let settings = &bench.settings;
    let measurements =
        pass::run_in_qemu(&qemu, bench.image.path(), &tasks, settings, &|_| {}).unwrap();
    for measurement in &measurements {
        let row = &rows[measurement.index];
        if row.is_stream() {
            assert_eq!(measurement.report.stream_bytes.get(), 1 << 20, "{row}");
        } else {
            check(row, measurement);
        }
    }
}
