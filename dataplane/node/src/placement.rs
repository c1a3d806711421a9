//! Which CPUs the shards run on.

use std::io;

use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    thread::{CpuSet, sched_getaffinity},
};

use crate::config::NodeConfig;

/// One core for each shard.
///
/// Default: one shard a CPU of the affinity mask (what `taskset`, cpusets and container limits left us). With more shards
/// than CPUs they take turns.
pub(crate) fn cores(config: &NodeConfig) -> io::Result<Vec<usize>> {
    let allowed = affinity()?;
    let cores = match &config.cores {
        None => allowed,
        Some(cores) => match cores.iter().find(|core| !allowed.contains(core)) {
            None => cores.clone(),
            Some(core) => {
                let reason = format!("node.cores: CPU {core} is not in this process's affinity mask {allowed:?}");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
        },
    };
    let most = usize::from(metanode_types::limits::SHARDS_MAX);
    let shards = config.shards.map_or(cores.len().min(most), usize::from);
    if shards > cores.len() {
        tracing::warn!("{shards} shards share {} CPUs", cores.len());
    }
    Ok(cores.iter().copied().cycle().take(shards).collect())
}

fn affinity() -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(None)?;
    let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| set.is_set(core)).collect();
    if cores.is_empty() {
        return Err(io::Error::other("the affinity mask has no CPU below 1024"));
    }
    Ok(cores)
}

/// Raises the soft limit on descriptors to the hard one: segments and sockets need more than the usual 1,024.
pub(crate) fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!("the limit on open files stays at {:?}: {error}", limit.current);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shards_follow_the_affinity_mask_and_take_turns_beyond_it() {
        let allowed = affinity().unwrap();
        assert_eq!(cores(&NodeConfig::default()).unwrap(), allowed);
        let config = NodeConfig { shards: Some(3), cores: Some(vec![allowed[0]]) };
        assert_eq!(cores(&config).unwrap(), [allowed[0]; 3]);
        let config = NodeConfig { shards: None, cores: Some(vec![1_023]) };
        assert!(
            cores(&config).unwrap_err().to_string().contains("node.cores"),
            "this machine has fewer than 1,024 CPUs"
        );
    }
}
