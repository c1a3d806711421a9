//! Reads the workspace into the value that the rules judge.

use std::{
    collections::BTreeSet,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result};
use cargo_metadata::{DependencyKind, MetadataCommand};

use super::{Dependency, Package, Workspace};
use crate::process::root;

/// Files above this are not read as text.
const TEXT_BYTES_MAX: u64 = 4 << 20;

/// The workspace on disk.
pub(super) fn workspace() -> Result<Workspace> {
    let root = root();
    let files = tracked(root)?;
    Ok(Workspace {
        packages: packages(root)?,
        manifest: read(&root.join("Cargo.toml"))?,
        locks: files.iter().filter(|(path, _)| path.ends_with("Cargo.lock")).cloned().collect(),
        folders: folders(root, &files),
        files,
    })
}

fn packages(root: &Path) -> Result<Vec<Package>> {
    let metadata =
        MetadataCommand::new().manifest_path(root.join("Cargo.toml")).no_deps().exec().context("cargo metadata")?;
    let relative = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned();
    metadata
        .packages
        .iter()
        .map(|package| {
            let folder = package.manifest_path.parent().context("a manifest lies in a folder")?;
            let crates =
                package.targets.iter().filter(|target| target.is_lib() || target.is_proc_macro() || target.is_bin());
            Ok(Package {
                name: package.name.to_string(),
                folder: relative(folder.as_std_path()),
                dependencies: package
                    .dependencies
                    .iter()
                    .map(|dependency| Dependency {
                        name: dependency.name.clone(),
                        dev: dependency.kind == DependencyKind::Development,
                    })
                    .collect(),
                manifest: read(package.manifest_path.as_std_path())?,
                roots: crates
                    .map(|target| Ok((relative(target.src_path.as_std_path()), read(target.src_path.as_std_path())?)))
                    .collect::<Result<_>>()?,
            })
        })
        .collect()
}

/// Text files that git has or would take; without git, all but hidden and built ones.
fn tracked(root: &Path) -> Result<Vec<(String, String)>> {
    let mut list = Command::new("git");
    list.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root).stderr(Stdio::null());
    // A tarball has no git, a container may not have it, and git refuses a checkout that belongs to somebody else.
    let listed = list.output().ok().filter(|output| root.join(".git").exists() && output.status.success());
    let mut paths = BTreeSet::new();
    match listed {
        Some(output) => paths.extend(String::from_utf8_lossy(&output.stdout).split_terminator('\0').map(str::to_owned)),
        None => walk(root, root, &mut paths)?,
    }
    // A file may be listed and gone, or not be text: neither is a rule's business.
    Ok(paths.into_iter().filter_map(|path| text_of(&root.join(&path)).map(|contents| (path, contents))).collect())
}

fn walk(root: &Path, folder: &Path, paths: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        if name == "target" || (folder == root && name == ".git") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            walk(root, &path, paths)?;
        } else {
            paths.insert(path.strip_prefix(root)?.to_string_lossy().into_owned());
        }
    }
    Ok(())
}

fn text_of(path: &Path) -> Option<String> {
    let metadata = std::fs::symlink_metadata(path).ok()?;
    (metadata.is_file() && metadata.len() <= TEXT_BYTES_MAX).then(|| std::fs::read_to_string(path).ok()).flatten()
}

/// The folders in the root that hold files, hidden ones left out.
fn folders(root: &Path, files: &[(String, String)]) -> Vec<(String, bool)> {
    let tops: BTreeSet<&str> = files.iter().filter_map(|(path, _)| path.split_once('/')).map(|(top, _)| top).collect();
    tops.into_iter()
        .filter(|top| !top.starts_with('.'))
        .map(|top| (top.to_owned(), root.join(top).join("README.md").is_file()))
        .collect()
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}
