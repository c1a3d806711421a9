//! Executors, mesh, buffers, timers, files and readiness: the only crate that names glommio
