//! Does a test notice when a rule of the protocol is broken? Each mutant breaks one rule at one place; the tests of its package must fail.
//!
//! [`ibft`] has a mutant or more for each clause of the protocol's checklist that the core can break. They are applied, one after the other, to
//! a copy of the sources below the target folder.

mod ibft;

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::process::{self, Guard, cargo, root, target, wait_until};

/// A mutant whose tests run longer than this never ends: that is noticed too.
const TESTS_TIME_MAX: Duration = Duration::from_secs(180);

/// What to break.
#[derive(Args)]
pub(crate) struct Options {
    /// A package: `ibft`.
    package: String,
    /// Only the mutants of this clause.
    #[arg(long)]
    clause: Option<u8>,
}

/// A rule that is broken.
struct Mutant {
    /// Of the checklist.
    clause: u8,
    /// What goes wrong.
    what: &'static str,
    /// Below `consensus/`; its tests must notice.
    package: &'static str,
    /// Relative to the package's folder.
    file: &'static str,
    /// What is there, once.
    from: &'static str,
    /// What comes in its place.
    to: &'static str,
}

impl Mutant {
    /// Its file, from the workspace's root.
    fn path(&self) -> PathBuf {
        Path::new("consensus").join(self.package).join(self.file)
    }
}

/// Where a mutant's text is in a file; it must be there once.
fn apply(mutant: &Mutant, source: &str) -> Result<String> {
    let count = source.matches(mutant.from).count();
    if count != 1 {
        bail!("clause {}, {}: `{}` is {count} times in {}", mutant.clause, mutant.what, mutant.from, mutant.file);
    }
    Ok(source.replacen(mutant.from, mutant.to, 1))
}

/// Runs them; fails when one survives.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mutants = match options.package.as_str() {
        "ibft" => ibft::MUTANTS,
        other => bail!("not supported: mutants of {other}; there are some of ibft"),
    };
    let mutants: Vec<&Mutant> =
        mutants.iter().filter(|mutant| options.clause.is_none_or(|clause| clause == mutant.clause)).collect();
    if mutants.is_empty() {
        bail!("no mutant of that clause");
    }
    let tree = copy()?;
    let packages: BTreeSet<&str> = mutants.iter().map(|mutant| mutant.package).collect();
    for package in packages {
        if !passes(&tree, package)? {
            bail!("the tests of {package} fail without any mutant");
        }
    }
    let mut survivors = Vec::new();
    for mutant in &mutants {
        let path = tree.join(mutant.path());
        let source = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let begun = Instant::now();
        fs::write(&path, apply(mutant, &source)?)?;
        let survived = passes(&tree, mutant.package);
        fs::write(&path, &source)?;
        let survived = survived?;
        println!(
            "clause {:>2}  {:<9} {:5.1} s  {}",
            mutant.clause,
            if survived { "SURVIVED" } else { "found" },
            begun.elapsed().as_secs_f64(),
            mutant.what
        );
        if survived {
            survivors.push(mutant.what);
        }
    }
    println!("{} mutants, {} survived", mutants.len(), survivors.len());
    if !survivors.is_empty() {
        bail!("survived: {}", survivors.join("; "));
    }
    Ok(())
}

/// The workspace's files, as they are now, in a folder that may be changed.
fn copy() -> Result<PathBuf> {
    let tree = target()?.join("mutants");
    if tree.exists() {
        fs::remove_dir_all(&tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    let listed = process::text(
        std::process::Command::new("git")
            .args(["ls-files", "--cached", "--others", "--exclude-standard"])
            .current_dir(root()),
    )?;
    for name in listed.lines() {
        let (from, to) = (root().join(name), tree.join(name));
        if from.is_file() {
            fs::create_dir_all(to.parent().expect("it lies in the tree"))?;
            fs::copy(&from, &to).with_context(|| format!("cannot copy {name}"))?;
        }
    }
    Ok(tree)
}

/// Whether the package's tests compile and pass. A mutant that does not compile is a mistake in the table.
fn passes(tree: &Path, package: &str) -> Result<bool> {
    let package = &format!("metanode-{package}");
    let in_tree = |arguments: &[&str]| {
        let mut command = cargo(arguments);
        // A folder of its own: cargo takes two copies of a workspace for one.
        command.current_dir(tree).env("CARGO_TARGET_DIR", target()?.join("mutants-target")).stdin(Stdio::null());
        Ok::<_, anyhow::Error>(command)
    };
    let build =
        in_tree(&["test", "-q", "-p", package, "--no-run"])?.stdout(Stdio::null()).stderr(Stdio::piped()).output()?;
    if !build.status.success() {
        bail!("it does not compile:\n{}", String::from_utf8_lossy(&build.stderr));
    }
    let mut tests = in_tree(&["test", "-q", "-p", package])?;
    let mut child = Guard(tests.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?);
    let status = wait_until(&mut child.0, Instant::now() + TESTS_TIME_MAX)?;
    child.end();
    Ok(status.is_some_and(|status| status.success()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table that no longer fits the sources would break nothing, and say so only to whoever runs it.
    #[test]
    fn every_mutant_has_its_place() {
        for mutant in ibft::MUTANTS {
            let source = fs::read_to_string(root().join(mutant.path())).unwrap();
            assert_ne!(apply(mutant, &source).unwrap(), source);
        }
    }

    #[test]
    fn every_clause_has_one() {
        let clauses: BTreeSet<u8> = ibft::MUTANTS.iter().map(|mutant| mutant.clause).collect();
        assert_eq!(clauses, (1..=26).collect());
    }
}
