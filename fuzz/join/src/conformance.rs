//! The same tests on every device × ring × transport × feature set.
#![forbid(unsafe_code)]

use crate::Kind;
use pvkit_host::virtio::block::BlockOptions;
use pvkit_protocol::virtio::Features;
use std::fmt;
use std::io::Write;

/// One way in which a driver and a device can come together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Combination {
    /// The transport, and how it interrupts.
    pub kind: Kind,
    /// Packed rings.
    pub packed: bool,
    /// Requests are used in their order.
    pub in_order: bool,
    /// Indirect descriptors.
    pub indirect: bool,
    /// Event index.
    pub event_idx: bool,
    /// Doorbells say where the queue stands.
    pub notification_data: bool,
}

impl Combination {
    /// All of them.
    pub fn all() -> impl Iterator<Item = Self> {
        let kinds = [Kind::Mmio, Kind::Pci, Kind::PciIntx];
        kinds.into_iter().flat_map(|kind| {
            (0..32).map(move |bits| Self {
                kind,
                packed: bits & 1 != 0,
                in_order: bits & 2 != 0,
                indirect: bits & 4 != 0,
                event_idx: bits & 8 != 0,
                notification_data: bits & 16 != 0,
            })
        })
    }

    /// The options of a block device that offers just this.
    #[must_use]
    pub fn block_options(&self) -> BlockOptions {
        BlockOptions {
            packed: self.packed,
            in_order: self.in_order,
            indirect: self.indirect,
            event_idx: self.event_idx,
            notification_data: self.notification_data,
            ..BlockOptions::default()
        }
    }

    /// The ring features that have to be negotiated then.
    #[must_use]
    pub fn features(&self) -> Features {
        let mut features = Features::empty();
        features.set(Features::RING_PACKED, self.packed);
        features.set(Features::IN_ORDER, self.in_order);
        features.set(Features::INDIRECT_DESC, self.indirect);
        features.set(Features::EVENT_IDX, self.event_idx);
        features.set(Features::NOTIFICATION_DATA, self.notification_data);
        features
    }

    /// Features that [`features`](Self::features) decides about.
    #[must_use]
    pub fn decided() -> Features {
        Features::RING_PACKED
            | Features::IN_ORDER
            | Features::INDIRECT_DESC
            | Features::EVENT_IDX
            | Features::NOTIFICATION_DATA
    }
}

impl fmt::Display for Combination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ring = if self.packed { "packed" } else { "split" };
        write!(f, "{:?}, {ring}", self.kind)?;
        for (set, name) in [
            (self.in_order, "in order"),
            (self.indirect, "indirect"),
            (self.event_idx, "event index"),
            (self.notification_data, "notification data"),
        ] {
            if set {
                write!(f, ", {name}")?;
            }
        }
        Ok(())
    }
}

/// Names the combination if its test panics.
struct Named<'a>(&'a str, Combination);

impl Drop for Named<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = writeln!(std::io::stderr(), "{} failed with: {}", self.0, self.1);
        }
    }
}

/// Runs a test on all combinations, and says on how many; also when the output
/// of tests is captured.
pub fn on_all(device: &str, name: &str, test: impl Fn(&Combination)) {
    let mut count = 0;
    for combination in Combination::all() {
        let _named = Named(name, combination);
        test(&combination);
        count += 1;
    }
    let _ = writeln!(
        std::io::stderr().lock(),
        "conformance: {device}: {name}: {count} combinations"
    );
}

/// Makes a `#[test]` of each function, which takes a
/// [`Combination`](crate::conformance::Combination) and is run on all of them.
///
/// ```
/// mod block {
///     # use pvkit_join::conformance::Combination;
///     fn a_queue_can_be_made(with: &Combination) {
///         assert_eq!(with.block_options().packed, with.packed);
///     }
///     pvkit_join::conformance!("virtio-blk": a_queue_can_be_made);
/// }
/// ```
#[macro_export]
macro_rules! conformance {
    ($device:literal: $($test:ident),+ $(,)?) => {
        mod on_all {
            $(
                #[test]
                fn $test() {
                    $crate::conformance::on_all($device, stringify!($test), super::$test);
                }
            )+
        }
    };
}
