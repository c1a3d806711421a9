//! Each rule, shown to fail on a workspace that breaks it and to hold on one that doesn't.

use super::*;

/// A workspace without a breach: every package of the table, every edge.
fn sound() -> Workspace {
    let folder = |name: &str| match name {
        "metanode-cli" => "control/cli".to_owned(),
        "metanode-log" | "metanode-blob" | "metanode-store" => name.replace("metanode-", "relay/"),
        _ => name.replace("metanode-", "dataplane/"),
    };
    let packages: Vec<Package> = LAYERS
        .iter()
        .map(|(name, _)| Package {
            name: (*name).to_owned(),
            folder: folder(name),
            dependencies: EDGES.iter().filter(|(from, ..)| from == name).map(|(_, to, _)| normal(to)).collect(),
            manifest: "[lints]\nworkspace = true\n".to_owned(),
            roots: vec![(format!("{}/src/lib.rs", folder(name)), "//! What it is.\n".to_owned())],
        })
        .chain([Package {
            name: "metanode-e2e".to_owned(),
            folder: "tests/e2e".to_owned(),
            dependencies: vec![normal("metanode-cli"), normal("rustls")],
            manifest: "[lints]\nworkspace = true\n".to_owned(),
            roots: Vec::new(),
        }])
        .collect();
    let members: String = packages.iter().map(|package| format!("    \"{}\", # what\n", package.folder)).collect();
    Workspace {
        manifest: format!(
            "members = [\n    # dataplane\n{members}]\n[workspace.lints.rust]\nunsafe_code = \"forbid\"\n"
        ),
        packages,
        locks: vec![(
            "Cargo.lock".to_owned(),
            "source = \"registry+https://github.com/rust-lang/crates.io-index\"\n".to_owned(),
        )],
        folders: vec![("dataplane".to_owned(), true)],
        files: vec![("README.md".to_owned(), "relay/ro\u{6f}t/x, https://host/home/x and ~/home/x\n".to_owned())],
    }
}

fn normal(name: &str) -> Dependency {
    Dependency { name: name.to_owned(), dev: false }
}

fn dev(name: &str) -> Dependency {
    Dependency { name: name.to_owned(), dev: true }
}

/// Breaks a sound workspace and returns what the rules say: `(rule, place)`.
fn broken(change: impl FnOnce(&mut Workspace)) -> Vec<(&'static str, String)> {
    let mut workspace = sound();
    change(&mut workspace);
    check(&workspace).into_iter().map(|breach| (breach.rule, breach.at)).collect()
}

/// Breaks one package.
fn broken_package(name: &str, change: impl FnOnce(&mut Package)) -> Vec<(&'static str, String)> {
    broken(|workspace| {
        change(workspace.packages.iter_mut().find(|package| package.name == name).expect("a package of the table"));
    })
}

fn imports(name: &str, import: Dependency) -> Vec<(&'static str, String)> {
    broken_package(name, |package| package.dependencies.push(import))
}

fn one(rule: &'static str, at: &str) -> Vec<(&'static str, String)> {
    vec![(rule, at.to_owned())]
}

#[test]
fn a_sound_workspace_has_no_breach() {
    assert_eq!(check(&sound()), []);
}

#[test]
fn imports_run_downward() {
    assert_eq!(imports("metanode-node", normal("metanode-log")), []);
    assert_eq!(imports("metanode-log", normal("metanode-node")), one("layers", "metanode-log"));
    assert_eq!(imports("metanode-types", normal("metanode-log")), one("layers", "metanode-types"));
    assert_eq!(imports("metanode-log", dev("metanode-node")), [], "tests may look upward");
}

#[test]
fn sideways_imports_are_listed() {
    assert_eq!(imports("metanode-log", normal("metanode-blob")), one("layers", "metanode-log"));
    assert_eq!(imports("metanode-types", normal("metanode-wire")), one("layers", "metanode-types"));
    assert_eq!(imports("metanode-store", normal("metanode-quic")), one("layers", "metanode-store"));
}

#[test]
fn tests_and_benches_are_imported_by_nobody() {
    assert_eq!(imports("metanode-cli", normal("metanode-e2e")), one("layers", "metanode-cli"));
}

#[test]
fn each_member_has_a_layer_and_each_line_of_the_tables_a_use() {
    let found = broken(|workspace| {
        workspace.manifest = workspace.manifest.replace("dataplane/node", "dataplane/other");
        let package =
            workspace.packages.iter_mut().find(|package| package.name == "metanode-node").expect("it is there");
        (package.name, package.folder) = ("metanode-other".to_owned(), "dataplane/other".to_owned());
    });
    assert_eq!(found, [("layers", "metanode-other".to_owned()), ("layers", "metanode-node".to_owned())]);
    let unused = broken_package("metanode-quic", |package| package.dependencies.clear());
    assert_eq!(unused, one("layers", "metanode-quic"));
}

#[test]
fn the_data_plane_never_imports_control() {
    let found = imports("metanode-node", normal("metanode-cli"));
    assert!(found.contains(&("reach", "metanode-node".to_owned())), "{found:?}");
    // Through another package, too.
    let found = imports("metanode-shard", normal("metanode-cli"));
    assert!(found.contains(&("reach", "metanode-quic".to_owned())), "{found:?}");
}

#[test]
fn the_client_reaches_nothing_of_a_node() {
    for part in ["metanode-shard", "metanode-quic", "metanode-store"] {
        let found = imports("metanode-client", normal(part));
        assert!(found.contains(&("reach", "metanode-client".to_owned())), "{part}: {found:?}");
    }
}

#[test]
fn heavy_crates_have_few_namers() {
    for (package, name) in [
        ("metanode-node", "glommio-ng"),
        ("metanode-store", "glommio"),
        ("metanode-client", "quinn-udp"),
        ("metanode-node", "quinn-proto"),
        ("metanode-node", "rustls"),
    ] {
        assert_eq!(imports(package, normal(name)), one("namers", package), "{name}");
        assert_eq!(imports(package, dev(name)), one("namers", package), "{name}");
    }
    for (package, name) in [
        ("metanode-shard", "glommio-ng"),
        ("metanode-quic", "quinn-udp"),
        ("metanode-client", "quinn-proto"),
        ("metanode-crypto", "rustls"),
    ] {
        assert_eq!(imports(package, normal(name)), [], "{name}");
    }
}

#[test]
fn cores_import_no_runtime() {
    for name in ["tokio", "rustix", "getrandom"] {
        assert_eq!(imports("metanode-log", normal(name)), one("cores", "metanode-log"));
        assert_eq!(imports("metanode-log", dev(name)), []);
        assert_eq!(imports("metanode-node", normal(name)), []);
    }
}

#[test]
fn only_the_registry_is_a_source() {
    let git = |workspace: &mut Workspace| {
        workspace.locks.push(("benches/peers/Cargo.lock".to_owned(), "source = \"git+https://host/x#1\"\n".to_owned()));
    };
    assert_eq!(broken(git), one("sources", "benches/peers/Cargo.lock"));
    assert_eq!(broken(|workspace| workspace.locks.clear()), one("sources", "Cargo.lock"));
}

#[test]
fn unsafe_is_forbidden_but_in_two_crates() {
    let set = |name: &str, manifest: &str| broken_package(name, |package| package.manifest = manifest.to_owned());
    assert_eq!(set("metanode-log", "[package]\n"), one("unsafe", "metanode-log"));
    assert_eq!(set("metanode-log", "[lints] # workspace = true\n"), one("unsafe", "metanode-log"));
    assert_eq!(set("metanode-log", "[lints.rust]\nunsafe_code = \"deny\"\n"), one("unsafe", "metanode-log"));
    assert_eq!(set("metanode-log", "[lints.rust]\nunsafe_code = \"forbid\"\n"), []);
    assert_eq!(set("metanode-log", "lints.workspace = true\n[package]\n"), []);
    assert_eq!(set("metanode-shard", "[lints.rust]\nunsafe_code = \"allow\"\n"), one("unsafe", "metanode-shard"));
    assert_eq!(set("metanode-shard", "[lints.clippy]\nundocumented_unsafe_blocks = \"deny\"\n"), []);
    let shared = broken(|workspace| workspace.manifest = workspace.manifest.replace("forbid", "deny"));
    assert_eq!(shared, one("unsafe", "Cargo.toml"));
}

#[test]
fn members_say_what_they_are_for() {
    let bare = broken(|workspace| {
        workspace.manifest = workspace.manifest.replace("\"dataplane/types\", # what", "\"dataplane/types\",");
    });
    assert_eq!(bare, one("members", "Cargo.toml"));
    let hidden = broken(|workspace| {
        workspace.manifest = workspace.manifest.replace("    \"dataplane/types\", # what\n", "");
    });
    assert_eq!(hidden, one("members", "Cargo.toml"));
}

#[test]
fn folders_and_crates_are_described() {
    let folder = |workspace: &mut Workspace| workspace.folders.push(("ebpf".to_owned(), false));
    assert_eq!(broken(folder), one("readme", "ebpf"));
    let undocumented = broken_package("metanode-log", |package| package.roots[0].1 = "use std::fs;\n".to_owned());
    assert_eq!(undocumented, one("crate-docs", "relay/log/src/lib.rs"));
}

#[test]
fn paths_of_a_machine_and_unfinished_code_are_found() {
    for path in MACHINE_PATHS {
        let file = ("docs/x.md".to_owned(), format!("first\nin `{path}somebody`\n"));
        assert_eq!(broken(|workspace| workspace.files.push(file)), one("machine-paths", "docs/x.md:2"));
    }
    let code = format!("fn f() {{ {}!() }}\n", "todo");
    let add = |path: &str| broken(|workspace| workspace.files.push((path.to_owned(), code.clone())));
    assert_eq!(add("relay/log/src/x.rs"), one("unfinished", "relay/log/src/x.rs:1"));
    assert_eq!(add("x.md"), []);
}

#[test]
fn unsafe_blocks_are_listed_with_their_number() {
    let code = concat!("fn f() { unsafe", " { g() } }\n").to_owned();
    let with = |list: &str| {
        broken(|workspace| {
            workspace.files.push(("dataplane/shard/src/a.rs".to_owned(), code.clone()));
            workspace.files.push(("ARCHITECTURE.md".to_owned(), list.to_owned()));
        })
    };
    assert_eq!(with("| `dataplane/shard/src/a.rs` | 1 | why | test |\n"), []);
    let breach = |place: &str| vec![("unsafe-list", place.to_owned())];
    assert_eq!(with(""), breach("dataplane/shard/src/a.rs"));
    assert_eq!(with("| `dataplane/shard/src/a.rs` | 2 | why | test |\n"), breach("dataplane/shard/src/a.rs"));
    let stale = "| `dataplane/shard/src/a.rs` | 1 | why | test |\n| `dataplane/shard/src/b.rs` | 1 | why | test |\n";
    assert_eq!(with(stale), breach("ARCHITECTURE.md"));
}
