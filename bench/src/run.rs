//! A whole run, from the command line to the tables.

use crate::cli::{Cli, Peer};
use crate::machine::Machine;
use crate::measure::{Pair, RowResult, Sum};
use crate::net::run::NetOutcome;
use crate::net::{self, table as net_table};
use crate::output::{json, table};
use crate::pass::{self, Measurement, Settings, Task};
use crate::plan::Plan;
use crate::row::{Loop, Row, Vmm};
use crate::test_file::{self, TestFile};
use crate::{image, instructions, pass::qemu};
use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};
use pvkit_host::disk::{FileDisk, FileOptions, MemoryDisk};
use pvkit_host::vmm;
use pvkit_workload::pattern::Round;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::time::{Duration, Instant};

/// Runs the benchmark.
///
/// # Errors
/// Whatever keeps it from measuring; wrong data is an error too.
pub fn run(cli: &Cli) -> Result<()> {
    if let Some(child) = cli.stepped {
        return instructions::run_child(child);
    }
    let mut plan = Plan::new(cli)?;
    let mut out = std::io::stdout().lock();
    if cli.list {
        for row in &plan.rows {
            writeln!(out, "{row}")?;
        }
        for row in &plan.net.rows {
            writeln!(out, "{row}")?;
        }
        return Ok(());
    }
    if let Some(path) = &cli.json {
        json::check(path)?;
    }
    let directory = cli.dir.clone().unwrap_or_else(std::env::temp_dir);
    let started = Instant::now();
    let missing = !Path::new("/dev/kvm").exists();
    let outcome = if cli.join || missing {
        let why = if missing {
            "/dev/kvm is missing"
        } else {
            "--join was given"
        };
        writeln!(
            out,
            "{why}: driver and device run in one process, without a virtual machine. \
             Counts only; times would mean nothing."
        )?;
        let most = plan.rows.len();
        let needs_machine = |row: &&Row| row.vmm.is_qemu() || row.looping == Loop::Open;
        let left_out = plan.rows.iter().filter(needs_machine).count();
        let net = plan.net.rows.len();
        plan = plan.for_join();
        let mut outcome = in_join(cli, &plan, &directory)?;
        if left_out > 0 {
            outcome.skipped.push(format!(
                "{left_out} of {most} rows, of QEMU or in open loops: they need a virtual machine"
            ));
        }
        if net > 0 {
            outcome
                .skipped
                .push(format!("{net} network rows: they need a virtual machine"));
        }
        outcome
    } else {
        in_machines(cli, &mut plan, &directory, &mut out)?
    };
    let Outcome {
        machine,
        sums,
        written,
        mut skipped,
        net,
    } = outcome;
    skipped.extend(net.skipped);

    let results: Vec<RowResult> = sums.iter().filter_map(Sum::result).collect();
    if results.is_empty() && net.results.is_empty() {
        bail!("nothing was measured; skipped: {}", skipped.join("; "));
    }
    let pairs = compare(&plan, &sums);
    let instructions = if cli.vs == Some(Peer::VirtioDrivers) {
        let program = std::env::current_exe().context("this program")?;
        instructions::count(&program, &instructions::DEPTHS)?.unwrap_or_else(|why| {
            skipped.push(why);
            Vec::new()
        })
    } else {
        Vec::new()
    };
    // Before the tables: nobody may be reading those any more.
    if let Some(path) = &cli.json {
        let document = json::Document {
            schema: json::SCHEMA,
            machine: &machine,
            results: json::entries(&results, &net.results),
            pairs: json::entries(&pairs, &net.pairs),
            instructions: &instructions,
            skipped: &skipped,
        };
        json::write(path, &document)?;
    }
    if !results.is_empty() {
        writeln!(out, "\n{}", table::results(&results))?;
    }
    if !pairs.is_empty() {
        writeln!(out, "\n{}", table::pairs(&pairs))?;
    }
    if !net.results.is_empty() {
        writeln!(out, "\n{}", net_table::wires(&net.results))?;
        writeln!(out, "{}", net_table::results(&net.results))?;
    }
    if !net.pairs.is_empty() {
        writeln!(out, "\n{}", net_table::pairs(&net.pairs))?;
    }
    if !instructions.is_empty() {
        writeln!(out, "\n{}", table::instructions(&instructions))?;
    }
    let disks = results.iter().map(|row| row.verified_bytes);
    let cards = net.results.iter().map(|row| row.verified_bytes);
    let verified: u64 = disks.chain(cards).sum();
    write!(
        out,
        "\nData verified: {:.1} MiB by the guest",
        verified as f64 / f64::from(1 << 20)
    )?;
    if let Some(sectors) = written {
        write!(out, ", {sectors} written sectors by the host")?;
    }
    let seconds = started.elapsed().as_secs_f64();
    writeln!(out, "; none wrong. {} rounds, {seconds:.0} s.", cli.rounds)?;
    for note in &skipped {
        writeln!(out, "skipped: {note}")?;
    }
    Ok(())
}

/// What a run brought.
struct Outcome {
    machine: Machine,
    sums: Vec<Sum>,
    /// Sectors of the test file that were written, and are right.
    written: Option<u64>,
    skipped: Vec<String>,
    net: NetOutcome,
}

fn in_join(cli: &Cli, plan: &Plan, directory: &Path) -> Result<Outcome> {
    let disk = MemoryDisk::from_bytes(test_file::content());
    let bar = progress_bar(plan, cli.rounds);
    let mut sums = plan
        .rows
        .iter()
        .map(|row| Sum::new(*row, None))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..cli.rounds {
        let tasks = tasks(plan, Vmm::Pvkit, round, None);
        let before = bar.position();
        let progress = |done: usize| bar.set_position(before + done as u64);
        for measurement in pass::join::run(&disk, &tasks, &progress)? {
            add(&mut sums, &measurement, None);
        }
    }
    bar.finish_and_clear();
    let machine = Machine::look(directory, 0);
    Ok(Outcome {
        machine,
        sums,
        written: None,
        skipped: Vec::new(),
        net: NetOutcome::default(),
    })
}

fn in_machines(
    cli: &Cli,
    plan: &mut Plan,
    directory: &Path,
    out: &mut dyn Write,
) -> Result<Outcome> {
    let tsc_khz = vmm::tsc_khz()?;
    let mut machine = Machine::look(directory, tsc_khz);
    let mut skipped = Vec::new();
    let qemu = find_qemu(cli, plan, machine.software_kvm, &mut skipped);
    let open = |row: &&Row| row.looping == Loop::Open;
    let open = plan.rows.iter().filter(open).count();
    if cli.rounds == 1 && open > 0 {
        skipped.push(format!(
            "{open} rows in open loops: their rate follows from the first round; \
             use --rounds 2 or more"
        ));
    }
    machine.qemu = qemu.as_ref().map(|qemu| qemu.version.clone());
    writeln!(out, "{}", machine.describe())?;

    let file = match plan.rows.as_slice() {
        [] => None,
        _ => Some(TestFile::new(directory)?),
    };
    let image = image::write().context("the guest image")?;
    let settings = Settings::new(tsc_khz, Duration::from_millis(cli.duration_ms));
    let bar = progress_bar(plan, cli.rounds);
    let mut sums = plan
        .rows
        .iter()
        .map(|row| Sum::new(*row, Some(tsc_khz)))
        .collect::<Result<Vec<_>>>()?;
    let mut last_round = 0;
    for round in 0..cli.rounds {
        for vmm in [Vmm::Pvkit, Vmm::QemuIothread, Vmm::Qemu] {
            let rate = half_rate(plan, &sums);
            let tasks = tasks(plan, vmm, round, rate);
            let Some(file) = file.as_ref().filter(|_| !tasks.is_empty()) else {
                continue;
            };
            last_round = tasks
                .iter()
                .map(|task| task.round)
                .fold(last_round, u32::max);
            let before = bar.position();
            let progress = |done: usize| bar.set_position(before + done as u64);
            let measurements = match (vmm, &qemu) {
                (Vmm::Pvkit, _) => {
                    let disk = FileDisk::open(file.path(), FileOptions::default())?;
                    pass::kvm::run(image.path(), &disk, &tasks, &settings, &progress)?
                }
                (_, Some(qemu)) => {
                    let disk = file.path();
                    let qemu = qemu.set_up(vmm == Vmm::QemuIothread);
                    qemu::run(&qemu, image.path(), disk, &tasks, &settings, &progress)?
                }
                (_, None) => continue,
            };
            for (measurement, task) in measurements.iter().zip(&tasks) {
                add(&mut sums, measurement, task.rate);
            }
            bar.set_position(before + tasks.len() as u64);
        }
    }
    let net = net::run::run(
        &plan.net,
        image.path(),
        qemu.as_ref(),
        &settings,
        cli.rounds,
        &bar,
    )?;
    bar.finish_and_clear();
    let verify = |file: TestFile| file.verify(Round(last_round));
    let written = file.map(verify).transpose()?;
    Ok(Outcome {
        machine,
        sums,
        written,
        skipped,
        net,
    })
}

/// Looks for QEMU if a row wants it; without it, its rows are left out.
fn find_qemu(
    cli: &Cli,
    plan: &mut Plan,
    software_kvm: bool,
    skipped: &mut Vec<String>,
) -> Option<qemu::Qemu> {
    let disks = plan.rows.iter().filter(|row| row.vmm.is_qemu()).count();
    let cards = plan.net.rows.iter().filter(|row| row.vmm.is_qemu());
    let count = disks + cards.count();
    if count == 0 {
        return None;
    }
    let found = if cli.no_qemu {
        Err(anyhow::anyhow!("--no-qemu was given"))
    } else {
        qemu::find(software_kvm)
    };
    match found {
        Ok(qemu) => Some(qemu),
        Err(error) => {
            skipped.push(format!("{count} rows of QEMU: {error:#}"));
            None
        }
    }
}

/// Half the rate of the row that open loops follow, once that has been
/// measured.
fn half_rate(plan: &Plan, sums: &[Sum]) -> Option<f64> {
    let index = plan.rows.iter().position(|row| *row == plan.base)?;
    sums.get(index)?.iops().map(|iops| iops / 2.0)
}

/// The tasks of a pass. Every round starts with another row, so that no row is
/// always the first.
fn tasks(plan: &Plan, vmm: Vmm, round: u32, rate: Option<f64>) -> Vec<Task> {
    let rows = plan.rows.len() as u32;
    let mut tasks: Vec<Task> = plan
        .rows_of(vmm)
        .filter(|(_, row)| row.looping == Loop::Closed || rate.is_some())
        .map(|(index, row)| Task {
            index,
            row: *row,
            round: 1 + round * rows + index as u32,
            rate: rate.filter(|_| row.looping == Loop::Open),
        })
        .collect();
    if !tasks.is_empty() {
        let shift = round as usize * 7 % tasks.len();
        tasks.rotate_left(shift);
    }
    tasks
}

fn add(sums: &mut [Sum], measurement: &Measurement, rate: Option<f64>) {
    if let Some(sum) = sums.get_mut(measurement.index) {
        sum.add(measurement, rate);
    }
}

fn compare(plan: &Plan, sums: &[Sum]) -> Vec<Pair> {
    let result = |index: usize| sums.get(index).and_then(Sum::result);
    plan.pairs
        .iter()
        .filter_map(|&(a, b)| Some(Pair::new(&result(a)?, &result(b)?)))
        .collect()
}

/// A bar on a terminal, and nothing elsewhere.
fn progress_bar(plan: &Plan, rounds: u32) -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new((plan.rows.len() + plan.net.rows.len()) as u64 * u64::from(rounds));
    if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} measurements, {eta} left")
    {
        bar.set_style(style);
    }
    bar
}
