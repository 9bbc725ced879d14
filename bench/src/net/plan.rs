//! Which network rows are measured in a run, and which of them are compared.

use super::row::{Card, NetRow, NetVmm, STREAM_MIB, WireKind};
use crate::cli::Peer;
use crate::plan::SPIN_US;
use pvkit_workload::net::job::NetWork;
use pvkit_workload::script::Completion;

/// Bytes of the frames of round trips.
const TRIP_BYTES: u32 = 64;
/// The rate at which a guest that is interrupted receives.
const RATE: u32 = 100_000;

/// The network rows of a run.
#[derive(Debug, Clone, Default)]
pub struct NetPlan {
    /// In the order in which they are printed.
    pub rows: Vec<NetRow>,
    /// Pairs of indices into `rows`: what is compared with what.
    pub pairs: Vec<(usize, usize)>,
}

/// A row in our monitor, as good as the card can be used.
#[must_use]
pub fn base_row(card: Card, work: NetWork) -> NetRow {
    let stream = matches!(work, NetWork::TcpReceive | NetWork::TcpSend);
    NetRow {
        work,
        frame_bytes: if stream { 1514 } else { TRIP_BYTES },
        rate: 0,
        stream_mib: if stream { STREAM_MIB } else { 0 },
        completion: Completion::Polled,
        card,
        offloads: true,
        moderation: true,
        vmm: NetVmm::Pvkit,
        wire: WireKind::Tap,
        spin_us: Some(SPIN_US),
    }
}

/// All that a card is asked to do, but for how it is used.
fn cases(card: Card, full: bool) -> Vec<NetRow> {
    use Completion::{Interrupt, Polled};
    use NetWork::{Receive, RoundTrip, TcpReceive, TcpSend, Transmit};
    let mut rows = Vec::new();
    let mut add = |row: NetRow, completion: Completion| {
        rows.push(NetRow { completion, ..row });
    };
    let sizes = |all: &'static [u32], few: &'static [u32]| if full { all } else { few };
    for &frame_bytes in &[64, 512, 1500] {
        let row = base_row(card, Transmit);
        add(NetRow { frame_bytes, ..row }, Polled);
    }
    for &frame_bytes in sizes(&[64, 512, 1500], &[64, 1500]) {
        let row = base_row(card, Receive);
        add(NetRow { frame_bytes, ..row }, Polled);
    }
    let row = base_row(card, Receive);
    add(NetRow { rate: RATE, ..row }, Interrupt);
    for &frame_bytes in sizes(&[64, 1500], &[64]) {
        let row = base_row(card, RoundTrip);
        let row = NetRow { frame_bytes, ..row };
        add(row, Polled);
        add(row, Interrupt);
    }
    for work in [TcpReceive, TcpSend] {
        let row = base_row(card, work);
        let stream_mib = if full { 4 * STREAM_MIB } else { STREAM_MIB };
        add(NetRow { stream_mib, ..row }, Polled);
    }
    rows
}

/// Each way in which a card's row can be used.
fn variants(row: NetRow) -> Vec<NetRow> {
    let mut rows = vec![row];
    if row.is_stream() && row.card.is_virtio() {
        rows.push(NetRow {
            offloads: false,
            ..row
        });
    }
    if row.is_moderable() {
        rows.push(NetRow {
            moderation: false,
            ..row
        });
    }
    rows
}

/// Beside the emulated card.
fn rows(full: bool) -> Vec<NetRow> {
    let mut rows = Vec::new();
    let mut cards = vec![Card::VirtioNet, Card::E1000];
    if full {
        cards.insert(1, Card::VirtioNetPci);
    }
    for card in cards {
        for row in cases(card, full) {
            for row in variants(row) {
                rows.push(row);
                let shortest = (row.work, row.frame_bytes) == (NetWork::Transmit, 64);
                if (full || shortest) && row.card == Card::VirtioNet && row.offloads {
                    rows.push(NetRow {
                        spin_us: Some(0),
                        ..row
                    });
                }
                if full && !row.is_stream() && row.card != Card::VirtioNetPci {
                    rows.push(NetRow {
                        wire: WireKind::InProcess,
                        ..row
                    });
                }
            }
        }
    }
    // Those of one case beside each other.
    let mut order: Vec<String> = Vec::new();
    for row in &rows {
        let case = row.case();
        if !order.contains(&case) {
            order.push(case);
        }
    }
    rows.sort_by_key(|row| order.iter().position(|case| *case == row.case()));
    rows
}

/// Our monitor beside QEMU, with the same drivers.
fn rows_beside_qemu(full: bool) -> Vec<NetRow> {
    let mut rows = Vec::new();
    for case in cases(Card::VirtioNetPci, full) {
        for card in [Card::VirtioNetPci, Card::E1000] {
            for row in variants(NetRow { card, ..case }) {
                if !full && (!row.offloads || !row.moderation) {
                    continue;
                }
                rows.push(row);
                let in_qemu = |vmm| NetRow {
                    vmm,
                    spin_us: None,
                    ..row
                };
                rows.push(in_qemu(NetVmm::Qemu));
                // It is about sending, and loses by waiting.
                let sends = matches!(row.work, NetWork::Transmit | NetWork::TcpSend);
                if row.card.is_virtio() && sends {
                    rows.push(in_qemu(NetVmm::QemuTimer));
                }
            }
        }
    }
    rows
}

impl NetPlan {
    /// The rows that match one of the filters, or all.
    #[must_use]
    pub fn new(vs: Option<Peer>, full: bool, filter: &[String]) -> Self {
        let mut rows = match vs {
            None => rows(full),
            Some(Peer::Qemu) => rows_beside_qemu(full),
            // It has a network driver, but none that is comparable.
            Some(Peer::VirtioDrivers) => Vec::new(),
        };
        rows.retain(|row| {
            let name = row.to_string();
            filter.is_empty() || filter.iter().any(|text| name.contains(text.as_str()))
        });
        Self::of(rows)
    }

    /// A plan of these rows.
    #[must_use]
    pub fn of(rows: Vec<NetRow>) -> Self {
        Self {
            pairs: pairs(&rows),
            rows,
        }
    }

    /// The same where no taps can be made: without what needs one.
    #[must_use]
    pub fn without_taps(&self) -> Self {
        let mut rows: Vec<NetRow> = Vec::new();
        for row in &self.rows {
            let row = NetRow {
                wire: WireKind::InProcess,
                ..*row
            };
            let needs_tap = row.is_stream() || row.vmm.is_qemu();
            if !needs_tap && !rows.contains(&row) {
                rows.push(row);
            }
        }
        Self::of(rows)
    }
}

/// Each paravirtual row with each emulated one that does the same work the same
/// way; with offloads beside without; virtio-pci with virtio-mmio; and each of
/// ours with QEMU's of the same kind.
fn pairs(rows: &[NetRow]) -> Vec<(usize, usize)> {
    let mut pairs = Vec::new();
    for (a, one) in rows.iter().enumerate() {
        for (b, two) in rows.iter().enumerate() {
            let same_work = one.case() == two.case() && one.wire == two.wire;
            let against_emulated = one.card.is_virtio()
                && !two.card.is_virtio()
                && (one.vmm, one.spin_us) == (two.vmm, two.spin_us)
                && one.vmm == NetVmm::Pvkit;
            let same_host = one.vmm == two.vmm && one.spin_us == two.spin_us;
            let against_plain = one.card == two.card
                && same_host
                && (one.offloads && !two.offloads || one.moderation && !two.moderation);
            let against_mmio = (one.card, two.card) == (Card::VirtioNetPci, Card::VirtioNet)
                && same_host
                && one.offloads == two.offloads;
            let against_qemu = one.card == two.card
                && (one.offloads, one.moderation) == (two.offloads, two.moderation)
                && one.vmm == NetVmm::Pvkit
                && two.vmm.is_qemu();
            if same_work && (against_emulated || against_plain || against_mmio || against_qemu) {
                pairs.push((a, b));
            }
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn names(plan: &NetPlan) -> HashSet<String> {
        plan.rows.iter().map(NetRow::to_string).collect()
    }

    #[test]
    fn names_differ_and_quick_runs_are_short() {
        for (vs, full, most) in [
            (None, false, 30),
            (None, true, 120),
            (Some(Peer::Qemu), false, 60),
            (Some(Peer::Qemu), true, 120),
        ] {
            let plan = NetPlan::new(vs, full, &[]);
            let names = names(&plan);
            assert_eq!(names.len(), plan.rows.len());
            assert!(names.len() <= most, "{vs:?} {full}: {}", names.len());
        }
    }

    #[test]
    fn the_quick_run_has_what_is_asked_of_it() {
        let plan = NetPlan::new(None, false, &[]);
        let names = names(&plan);
        for case in ["transmit-64", "transmit-512", "transmit-1500", "receive-64"] {
            for card in ["virtio-net", "e1000"] {
                let name = format!("{case}-polled/{card}/pvkit/spin-50us");
                assert!(names.contains(&name), "{name}");
            }
        }
        for card in ["virtio-net", "e1000-moderated", "e1000-unmoderated"] {
            for case in ["receive-64-100k/s", "round-trip-64"] {
                let name = format!("{case}-interrupt/{card}/pvkit/spin-50us");
                assert!(names.contains(&name), "{name}");
            }
        }
        for card in ["virtio-net", "virtio-net-no-offloads", "e1000"] {
            for case in ["tcp-send-16m", "tcp-receive-16m"] {
                let name = format!("{case}-polled/{card}/pvkit/spin-50us");
                assert!(names.contains(&name), "{name}");
            }
        }
    }

    #[test]
    fn what_is_compared_does_the_same_work() {
        for vs in [None, Some(Peer::Qemu)] {
            let plan = NetPlan::new(vs, true, &[]);
            assert!(!plan.pairs.is_empty());
            for (a, b) in plan.pairs {
                let (a, b) = (plan.rows[a], plan.rows[b]);
                assert_eq!((a.case(), a.wire), (b.case(), b.wire));
                assert_ne!(a, b);
            }
        }
    }

    #[test]
    fn without_taps_there_is_no_tcp_and_no_qemu() {
        let plan = NetPlan::new(None, true, &[]).without_taps();
        assert_eq!(names(&plan).len(), plan.rows.len());
        assert!(plan.rows.iter().all(|row| !row.is_stream()));
        let plan = NetPlan::new(Some(Peer::Qemu), false, &[]).without_taps();
        assert!(plan.rows.iter().all(|row| row.vmm == NetVmm::Pvkit));
        assert!(!plan.rows.is_empty());
        let filter = ["transmit-64".to_owned()];
        let plan = NetPlan::new(None, false, &filter);
        assert_eq!(plan.rows.len(), 3, "with and without spinning, and e1000");
    }
}
