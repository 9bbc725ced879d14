//! The host's end of TCP streams: a server on the host's own stack.

use pvkit_workload::net::stream::{self, FETCH, MAGIC, Request, STORE, Verdict};
use rustix::event::{PollFd, PollFlags, poll};
use sha2::{Digest, Sha256};
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;
use zerocopy::{FromZeros, IntoBytes};

/// Bytes that are made or compared at once.
const PIECE: usize = 256 * 1024;
/// How long a connection may stand still.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long the server waits for the guest to close: a card that is reset may
/// keep its last frame to itself.
const LINGER: Duration = Duration::from_millis(100);

/// Serves each connection in a thread of its own, so that one that the guest
/// has not closed yet takes no time of the next; until the other end of `stop`
/// is closed.
pub(super) fn serve(listener: &TcpListener, stop: &UnixStream) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        if let Err(error) = poll(&mut fds, None)
            && error != rustix::io::Errno::INTR
        {
            log::warn!("the TCP server ends: {error}");
            return;
        }
        if !fds[1].revents().is_empty() {
            return;
        }
        if !fds[0].revents().contains(PollFlags::IN) {
            continue;
        }
        // The guest sees what fails, and the run ends by that.
        match listener.accept() {
            Ok((connection, _)) => {
                // It ends by itself: nothing in it waits for longer than its
                // patience.
                let spawned =
                    thread::Builder::new()
                        .name("net-stream".to_owned())
                        .spawn(move || {
                            if let Err(error) = answer(&connection) {
                                log::warn!("a TCP stream of the guest: {error}");
                            }
                        });
                if let Err(error) = spawned {
                    log::warn!("a thread for a TCP stream: {error}");
                }
            }
            Err(error) => log::warn!("a TCP connection of the guest: {error}"),
        }
    }
}

fn answer(mut connection: &TcpStream) -> io::Result<()> {
    connection.set_nonblocking(false)?;
    connection.set_nodelay(true)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    connection.set_write_timeout(Some(PATIENCE))?;
    let mut request = Request::new_zeroed();
    connection.read_exact(request.as_mut_bytes())?;
    let nonsense = || io::Error::new(io::ErrorKind::InvalidData, "this is no request");
    if request.magic != MAGIC {
        return Err(nonsense());
    }
    let verdict = match request.operation.get() {
        FETCH => send(connection, &request)?,
        STORE => receive(connection, &request)?,
        _ => return Err(nonsense()),
    };
    connection.write_all(verdict.as_bytes())?;
    // Until the guest closes, too.
    connection.set_read_timeout(Some(LINGER))?;
    let _ = connection.read(&mut [0; 16]);
    Ok(())
}

fn verdict(bytes: u64, wrong: bool, hash: Option<Sha256>) -> Verdict {
    let mut verdict = Verdict::new_zeroed();
    verdict.bytes.set(bytes);
    verdict.wrong.set(u64::from(wrong));
    if let Some(hash) = hash {
        verdict.digest = hash.finalize().into();
    }
    verdict
}

fn send(mut connection: &TcpStream, request: &Request) -> io::Result<Verdict> {
    let mut hash = (request.hash.get() != 0).then(Sha256::new);
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    let bytes = request.bytes.get();
    while done < bytes {
        let count = (bytes - done).min(PIECE as u64) as usize;
        let Some(piece) = piece.get_mut(..count) else {
            break;
        };
        stream::fill(piece, done, request.seed.get());
        if let Some(hash) = &mut hash {
            hash.update(&*piece);
        }
        connection.write_all(piece)?;
        done += count as u64;
    }
    Ok(verdict(done, false, hash))
}

fn receive(mut connection: &TcpStream, request: &Request) -> io::Result<Verdict> {
    let mut hash = (request.hash.get() != 0).then(Sha256::new);
    let mut piece = vec![0; PIECE];
    let mut done = 0;
    let bytes = request.bytes.get();
    let mut right = true;
    // Everything is read, also behind a wrong byte: the guest asks only then.
    let mut right_bytes = 0;
    while done < bytes {
        let count = (bytes - done).min(PIECE as u64) as usize;
        let count = connection.read(piece.get_mut(..count).unwrap_or(&mut []))?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let piece = piece.get(..count).unwrap_or(&[]);
        if let Some(hash) = &mut hash {
            hash.update(piece);
        }
        if right {
            let same = stream::right_bytes(piece, done, request.seed.get());
            right = same == count;
            right_bytes += same as u64;
        }
        done += count as u64;
    }
    Ok(verdict(right_bytes, !right, hash))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;
    use zerocopy::little_endian::{U32, U64};

    fn ask(operation: u32, bytes: u64) -> Request {
        Request {
            magic: MAGIC,
            operation: U32::new(operation),
            bytes: U64::new(bytes),
            seed: U32::new(3),
            hash: U32::new(1),
        }
    }

    #[test]
    fn streams_go_both_ways_and_a_wrong_byte_is_found() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let server = thread::spawn(move || serve(&listener, &stopped));
        const BYTES: usize = 1_000_001;
        let mut whole = vec![0; BYTES];
        stream::fill(&mut whole, 0, 3);
        let digest: [u8; 32] = Sha256::digest(&whole).into();
        let mut verdict = Verdict::new_zeroed();

        let mut connection = TcpStream::connect(address).unwrap();
        connection
            .write_all(ask(FETCH, BYTES as u64).as_bytes())
            .unwrap();
        let mut got = vec![0; BYTES];
        connection.read_exact(&mut got).unwrap();
        connection.read_exact(verdict.as_mut_bytes()).unwrap();
        assert!(got == whole && verdict.digest == digest);
        drop(connection);

        for wrong in [None, Some(700_000)] {
            let mut sent = whole.clone();
            if let Some(wrong) = wrong {
                sent[wrong] ^= 1;
            }
            let mut connection = TcpStream::connect(address).unwrap();
            connection
                .write_all(ask(STORE, BYTES as u64).as_bytes())
                .unwrap();
            connection.write_all(&sent).unwrap();
            connection.read_exact(verdict.as_mut_bytes()).unwrap();
            assert_eq!(verdict.digest == digest, wrong.is_none());
            assert_eq!(verdict.wrong.get() != 0, wrong.is_some());
            assert_eq!(verdict.bytes.get(), wrong.unwrap_or(BYTES) as u64);
        }
        // Who never closes does not keep others from being served: they are as
        // patient as the server.
        let fetch = || {
            let mut connection = TcpStream::connect(address).unwrap();
            connection.set_read_timeout(Some(PATIENCE / 2)).unwrap();
            connection.write_all(ask(FETCH, 8).as_bytes()).unwrap();
            let mut got = [0; 8 + size_of::<Verdict>()];
            connection.read_exact(&mut got).unwrap();
            connection
        };
        let _open = [fetch(), fetch()];
        // Nonsense ends that connection, and no more.
        let mut connection = TcpStream::connect(address).unwrap();
        connection.write_all(&[0; 64]).unwrap();
        assert_eq!(connection.read(&mut [0; 1]).unwrap_or(0), 0);
        drop(stop);
        server.join().unwrap();
    }
}
