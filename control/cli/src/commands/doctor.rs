//! `metanode doctor`.

use crate::{
    args::Global,
    doctor::{self, State},
    exit::{Exit, Failure, Result},
    target::data_folder,
};

pub(super) fn run(global: &Global) -> Result<()> {
    let checks = doctor::all(&data_folder(global)?);
    let mut list = global.output.list()?;
    for check in &checks {
        list.push(check)?;
    }
    list.end()?;
    let missing: Vec<_> =
        checks.iter().filter(|check| check.needed && check.state == State::Missing).map(|check| check.name).collect();
    if missing.is_empty() {
        return Ok(());
    }
    Err(Failure::new(Exit::Other, format!("a node does not run here without: {}", missing.join(", ")))
        .hint("the lines above say how to provide it"))
}
