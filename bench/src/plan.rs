//! Which rows are measured in a run, and which of them are compared.

use crate::cli::{Cli, Peer};
use crate::net::plan::NetPlan;
use crate::pass;
use crate::row::{DeviceKind, Driver, Loop, Ring, Row, Vmm};
use anyhow::{Result, bail};
use pvkit_workload::script::{Access, Completion};

/// How long a worker polls before it sleeps, unless a row says otherwise.
pub const SPIN_US: u32 = 50;

/// How long a guest polls before it halts, in rows that say so.
const GUEST_SPIN_US: u32 = 20;

/// The rows of a run.
#[derive(Debug, Clone)]
pub struct Plan {
    /// In the order in which they are printed.
    pub rows: Vec<Row>,
    /// Pairs of indices into `rows`: what is compared with what.
    pub pairs: Vec<(usize, usize)>,
    /// The row of whose rate open loops run at half.
    pub base: Row,
    /// The same for network cards.
    pub net: NetPlan,
}

/// A closed loop on a device in our monitor.
fn row(device: DeviceKind, access: Access, kib: u32, depth: u32, completion: Completion) -> Row {
    Row {
        access,
        block_bytes: kib * 1024,
        depth: depth.min(device.max_depth()),
        completion,
        looping: Loop::Closed,
        device,
        ring: Ring::Split,
        driver: Driver::PvkitGuest,
        vmm: Vmm::Pvkit,
        spin_us: device.is_virtio().then_some(SPIN_US),
        guest_spin_us: 0,
    }
}

fn without_spin(row: Row) -> Row {
    Row {
        spin_us: row.spin_us.map(|_| 0),
        ..row
    }
}

/// The row whose rate open loops are derived from, beside emulated devices.
#[must_use]
pub fn base_row() -> Row {
    row(
        DeviceKind::IdeDma,
        Access::RandomRead,
        4,
        1,
        Completion::Polled,
    )
}

fn rows(full: bool) -> Vec<Row> {
    use Access::{RandomRead, RandomWrite, SequentialRead, SequentialWrite};
    use Completion::{Interrupt, Polled};
    use DeviceKind::{IdeDma, IdePio, VirtioBlk, VirtioBlkPci};
    let mut rows = Vec::new();
    let depths: &[u32] = if full {
        &[1, 2, 4, 8, 16, 32, 64, 128]
    } else {
        &[1, 8, 32, 128]
    };

    // 4 KiB at random places: the cost of a request.
    for access in [RandomRead, RandomWrite] {
        let quick_write = !full && access == RandomWrite;
        let depths = if quick_write { &[1, 32] } else { depths };
        for &depth in depths {
            let virtio = row(VirtioBlk, access, 4, depth, Polled);
            rows.push(virtio);
            if full || (access == RandomRead && [1, 32].contains(&depth)) {
                rows.push(without_spin(virtio));
            }
        }
        rows.push(row(IdeDma, access, 4, 1, Polled));
        rows.push(row(IdePio, access, 4, 1, Polled));
        if quick_write {
            continue;
        }
        let depths: &[u32] = if full { depths } else { &[1, 32] };
        for &depth in depths {
            rows.push(row(VirtioBlk, access, 4, depth, Interrupt));
            if full {
                rows.push(without_spin(row(VirtioBlk, access, 4, depth, Interrupt)));
            }
        }
        rows.push(row(IdeDma, access, 4, 1, Interrupt));
        rows.push(row(IdePio, access, 4, 1, Interrupt));
    }

    // Larger requests: the cost of a byte.
    let sizes: &[u32] = if full { &[16, 64, 128] } else { &[128] };
    for &kib in sizes {
        for access in [SequentialRead, SequentialWrite] {
            let depths: &[u32] = if full { &[1, 8, 32] } else { &[1, 8] };
            for &depth in depths {
                rows.push(row(VirtioBlk, access, kib, depth, Polled));
            }
            rows.push(row(IdeDma, access, kib, 1, Polled));
            // A word of a PIO write is an exit: a row of many thousand each
            // would measure nothing that 4 KiB do not show.
            if !access.is_write() {
                rows.push(row(IdePio, access, kib, 1, Polled));
            }
        }
        if full {
            for access in [RandomRead, RandomWrite] {
                rows.push(row(VirtioBlk, access, kib, 8, Polled));
                rows.push(row(IdeDma, access, kib, 1, Polled));
            }
        }
    }

    // The same ring behind the other transport: what an interrupt costs.
    let depths: &[u32] = if full { &[1, 8, 32, 128] } else { &[1, 32] };
    for &depth in depths {
        for completion in [Polled, Interrupt] {
            if !full && (depth, completion) == (1, Polled) {
                continue;
            }
            let over_pci = row(VirtioBlkPci, RandomRead, 4, depth, completion);
            rows.push(over_pci);
            if full {
                rows.push(without_spin(over_pci));
            }
        }
    }

    // The same load on both: what it costs the host.
    for device in [VirtioBlk, IdeDma] {
        let depth = device.max_depth().min(32);
        let open = Row {
            looping: Loop::Open,
            ..row(device, RandomRead, 4, depth, Polled)
        };
        rows.push(open);
        if device == VirtioBlk {
            rows.push(without_spin(open));
        }
    }

    // Our IDE beside QEMU's: the comparison is worth nothing if ours is slow.
    for device in [IdeDma, IdePio] {
        rows.push(Row {
            vmm: Vmm::Qemu,
            ..row(device, RandomRead, 4, 1, Polled)
        });
    }
    if full {
        for (depth, completion) in [(1, Polled), (32, Polled), (1, Interrupt)] {
            rows.push(Row {
                vmm: Vmm::Qemu,
                spin_us: None,
                ..row(VirtioBlkPci, RandomRead, 4, depth, completion)
            });
        }
        for device in [IdeDma, IdePio] {
            for access in [SequentialRead, SequentialWrite] {
                if (device, access.is_write()) == (IdePio, true) {
                    continue;
                }
                rows.push(Row {
                    vmm: Vmm::Qemu,
                    ..row(device, access, 128, 1, Polled)
                });
            }
        }
    }
    rows
}

/// The row whose rate open loops are derived from, beside QEMU.
fn qemu_base_row() -> Row {
    Row {
        vmm: Vmm::QemuIothread,
        spin_us: None,
        ..row(
            DeviceKind::VirtioBlkPci,
            Access::RandomRead,
            4,
            32,
            Completion::Polled,
        )
    }
}

/// Our monitor beside QEMU, both with the same driver, on virtio-pci.
fn rows_beside_qemu(full: bool) -> Vec<Row> {
    use Access::{RandomRead, RandomWrite, SequentialRead};
    use Completion::{Interrupt, Polled};
    let device = DeviceKind::VirtioBlkPci;
    let mut rows = Vec::new();
    let mut add = |row: Row| {
        rows.push(row);
        if full || (row.completion, row.looping) == (Polled, Loop::Closed) {
            rows.push(without_spin(row));
        }
        for vmm in [Vmm::QemuIothread, Vmm::Qemu] {
            let plain = vmm == Vmm::Qemu;
            if plain && (row.ring == Ring::Packed || row.looping == Loop::Open) {
                continue;
            }
            rows.push(Row {
                vmm,
                spin_us: None,
                ..row
            });
        }
    };
    let depths: &[u32] = if full {
        &[1, 2, 4, 8, 16, 32, 64, 128]
    } else {
        &[1, 32]
    };
    for ring in [Ring::Split, Ring::Packed] {
        for &depth in depths {
            let row = row(device, RandomRead, 4, depth, Polled);
            add(Row { ring, ..row });
        }
    }
    let open = row(device, RandomRead, 4, 32, Polled);
    add(Row {
        looping: Loop::Open,
        ..open
    });
    for &depth in depths {
        let row = row(device, RandomRead, 4, depth, Interrupt);
        add(row);
        add(Row {
            guest_spin_us: GUEST_SPIN_US,
            ..row
        });
    }
    if full {
        for &depth in depths {
            add(row(device, RandomWrite, 4, depth, Polled));
        }
        for depth in [1, 8] {
            add(row(device, SequentialRead, 128, depth, Polled));
        }
    }
    rows
}

/// Our driver beside that of `virtio-drivers`, on our device. Its queue has 16
/// descriptors; a row of ours shows what a longer one brings.
fn rows_beside_virtio_drivers(full: bool) -> Vec<Row> {
    use Access::{RandomRead, RandomWrite};
    let depths: &[u32] = if full { &[1, 2, 4, 8, 16] } else { &[1, 8, 16] };
    let accesses: &[Access] = if full {
        &[RandomRead, RandomWrite]
    } else {
        &[RandomRead]
    };
    let of_depth = |access, depth| row(DeviceKind::VirtioBlk, access, 4, depth, Completion::Polled);
    let mut rows = Vec::new();
    for &access in accesses {
        for &depth in depths {
            let spins = of_depth(access, depth);
            for row in [spins, without_spin(spins)] {
                for driver in [
                    Driver::PvkitGuest,
                    Driver::VirtioDrivers,
                    Driver::VirtioDriversTuned,
                ] {
                    rows.push(Row { driver, ..row });
                }
            }
        }
        rows.push(of_depth(access, 32));
    }
    rows
}

impl Plan {
    /// The rows that the command line asks for.
    ///
    /// # Errors
    /// If no row matches the filters.
    pub fn new(cli: &Cli) -> Result<Self> {
        let (all, base) = match cli.vs {
            None => (rows(cli.full), base_row()),
            Some(Peer::Qemu) => (rows_beside_qemu(cli.full), qemu_base_row()),
            // There are no open loops.
            Some(Peer::VirtioDrivers) => (rows_beside_virtio_drivers(cli.full), base_row()),
        };
        let mut rows: Vec<Row> = all
            .into_iter()
            .filter(|row| {
                let name = row.to_string();
                cli.filter.is_empty() || cli.filter.iter().any(|text| name.contains(text.as_str()))
            })
            .collect();
        let net = NetPlan::new(cli.vs, cli.full, &cli.filter);
        if rows.is_empty() && net.rows.is_empty() {
            bail!("no row matches {:?}; `--list` prints all names", cli.filter);
        }
        let open = rows.iter().any(|row| row.looping == Loop::Open);
        if open && !rows.contains(&base) {
            rows.push(base);
        }
        Ok(Self {
            pairs: pairs(&rows),
            rows,
            base,
            net,
        })
    }

    /// The same without a virtual machine.
    #[must_use]
    pub fn for_join(self) -> Self {
        let rows = pass::join::rows(&self.rows);
        Self {
            pairs: pairs(&rows),
            rows,
            base: self.base,
            net: NetPlan::default(),
        }
    }

    /// The rows of one monitor, with their indices.
    pub fn rows_of(&self, vmm: Vmm) -> impl Iterator<Item = (usize, &Row)> {
        self.rows
            .iter()
            .enumerate()
            .filter(move |(_, row)| row.vmm == vmm)
    }
}

/// Each paravirtual row with each emulated one that does the same work and
/// completes the same way; virtio-pci with virtio-mmio; each of ours with
/// QEMU's of the same kind; and our driver with another one of the same device.
fn pairs(rows: &[Row]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (a, one) in rows.iter().enumerate() {
        for (b, two) in rows.iter().enumerate() {
            let same_work = (one.access, one.block_bytes, one.completion, one.looping)
                == (two.access, two.block_bytes, two.completion, two.looping)
                && one.guest_spin_us == two.guest_spin_us;
            let against_emulated = one.device == DeviceKind::VirtioBlk
                && !two.device.is_virtio()
                && one.vmm == two.vmm;
            let against_mmio = (one.device, two.device)
                == (DeviceKind::VirtioBlkPci, DeviceKind::VirtioBlk)
                && (one.depth, one.spin_us, one.vmm) == (two.depth, two.spin_us, two.vmm)
                && one.ring == two.ring;
            let against_qemu = one.device == two.device
                && (one.depth, one.ring) == (two.depth, two.ring)
                && one.vmm == Vmm::Pvkit
                && two.vmm.is_qemu();
            let against_driver = one.driver == Driver::PvkitGuest
                && two.driver != Driver::PvkitGuest
                && (one.device, one.depth, one.ring) == (two.device, two.depth, two.ring)
                && (one.vmm, one.spin_us) == (two.vmm, two.spin_us);
            if same_work && (against_emulated || against_mmio || against_qemu || against_driver) {
                pairs.push((a, b));
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::collections::HashSet;

    fn plan(args: &[&str]) -> Result<Plan> {
        let args = std::iter::once("pvkit-bench").chain(args.iter().copied());
        Plan::new(&Cli::parse_from(args))
    }

    #[test]
    fn the_quick_set_has_at_most_forty_rows_and_all_names_differ() {
        for (args, most) in [(&[][..], 40), (&["--full"][..], 200)] {
            let plan = plan(args).unwrap();
            let names: HashSet<String> = plan.rows.iter().map(Row::to_string).collect();
            assert_eq!(names.len(), plan.rows.len());
            assert!(names.len() <= most, "{}", names.len());
        }
    }

    #[test]
    fn polled_and_interrupt_never_share_a_pair() {
        let plan = plan(&["--full"]).unwrap();
        assert!(!plan.pairs.is_empty());
        for (a, b) in plan.pairs {
            let (a, b) = (plan.rows[a], plan.rows[b]);
            assert_eq!(a.completion, b.completion);
            assert_eq!((a.access, a.block_bytes), (b.access, b.block_bytes));
            assert_ne!((a.device, a.vmm), (b.device, b.vmm));
        }
    }

    #[test]
    fn each_row_of_virtio_drivers_is_beside_ours_and_fits_its_queue() {
        for args in [
            &["--vs", "virtio-drivers"][..],
            &["--vs", "virtio-drivers", "--full"][..],
        ] {
            let plan = plan(args).unwrap();
            let names: HashSet<String> = plan.rows.iter().map(Row::to_string).collect();
            assert_eq!(names.len(), plan.rows.len());
            let end = "/virtio-blk/pvkit/no-spin/virtio-drivers";
            assert!(names.contains(&format!("randread-4k-qd16-polled{end}")));
            assert!(names.contains("randread-4k-qd32-polled/virtio-blk/pvkit/spin-50us"));
            let theirs = |row: &&Row| row.driver != Driver::PvkitGuest;
            assert_eq!(plan.pairs.len(), plan.rows.iter().filter(theirs).count());
            for row in &plan.rows {
                assert!(row.depth <= row.driver.max_depth(), "{row}");
                assert_eq!(row.completion, Completion::Polled, "{row}");
            }
            for (a, b) in plan.pairs {
                let (a, b) = (plan.rows[a], plan.rows[b]);
                let driver = b.driver;
                assert_eq!(Row { driver, ..a }, b);
                assert_eq!(a.driver, Driver::PvkitGuest);
            }
        }
    }

    #[test]
    fn filters_choose_and_an_open_loop_brings_its_base() {
        let only = plan(&["--filter", "randread-4k-qd32-polled/virtio-blk/"]).unwrap();
        assert_eq!(only.rows.len(), 2, "with and without spinning");
        let open = plan(&["--filter", "-open"]).unwrap();
        assert!(open.rows.contains(&base_row()));
        let error = plan(&["--filter", "nothing"]).unwrap_err().to_string();
        assert!(
            error.contains("nothing") && error.contains("--list"),
            "{error}"
        );
    }
}
