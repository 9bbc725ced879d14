//! How registers are reached: a window of memory-mapped registers
//! ([`Registers`]), or x86 ports ([`PortIo`]).
//!
//! Accesses are single plain loads and stores, in forms that every hypervisor
//! decodes. A guest whose memory its host cannot read implements the traits
//! with hypercalls instead.
//!
//! Writes are `unsafe`: a register can tell a device to write to any memory.
//! A handle has one owner, the driver that it is handed to; a second handle to
//! the same registers takes an `unsafe` call too.

mod owned;

pub(crate) use owned::{OwnedPorts, OwnedRegisters};

use core::fmt;
use core::ptr::NonNull;

/// A window of device registers, little-endian, with offsets in bytes.
///
/// An access that does not fit the window reads as all ones, or does nothing.
///
/// # Safety
/// Each call is one access of exactly its width to the register at `offset` of
/// one fixed window, in program order with the other calls, and after all
/// earlier writes to memory. It touches no memory of the program.
pub unsafe trait Registers: Send + 'static {
    /// Size of the window in bytes.
    fn len(&self) -> usize;
    /// Whether there is no window at all.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Reads 8 bits.
    fn read_u8(&self, offset: usize) -> u8;
    /// Reads 16 bits.
    fn read_u16(&self, offset: usize) -> u16;
    /// Reads 32 bits.
    fn read_u32(&self, offset: usize) -> u32;
    /// Writes 8 bits.
    ///
    /// # Safety
    /// What the device does upon the write touches no memory but what its
    /// driver may give it, and disturbs no other owner of the device.
    unsafe fn write_u8(&self, offset: usize, value: u8);
    /// Writes 16 bits.
    ///
    /// # Safety
    /// As for [`write_u8`](Registers::write_u8).
    unsafe fn write_u16(&self, offset: usize, value: u16);
    /// Writes 32 bits.
    ///
    /// # Safety
    /// As for [`write_u8`](Registers::write_u8).
    unsafe fn write_u32(&self, offset: usize, value: u32);
    /// A second handle to the same window.
    ///
    /// # Safety
    /// The two are used for different registers, or by one driver at a time.
    #[must_use]
    unsafe fn alias(&self) -> Self
    where
        Self: Sized;
}

/// Registers in the address space of the driver.
///
/// There is one owner, and safe code cannot write to the device:
///
/// ```compile_fail,E0599
/// # use pvkit_guest::register::MmioRegisters;
/// fn second(registers: MmioRegisters) -> [MmioRegisters; 2] {
///     [registers.clone(), registers]
/// }
/// ```
///
/// ```compile_fail,E0133
/// # use pvkit_guest::register::{MmioRegisters, Registers};
/// fn tell(registers: &MmioRegisters) {
///     registers.write_u32(0x80, 0x1000);
/// }
/// ```
pub struct MmioRegisters {
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: device registers may be accessed from any thread; each access is
// one instruction.
unsafe impl Send for MmioRegisters {}

impl fmt::Debug for MmioRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MmioRegisters({:p}, {:#x})", self.base, self.len)
    }
}

impl MmioRegisters {
    /// The window of `len` bytes at `base`.
    ///
    /// # Safety
    /// `base` is aligned to 8 bytes; the window is mapped uncached for as long
    /// as this value or an [alias](Registers::alias) exists, and holds
    /// registers of a device, which only the driver that gets this value uses.
    /// (A second value may be made for other registers of the window: the
    /// vectors of a PCI function can share one with its structures.) The device
    /// does not use memory that it was told about earlier, by firmware say,
    /// unless nobody else does.
    #[must_use]
    pub const unsafe fn new(base: NonNull<u8>, len: usize) -> Self {
        Self { base, len }
    }

    #[inline]
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let fits = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.len);
        if !fits || !offset.is_multiple_of(size_of::<T>()) {
            return None;
        }
        // SAFETY: inside the window.
        Some(unsafe { self.base.as_ptr().add(offset) }.cast())
    }
}

/// One load or store of a register.
///
/// On x86-64 it is a `mov` with the register operand that emulators of KVM,
/// PVM and TCG all decode; a plain volatile access could be folded into
/// another instruction.
mod access {
    #[cfg(target_arch = "x86_64")]
    macro_rules! access {
        ($ty:ty, $load:ident, $store:ident, $class:ident, $fmt:literal, $size:literal) => {
            /// # Safety
            /// `at` is a mapped, aligned register.
            #[inline]
            pub(super) unsafe fn $load(at: *const $ty) -> $ty {
                let value: $ty;
                // SAFETY: one load from a register (contract of this function).
                unsafe {
                    core::arch::asm!(
                        concat!("mov {value", $fmt, "}, ", $size, " ptr [{at}]"),
                        at = in(reg) at,
                        value = out($class) value,
                        options(nostack, preserves_flags)
                    );
                }
                value
            }
            /// # Safety
            /// `at` is a mapped, aligned register.
            #[inline]
            pub(super) unsafe fn $store(at: *mut $ty, value: $ty) {
                // SAFETY: one store to a register (contract of this function).
                unsafe {
                    core::arch::asm!(
                        concat!("mov ", $size, " ptr [{at}], {value", $fmt, "}"),
                        at = in(reg) at,
                        value = in($class) value,
                        options(nostack, preserves_flags)
                    );
                }
            }
        };
    }
    #[cfg(not(target_arch = "x86_64"))]
    macro_rules! access {
        ($ty:ty, $load:ident, $store:ident, $class:ident, $fmt:literal, $size:literal) => {
            /// # Safety
            /// `at` is a mapped, aligned register.
            #[inline]
            pub(super) unsafe fn $load(at: *const $ty) -> $ty {
                // SAFETY: one load from a register (contract of this function).
                <$ty>::from_le(unsafe { at.read_volatile() })
            }
            /// # Safety
            /// `at` is a mapped, aligned register.
            #[inline]
            pub(super) unsafe fn $store(at: *mut $ty, value: $ty) {
                // SAFETY: one store to a register (contract of this function).
                unsafe { at.write_volatile(value.to_le()) };
            }
        };
    }
    access!(u8, load_u8, store_u8, reg_byte, "", "byte");
    access!(u16, load_u16, store_u16, reg, ":x", "word");
    access!(u32, load_u32, store_u32, reg, ":e", "dword");
}

// SAFETY: one `mov` of the register's width inside the window; assembly that
// may touch memory is not reordered with other accesses by the compiler, and
// stores to uncached memory follow earlier stores on x86-64. Elsewhere the
// caller's barriers (see `crate::barrier`) order them.
unsafe impl Registers for MmioRegisters {
    fn len(&self) -> usize {
        self.len
    }
    #[inline]
    fn read_u8(&self, offset: usize) -> u8 {
        // SAFETY: `at` checked the register's place.
        self.at(offset)
            .map_or(!0, |at| unsafe { access::load_u8(at) })
    }
    #[inline]
    fn read_u16(&self, offset: usize) -> u16 {
        // SAFETY: `at` checked the register's place.
        self.at(offset)
            .map_or(!0, |at| unsafe { access::load_u16(at) })
    }
    #[inline]
    fn read_u32(&self, offset: usize) -> u32 {
        // SAFETY: `at` checked the register's place.
        self.at(offset)
            .map_or(!0, |at| unsafe { access::load_u32(at) })
    }
    #[inline]
    unsafe fn write_u8(&self, offset: usize, value: u8) {
        if let Some(at) = self.at(offset) {
            // SAFETY: `at` checked that the register is in the window; the
            // caller answers for the value.
            unsafe { access::store_u8(at, value) };
        }
    }
    #[inline]
    unsafe fn write_u16(&self, offset: usize, value: u16) {
        if let Some(at) = self.at(offset) {
            // SAFETY: `at` checked that the register is in the window; the
            // caller answers for the value.
            unsafe { access::store_u16(at, value) };
        }
    }
    #[inline]
    unsafe fn write_u32(&self, offset: usize, value: u32) {
        if let Some(at) = self.at(offset) {
            // SAFETY: `at` checked that the register is in the window; the
            // caller answers for the value.
            unsafe { access::store_u32(at, value) };
        }
    }
    unsafe fn alias(&self) -> Self {
        Self {
            base: self.base,
            len: self.len,
        }
    }
}

/// x86 port space.
///
/// # Safety
/// Each call is the one access (or the `buffer`'s length in accesses) that its
/// name says, in program order with the other calls, and after all earlier
/// writes to memory. It touches no memory of the program but `buffer`.
pub unsafe trait PortIo: Send + 'static {
    /// Reads 8 bits.
    fn read_u8(&self, port: u16) -> u8;
    /// Reads 16 bits.
    fn read_u16(&self, port: u16) -> u16;
    /// Reads 32 bits.
    fn read_u32(&self, port: u16) -> u32;
    /// Writes 8 bits.
    ///
    /// # Safety
    /// As for [`Registers::write_u8`]: ports, too, tell devices addresses.
    unsafe fn write_u8(&self, port: u16, value: u8);
    /// Writes 16 bits.
    ///
    /// # Safety
    /// As for [`write_u8`](PortIo::write_u8).
    unsafe fn write_u16(&self, port: u16, value: u16);
    /// Writes 32 bits.
    ///
    /// # Safety
    /// As for [`write_u8`](PortIo::write_u8).
    unsafe fn write_u32(&self, port: u16, value: u32);
    /// A second handle to the same ports.
    ///
    /// # Safety
    /// The two are used for different ports, or by one driver at a time.
    #[must_use]
    unsafe fn alias(&self) -> Self
    where
        Self: Sized;
    /// Fills `words` with 16-bit reads of the same port (`rep insw`).
    ///
    /// # Safety
    /// `words` may be written.
    unsafe fn read_words(&self, port: u16, words: NonNull<[u16]>);
    /// Writes `words` to the same port with 16-bit writes (`rep outsw`).
    ///
    /// # Safety
    /// `words` may be read, and is data for a device, not a command.
    unsafe fn write_words(&self, port: u16, words: NonNull<[u16]>);
}

#[cfg(target_arch = "x86_64")]
pub use x86_64::CpuPorts;

#[cfg(target_arch = "x86_64")]
mod x86_64 {
    use super::{NonNull, PortIo};
    use core::arch::asm;
    use core::cell::Cell;
    use core::marker::PhantomData;

    /// The processor's own port instructions.
    ///
    /// An access to PCI configuration space takes two of them, so the value can
    /// move to another thread, but not be shared by two.
    #[derive(Debug)]
    pub struct CpuPorts(PhantomData<Cell<()>>);

    impl CpuPorts {
        /// Access to all ports.
        ///
        /// # Safety
        /// The program may execute `in` and `out` (CPL 0, IOPL, or the task
        /// state segment's bitmap), and the driver that gets this value owns
        /// the ports that it uses: a second one on the channel of a disk would
        /// point its bus master to other memory. The devices do not use memory
        /// that they were told about earlier, by firmware say, unless nobody
        /// else does.
        #[must_use]
        pub const unsafe fn new() -> Self {
            Self(PhantomData)
        }
    }

    // SAFETY: one instruction each, not reordered by the compiler; `in` and
    // `out` are ordered with earlier stores.
    unsafe impl PortIo for CpuPorts {
        #[inline]
        fn read_u8(&self, port: u16) -> u8 {
            let value;
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("in al, dx", in("dx") port, out("al") value, options(nostack, preserves_flags));
            }
            value
        }
        #[inline]
        fn read_u16(&self, port: u16) -> u16 {
            let value;
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("in ax, dx", in("dx") port, out("ax") value, options(nostack, preserves_flags));
            }
            value
        }
        #[inline]
        fn read_u32(&self, port: u16) -> u32 {
            let value;
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("in eax, dx", in("dx") port, out("eax") value, options(nostack, preserves_flags));
            }
            value
        }
        #[inline]
        unsafe fn write_u8(&self, port: u16, value: u8) {
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("out dx, al", in("dx") port, in("al") value, options(nostack, preserves_flags));
            }
        }
        #[inline]
        unsafe fn write_u16(&self, port: u16, value: u16) {
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("out dx, ax", in("dx") port, in("ax") value, options(nostack, preserves_flags));
            }
        }
        #[inline]
        unsafe fn write_u32(&self, port: u16, value: u32) {
            // SAFETY: whoever called `new` may use ports.
            unsafe {
                asm!("out dx, eax", in("dx") port, in("eax") value, options(nostack, preserves_flags));
            }
        }
        #[inline]
        unsafe fn read_words(&self, port: u16, words: NonNull<[u16]>) {
            // SAFETY: the buffer may be written (contract); the direction flag
            // is clear by the ABI.
            unsafe {
                asm!(
                    "rep insw",
                    in("dx") port,
                    inout("rdi") words.cast::<u16>().as_ptr() => _,
                    inout("rcx") words.len() => _,
                    options(nostack, preserves_flags)
                );
            }
        }
        #[inline]
        unsafe fn write_words(&self, port: u16, words: NonNull<[u16]>) {
            // SAFETY: the buffer may be read (contract); the direction flag is
            // clear by the ABI.
            unsafe {
                asm!(
                    "rep outsw",
                    in("dx") port,
                    inout("rsi") words.cast::<u16>().as_ptr() => _,
                    inout("rcx") words.len() => _,
                    options(nostack, preserves_flags)
                );
            }
        }
        unsafe fn alias(&self) -> Self {
            Self(PhantomData)
        }
    }
}
