//! The tables of network rows on standard output.

use super::result::{NetPair, NetResult};
use crate::output::table::{figure, optional, spin, table};

/// What the cards are plugged into.
#[must_use]
pub fn wires(results: &[NetResult]) -> &'static str {
    if results.iter().any(|row| row.wire == "tap") {
        "Each network card is plugged into a tap of the host's kernel, in a namespace of its own,\n\
         unless it says otherwise. Frames are counted by whoever receives them."
    } else {
        "Network cards are plugged into a link inside the process, which answers in the device's\n\
         thread: what a real wire costs is not in these figures."
    }
}

/// All rows.
#[must_use]
pub fn results(results: &[NetResult]) -> String {
    let header = [
        "network case",
        "card",
        "vmm",
        "spin",
        "frames/s",
        "MiB/s",
        "lost",
        "p50 µs",
        "p99",
        "max",
        "exits/frame",
        "kicks",
        "irqs",
        "halts",
        "CPU µs/frame",
        "vcpu",
        "worker",
    ];
    let mut table = table(&header, 4);
    for row in results {
        let cpu = row.cpu_us_per_frame;
        let card = match row.wire {
            "tap" => row.device.clone(),
            wire => format!("{} ({wire})", row.device),
        };
        table.add_row([
            row.case.clone(),
            card,
            row.vmm.to_owned(),
            spin(row.spin_us),
            figure(row.pps),
            figure(row.mib_per_s),
            row.lost.map_or("-".to_owned(), |lost| lost.to_string()),
            optional(row.p50_us),
            optional(row.p99_us),
            optional(row.max_us),
            figure(row.exits_per_frame),
            figure(row.kicks_per_frame),
            figure(row.interrupts_per_frame),
            figure(row.halts_per_frame),
            optional(row.host_cpu_us_per_frame),
            optional(cpu.map(|cpu| cpu.vcpu_us)),
            optional(cpu.map(|cpu| cpu.worker_us)),
        ]);
    }
    table.trim_fmt()
}

/// All comparisons.
#[must_use]
pub fn pairs(pairs: &[NetPair]) -> String {
    let header = [
        "this",
        "beside this",
        "frames/s ×",
        "MiB/s ×",
        "p50 ×",
        "CPU ×",
        "exits/frame",
        "against",
    ];
    let mut table = table(&header, 2);
    for pair in pairs {
        table.add_row([
            pair.a.clone(),
            pair.b.clone(),
            optional(pair.pps),
            optional(pair.mib_per_s),
            optional(pair.p50),
            optional(pair.host_cpu),
            figure(pair.a_exits_per_frame),
            figure(pair.b_exits_per_frame),
        ]);
    }
    table.trim_fmt()
}
