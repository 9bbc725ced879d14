//! The guest image on real monitors: what a request costs where the count is
//! exact, and that wrong data fails the run.

mod common;

use common::{alone, skipped};
use pvkit_bench::pass::{self, Measurement, Settings, Task};
use pvkit_bench::plan::base_row;
use pvkit_bench::row::{DeviceKind, Driver, Ring, Row};
use pvkit_bench::test_file::TestFile;
use pvkit_bench::{image, machine::Machine};
use pvkit_host::disk::{FileDisk, FileOptions};
use pvkit_host::vmm;
use pvkit_protocol::virtio::Features;
use pvkit_workload::script::{Access, Completion};
use std::io::{Seek, SeekFrom, Write};
use std::time::Duration;

fn settings(tsc_khz: u32) -> Settings {
    Settings::new(tsc_khz, Duration::from_millis(30))
}

fn tasks(rows: &[Row]) -> Vec<Task> {
    (1..)
        .zip(rows)
        .map(|(round, row)| Task {
            index: round as usize - 1,
            row: *row,
            round,
            rate: None,
        })
        .collect()
}

fn row(device: DeviceKind, access: Access, completion: Completion) -> Row {
    let spin_us = device.is_virtio().then_some(50);
    let depth = device.max_depth().min(16);
    Row {
        device,
        access,
        completion,
        spin_us,
        depth,
        ..base_row()
    }
}

const DEVICES: [DeviceKind; 4] = [
    DeviceKind::VirtioBlk,
    DeviceKind::VirtioBlkPci,
    DeviceKind::IdeDma,
    DeviceKind::IdePio,
];

#[test]
fn every_device_works_in_our_monitor_and_ide_costs_what_it_must() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let directory = tempfile::tempdir().unwrap();
    let file = TestFile::new(directory.path()).unwrap();
    let image = image::write().unwrap();
    let mut rows = Vec::new();
    for device in DEVICES {
        for completion in [Completion::Polled, Completion::Interrupt] {
            rows.push(row(device, Access::RandomRead, completion));
        }
        rows.push(row(device, Access::RandomWrite, Completion::Polled));
    }
    rows.push(Row {
        ring: Ring::Packed,
        ..row(
            DeviceKind::VirtioBlk,
            Access::RandomWrite,
            Completion::Interrupt,
        )
    });
    let tasks = tasks(&rows);
    let disk = FileDisk::open(file.path(), FileOptions::default()).unwrap();
    let measurements =
        pass::kvm::run(image.path(), &disk, &tasks, &settings(tsc_khz), &|_| {}).unwrap();
    drop(disk);
    for Measurement {
        index,
        report,
        host,
        ..
    } in &measurements
    {
        let row = rows[*index];
        let requests = report.requests.get();
        assert!(requests > 0 && report.verified_bytes.get() > 0, "{row}");
        let host = host.expect("both marks came");
        let exits = host.exits.total() - host.exits.interrupted;
        let most = match row.device {
            DeviceKind::VirtioBlkPci => {
                // Neither doorbells nor interrupts leave the kernel.
                assert_eq!(exits, 0, "{row}: {:?}", host.exits);
                continue;
            }
            DeviceKind::VirtioBlk => continue,
            DeviceKind::IdePio if row.access.is_write() => continue,
            // The host throttles writers now and then: who polls sees that.
            DeviceKind::IdeDma if row.access.is_write() => u64::MAX,
            DeviceKind::IdeDma => 12,
            DeviceKind::IdePio => 14,
        };
        assert!(
            exits <= most.saturating_mul(requests),
            "{row}: {exits} exits for {requests} requests"
        );
        // What the guest counts is what leaves it.
        let accesses = report.port_reads.get() + report.port_writes.get();
        assert_eq!(exits, accesses, "{row}");
    }
    assert!(
        file.verify(pvkit_workload::pattern::Round(rows.len() as u32))
            .unwrap()
            > 0
    );
}

#[test]
fn virtio_drivers_reads_and_writes_what_it_should_on_our_device() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let directory = tempfile::tempdir().unwrap();
    let file = TestFile::new(directory.path()).unwrap();
    let image = image::write().unwrap();
    let mut rows = Vec::new();
    for driver in Driver::ALL {
        for (access, depth) in [
            (Access::RandomRead, 1),
            (Access::RandomRead, 16),
            (Access::RandomWrite, 16),
            (Access::SequentialWrite, 5),
        ] {
            for spin_us in [Some(50), Some(0)] {
                rows.push(Row {
                    driver,
                    depth,
                    spin_us,
                    ..row(DeviceKind::VirtioBlk, access, Completion::Polled)
                });
            }
        }
    }
    let tasks = tasks(&rows);
    let disk = FileDisk::open(file.path(), FileOptions::default()).unwrap();
    let settings = settings(tsc_khz);
    let measurements = pass::kvm::run(image.path(), &disk, &tasks, &settings, &|_| {}).unwrap();
    drop(disk);
    for Measurement { index, report, .. } in &measurements {
        let row = rows[*index];
        assert!(
            report.requests.get() > 0 && report.verified_bytes.get() > 0,
            "{row}"
        );
        // It has no way to ask for none, so its pin is masked.
        assert_eq!(report.interrupts.get(), 0, "{row}");
        let features = Features::from_bits_retain(report.features.get());
        let both = Features::EVENT_IDX | Features::INDIRECT_DESC;
        let hidden = row.driver.hidden_features(row.depth);
        assert_eq!(features & both, both - hidden, "{row}");
    }
    let last = pvkit_workload::pattern::Round(rows.len() as u32);
    assert!(file.verify(last).unwrap() > 0);
}

#[test]
fn the_same_image_works_in_qemu() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let directory = tempfile::tempdir().unwrap();
    let software_kvm = Machine::look(directory.path(), tsc_khz).software_kvm;
    let qemu = match pass::qemu::find(software_kvm) {
        Ok(qemu) => qemu,
        Err(error) => return skipped(&format!("{error:#}")),
    };
    let file = TestFile::new(directory.path()).unwrap();
    let image = image::write().unwrap();
    let rows = [
        row(DeviceKind::IdeDma, Access::RandomRead, Completion::Polled),
        row(
            DeviceKind::IdeDma,
            Access::RandomWrite,
            Completion::Interrupt,
        ),
        row(
            DeviceKind::IdePio,
            Access::RandomRead,
            Completion::Interrupt,
        ),
    ];
    let measurements = pass::qemu::run(
        &qemu,
        image.path(),
        file.path(),
        &tasks(&rows),
        &settings(tsc_khz),
        &|_| {},
    )
    .unwrap();
    for Measurement { index, report, .. } in &measurements {
        assert!(
            report.requests.get() > 0 && report.verified_bytes.get() > 0,
            "{}",
            rows[*index]
        );
    }
    file.verify(pvkit_workload::pattern::Round(rows.len() as u32))
        .unwrap();
}

/// Reads and writes by virtio-pci, polled and by interrupt, with `settings`.
fn over_pci(settings: &Settings, in_qemu: Option<&pass::qemu::Qemu>) -> Vec<Measurement> {
    let directory = tempfile::tempdir().unwrap();
    let file = TestFile::new(directory.path()).unwrap();
    let image = image::write().unwrap();
    let rows = [
        (Access::RandomRead, Completion::Polled),
        (Access::RandomRead, Completion::Interrupt),
        (Access::RandomWrite, Completion::Interrupt),
        (Access::SequentialWrite, Completion::Polled),
    ]
    .map(|(access, completion)| row(DeviceKind::VirtioBlkPci, access, completion))
    .into_iter()
    .flat_map(|row| [Ring::Split, Ring::Packed].map(|ring| Row { ring, ..row }));
    let rows: Vec<Row> = rows.collect();
    let tasks = tasks(&rows);
    let measurements = match in_qemu {
        Some(qemu) => pass::qemu::run(qemu, image.path(), file.path(), &tasks, settings, &|_| {}),
        None => {
            let disk = FileDisk::open(file.path(), FileOptions::default()).unwrap();
            pass::kvm::run(image.path(), &disk, &tasks, settings, &|_| {})
        }
    }
    .unwrap();
    let mut interrupts = 0;
    for Measurement { index, report, .. } in &measurements {
        let row = rows[*index];
        assert!(
            report.requests.get() > 0 && report.verified_bytes.get() > 0,
            "{row}"
        );
        // A guest that finds a completion whenever it looks does not sleep.
        interrupts += report.interrupts.get();
        if row.completion == Completion::Polled {
            assert_eq!(report.interrupts.get(), 0, "{row}");
        }
        let features = Features::from_bits_retain(report.features.get());
        assert!(settings.allow.contains(features), "{row}: {features:?}");
        let packed = features.contains(Features::RING_PACKED);
        assert_eq!(packed, row.ring == Ring::Packed, "{row}");
        let reads = report.mmio_reads.get();
        if settings.vectors == Some(0) {
            // Reading the ISR status is what an interrupt by pin costs, and
            // the next one comes only after it: the timed part may begin or
            // end between the two.
            let interrupts = report.interrupts.get();
            assert!(
                reads.abs_diff(interrupts) <= 1,
                "{row}: {reads} {interrupts}"
            );
        } else {
            assert_eq!(reads, 0, "{row}");
        }
        assert_eq!(report.mmio_writes.get(), 0, "{row}: but doorbells");
    }
    assert!(interrupts > 0, "nobody was ever interrupted");
    let last = pvkit_workload::pattern::Round(rows.len() as u32);
    assert!(file.verify(last).unwrap() > 0);
    measurements
}

/// Settings with and without each ring feature and vectors.
fn variants(tsc_khz: u32) -> [Settings; 4] {
    let all = settings(tsc_khz);
    let without = |features| Settings {
        allow: Features::all() - features,
        ..all
    };
    [
        all,
        without(Features::INDIRECT_DESC | Features::EVENT_IDX),
        without(Features::INDIRECT_DESC),
        Settings {
            vectors: Some(0),
            ..without(Features::EVENT_IDX)
        },
    ]
}

#[test]
fn virtio_pci_works_in_our_monitor_with_every_ring_feature_and_by_pin() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    for settings in variants(tsc_khz) {
        over_pci(&settings, None);
    }
}

#[test]
fn the_same_image_drives_qemu_s_virtio_pci() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let software_kvm = Machine::look(&std::env::temp_dir(), tsc_khz).software_kvm;
    let qemu = match pass::qemu::find(software_kvm) {
        Ok(qemu) => qemu,
        Err(error) => return skipped(&format!("{error:#}")),
    };
    for settings in variants(tsc_khz) {
        over_pci(&settings, Some(&qemu));
    }
}

#[test]
fn requests_are_used_in_order_here_and_in_a_qemu_that_can() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let in_order = |settings| Settings {
        in_order: true,
        ..settings
    };
    let check = |measurements: &[Measurement]| {
        for Measurement { report, .. } in measurements {
            let features = Features::from_bits_retain(report.features.get());
            assert!(features.contains(Features::IN_ORDER), "{features:?}");
        }
    };
    for settings in variants(tsc_khz) {
        check(&over_pci(&in_order(settings), None));
    }
    let software_kvm = Machine::look(&std::env::temp_dir(), tsc_khz).software_kvm;
    let qemu = match pass::qemu::find(software_kvm) {
        Ok(qemu) if qemu.has_in_order() => qemu,
        Ok(qemu) => return skipped(&format!("{} has no in_order: 10.0 has", qemu.version)),
        Err(error) => return skipped(&format!("{error:#}")),
    };
    for settings in variants(tsc_khz) {
        check(&over_pci(&in_order(settings), Some(&qemu)));
    }
}

#[test]
fn one_wrong_sector_fails_the_run() {
    let _alone = alone();
    let Ok(tsc_khz) = vmm::tsc_khz() else {
        return skipped("/dev/kvm cannot be opened");
    };
    let directory = tempfile::tempdir().unwrap();
    let file = TestFile::new(directory.path()).unwrap();
    let image = image::write().unwrap();
    // Sequential reads start at the first sector, and so does this damage.
    let mut handle = std::fs::File::options()
        .write(true)
        .open(file.path())
        .unwrap();
    handle.seek(SeekFrom::Start(200)).unwrap();
    handle.write_all(b"damage").unwrap();
    for device in DEVICES {
        let rows = [row(device, Access::SequentialRead, Completion::Polled)];
        let disk = FileDisk::open(file.path(), FileOptions::default()).unwrap();
        let settings = settings(tsc_khz);
        let error = pass::kvm::run(image.path(), &disk, &tasks(&rows), &settings, &|_| {});
        let error = format!("{:#}", error.unwrap_err());
        assert!(
            error.contains("sector 0, byte 200") && error.contains(device.name()),
            "{error}"
        );
    }
    assert!(file.verify(pvkit_workload::pattern::FIRST).is_err());
}
