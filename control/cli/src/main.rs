//! The `metanode` binary: every role and every command.
//!
//! [`args`] is the command line, [`commands`] what each command does, [`exit`] how errors become exit codes and hints,
//! [`output`] how data is printed, [`target`] which node is meant and who asks. Data goes to standard output, everything else to
//! standard error.

mod args;
mod commands;
mod doctor;
mod exit;
mod output;
mod progress;
mod reference;
mod target;

use clap::Parser as _;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    let cli = args::Cli::parse(); // ends with code 2 when it can't be understood
    match commands::run(cli) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(failure) => {
            if failure.exit != exit::Exit::Pipe {
                for line in failure.lines() {
                    eprintln!("{line}");
                }
            }
            std::process::ExitCode::from(failure.exit as u8)
        }
    }
}
