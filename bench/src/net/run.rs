//! The network part of a run.

use super::pass::{self, NetTask};
use super::plan::NetPlan;
use super::result::{NetPair, NetResult, NetSum};
use super::row::{NetVmm, WireKind};
use super::wire::tap::TapWire;
use crate::pass::Settings;
use crate::pass::qemu::Qemu;
use anyhow::Result;
use indicatif::ProgressBar;
use std::path::Path;

/// What the network part brought.
#[derive(Debug, Default)]
pub struct NetOutcome {
    /// By row.
    pub results: Vec<NetResult>,
    /// What is compared.
    pub pairs: Vec<NetPair>,
    /// What was left out, and why.
    pub skipped: Vec<String>,
}

/// Measures all rows of the plan, in rounds.
///
/// # Errors
/// Whatever keeps it from measuring; wrong data is an error too.
pub fn run(
    plan: &NetPlan,
    image: &Path,
    qemu: Option<&Qemu>,
    settings: &Settings,
    rounds: u32,
    bar: &ProgressBar,
) -> Result<NetOutcome> {
    let mut skipped = Vec::new();
    let mut plan = plan.clone();
    let needs_tap = plan.rows.iter().any(|row| row.wire == WireKind::Tap);
    if needs_tap && let Err(error) = TapWire::new() {
        plan = plan.without_taps();
        skipped.push(format!(
            "taps ({error:#}): network cards are measured on a link in the process, \
             without TCP and QEMU"
        ));
    }
    let in_qemu = plan.rows.iter().any(|row| row.vmm.is_qemu());
    if in_qemu && qemu.is_some() {
        // Whether the host has it or not: there is no such row.
        skipped.push("QEMU's virtio-net with vhost, a device of the kernel".to_owned());
    }
    let mut sums = plan
        .rows
        .iter()
        .map(|row| NetSum::new(*row, settings.tsc_khz))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..rounds {
        for vmm in [NetVmm::Pvkit, NetVmm::Qemu, NetVmm::QemuTimer] {
            let tasks = tasks(&plan, vmm, round);
            if tasks.is_empty() {
                continue;
            }
            let before = bar.position();
            let progress = |done: usize| bar.set_position(before + done as u64);
            let measurements = match (vmm, qemu) {
                (NetVmm::Pvkit, _) => pass::run(image, &tasks, settings, &progress)?,
                (_, Some(qemu)) => pass::run_in_qemu(qemu, image, &tasks, settings, &progress)?,
                (_, None) => continue,
            };
            for measurement in &measurements {
                if let Some(sum) = sums.get_mut(measurement.index) {
                    sum.add(measurement);
                }
            }
            bar.set_position(before + tasks.len() as u64);
        }
    }
    let result = |index: usize| sums.get(index).and_then(NetSum::result);
    let pairs = plan
        .pairs
        .iter()
        .filter_map(|&(a, b)| Some(NetPair::new(&result(a)?, &result(b)?)))
        .collect();
    Ok(NetOutcome {
        results: sums.iter().filter_map(NetSum::result).collect(),
        pairs,
        skipped,
    })
}

/// The tasks of a pass. Every round starts with another row.
fn tasks(plan: &NetPlan, vmm: NetVmm, round: u32) -> Vec<NetTask> {
    let rows = plan.rows.len() as u32;
    let mut tasks: Vec<NetTask> = (0u32..)
        .zip(&plan.rows)
        .filter(|(_, row)| row.vmm == vmm)
        .map(|(index, row)| NetTask {
            index: index as usize,
            row: *row,
            round: 1 + round * rows + index,
            hash: false,
        })
        .collect();
    if !tasks.is_empty() {
        let shift = round as usize * 7 % tasks.len();
        tasks.rotate_left(shift);
    }
    tasks
}
