//! Network namespaces on two bridges with one cable between them, which can be cut. Needs root; all of it goes with its owner.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::atomic::{AtomicU8, Ordering},
};

use crate::process::{Ran, run};

/// Two halves of a network, each of some machines.
#[derive(Debug)]
pub struct Halves {
    /// Unique on this machine.
    name: String,
    /// The second and third number of its addresses.
    subnet: (u8, u8),
    count: u8,
}

fn ip(line: &str) -> bool {
    let mut command = Command::new("ip");
    command.args(line.split(' ')).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

#[track_caller]
fn must(line: &str) {
    assert!(ip(line), "ip {line}");
}

/// What there is of ours: namespaces and links, for a test that counts them.
pub fn left_behind() -> Vec<String> {
    let mut found = Vec::new();
    for arguments in [["netns", "list"], ["-br", "link"]] {
        let output = Command::new("ip").args(arguments).output().expect("ip can be run");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        found.extend(text.lines().filter(|line| line.starts_with(&prefix())).map(str::to_owned));
    }
    found
}

/// Links have at most 15 bytes of name.
fn prefix() -> String {
    format!("m{:x}", std::process::id())
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
        let name = format!("{}{number:x}", prefix());
        let this = Self { name, subnet: (64 + (pid % 128) as u8, (pid / 128 % 250) as u8 ^ number), count };
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
            let side = if machine < count / 2 { "a" } else { "b" };
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

    /// A machine's address.
    pub fn address(&self, machine: u8) -> String {
        let (second, third) = self.subnet;
        format!("10.{second}.{third}.{}", machine + 1)
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
        for machine in 0..self.count {
            ip(&format!("netns del {name}n{machine}")); // its end of the cable goes with it
            ip(&format!("link del {name}v{machine}"));
        }
        for link in ["c", "a", "b"] {
            ip(&format!("link del {name}{link}"));
        }
    }
}
