//! The tables on standard output.

use crate::instructions::Instructions;
use crate::measure::{Pair, RowResult};
use crate::row::Driver;

use comfy_table::{CellAlignment, ContentArrangement, Table, presets};

pub(crate) fn table(header: &[&str], left: usize) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    for (index, column) in table.column_iter_mut().enumerate() {
        column.set_padding((0, 2));
        if index >= left {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    table
}

/// A number with as many digits as say something.
#[must_use]
pub fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 9_999_500.0 => format!("{:.1}M", value / 1e6),
        v if v >= 99_950.0 => format!("{:.0}k", value / 1e3),
        v if v >= 9_995.0 => format!("{:.1}k", value / 1e3),
        v if v >= 99.95 => format!("{value:.0}"),
        v if v >= 9.995 => format!("{value:.1}"),
        v if v >= 0.995 => format!("{value:.2}"),
        0.0 => "0".to_owned(),
        v if v >= 0.000_95 => format!("{value:.3}"),
        _ => format!("{value:.5}"),
    }
}

pub(crate) fn optional(value: Option<f64>) -> String {
    value.map_or("-".to_owned(), figure)
}

/// How long a worker spins, if it can.
pub(crate) fn spin(us: Option<u32>) -> String {
    match us {
        None => "-".to_owned(),
        Some(0) => "off".to_owned(),
        Some(us) => format!("{us} µs"),
    }
}

/// All rows.
#[must_use]
pub fn results(results: &[RowResult]) -> String {
    // Only where it is compared: the table is wide enough.
    let ours = Driver::PvkitGuest.name();
    let drivers = results.iter().any(|row| row.driver != ours);
    let mut table = table(
        &[
            "case",
            if drivers { "driver" } else { "device" },
            "vmm",
            "spin",
            "QD",
            "IOPS",
            "MiB/s",
            "p50 µs",
            "p99",
            "p99.9",
            "max",
            "exits/req",
            "kicks",
            "irqs",
            "halts",
            "CPU µs/req",
            "vcpu",
            "worker",
            "kernel",
        ],
        4,
    );
    for row in results {
        let cpu = row.cpu_us_per_request;
        table.add_row([
            row.case.clone(),
            if drivers {
                row.driver.to_owned()
            } else {
                row.device.clone()
            },
            row.vmm.to_owned(),
            spin(row.spin_us),
            row.depth.to_string(),
            optional(row.iops),
            optional(row.mib_per_s),
            optional(row.p50_us),
            optional(row.p99_us),
            optional(row.p999_us),
            optional(row.max_us),
            figure(row.exits_per_request),
            figure(row.kicks_per_request),
            figure(row.interrupts_per_request),
            figure(row.halts_per_request),
            optional(row.host_cpu_us_per_request),
            optional(cpu.map(|cpu| cpu.vcpu_us)),
            optional(cpu.map(|cpu| cpu.worker_us)),
            optional(cpu.map(|cpu| cpu.in_kernel_us)),
        ]);
    }
    table.trim_fmt()
}

/// All comparisons.
#[must_use]
pub fn pairs(pairs: &[Pair]) -> String {
    let mut table = table(
        &[
            "this",
            "beside this",
            "IOPS ×",
            "p50 ×",
            "CPU ×",
            "exits/req",
            "against",
        ],
        2,
    );
    for pair in pairs {
        table.add_row([
            pair.a.clone(),
            pair.b.clone(),
            optional(pair.iops),
            optional(pair.p50),
            optional(pair.host_cpu),
            figure(pair.a_exits_per_request),
            figure(pair.b_exits_per_request),
        ]);
    }
    table.trim_fmt()
}

/// What drivers execute.
#[must_use]
pub fn instructions(counts: &[Instructions]) -> String {
    let header = ["driver", "QD", "instructions/req", "without allocator"];
    let mut table = table(&header, 1);
    for count in counts {
        table.add_row([
            count.driver.to_owned(),
            count.depth.to_string(),
            figure(count.instructions_per_request),
            figure(count.without_allocator),
        ]);
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::figure;

    #[test]
    fn figures_have_about_three_digits() {
        for (value, text) in [
            (0.0, "0"),
            (0.000_02, "0.00002"),
            (0.012, "0.012"),
            (1.0, "1.00"),
            (12.34, "12.3"),
            (999.9, "1000"),
            (12_345.0, "12.3k"),
            (812_345.0, "812k"),
            (12_345_678.0, "12.3M"),
        ] {
            assert_eq!(figure(value), text);
        }
    }
}
