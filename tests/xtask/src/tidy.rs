//! The rules of the workspace. Each breach is printed with where it is, the rule and its reason.
//!
//! [`tables`] holds what is permitted, [`gather`] reads the workspace into a [`Workspace`], and the rules here judge that value
//! alone, so that each can be shown to fail on a workspace that no disk holds.

mod gather;
mod tables;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use anyhow::{Result, bail};

use tables::{CORE_REFUSES, EDGES, LAYERS, MACHINE_PATHS, NAMERS, NO_PATHS, UNLAYERED, UNSAFE};

/// Everything the rules look at.
#[derive(Debug, Default)]
pub(crate) struct Workspace {
    /// Members.
    packages: Vec<Package>,
    /// The root Cargo.toml.
    manifest: String,
    /// Lock files: path, contents.
    locks: Vec<(String, String)>,
    /// Top folders, and whether each has a README.md.
    folders: Vec<(String, bool)>,
    /// Text files under version control: path, contents.
    files: Vec<(String, String)>,
}

/// A member.
#[derive(Debug, Default, Clone)]
struct Package {
    name: String,
    /// Relative to the root: `dataplane/types`.
    folder: String,
    dependencies: Vec<Dependency>,
    manifest: String,
    /// Its crates' root files: path, contents.
    roots: Vec<(String, String)>,
}

/// What a member's manifest declares.
#[derive(Debug, Default, Clone)]
struct Dependency {
    name: String,
    /// Whether only tests, benches and examples of the package see it.
    dev: bool,
}

/// A rule that does not hold.
#[derive(Debug, PartialEq, Eq)]
struct Breach {
    /// File or package.
    at: String,
    rule: &'static str,
    reason: String,
}

impl fmt::Display for Breach {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: [{}] {}", self.at, self.rule, self.reason)
    }
}

/// A rule: its name, and what it finds.
type Rule = (&'static str, fn(&Workspace, &mut dyn FnMut(String, String)));

/// Every rule.
const RULES: &[Rule] = &[
    ("layers", layers),
    ("reach", reach),
    ("namers", namers),
    ("cores", cores),
    ("sources", sources),
    ("unsafe", unsafe_code),
    ("unsafe-list", unsafe_list),
    ("members", members),
    ("readme", readme),
    ("crate-docs", crate_docs),
    ("machine-paths", machine_paths),
    ("unfinished", unfinished),
];

/// Checks the workspace on disk.
pub(crate) fn run() -> Result<()> {
    let workspace = gather::workspace()?;
    let breaches = check(&workspace);
    for breach in &breaches {
        println!("{breach}");
    }
    if !breaches.is_empty() {
        bail!("{} breaches of the workspace's rules", breaches.len());
    }
    println!(
        "tidy: {} packages, {} files, {} rules hold",
        workspace.packages.len(),
        workspace.files.len(),
        RULES.len()
    );
    Ok(())
}

/// Applies every rule.
fn check(workspace: &Workspace) -> Vec<Breach> {
    let mut breaches = Vec::new();
    for &(rule, find) in RULES {
        find(workspace, &mut |at, reason| breaches.push(Breach { at, rule, reason }));
    }
    breaches
}

impl Workspace {
    fn names(&self) -> BTreeSet<&str> {
        self.packages.iter().map(|package| package.name.as_str()).collect()
    }
}

impl Package {
    fn is_unlayered(&self) -> bool {
        UNLAYERED.iter().any(|folder| self.folder.starts_with(folder))
    }

    fn layer(&self) -> Option<u8> {
        layer(&self.name)
    }

    /// What ships with it; what only its tests use is not part of the graph.
    fn imports(&self) -> impl Iterator<Item = &str> {
        self.dependencies.iter().filter(|dependency| !dependency.dev).map(|dependency| dependency.name.as_str())
    }

    /// Whether a table's entry, a package's name or a folder that ends in a slash, means this package.
    fn is(&self, entry: &str) -> bool {
        if entry.ends_with('/') { self.folder.starts_with(entry) } else { self.name == entry }
    }
}

fn layer(name: &str) -> Option<u8> {
    LAYERS.iter().find(|(package, _)| *package == name).map(|(_, layer)| *layer)
}

/// Imports run strictly downward; sideways along a listed edge; nobody imports tests and benches.
fn layers(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    let members = workspace.names();
    for package in &workspace.packages {
        if package.is_unlayered() {
            continue;
        }
        let Some(from) = package.layer() else {
            let reason =
                "has no layer: list it in tests/xtask/src/tidy/tables.rs, as DESIGN and ARCHITECTURE.md have it";
            breach(package.name.clone(), reason.to_owned());
            continue;
        };
        for import in package.imports().filter(|import| members.contains(import)) {
            let Some(to) = layer(import) else {
                breach(
                    package.name.clone(),
                    format!("imports {import}: nobody imports tests, benches or a package without a layer"),
                );
                continue;
            };
            let listed = EDGES.iter().any(|(a, b, _)| *a == package.name && *b == import);
            if to > from {
                breach(package.name.clone(), format!("L{from} imports {import} (L{to}): imports run downward"));
            } else if to == from && !listed {
                let reason = format!(
                    "L{from} imports {import} (L{to}): a sideways import needs a line with its reason in the table of edges"
                );
                breach(package.name.clone(), reason);
            }
        }
    }
    for (name, _) in LAYERS.iter().filter(|(name, _)| !members.contains(name)) {
        breach((*name).to_owned(), "is in the layer table and not in the workspace: take the line out".to_owned());
    }
    for (from, to, _) in EDGES {
        let used = workspace
            .packages
            .iter()
            .any(|package| package.name == *from && package.imports().any(|import| import == *to));
        if !used {
            breach((*from).to_owned(), format!("no longer imports {to}: take the edge out of the table"));
        }
    }
}

/// What may not be reached, however many imports lie between.
fn reach(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    let packages: BTreeMap<&str, &Package> =
        workspace.packages.iter().map(|package| (package.name.as_str(), package)).collect();
    for package in &workspace.packages {
        let mut seen = BTreeMap::new();
        let mut open = vec![(package.name.as_str(), package.name.clone())];
        while let Some((name, path)) = open.pop() {
            let Some(reached) = packages.get(name) else { continue };
            if seen.insert(name, path.clone()).is_some() {
                continue;
            }
            open.extend(reached.imports().map(|import| (import, format!("{path} → {import}"))));
        }
        for (from, to, why) in NO_PATHS.iter().filter(|(from, ..)| package.is(from)) {
            for (reached, path) in
                seen.iter().filter(|(reached, _)| packages.get(*reached).is_some_and(|found| found.is(to)))
            {
                if *reached != package.name {
                    breach(
                        package.name.clone(),
                        format!("reaches {reached} ({path}): {from} never imports {to}: {why}"),
                    );
                }
            }
        }
    }
}

/// Each heavy dependency has few crates that name it, so that replacing it is a local change.
fn namers(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for package in &workspace.packages {
        for dependency in &package.dependencies {
            for (crates, who, why) in NAMERS.iter().filter(|(crates, ..)| crates.contains(&dependency.name.as_str())) {
                if !who.iter().any(|entry| package.is(entry)) {
                    let reason = format!("names {}, which only {} may: {why}", crates[0], who.join(", "));
                    breach(package.name.clone(), reason);
                }
            }
        }
    }
}

/// Cores have no clock, no randomness, no I/O and no runtime: they can't import what brings one.
fn cores(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for package in workspace.packages.iter().filter(|package| package.layer().is_some_and(|layer| layer <= 1)) {
        for import in package.imports().filter(|import| CORE_REFUSES.contains(import)) {
            let reason = format!(
                "L0 and L1 decide and leave I/O, clocks, randomness and runtimes to shells, which {import} is for"
            );
            breach(package.name.clone(), reason);
        }
    }
}

/// Everything is built from crates.io: no git dependency, no other registry.
fn sources(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for (path, contents) in &workspace.locks {
        let sources = contents.lines().filter_map(|line| line.trim().strip_prefix("source = "));
        let others: BTreeSet<_> =
            sources.filter(|source| !source.contains("github.com/rust-lang/crates.io-index")).collect();
        for source in others {
            breach(
                path.clone(),
                format!("takes a package from {source}: git dependencies and other registries are not reproducible"),
            );
        }
    }
    if workspace.locks.is_empty() {
        breach("Cargo.lock".to_owned(), "is missing: builds are reproducible only with it".to_owned());
    }
}

/// `unsafe` is forbidden everywhere but in the crates named for it, which must say why each block is sound.
fn unsafe_code(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    let forbids = |manifest: &str, section: &str| {
        value(manifest, section, "unsafe_code").is_some_and(|level| level.contains("forbid"))
    };
    let shared = forbids(&workspace.manifest, "workspace.lints.rust");
    if !shared {
        breach("Cargo.toml".to_owned(), "[workspace.lints.rust] must have unsafe_code = \"forbid\"".to_owned());
    }
    for package in &workspace.packages {
        let inherits = value(&package.manifest, "lints", "workspace").as_deref() == Some("true");
        if UNSAFE.contains(&package.name.as_str()) {
            let documented = value(&package.manifest, "lints.clippy", "undocumented_unsafe_blocks");
            if !inherits && !documented.is_some_and(|level| level.contains("deny")) {
                let reason =
                    "may hold unsafe code, so its lints must have clippy's undocumented_unsafe_blocks = \"deny\"";
                breach(package.name.clone(), reason.to_owned());
            }
        } else if !inherits && !forbids(&package.manifest, "lints.rust") {
            let reason = format!(
                "unsafe_code is not forbidden: inherit the workspace's lints; unsafe is for {}",
                UNSAFE.join(" and ")
            );
            breach(package.name.clone(), reason);
        }
    }
}

/// Every file with unsafe blocks stands in ARCHITECTURE.md with their number, so that none comes or goes unseen.
fn unsafe_list(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    const LIST: &str = "ARCHITECTURE.md";
    let listed: BTreeMap<&str, usize> = workspace
        .files
        .iter()
        .filter(|(path, _)| path == LIST)
        .flat_map(|(_, text)| text.lines())
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split(" | ");
            let path = cells.next()?.strip_suffix('`').filter(|path| path.ends_with(".rs"))?;
            Some((path, cells.next()?.parse().ok()?))
        })
        .collect();
    let blocks =
        |text: &str| text.matches(concat!("unsafe", " {")).count() + text.matches(concat!("unsafe", " impl")).count();
    let held: BTreeMap<&str, usize> = workspace
        .files
        .iter()
        .filter(|(path, _)| path.ends_with(".rs"))
        .map(|(path, text)| (path.as_str(), blocks(text)))
        .filter(|(_, count)| *count > 0)
        .collect();
    for (path, count) in &held {
        let known = listed.get(path).copied().unwrap_or(0);
        if known != *count {
            breach(
                (*path).to_owned(),
                format!("has {count} unsafe blocks, {LIST} lists {known}: each needs a reason and a test"),
            );
        }
    }
    for path in listed.keys().filter(|path| !held.contains_key(*path)) {
        breach(LIST.to_owned(), format!("lists unsafe blocks of {path}, which has none"));
    }
}

/// The value of a key in a section of a manifest that cargo has accepted; enough TOML for `[lints]`.
fn value(manifest: &str, section: &str, key: &str) -> Option<String> {
    let lines = manifest.lines().map(|line| line.split_once('#').map_or(line, |(line, _)| line).trim());
    let (mut inside, dotted) = (false, format!("{section}."));
    for line in lines {
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            inside = header.trim() == section;
        } else if let Some((name, value)) = line.split_once('=') {
            let name = name.trim();
            if (inside && name == key) || name.strip_prefix(&dotted) == Some(key) {
                return Some(value.trim().to_owned());
            }
        }
    }
    None
}

/// The list of members is the workspace's table of contents: each line says what the member is for.
fn members(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    let lines = workspace.manifest.lines().skip_while(|line| !line.starts_with("members")).skip(1);
    let mut listed = BTreeSet::new();
    for line in lines.map(str::trim).take_while(|line| !line.starts_with(']')) {
        let Some((member, rest)) = line.strip_prefix('"').and_then(|line| line.split_once('"')) else { continue };
        listed.insert(member);
        if rest.split_once('#').is_none_or(|(_, comment)| comment.trim().is_empty()) {
            breach("Cargo.toml".to_owned(), format!("the member {member} has no comment that says what it is for"));
        }
    }
    for package in workspace.packages.iter().filter(|package| !listed.contains(package.folder.as_str())) {
        breach(
            "Cargo.toml".to_owned(),
            format!("{} is a member without a line of its own in `members`", package.folder),
        );
    }
}

/// Each top folder has a map.
fn readme(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for (folder, _) in workspace.folders.iter().filter(|(_, has)| !has) {
        breach(folder.clone(), "has no README.md: each top folder has its own map".to_owned());
    }
}

/// Each crate opens with what it is.
fn crate_docs(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for (path, contents) in workspace.packages.iter().flat_map(|package| &package.roots) {
        if !contents.starts_with("//!") {
            breach(
                path.clone(),
                "does not start with `//!`: the root of a crate says what it is and where to start".to_owned(),
            );
        }
    }
}

/// Nothing in the repository depends on where somebody has checked it out.
fn machine_paths(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for (path, number, line) in lines(workspace) {
        for found in MACHINE_PATHS.iter().filter(|found| has_path(line, found)) {
            breach(format!("{path}:{number}"), format!("has {found}…, a path of one machine"));
        }
    }
}

/// Whether an absolute path begins in the line, rather than a relative one or an address goes on.
fn has_path(line: &str, path: &str) -> bool {
    let begins =
        |at: usize| !line[..at].ends_with(|before: char| before.is_alphanumeric() || "_-.~}>*]".contains(before));
    line.match_indices(path).any(|(at, _)| begins(at))
}

/// What is not written yet is not merged.
fn unfinished(workspace: &Workspace, breach: &mut dyn FnMut(String, String)) {
    for (path, number, line) in lines(workspace).filter(|(path, ..)| path.ends_with(".rs")) {
        for name in [concat!("todo", "!"), concat!("unimplemented", "!")] {
            if line.contains(name) {
                breach(
                    format!("{path}:{number}"),
                    format!("has {name}: write it, or leave it out and say so in the docs"),
                );
            }
        }
    }
}

fn lines(workspace: &Workspace) -> impl Iterator<Item = (&str, usize, &str)> {
    workspace.files.iter().flat_map(|(path, contents)| {
        contents.lines().enumerate().map(move |(index, line)| (path.as_str(), index + 1, line))
    })
}
