//! Kernel, limits, cgroups, BPF.

use metanode_client::files::FileIo;
use rustix::process::{Resource, getrlimit};

use super::{Check, State, text_of};
use crate::output::bytes;

/// glommio's rings need features of this release.
const KERNEL_MIN: (u32, u32) = (5, 8);

/// What glommio registers for one executor, with room for its three rings.
const MEMLOCK_PER_SHARD: u64 = 1 << 20;

/// A node has a file for each 64 MiB segment that it uses, and some dozens besides.
const NOFILE_WANTED: u64 = 4096;

/// The buffers that node and client ask for.
const UDP_BUFFER_WANTED: u64 = 8 << 20;

pub(super) fn version() -> Check {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let check = if found >= KERNEL_MIN {
        Check::ok("kernel", format!("Linux {release}"))
    } else {
        let (major, minor) = KERNEL_MIN;
        Check::bad(
            "kernel",
            State::Missing,
            format!("Linux {release}"),
            "the node does not start: its io_uring lacks operations that the node uses",
            format!("Linux {major}.{minor} or later"),
        )
    };
    check.needed()
}

pub(super) fn io_uring() -> Check {
    let switch = text_of("/proc/sys/kernel/io_uring_disabled");
    let check = match FileIo::uring_error() {
        None => Check::ok("io_uring", "a ring was made"),
        Some(error) => {
            let fix = match switch.as_deref() {
                Some("1" | "2") => "sysctl -w kernel.io_uring_disabled=0",
                _ => "permit io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile",
            };
            let lost = "the node does not start; the client uses plain files instead";
            Check::bad("io_uring", State::Missing, format!("no ring: {error}"), lost, fix)
        }
    };
    check.needed()
}

pub(super) fn memlock() -> Check {
    let limit = getrlimit(Resource::Memlock);
    let shards = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let wanted = shards * MEMLOCK_PER_SHARD;
    let Some(soft) = limit.current else { return Check::ok("memlock", "unlimited") };
    let hard = limit.maximum.map_or("unlimited".into(), bytes);
    let found = format!("{} (at most {hard}); {} for {shards} shards", bytes(soft), bytes(wanted));
    if soft >= wanted {
        return Check::ok("memlock", found);
    }
    let fix = "`ulimit -l unlimited`, or LimitMEMLOCK=infinity in the systemd unit";
    if soft < MEMLOCK_PER_SHARD / 2 {
        return Check::bad("memlock", State::Missing, found, "the node does not start", fix).needed();
    }
    Check::bad(
        "memlock",
        State::Degraded,
        found,
        "buffers are not registered with the kernel: more CPU for each disk access",
        fix,
    )
}

pub(super) fn nofile() -> Check {
    let limit = getrlimit(Resource::Nofile);
    let Some(soft) = limit.current else { return Check::ok("nofile", "unlimited") };
    let hard = limit.maximum.map_or("unlimited".into(), |n| n.to_string());
    let found = format!("{soft} (at most {hard})");
    if soft >= NOFILE_WANTED {
        return Check::ok("nofile", found);
    }
    let lost = "large stores: a node keeps one file open for each 64 MiB segment";
    Check::bad(
        "nofile",
        State::Degraded,
        found,
        lost,
        format!("`ulimit -n {NOFILE_WANTED}`, or LimitNOFILE= in the systemd unit"),
    )
}

pub(super) fn cpu() -> Check {
    let info = text_of("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap_or_default();
    let has = |flag: &str| flags.split_whitespace().any(|word| word == flag);
    let count = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let vector =
        ["avx512f", "avx2", "sse4_1", "asimd"].into_iter().find(|flag| has(flag)).unwrap_or("no vector instructions");
    let found = format!("{count} CPUs for this process, {vector}{}", if has("aes") { ", aes" } else { "" });
    if has("aes") && vector != "no vector instructions" {
        Check::ok("cpu", found)
    } else {
        Check::bad("cpu", State::Degraded, found, "encryption or hashing in software: several times slower", "")
    }
}

pub(super) fn udp_buffers() -> Check {
    let limit = |name: &str| text_of(&format!("/proc/sys/net/core/{name}")).and_then(|text| text.parse::<u64>().ok());
    let (Some(receive), Some(send)) = (limit("rmem_max"), limit("wmem_max")) else {
        return Check::bad("udp buffers", State::NotProbed, "net.core.rmem_max can't be read here", "unknown", "");
    };
    let found = format!("net.core.rmem_max {}, wmem_max {}", bytes(receive), bytes(send));
    if receive >= UDP_BUFFER_WANTED && send >= UDP_BUFFER_WANTED {
        return Check::ok("udp buffers", found);
    }
    let fix = format!("sysctl -w net.core.rmem_max={UDP_BUFFER_WANTED} net.core.wmem_max={UDP_BUFFER_WANTED}");
    Check::bad(
        "udp buffers",
        State::Degraded,
        found,
        "packets under bursts: they are sent again, so bulk transfers are slower",
        fix,
    )
}

pub(super) fn cgroups() -> Check {
    let mounts = text_of("/proc/self/mountinfo").unwrap_or_default();
    let of_type = |kind: &str| -> Vec<String> {
        let lines = mounts.lines().filter_map(|line| {
            let (place, rest) = line.split_once(" - ")?;
            (rest.split(' ').next() == Some(kind)).then(|| place.split(' ').nth(4).unwrap_or_default().to_owned())
        });
        lines.collect()
    };
    let (v2, v1) = (of_type("cgroup2"), of_type("cgroup"));
    let controllers = v2.first().and_then(|place| text_of(&format!("{place}/cgroup.controllers"))).unwrap_or_default();
    let of_v1 = v1.iter().filter_map(|place| place.rsplit('/').next()).collect::<Vec<_>>().join(" ");
    match (v2.is_empty(), v1.is_empty()) {
        (false, true) => Check::ok("cgroups", format!("v2: {controllers}")),
        (false, false) => Check::bad(
            "cgroups",
            State::Degraded,
            format!("hybrid; v2: {controllers}; v1: {of_v1}"),
            "for containers (not for storing): limits by the v1 controllers, slower to enter",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
        (true, false) => Check::bad(
            "cgroups",
            State::Degraded,
            format!("v1 only: {of_v1}"),
            "for containers (not for storing): policy by cgroup, kill and freeze",
            "boot with systemd.unified_cgroup_hierarchy=1",
        ),
        (true, true) => Check::bad(
            "cgroups",
            State::Missing,
            "none mounted",
            "containers; storing and fetching work",
            "mount cgroup2",
        ),
    }
}

/// What the BPF tiers need. Whether a program loads is decided by loading one, which the storing part of Metanode never does.
pub(super) fn bpf() -> Vec<Check> {
    let lost = "for containers (not for storing): ";
    let mounts = text_of("/proc/self/mountinfo").unwrap_or_default();
    let bpffs = mounts.lines().any(|line| line.contains(" - bpf "));
    let btf = std::path::Path::new("/sys/kernel/btf/vmlinux").exists();
    let lsm = text_of("/sys/kernel/security/lsm");
    let yes_no = |name, is_there, found: &str, missing: &str, what: &str, fix: &str| {
        if is_there {
            Check::ok(name, found)
        } else {
            Check::bad(name, State::Missing, missing, &format!("{lost}{what}"), fix)
        }
    };
    let unprivileged = text_of("/proc/sys/kernel/unprivileged_bpf_disabled").unwrap_or_else(|| "not readable".into());
    let user = if rustix::process::geteuid().is_root() { "root" } else { "not root" };
    let listed = match &lsm {
        Some(list) if list.split(',').any(|name| name == "bpf") => {
            "bpf is among the kernel's LSMs, which does not yet mean that programs load"
        }
        Some(_) => "bpf is not among the kernel's LSMs",
        None => "the list of LSMs can't be read (securityfs is not mounted, or not readable)",
    };
    vec![
        yes_no(
            "bpf: btf",
            btf,
            "/sys/kernel/btf/vmlinux",
            "no /sys/kernel/btf/vmlinux",
            "programs that read kernel structures",
            "a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
        yes_no(
            "bpf: bpffs",
            bpffs,
            "mounted",
            "not mounted",
            "policies that outlive the engine",
            "mount -t bpf bpf /sys/fs/bpf",
        ),
        Check::bad(
            "bpf: cgroup",
            State::NotProbed,
            format!("{user}, kernel.unprivileged_bpf_disabled = {unprivileged}; only loading a program decides"),
            &format!("{lost}unknown until the container engine probes it"),
            "",
        ),
        Check::bad(
            "bpf: lsm",
            State::NotProbed,
            listed,
            &format!("{lost}unknown until the container engine probes it"),
            "",
        ),
    ]
}
