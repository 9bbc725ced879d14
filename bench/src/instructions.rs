//! Instructions that a driver takes for a request, counted by callgrind.
//!
//! The program runs itself under valgrind, in a mode in which driver and device
//! take turns in one process and every run is the same. Counting is on only
//! inside the driver (see [`pvkit_peer::sides`]): submitting, publishing and
//! completing; not the doorbell's register, and not the translation of
//! addresses. It is done for two numbers of requests, and the difference
//! leaves nothing of the start.

use crate::cli::Cli;
use crate::pass::{self, Settings, Task, job};
use crate::plan::base_row;
use crate::row::{DeviceKind, Driver, Row};
use anyhow::{Context, Result, bail, ensure};
use pvkit_host::disk::MemoryDisk;
use pvkit_workload::pattern::{self, FIRST};
use serde::Serialize;
use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;
use std::process::{Command, Stdio};
use std::str::FromStr;
use std::time::Duration;

/// The tool.
const VALGRIND: &str = "valgrind";
/// Depths that a run counts.
pub const DEPTHS: [u32; 3] = [1, 8, 16];
/// The two numbers of requests: multiples of every depth, so that the last
/// round is a full one.
const REQUESTS: [u32; 2] = [1024, 3072];
/// Where counting is switched on, and where off again inside of that.
const SWITCHES: [&str; 2] = [
    "pvkit_peer::sides::driver_side*",
    "pvkit_peer::sides::platform_side*",
];
/// A function on the platform's side: where it was counted, switching failed.
const PLATFORM: &str = "ArenaSpace";
/// Where memory is taken and given back; none of them calls another.
const ALLOCATOR: [&str; 4] = ["malloc", "calloc", "posix_memalign", "free"];
/// The disk; its content does not matter, but is checked.
const DISK_BYTES: usize = 1 << 20;

/// Instructions per request of one driver at one depth.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Instructions {
    /// The driver.
    pub driver: &'static str,
    /// Requests in flight.
    pub depth: u32,
    /// All of the driver's.
    pub instructions_per_request: f64,
    /// Without those of the allocator that it calls.
    pub without_allocator: f64,
}

/// What a child does: so many requests by a driver, at a depth.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Child {
    driver: Driver,
    depth: u32,
    requests: u32,
}

impl Child {
    fn argument(self) -> String {
        format!("{},{},{}", self.driver.name(), self.depth, self.requests)
    }
}

impl FromStr for Child {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (driver, rest) = text.split_once(',')?;
            let (depth, requests) = rest.split_once(',')?;
            Some(Self {
                driver: Driver::ALL.into_iter().find(|d| d.name() == driver)?,
                depth: depth.parse().ok()?,
                requests: requests.parse().ok()?,
            })
        };
        parse().ok_or_else(|| format!("{text:?} is not DRIVER,DEPTH,REQUESTS"))
    }
}

/// Moves the requests of a child, and nothing else.
///
/// # Errors
/// If one fails, or data is wrong.
pub fn run_child(child: Child) -> Result<()> {
    let row = Row {
        device: DeviceKind::VirtioBlk,
        driver: child.driver,
        depth: child.depth,
        spin_us: Some(0),
        ..base_row()
    };
    let task = Task {
        index: 0,
        row,
        round: 0,
        rate: None,
    };
    let settings = Settings::new(0, Duration::ZERO);
    let mut job = job(&task, &settings, u64::from(child.requests));
    job.duration_ticks.set(u64::MAX);
    job.sectors.set((DISK_BYTES / pattern::SECTOR_BYTES) as u64);
    let mut content = vec![0; DISK_BYTES];
    pattern::fill(&mut content, 0, FIRST, 1);
    let disk = MemoryDisk::from_bytes(content);
    let outcome = match child.driver {
        Driver::PvkitGuest => pass::join::run_sided(&disk, &job, child.requests)?,
        Driver::VirtioDrivers | Driver::VirtioDriversTuned => {
            pass::join::run_virtio_drivers(&disk, &job, child.requests)?.0
        }
    };
    ensure!(
        outcome.requests == u64::from(child.requests),
        "{} requests instead of {}",
        outcome.requests,
        child.requests
    );
    Ok(())
}

/// Counts for every driver at `depths`, by running `program`, which is this one.
/// `Err` in the result says why it cannot be counted here.
///
/// # Errors
/// If the program fails under valgrind, or valgrind itself.
pub fn count(program: &Path, depths: &[u32]) -> Result<Result<Vec<Instructions>, String>> {
    count_with(VALGRIND, program, depths)
}

fn count_with(
    valgrind: &str,
    program: &Path,
    depths: &[u32],
) -> Result<Result<Vec<Instructions>, String>> {
    let version = Command::new(valgrind)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    match version {
        Ok(status) => ensure!(status.success(), "{valgrind} --version: {status}"),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Ok(Err(
                "instructions per request: valgrind is missing (Debian: apt install valgrind)"
                    .to_owned(),
            ));
        }
        Err(error) => return Err(error).context(valgrind.to_owned()),
    }
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("callgrind.out");
    let mut counts = Vec::new();
    for &depth in depths {
        for driver in Driver::ALL {
            let mut totals = [Total::default(); 2];
            for (total, requests) in totals.iter_mut().zip(REQUESTS) {
                let child = Child {
                    driver,
                    depth,
                    requests,
                };
                *total = run_counted(valgrind, program, child, &file)?;
            }
            let [few, many] = totals;
            ensure!(
                many.all > few.all && few.all > 0,
                "callgrind counted {} and {} instructions of {}: was the program built without \
                 symbols?",
                few.all,
                many.all,
                driver.name(),
            );
            let requests = f64::from(REQUESTS[1] - REQUESTS[0]);
            let all = (many.all - few.all) as f64 / requests;
            let allocator = many.allocator.saturating_sub(few.allocator) as f64 / requests;
            counts.push(Instructions {
                driver: driver.name(),
                depth,
                instructions_per_request: all,
                without_allocator: all - allocator,
            });
        }
    }
    Ok(Ok(counts))
}

/// What callgrind counted in one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Total {
    all: u64,
    /// Those of the allocator, in calls from the driver.
    allocator: u64,
}

/// The instructions of one child.
fn run_counted(valgrind: &str, program: &Path, child: Child, file: &Path) -> Result<Total> {
    let context = || format!("{valgrind} for {}", child.argument());
    let mut command = Command::new(valgrind);
    command
        .args(["--tool=callgrind", "--collect-atstart=no"])
        .arg(format!("--callgrind-out-file={}", file.display()))
        .args(SWITCHES.map(|name| format!("--toggle-collect={name}")))
        .arg(program)
        .arg(Cli::STEPPED)
        .arg(child.argument());
    let output = command.output().with_context(context)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}: {}\n{}", context(), output.status, text.trim());
    }
    let text = fs::read_to_string(file).with_context(context)?;
    total(&text).with_context(|| {
        format!(
            "{}: callgrind left no total, or counted more than the driver",
            context()
        )
    })
}

/// Reads callgrind's file. A call is three lines (see the manual, "Callgrind
/// Format Specification"): the callee, whose name follows its number where
/// that is new; how often; and a position with the instructions inside.
fn total(text: &str) -> Option<Total> {
    let mut total = Total::default();
    let mut names = HashMap::new();
    let mut callee = "";
    let mut lines = text.lines();
    let mut found = false;
    while let Some(line) = lines.next() {
        let function = line.strip_prefix("cfn=");
        if let Some(function) = function.or(line.strip_prefix("fn=")) {
            let (number, name) = function.split_once(' ').unwrap_or((function, ""));
            if name.contains(PLATFORM) {
                return None;
            }
            if !name.is_empty() {
                names.insert(number, name);
            }
            callee = names.get(number).copied().unwrap_or("");
        } else if line.starts_with("calls=") {
            let inside = lines.next()?.split(' ').nth(1)?;
            if ALLOCATOR.contains(&callee) {
                total.allocator += inside.parse::<u64>().ok()?;
            }
        } else if let Some(all) = line.strip_prefix("totals: ") {
            total.all = all.trim().parse().ok()?;
            found = true;
        }
    }
    found.then_some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_s_argument_round_trips() {
        let child = Child {
            driver: Driver::VirtioDriversTuned,
            depth: 8,
            requests: 1024,
        };
        assert_eq!(child.argument().parse(), Ok(child));
        for bad in ["", "pvkit-guest", "pvkit-guest,1", "nobody,1,1"] {
            assert!(bad.parse::<Child>().is_err(), "{bad}");
        }
    }

    #[test]
    fn every_child_runs() {
        for driver in Driver::ALL {
            for depth in DEPTHS {
                let requests = 64;
                let child = Child {
                    driver,
                    depth,
                    requests,
                };
                run_child(child).unwrap();
            }
        }
    }

    #[test]
    fn calls_of_the_allocator_are_found_by_their_numbers() {
        let text = "events: Ir\nfn=(1) driver\n10 5\ncfn=(2) calloc\ncalls=3 0\n10 70\n\
                    cfn=(3) other\ncalls=1 0\n10 1\nfn=(4) more\ncfn=(2)\ncalls=1 0\n\
                    +1 30\ntotals: 106\n";
        let expected = Total {
            all: 106,
            allocator: 100,
        };
        assert_eq!(total(text), Some(expected));
        assert_eq!(total("events: Ir\n"), None);
        let wrong = text.replace("other", "<join::ArenaSpace as DmaSpace>::map");
        assert_eq!(total(&wrong), None);
    }

    #[test]
    fn a_missing_tool_is_a_reason_and_a_failing_program_an_error() {
        let program = Path::new("/bin/false");
        let missing = count_with("no-such-valgrind", program, &DEPTHS).unwrap();
        assert!(missing.unwrap_err().contains("apt install valgrind"));
        // Stands for a valgrind whose child fails.
        let error = count_with("false", program, &DEPTHS)
            .unwrap_err()
            .to_string();
        assert!(error.contains("--version"), "{error}");
    }
}
