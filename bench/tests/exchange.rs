//! Two virtual machines that exchange frames through the switch.

mod common;

use common::{alone, skipped};
use pvkit_bench::image;
use pvkit_bench::net::pass::{Exchange, exchange};
use pvkit_bench::net::row::Card;
use pvkit_bench::pass::Settings;
use pvkit_host::link::switch::{Switch, SwitchOptions};
use pvkit_host::vmm;
use std::sync::Arc;
use std::time::Duration;

fn settings() -> Option<Settings> {
    match vmm::tsc_khz() {
        Ok(tsc_khz) => Some(Settings::new(tsc_khz, Duration::from_millis(30))),
        Err(error) => {
            skipped(&error.to_string());
            None
        }
    }
}

#[test]
fn five_million_frames_and_none_is_lost_where_the_receiver_keeps_up() {
    let _alone = alone();
    let Some(settings) = settings() else { return };
    let image = image::write().unwrap();
    for (card, each) in [(Card::VirtioNetPci, 2_500_000), (Card::E1000, 100_000)] {
        let switch = Switch::new(SwitchOptions::default());
        let ports = [(); 2].map(|()| switch.port().unwrap());
        let what = Exchange {
            card,
            frame_bytes: 64,
            frames: [each; 2],
            window: 2048,
        };
        let links = [ports[0].clone() as Arc<_>, ports[1].clone() as Arc<_>];
        let reports = exchange(image.path(), &what, links, &settings).unwrap();
        for report in &reports {
            assert_eq!(report.sent.get(), each);
            assert_eq!(report.received.get(), each, "in order, too");
            assert!(report.job.verified_bytes.get() >= each);
        }
        for (one, other) in [(0, 1), (1, 0)] {
            let [one, other] = [one, other].map(|port: usize| ports[port].counters(0).unwrap());
            // A guest says hello until the other one is there, and once more
            // when that may be gone.
            let (sent, control) = (one.sent.get(), one.sent.get() - each);
            let (taken, lost) = (other.received.get(), other.receive_drops.get());
            assert!(lost < control, "{lost} of {control}");
            assert!(taken + lost <= sent && taken > each);
        }
    }
}

#[test]
fn a_receiver_that_does_not_keep_up_loses_frames_and_no_memory() {
    let _alone = alone();
    let Some(settings) = settings() else { return };
    let image = image::write().unwrap();
    let switch = Switch::new(SwitchOptions {
        // Less than what a burst of frames of this size takes.
        inbox_bytes: 64 << 10,
        ..SwitchOptions::default()
    });
    let ports = [(); 2].map(|()| switch.port().unwrap());
    let frames = 300_000;
    let what = Exchange {
        card: Card::VirtioNetPci,
        frame_bytes: 1514,
        frames: [frames, 0],
        window: 0,
    };
    let links = [ports[0].clone() as Arc<_>, ports[1].clone() as Arc<_>];
    let [sender, receiver] = exchange(image.path(), &what, links, &settings).unwrap();
    assert_eq!(sender.sent.get(), frames);
    assert_eq!(receiver.sent.get(), 0);
    let received = receiver.received.get();
    assert!(received > 0);
    // Each frame, those that control them too, was received or is counted as
    // lost; the others wait in the inbox, or in the sender's or receiver's
    // device, until somebody resets them.
    let sent = ports[0].counters(0).unwrap().sent.get();
    let counters = ports[1].counters(0).unwrap();
    let (taken, lost) = (counters.received.get(), counters.receive_drops.get());
    println!("{sent} sent, {taken} taken, {lost} lost");
    assert!(lost > 0);
    assert!(taken + lost <= sent);
    assert!(sent - taken - lost <= 2 * (64 << 10) / 64);
    assert!(sent >= frames && received <= taken);
}
