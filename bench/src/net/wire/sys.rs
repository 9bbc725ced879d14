//! System calls that no crate has a safe name for: namespaces, taps, and the
//! settings of interfaces.
#![allow(unsafe_code)]

use pvkit_protocol::frame::MacAddress;
use std::fs::File;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Takes the calling thread, and all that it starts later, to a network
/// namespace of its own, which ends with them and with what was opened there.
pub(super) fn enter_new_network() -> io::Result<()> {
    // SAFETY: changes what this thread sees of the network, and no memory.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// Lets the thread's sleeps end when they should, and not up to 50 µs later.
pub(super) fn wake_in_time() {
    // SAFETY: takes no pointers.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong) };
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: plain data, of which zeros are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays 0.
    let room = request.ifr_name.len() - 1;
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes().take(room)) {
        *place = byte as libc::c_char;
    }
    request
}

fn control(fd: &impl AsRawFd, code: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all codes of this module take an `ifreq`, which outlives the
    // call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code as _, std::ptr::from_mut(request)) }).map(drop)
}

/// Makes a tap in the thread's namespace, of one queue, with vnet headers. It
/// ends with the descriptor.
pub(super) fn make_tap(name: &str) -> io::Result<OwnedFd> {
    let tun = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = request(name);
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    control(&tun, libc::TUNSETIFF as libc::c_ulong, &mut request)?;
    Ok(tun.into())
}

/// An interface of the thread's namespace.
pub(super) struct Interface {
    name: String,
    socket: OwnedFd,
}

impl Interface {
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC;
        // SAFETY: takes no pointers.
        let fd = check(unsafe { libc::socket(libc::AF_INET, kind, 0) })?;
        Ok(Self {
            name: name.to_owned(),
            // SAFETY: it was just opened, and nobody else has it.
            socket: unsafe { OwnedFd::from_raw_fd(fd) },
        })
    }

    fn set(
        &self,
        code: libc::c_ulong,
        fill: impl FnOnce(&mut libc::ifreq),
    ) -> io::Result<libc::ifreq> {
        let mut request = request(&self.name);
        fill(&mut request);
        control(&self.socket, code, &mut request)?;
        Ok(request)
    }

    pub(super) fn index(&self) -> io::Result<i32> {
        let request = self.set(libc::SIOCGIFINDEX as _, |_| {})?;
        // SAFETY: the kernel has filled this member.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    pub(super) fn set_mac(&self, mac: MacAddress) -> io::Result<()> {
        self.set(libc::SIOCSIFHWADDR as _, |request| {
            // SAFETY: zeros are a value of every member.
            let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
            address.sa_family = libc::ARPHRD_ETHER;
            for (place, byte) in address.sa_data.iter_mut().zip(mac.0) {
                *place = byte as libc::c_char;
            }
            request.ifr_ifru.ifru_hwaddr = address;
        })
        .map(drop)
    }

    /// Frames that may wait for the tap's reader.
    pub(super) fn set_queue_length(&self, frames: i32) -> io::Result<()> {
        self.set(libc::SIOCSIFTXQLEN as _, |request| {
            request.ifr_ifru.ifru_metric = frames;
        })
        .map(drop)
    }

    fn set_address(&self, code: libc::c_ulong, address: Ipv4Addr) -> io::Result<()> {
        self.set(code, |request| {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: 0,
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: both are plain data of one size, and the first is what
            // the kernel reads there for this family.
            request.ifr_ifru.ifru_addr =
                unsafe { std::mem::transmute::<libc::sockaddr_in, libc::sockaddr>(address) };
        })
        .map(drop)
    }

    /// Gives it an address, and brings it up.
    pub(super) fn bring_up(&self, address: Ipv4Addr, prefix: u8) -> io::Result<()> {
        let mask = u32::MAX << (32 - u32::from(prefix));
        self.set_address(libc::SIOCSIFADDR as _, address)?;
        self.set_address(libc::SIOCSIFNETMASK as _, Ipv4Addr::from(mask))?;
        self.set(libc::SIOCSIFFLAGS as _, |request| {
            request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        })
        .map(drop)
    }
}

/// A socket for whole frames of one type on one interface.
pub(super) fn packet_socket(kind: u16, interface: i32) -> io::Result<OwnedFd> {
    let flags = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // Nothing is received before it is bound.
    // SAFETY: takes no pointers.
    let fd = check(unsafe { libc::socket(libc::AF_PACKET, flags, 0) })?;
    // SAFETY: it was just opened, and nobody else has it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let set = |level: libc::c_int, option: libc::c_int, value: libc::c_int| {
        let size = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the value outlives the call, and has this size.
        check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                level,
                option,
                std::ptr::from_ref(&value).cast(),
                size,
            )
        })
    };
    set(libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, 1)?;
    // More room needs a privilege; without, batches are short enough.
    let room = 8 << 20;
    if set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, room).is_err() {
        set(libc::SOL_SOCKET, libc::SO_RCVBUF, room)?;
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: kind.to_be(),
        sll_ifindex: interface,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address outlives the call, and has this size.
    check(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            std::ptr::from_ref(&address).cast(),
            size_of_val(&address) as libc::socklen_t,
        )
    })?;
    Ok(socket)
}

/// Most frames of one call.
pub(super) const BATCH: usize = 64;

/// Sends frames, at most [`BATCH`]; returns how many were taken.
pub(super) fn send_frames<'a>(
    socket: &OwnedFd,
    frames: impl Iterator<Item = &'a [u8]>,
) -> io::Result<usize> {
    // SAFETY: plain data, of which zeros are a value.
    let mut pieces: [libc::iovec; BATCH] = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    let mut messages: [libc::mmsghdr; BATCH] = unsafe { std::mem::zeroed() };
    let mut count = 0;
    for ((piece, message), frame) in pieces.iter_mut().zip(&mut messages).zip(frames) {
        piece.iov_base = frame.as_ptr().cast_mut().cast();
        piece.iov_len = frame.len();
        message.msg_hdr.msg_iov = piece;
        message.msg_hdr.msg_iovlen = 1;
        count += 1;
    }
    // SAFETY: the first `count` messages have one piece each, in memory that
    // outlives the call and is only read.
    let sent = unsafe {
        libc::sendmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT,
        )
    };
    check(sent).map(|sent| sent as usize)
}
