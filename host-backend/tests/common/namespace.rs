//! Network namespaces, and interfaces in them.
#![allow(unreachable_pub, reason = "a module of a test")]

use crate::common::skipped;
use pvkit_host::link::tap::{Tap, TapOptions};
use pvkit_protocol::frame::MacAddress;
use rustix::thread::{UnshareFlags, unshare_unsafe};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Runs `body` in a thread with a network namespace of its own, which takes
/// root's rights, if only those that `unshare --map-root-user` gives.
pub fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let run = move || {
        // SAFETY: this flag does not concern what threads share in memory.
        if let Err(error) = unsafe { unshare_unsafe(UnshareFlags::NEWNET) } {
            return skipped(&format!("no network namespace: {error}"));
        }
        match Tap::open("probe%d", &TapOptions::default()) {
            Ok(tap) => assert!(tap.interface().starts_with("probe")),
            Err(error) => return skipped(&format!("no taps: {error}")),
        }
        body();
    };
    std::thread::spawn(run).join().unwrap();
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> OwnedFd {
    // SAFETY: takes numbers only; the descriptor is new, and nobody else's.
    unsafe {
        let fd = check(libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol)).unwrap();
        OwnedFd::from_raw_fd(fd)
    }
}

fn request(name: &str) -> libc::ifreq {
    // SAFETY: made of integers and pointers that may be null.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn ioctl(fd: &OwnedFd, number: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the numbers used here all take a request about an interface.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), number as _, &raw mut *request) }).map(drop)
}

fn control() -> OwnedFd {
    socket(libc::AF_INET, libc::SOCK_DGRAM, 0)
}

pub fn set_up(name: &str, up: bool) {
    let mut request = request(name);
    let flags = if up { libc::IFF_UP } else { 0 };
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&control(), libc::SIOCSIFFLAGS, &mut request).unwrap();
}

pub fn set_address(name: &str, address: [u8; 4]) {
    let mut request = request(name);
    let mut place: libc::sockaddr = request_address(libc::AF_INET);
    for (to, from) in place.sa_data[2..6].iter_mut().zip(address) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_addr = place;
    ioctl(&control(), libc::SIOCSIFADDR, &mut request).unwrap();
}

fn request_address(family: libc::c_int) -> libc::sockaddr {
    libc::sockaddr {
        sa_family: family as libc::sa_family_t,
        sa_data: [0; 14],
    }
}

pub fn set_mtu(name: &str, mtu: i32) {
    let mut request = request(name);
    request.ifr_ifru.ifru_mtu = mtu;
    ioctl(&control(), libc::SIOCSIFMTU, &mut request).unwrap();
}

fn index_of(name: &str) -> i32 {
    let mut request = request(name);
    ioctl(&control(), libc::SIOCGIFINDEX, &mut request).unwrap();
    // SAFETY: written by the call.
    unsafe { request.ifr_ifru.ifru_ifindex }
}

pub fn address_of(name: &str) -> MacAddress {
    let mut request = request(name);
    ioctl(&control(), libc::SIOCGIFHWADDR, &mut request).unwrap();
    // SAFETY: written by the call.
    let address = unsafe { request.ifr_ifru.ifru_hwaddr };
    MacAddress(std::array::from_fn(|index| address.sa_data[index] as u8))
}

/// Makes a tap that stays when nobody has it.
pub fn make(name: &str, more: libc::c_int) -> io::Result<OwnedFd> {
    let tun = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let tun = OwnedFd::from(tun);
    let mut request = request(name);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl(&tun, libc::TUNSETIFF as _, &mut request)?;
    // SAFETY: takes a number.
    check(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) })?;
    Ok(tun)
}

/// Deletes an interface (rtnetlink, RTM_DELLINK).
pub fn delete(name: &str) {
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(((libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16).to_ne_bytes());
    message.extend([0; 8]);
    message.extend([0; 4]);
    message.extend(index_of(name).to_ne_bytes());
    message.extend([0; 8]);
    rustix::io::write(&netlink, &message).unwrap();
    let mut answer = [0; 64];
    rustix::io::read(&netlink, &mut answer).unwrap();
    assert_eq!(answer[16..20], [0; 4], "the interface is deleted");
}

/// A raw socket on an interface, whose frames have virtio's header (the short
/// one, of 10 bytes).
pub fn packets(name: &str) -> OwnedFd {
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    let raw = socket(
        libc::AF_PACKET,
        libc::SOCK_RAW | libc::SOCK_NONBLOCK,
        libc::c_int::from(protocol),
    );
    let on: libc::c_int = 1;
    // SAFETY: the option is an integer, and the address of the kind that the
    // socket takes; both outlive their calls.
    unsafe {
        check(libc::setsockopt(
            raw.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_VNET_HDR,
            (&raw const on).cast(),
            size_of_val(&on) as u32,
        ))
        .unwrap();
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index_of(name);
        check(libc::bind(
            raw.as_raw_fd(),
            (&raw const address).cast(),
            size_of_val(&address) as u32,
        ))
        .unwrap();
    }
    raw
}
