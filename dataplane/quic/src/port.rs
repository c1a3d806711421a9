use std::{
    io::{self, IoSliceMut},
    net::{SocketAddr, UdpSocket},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::Arc,
    task::{Context, Poll},
    thread,
    time::{Duration, Instant},
};

use metanode_shard::fd::Readiness;
#[cfg(feature = "sim")]
use metanode_shard::sim::SimSocket;
use metanode_types::ShardCount;
use quinn_udp::{RecvMeta, UdpSockRef, UdpSocketState};
use socket2::{Domain, Protocol, Socket, Type};

use crate::steer::{APART_BYTE, Layout};

/// io_uring holds the sockets of a node that has just ended for some more milliseconds (3 to 11 measured): a restart waits.
const BIND_PATIENCE: Duration = Duration::from_secs(2);

/// Pause between two attempts to bind.
const BIND_PAUSE: Duration = Duration::from_millis(2);

/// Socket buffers asked for, in bytes; the kernel grants what `net.core.{r,w}mem_max` allow. A receive buffer holds what
/// arrives while the shard does something else: 8 MiB is 7 ms at 10 Gbit/s.
const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// One UDP port, one socket a shard.
#[derive(Debug)]
pub struct PortGroup {
    /// Duplicates of all sockets, in bind order. The kernel's index of a socket is its bind order, and closing one moves the
    /// last into the hole, so all stay open until all shards are done and are closed from the last to the first.
    sockets: Vec<OwnedFd>,
}

impl Drop for PortGroup {
    fn drop(&mut self) {
        while let Some(last) = self.sockets.pop() {
            drop(last);
        }
    }
}

/// One shard's socket of a [`PortGroup`].
#[derive(Debug)]
pub struct ShardSocket(Kind);

#[derive(Debug)]
enum Kind {
    Udp(UdpShardSocket),
    #[cfg(feature = "sim")]
    Simulated(SimSocket),
}

#[derive(Debug)]
struct UdpShardSocket {
    socket: UdpSocket,
    state: UdpSocketState,
    /// Declared last: dropped after this shard's own descriptor.
    _group: Arc<PortGroup>,
}

impl PortGroup {
    /// Binds a socket for each shard to `address` (port 0: a free one; the address returned has the real port) and steers by
    /// [`steer::owner`](crate::steer::owner).
    ///
    /// Fails with `AddrInUse` when another process keeps the port, another group of sockets included.
    pub fn bind(address: SocketAddr, layout: impl Into<Layout>) -> io::Result<(SocketAddr, Vec<ShardSocket>)> {
        Self::bind_group(address, layout.into(), true)
    }

    /// Leaves the placing of packets to the kernel, which goes by their addresses: for tests of forwarding.
    #[doc(hidden)]
    pub fn bind_unsteered(address: SocketAddr, shards: ShardCount) -> io::Result<(SocketAddr, Vec<ShardSocket>)> {
        Self::bind_group(address, shards.into(), false)
    }

    fn bind_group(address: SocketAddr, layout: Layout, steer: bool) -> io::Result<(SocketAddr, Vec<ShardSocket>)> {
        let mut address = address;
        let mut sockets: Vec<UdpSocket> = Vec::new();
        for shard in layout.all().iter() {
            let socket = new_socket(address)?;
            if shard.0 == 0 && steer {
                // Before the first bind. A group that has a program refuses sockets without one, so that a second node on
                // this port gets an error instead of half the packets; and no packet is ever placed by hash.
                attach_steering(&socket, layout)?;
            }
            bind_patiently(&socket, address)?;
            if shard.0 == 0 {
                address = socket.local_addr()?.as_socket().expect("a UDP socket has an IP address");
            }
            sockets.push(socket.into());
        }
        let duplicates = sockets.iter().map(|socket| socket.as_fd().try_clone_to_owned());
        let group = Arc::new(PortGroup { sockets: duplicates.collect::<io::Result<_>>()? });
        let sockets = sockets.into_iter().map(|socket| {
            let state = UdpSocketState::new((&socket).into())?;
            Ok(ShardSocket(Kind::Udp(UdpShardSocket { socket, state, _group: group.clone() })))
        });
        Ok((address, sockets.collect::<io::Result<_>>()?))
    }
}

impl ShardSocket {
    /// A socket of a simulated network.
    #[cfg(feature = "sim")]
    pub fn simulated(socket: SimSocket) -> Self {
        Self(Kind::Simulated(socket))
    }

    /// The port's address.
    pub fn local_address(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Kind::Udp(udp) => udp.socket.local_addr(),
            #[cfg(feature = "sim")]
            Kind::Simulated(socket) => Ok(socket.address()),
        }
    }

    /// Changes the kernel's send buffer, for tests of what happens when it is full.
    #[doc(hidden)]
    pub fn set_send_buffer(&self, bytes: usize) -> io::Result<()> {
        match &self.0 {
            Kind::Udp(udp) => udp.state.set_send_buffer_size((&udp.socket).into(), bytes),
            #[cfg(feature = "sim")]
            Kind::Simulated(_) => Ok(()),
        }
    }
}

impl AsFd for UdpShardSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A shard's socket, on its shard: calls that don't wait, and waiting.
pub(crate) struct WatchedSocket(Watched);

enum Watched {
    Udp(Readiness<UdpShardSocket>),
    #[cfg(feature = "sim")]
    Simulated(SimSocket, Instant),
}

impl WatchedSocket {
    pub(crate) fn new(socket: ShardSocket) -> io::Result<Self> {
        Ok(Self(match socket.0 {
            Kind::Udp(udp) => Watched::Udp(Readiness::new(udp)?),
            #[cfg(feature = "sim")]
            Kind::Simulated(socket) => Watched::Simulated(socket, metanode_shard::sim::epoch()),
        }))
    }

    pub(crate) fn local_address(&self) -> io::Result<SocketAddr> {
        match &self.0 {
            Watched::Udp(watched) => watched.inner().socket.local_addr(),
            #[cfg(feature = "sim")]
            Watched::Simulated(socket, _) => Ok(socket.address()),
        }
    }

    /// Whether the network may cut datagrams into pieces, which makes looking for its MTU pointless.
    pub(crate) fn may_fragment(&self) -> bool {
        match &self.0 {
            Watched::Udp(watched) => watched.inner().state.may_fragment(),
            #[cfg(feature = "sim")]
            Watched::Simulated(..) => false,
        }
    }

    /// Segments that one call sends at most.
    pub(crate) fn max_gso_segments(&self) -> usize {
        match &self.0 {
            Watched::Udp(watched) => watched.inner().state.max_gso_segments(),
            #[cfg(feature = "sim")]
            Watched::Simulated(..) => 64,
        }
    }

    /// Receives what has arrived, up to one entry a slot.
    #[inline]
    pub(crate) fn receive(&self, slots: &mut [IoSliceMut<'_>], metas: &mut [RecvMeta]) -> io::Result<usize> {
        match &self.0 {
            Watched::Udp(watched) => {
                let UdpShardSocket { socket, state, .. } = watched.inner();
                state.recv(UdpSockRef::from(socket), slots, metas)
            }
            #[cfg(feature = "sim")]
            Watched::Simulated(socket, _) => {
                let (length, from) = socket.receive(&mut slots[0])?;
                metas[0] = RecvMeta { addr: from, len: length, stride: length, ecn: None, dst_ip: None };
                Ok(1)
            }
        }
    }

    /// Sends all of it, or says that there is no room.
    #[inline]
    pub(crate) fn send(&self, transmit: &quinn_udp::Transmit<'_>) -> io::Result<()> {
        match &self.0 {
            Watched::Udp(watched) => {
                let UdpShardSocket { socket, state, .. } = watched.inner();
                state.try_send(UdpSockRef::from(socket), transmit)
            }
            #[cfg(feature = "sim")]
            Watched::Simulated(socket, epoch) => {
                let now = metanode_shard::now() - *epoch;
                socket.send(now, transmit.destination, transmit.contents, transmit.segment_size);
                Ok(())
            }
        }
    }

    pub(crate) fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.0 {
            Watched::Udp(watched) => watched.poll_readable(cx),
            #[cfg(feature = "sim")]
            Watched::Simulated(socket, _) => socket.poll_readable(cx).map(Ok),
        }
    }

    pub(crate) fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &self.0 {
            Watched::Udp(watched) => watched.poll_writable(cx),
            #[cfg(feature = "sim")]
            Watched::Simulated(..) => Poll::Ready(Ok(())),
        }
    }
}

fn new_socket(address: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        // Its own family only: a v4 group on the same port stays possible, and addresses are never v4-mapped.
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_port(true)?;
    // Best effort: the limits are the administrator's.
    socket.set_recv_buffer_size(SOCKET_BUFFER_BYTES).ok();
    socket.set_send_buffer_size(SOCKET_BUFFER_BYTES).ok();
    Ok(socket)
}

fn bind_patiently(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let begin = Instant::now();
    loop {
        match socket.bind(&address.into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && begin.elapsed() < BIND_PATIENCE => {
                thread::sleep(BIND_PAUSE);
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    format!("UDP {address} is in use by another process: {error}"),
                ));
            }
            result => return result,
        }
    }
}

/// The steering rule as a classic BPF program over the UDP payload. A load behind the end of the packet ends it with socket 0; a
/// result that is no socket makes the kernel place the packet by its addresses.
fn steering_program(layout: Layout) -> [libc::sock_filter; 12] {
    let op = |code: u32, jt, jf, k| libc::sock_filter { code: code as u16, jt, jf, k };
    let load_byte = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
    let jump_if_bits = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    let jump_if_at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let jump_if_equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let jump = libc::BPF_JMP | libc::BPF_JA;
    let shards = layout.shards();
    let is_apart = layout.all() != shards;
    let apart_byte = if is_apart { u32::from(APART_BYTE) } else { 256 }; // or no byte
    let modulo = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
    let return_a = libc::BPF_RET | libc::BPF_A;
    let return_k = libc::BPF_RET | libc::BPF_K;
    [
        /* 0 */ op(load_byte, 0, 0, 0), // the first byte
        /* 1 */ op(jump_if_bits, 0, 4, 0x80), // long header: 2, short: 6
        /* 2 */ op(load_byte, 0, 0, 5), // length of the destination connection ID
        /* 3 */ op(jump_if_at_least, 0, 7, 8), // 4, else 11
        /* 4 */ op(load_byte, 0, 0, 6), // its first byte
        /* 5 */ op(jump, 0, 0, 1), // 7
        /* 6 */ op(load_byte, 0, 0, 1), // its first byte
        /* 7 */ op(jump_if_equal, 2, 0, apart_byte), // 10, else 8
        /* 8 */ op(modulo, 0, 0, u32::from(shards.get())),
        /* 9 */ op(return_a, 0, 0, 0),
        /* 10 */ op(return_k, 0, 0, u32::from(shards.get())), // behind the others
        /* 11 */ op(return_k, 0, 0, u32::MAX), // no socket
    ]
}

fn attach_steering(socket: &Socket, layout: Layout) -> io::Result<()> {
    let mut program = steering_program(layout);
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // socket2 attaches socket filters but not REUSEPORT programs.
    // SAFETY: `filter` describes `program`, both outlive the call, and the kernel copies and checks the program.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const filter).cast(),
            size_of_val(&filter) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, Ipv6Addr};

    use metanode_types::ShardId;

    use super::*;
    use crate::steer;

    fn count(n: u16) -> ShardCount {
        ShardCount::new(n).unwrap()
    }

    /// Which socket of the group a datagram arrives at.
    fn arrival(sockets: &[ShardSocket], address: SocketAddr, datagram: &[u8]) -> usize {
        let sender = UdpSocket::bind((address.ip(), 0)).unwrap();
        sender.send_to(datagram, address).unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_secs(10) {
            let mut buffer = [0; 64];
            for (index, socket) in sockets.iter().enumerate() {
                let Kind::Udp(udp) = &socket.0 else { unreachable!("a group has UDP sockets") };
                if udp.socket.recv_from(&mut buffer).is_ok() {
                    return index;
                }
            }
            thread::yield_now();
        }
        panic!("{datagram:?} did not arrive");
    }

    #[test]
    fn the_kernel_steers_by_the_same_rule() {
        for ip in [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()] {
            for n in [1, 2, 3, 5] {
                for layout in [count(n).into(), Layout::with_apart(count(n))] {
                    let (address, sockets) = PortGroup::bind(SocketAddr::new(ip, 0), layout).unwrap();
                    assert_ne!(address.port(), 0);
                    for byte in (0..=255u8).step_by(37).chain([254, 255]) {
                        for datagram in [vec![0x40, byte, 1, 2], vec![0xc0, 0, 0, 0, 1, 8, byte, 2, 3, 4]] {
                            let ShardId(owner) = steer::owner(&datagram, layout).unwrap();
                            let arrived = arrival(&sockets, address, &datagram);
                            assert_eq!(arrived, usize::from(owner), "{layout:?} {datagram:?}");
                        }
                    }
                    // Nothing to steer by: it arrives somewhere.
                    arrival(&sockets, address, &[0xc0, 0, 0, 0, 1, 0]);
                    arrival(&sockets, address, &[0xc0]);
                }
            }
        }
    }

    #[test]
    fn a_second_group_on_the_port_is_refused_and_a_freed_port_is_taken() {
        let (address, first) = PortGroup::bind((Ipv4Addr::LOCALHOST, 0).into(), count(2)).unwrap();
        let error = PortGroup::bind(address, count(2)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AddrInUse);
        assert!(error.to_string().contains(&address.to_string()), "{error}");
        let waiting = thread::spawn(move || PortGroup::bind(address, count(3)).map(drop));
        drop(first);
        waiting.join().unwrap().unwrap();
    }
}
