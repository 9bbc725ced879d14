//! How often the guest left for user space, and why.
#![forbid(unsafe_code)]

use crate::worker::Counter;

macro_rules! exits {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Returns of `KVM_RUN` by reason, for all vCPUs of a machine. With
        /// several vCPUs, a few may be lost: the counters are plain.
        #[derive(Debug, Default)]
        pub struct ExitCounters {
            $($(#[$doc])* pub $name: Counter,)*
        }

        /// A reading of [`ExitCounters`].
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct ExitCounts {
            $($(#[$doc])* pub $name: u64,)*
        }

        impl ExitCounters {
            /// All counters now.
            #[must_use]
            pub fn read(&self) -> ExitCounts {
                ExitCounts { $($name: self.$name.get(),)* }
            }
        }

        impl ExitCounts {
            /// Name and count of every reason.
            #[must_use]
            pub fn by_reason(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }

            /// The sum of two readings.
            #[must_use]
            pub fn plus(&self, other: &Self) -> Self {
                Self { $($name: self.$name.wrapping_add(other.$name),)* }
            }

            /// What was added since `earlier`.
            #[must_use]
            pub fn since(&self, earlier: &Self) -> Self {
                Self { $($name: self.$name.wrapping_sub(earlier.$name),)* }
            }
        }
    };
}

exits! {
    /// Port reads.
    io_in,
    /// Port writes.
    io_out,
    /// Reads of device registers in memory.
    mmio_read,
    /// Writes of device registers in memory that are not doorbells.
    mmio_write,
    /// Halts that KVM does not handle itself.
    hlt,
    /// Signals from this program.
    interrupted,
    /// Anything else.
    other,
}

impl ExitCounts {
    /// The sum of all reasons.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.by_reason().iter().map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readings_subtract_and_add_up() {
        let counters = ExitCounters::default();
        counters.io_in.add(2);
        let early = counters.read();
        counters.io_in.add(3);
        counters.other.add(1);
        let since = counters.read().since(&early);
        assert_eq!((since.io_in, since.other, since.total()), (3, 1, 4));
        assert!(since.by_reason().contains(&("io_in", 3)));
    }
}
