//! Network namespaces on two bridges with one cable between them, which can be cut. Needs root; all of it goes with its owner.

use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsFd as _,
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
};

use metanode_proxy::{Conditions, Proxy};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process::{Ran, run};

/// Two halves of a network, each of some machines.
#[derive(Debug)]
pub struct Halves {
    /// Unique on this machine.
    name: String,
    /// The second and third number of its addresses.
    subnet: (u8, u8),
    count: u8,
    /// There is a machine between them.
    has_between: bool,
}

/// The last numbers of the addresses that the machine between the halves has, by the side that sees it.
const BETWEEN: [u8; 2] = [201, 202];

fn ip(line: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(line.split(' ')).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[track_caller]
fn must(line: &str) {
    assert!(ip(line), "ip {line}");
}

/// What there is of [`Halves`] with this name: namespaces and links, for a test that counts them.
pub fn left_behind(name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for arguments in [["netns", "list"], ["-br", "link"]] {
        let output = Command::new("ip").args(arguments).output().expect("ip can be run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(text.lines().filter(|line| line.starts_with(name)).map(str::to_owned));
    }
    found
}

impl Halves {
    /// As many machines, the first half of them on one side; `None`, saying why, where that is not possible.
    pub fn make(count: u8) -> Option<Self> {
        static NEXT: AtomicU8 = AtomicU8::new(0);
        if !crate::is_root() || !ip("netns list") {
            eprintln!("skipped: network namespaces need root and `ip`");
            return None;
        }
        let (pid, number) = (std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let name = format!("m{pid:x}{number:x}"); // links have at most 15 bytes of name
        let this = Self {
            name,
            subnet: (64 + (pid % 128) as u8, (pid / 128 % 250) as u8 ^ number),
            count,
            has_between: false,
        };
        for side in ["a", "b"] {
            let name = &this.name;
            if !ip(&format!("link add {name}{side} type bridge")) {
                eprintln!("skipped: the kernel makes no bridges here");
                return None;
            }
            must(&format!("link set {name}{side} up"));
        }
        let name = &this.name;
        must(&format!("link add {name}c type veth peer name {name}d"));
        must(&format!("link set {name}c master {name}a up"));
        must(&format!("link set {name}d master {name}b up"));
        for machine in 0..count {
            let side = ["a", "b"][this.side(machine)];
            let address = this.address(machine);
            must(&format!("netns add {name}n{machine}"));
            must(&format!("link add {name}v{machine} type veth peer name eth0 netns {name}n{machine}"));
            must(&format!("link set {name}v{machine} master {name}{side} up"));
            must(&format!("-n {name}n{machine} addr add {address}/24 dev eth0"));
            must(&format!("-n {name}n{machine} link set eth0 up"));
            must(&format!("-n {name}n{machine} link set lo up"));
        }
        Some(this)
    }

    /// What all names of its parts begin with.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A machine's address.
    pub fn address(&self, machine: u8) -> IpAddr {
        self.at(machine + 1)
    }

    fn at(&self, last: u8) -> IpAddr {
        let (second, third) = self.subnet;
        [10, second, third, last].into()
    }

    /// 0 or 1.
    pub fn side(&self, machine: u8) -> usize {
        usize::from(machine >= self.count / 2)
    }

    /// Puts a machine between the halves that is in both, and cuts the cable: what crosses goes through [`Halves::proxy`].
    #[track_caller]
    pub fn put_between(&mut self) {
        self.cut(true);
        let name = &self.name;
        must(&format!("netns add {name}r"));
        for (side, bridge) in ["a", "b"].into_iter().enumerate() {
            must(&format!("link add {name}r{bridge} type veth peer name eth{side} netns {name}r"));
            must(&format!("link set {name}r{bridge} master {name}{bridge} up"));
            must(&format!("-n {name}r addr add {}/32 dev eth{side}", self.at(BETWEEN[side])));
            must(&format!("-n {name}r link set eth{side} up"));
            for machine in (0..self.count).filter(|machine| self.side(*machine) == side) {
                must(&format!("-n {name}r route add {}/32 dev eth{side}", self.address(machine)));
            }
        }
        self.has_between = true;
    }

    /// On the machine between the halves: what leads to a server from the other one.
    #[track_caller]
    pub fn proxy(&self, machine: u8, port: u16, conditions: Conditions) -> Proxy {
        let server = SocketAddr::new(self.address(machine), port);
        let listen = self.at(BETWEEN[1 - self.side(machine)]);
        let space = std::fs::File::open(format!("/run/netns/{}r", self.name)).expect("the machine is there");
        let start = || {
            // This thread, and those that it starts.
            move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)).expect("we are root");
            Proxy::start(listen, server, conditions, machine.into()).expect("its addresses are there")
        };
        std::thread::scope(|scope| scope.spawn(start).join()).expect("it starts")
    }

    /// Cuts the cable between the halves, or mends it.
    #[track_caller]
    pub fn cut(&self, cut: bool) {
        must(&format!("link set {}c {}", self.name, if cut { "down" } else { "up" }));
    }

    /// The same command, on a machine.
    pub fn on(&self, machine: u8, command: &Command) -> Command {
        let mut there = Command::new("ip");
        there.args(["netns", "exec", &format!("{}n{machine}", self.name)]);
        there.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => there.env(name, value),
                None => there.env_remove(name),
            };
        }
        there
    }

    /// Runs a command of the binary under test on a machine, with a data folder.
    #[track_caller]
    pub fn cli(&self, machine: u8, data: &Path, line: &str) -> Ran {
        let mut command = crate::metanode(line.split(' '));
        command.arg("--data").arg(data);
        run(&mut self.on(machine, &command), b"")
    }
}

impl Drop for Halves {
    fn drop(&mut self) {
        let name = &self.name;
        if self.has_between {
            ip(&format!("netns del {name}r"));
            ip(&format!("link del {name}ra"));
            ip(&format!("link del {name}rb"));
        }
        for machine in 0..self.count {
            ip(&format!("netns del {name}n{machine}")); // its end of the cable goes with it
            ip(&format!("link del {name}v{machine}"));
        }
        for link in ["c", "a", "b"] {
            ip(&format!("link del {name}{link}"));
        }
    }
}
