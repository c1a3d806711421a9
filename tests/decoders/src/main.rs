//! Repeats inputs, and writes those that fuzzing begins with.
//!
//! ```text
//! metanode-decoders TARGET FILE…   gives the files to a target; a panic says what does not hold
//! metanode-decoders seeds FOLDER   writes FOLDER/TARGET/seed-*
//! ```

use std::{fs, path::Path};

use anyhow::{Context, Result, bail};
use metanode_decoders::{TARGETS, planted, seeds};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some((name, paths)) = arguments.split_first().filter(|(_, paths)| !paths.is_empty()) else {
        bail!("usage: metanode-decoders TARGET FILE… | seeds FOLDER");
    };
    if name == "seeds" {
        return write_seeds(Path::new(&paths[0]));
    }
    let target = TARGETS.iter().chain(&[("planted", planted as fn(&[u8]))]).find(|(known, _)| known == name);
    let (_, target) = target.with_context(|| format!("there is no target {name}"))?;
    for path in paths {
        let bytes = fs::read(path).with_context(|| format!("cannot read {path}"))?;
        eprintln!("{name} {path} ({} bytes)", bytes.len());
        target(&bytes);
    }
    Ok(())
}

fn write_seeds(folder: &Path) -> Result<()> {
    for seed in seeds::all() {
        let folder = folder.join(seed.target);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let path = folder.join(seed.name);
        fs::write(&path, seed.bytes).with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}
