//! System calls on taps that have no safe wrapper (`linux/if_tun.h`,
//! `linux/sockios.h`).

use crate::memory::IoBufs;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Bytes of a name, with the zero that ends it.
pub(super) const NAME_BYTES: usize = libc::IFNAMSIZ;

/// Most buffers that one system call takes (`UIO_MAXIOV`), less those for the
/// two headers.
pub(super) const MAX_BUFFERS: usize = 1024 - 2;

fn request(name: &str) -> io::Result<libc::ifreq> {
    if name.len() >= NAME_BYTES {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is made of integers and of pointers that may be null.
    let mut request: libc::ifreq = unsafe { mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

fn name_of(request: &libc::ifreq) -> String {
    let name = request.ifr_name.iter().map(|byte| *byte as u8);
    let name: Vec<u8> = name.take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&name).into_owned()
}

/// An ioctl that takes a request about an interface.
fn call(fd: BorrowedFd<'_>, number: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all numbers that this module uses read and write at most a
    // `struct ifreq`, which outlives the call.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), number, &raw mut *request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn flags(request: &libc::ifreq) -> libc::c_int {
    // SAFETY: this member of the union is an integer, which the kernel or
    // `request` has written.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    // 16 bits without a sign, in a type that has one.
    libc::c_int::from(flags as u16)
}

/// Makes `fd` a queue of the interface `name`, which is created if there is
/// none. Returns the name it has: the kernel completes a pattern such as
/// `tap%d`.
pub(super) fn attach(fd: BorrowedFd<'_>, name: &str, flags: libc::c_int) -> io::Result<String> {
    let mut request = request(name)?;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    call(fd, libc::TUNSETIFF, &mut request)?;
    Ok(name_of(&request))
}

/// Which interface `fd` is a queue of, and of which kind that is.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, libc::c_int)> {
    let mut request = request("")?;
    call(fd, libc::TUNGETIFF, &mut request)?;
    Ok((name_of(&request), flags(&request)))
}

/// Attaches a queue that was detached, or detaches it.
pub(super) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request("")?;
    let flag = if attached {
        libc::IFF_ATTACH_QUEUE
    } else {
        libc::IFF_DETACH_QUEUE
    };
    request.ifr_ifru.ifru_flags = flag as libc::c_short;
    call(fd, libc::TUNSETQUEUE, &mut request)
}

/// Sets how long the header is that stands before each frame.
pub(super) fn set_header_bytes(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: this call reads one integer, which outlives it.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const bytes) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Says what the reader of the interface takes (`TUN_F_*`).
pub(super) fn set_offload(fd: BorrowedFd<'_>, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: this call takes a number, and no memory.
    let result = unsafe {
        libc::ioctl(
            fd.as_raw_fd(),
            libc::TUNSETOFFLOAD,
            libc::c_ulong::from(flags),
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The largest payload that an interface takes, asked through any socket.
pub(super) fn mtu(socket: BorrowedFd<'_>, name: &str) -> io::Result<u32> {
    let mut request = request(name)?;
    call(socket, libc::SIOCGIFMTU as libc::Ioctl, &mut request)?;
    // SAFETY: the call was successful, so this member was written; it is an
    // integer.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    u32::try_from(mtu).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Whether an interface is up, asked through any socket.
pub(super) fn is_up(socket: BorrowedFd<'_>, name: &str) -> io::Result<bool> {
    let mut request = request(name)?;
    call(socket, libc::SIOCGIFFLAGS as libc::Ioctl, &mut request)?;
    Ok(flags(&request) & libc::IFF_UP != 0)
}

/// The address of an interface, asked through any socket, or of that which a
/// queue belongs to.
pub(super) fn address(fd: BorrowedFd<'_>, name: &str) -> io::Result<[u8; 6]> {
    let mut request = request(name)?;
    call(fd, libc::SIOCGIFHWADDR as libc::Ioctl, &mut request)?;
    // SAFETY: the call was successful, so this member was written; it is made
    // of integers.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    let mut bytes = [0; 6];
    for (to, from) in bytes.iter_mut().zip(address.sa_data) {
        *to = from as u8;
    }
    Ok(bytes)
}

/// The buffers of one frame, with room that is used again. It is empty between
/// calls.
#[derive(Default)]
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: it holds pointers only during a call of `write`.
unsafe impl Send for Vectors {}

impl Vectors {
    /// Writes a frame in one system call: its virtio header, its head, and the
    /// rest of it, in at most [`MAX_BUFFERS`] buffers.
    pub(super) fn write(
        &mut self,
        fd: BorrowedFd<'_>,
        header: &[u8],
        head: &[u8],
        rest: &IoBufs,
    ) -> io::Result<usize> {
        let vector = |bytes: &[u8]| libc::iovec {
            iov_base: bytes.as_ptr().cast_mut().cast(),
            iov_len: bytes.len(),
        };
        self.0.push(vector(header));
        self.0.push(vector(head));
        self.0.extend_from_slice(rest.as_iovecs());
        let count = self.0.len().min(MAX_BUFFERS + 2);
        // Not `libc::writev`, in which a thread can be cancelled: getting ready
        // for that, and back, is a tenth of the time that a frame takes.
        // SAFETY: the first two buffers are borrowed for this call, and the
        // others lie in mappings that `rest` keeps; the kernel only reads them.
        let result =
            unsafe { libc::syscall(libc::SYS_writev, fd.as_raw_fd(), self.0.as_ptr(), count) };
        let result = usize::try_from(result).map_err(|_| io::Error::last_os_error());
        self.0.clear();
        result
    }
}
