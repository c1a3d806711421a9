//! Leads all shards through a step at a time.

use std::{
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use metanode_shard::{
    ShardPanic, Shards,
    signal::{StopSignal, StopSignals},
};

use super::{DRAIN_TIME_MAX, LOOK_PERIOD, NodeError, STOP_TIME_MAX, assemble::Running};
use crate::shard::{Command, Event};

/// Time for the shards to end once they have nothing left to do.
const END_TIME_MAX: Duration = Duration::from_secs(2);

/// Time for a shard to take a command; its queue has room for all there are.
const SERVE_TIME_MAX: Duration = Duration::from_secs(10);

/// Speaks for the control thread to all shards.
pub(super) struct Conductor {
    running: Running,
    /// Taken when they are joined.
    shards: Option<Shards<()>>,
}

impl Conductor {
    pub(super) fn new(shards: Shards<()>, running: Running) -> Self {
        Self { running, shards: Some(shards) }
    }

    /// Waits until all shards have opened their stores; false when a signal came first.
    pub(super) fn open(&mut self, signals: &StopSignals) -> Result<bool, NodeError> {
        let mut missing = self.running.commands.len();
        let mut signalled: Option<Instant> = None;
        while missing > 0 {
            match self.running.events.recv_timeout(LOOK_PERIOD) {
                Ok(Event::Opened(Ok(()))) => missing -= 1,
                Ok(Event::Opened(Err(error))) => return Err(self.give_up(error.into())),
                Ok(_) => {}
                Err(_) if self.any_finished() => return Err(self.give_up(NodeError::ShardEnded)),
                Err(_) => {}
            }
            if signalled.is_none() {
                signalled = look(signals)?.map(|_| Instant::now());
            }
            // A store that is being opened is safe to leave at any time, but an orderly end is worth a wait.
            if signalled.is_some_and(|since| since.elapsed() >= STOP_TIME_MAX) {
                return Err(self.give_up(NodeError::Overdue { what: "finish opening the store" }));
            }
        }
        Ok(signalled.is_none())
    }

    /// Lets all shards accept connections.
    pub(super) fn serve(&mut self) -> Result<(), NodeError> {
        let mut failed = None;
        let step = self.step(Command::Serve, Instant::now() + SERVE_TIME_MAX, "start serving", |event| match event {
            Event::Serving(served) => {
                failed = served.err();
                true
            }
            _ => false,
        });
        match (step, failed) {
            (Ok(()), None) => Ok(()),
            (Ok(()), Some(source)) => Err(self.give_up(NodeError::Io { what: "start an endpoint".to_owned(), source })),
            (Err(error), _) => Err(self.give_up(error)),
        }
    }

    /// Waits for a reason to stop, in words; the error is that of a shard that ended by itself.
    pub(super) fn wait(
        &self,
        signals: &StopSignals,
        stop_requested: impl Fn() -> bool,
    ) -> Result<&'static str, NodeError> {
        loop {
            match signals.wait_timeout(LOOK_PERIOD).map_err(NodeError::io("wait for signals"))? {
                Some(StopSignal::Terminate) => return Ok("SIGTERM"),
                Some(StopSignal::Interrupt) => return Ok("SIGINT"),
                None if stop_requested() => return Ok("asked over the local socket"),
                None if self.any_finished() => return Err(NodeError::ShardEnded),
                None => {}
            }
        }
    }

    /// The orderly end: clients, stores, shards.
    pub(super) fn shut_down(mut self) -> Result<(), NodeError> {
        let deadline = Instant::now() + STOP_TIME_MAX;
        let drain = Command::Drain { until: Instant::now() + DRAIN_TIME_MAX };
        match self.step(drain, deadline, "drain", |event| matches!(event, Event::Drained)) {
            Ok(()) => self.end(deadline),
            Err(error) => self.abandon(error),
        }
    }

    /// The orderly end of a node that has not served anybody.
    pub(super) fn end_unserved(self) -> Result<(), NodeError> {
        self.end(Instant::now() + STOP_TIME_MAX)
    }

    fn end(mut self, deadline: Instant) -> Result<(), NodeError> {
        if let Err(error) = self.close_stores(deadline) {
            return self.abandon(error);
        }
        self.tell(Command::End);
        match self.join() {
            None => Err(NodeError::Overdue { what: "end its shards" }),
            Some(panics) => panics.into_iter().next().map_or(Ok(()), |panic| Err(panic.into())),
        }
    }

    /// The disorderly end. A shard's panic is the better explanation when there was one.
    pub(super) fn abandon(mut self, error: NodeError) -> Result<(), NodeError> {
        Err(self.give_up(error))
    }

    fn close_stores(&mut self, deadline: Instant) -> Result<(), NodeError> {
        let mut failed = None;
        self.step(Command::CloseStore, deadline, "close its store", |event| match event {
            Event::StoreClosed(closed) => {
                failed = failed.take().or(closed.err());
                true
            }
            _ => false,
        })?;
        failed.map_or(Ok(()), |error| Err(NodeError::StoreClosing(error)))
    }

    /// One command to all shards, one answer from each.
    fn step(
        &mut self,
        command: Command,
        deadline: Instant,
        what: &'static str,
        mut is_answer: impl FnMut(Event) -> bool,
    ) -> Result<(), NodeError> {
        self.tell(command);
        let mut missing = self.running.commands.len();
        while missing > 0 {
            match self.running.events.recv_timeout(LOOK_PERIOD) {
                Ok(event) => missing -= usize::from(is_answer(event)),
                Err(mpsc::RecvTimeoutError::Timeout) if Instant::now() < deadline => {
                    if self.any_finished() {
                        return Err(NodeError::ShardEnded);
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout) => return Err(NodeError::Overdue { what }),
                Err(mpsc::RecvTimeoutError::Disconnected) => return Err(NodeError::ShardEnded),
            }
        }
        Ok(())
    }

    /// A shard that has gone takes no command, and is noticed by its missing answer.
    fn tell(&self, command: Command) {
        for shard in &self.running.commands {
            shard.try_send(command).ok();
        }
    }

    fn give_up(&mut self, error: NodeError) -> NodeError {
        self.tell(Command::End);
        self.join().into_iter().flatten().next().map_or(error, NodeError::from)
    }

    fn any_finished(&self) -> bool {
        self.shards.as_ref().is_none_or(Shards::any_finished)
    }

    /// Waits for the shards' ends; their panics, or `None` when they did not end in time.
    fn join(&mut self) -> Option<Vec<ShardPanic>> {
        let shards = self.shards.take()?;
        let (done, joined) = mpsc::channel();
        let joining = move || done.send(shards.join().into_iter().filter_map(Result::err).collect()).ok();
        thread::Builder::new().name("join".to_owned()).spawn(joining).ok()?;
        joined.recv_timeout(END_TIME_MAX).ok()
    }
}

/// Whether a signal has come; does not wait.
pub(super) fn look(signals: &StopSignals) -> Result<Option<StopSignal>, NodeError> {
    signals.wait_timeout(Duration::ZERO).map_err(NodeError::io("wait for signals"))
}

#[cfg(test)]
mod tests {
    use metanode_shard::{
        ShardCount, ShardsConfig,
        mesh::{Injector, InjectorPort},
        signal::install_stop_signals,
        sleep, start,
    };

    use super::*;

    /// Two shards without a node in them; `act` is what each does.
    fn conduct<F: Future<Output = ()> + 'static>(
        act: impl Fn(u16, InjectorPort<Command>, mpsc::Sender<Event>) -> F + Copy + Send + 'static,
    ) -> Conductor {
        let (sender, events) = mpsc::channel();
        let mut commands = Vec::new();
        let shards = start(&ShardsConfig::unpinned("test", ShardCount::new(2).unwrap()), |shard| {
            let (injector, port) = Injector::new(8);
            commands.push(injector);
            let sender = sender.clone();
            move || act(shard.0, port, sender)
        });
        Conductor::new(shards.unwrap(), Running { commands, events })
    }

    async fn obey(commands: InjectorPort<Command>, events: mpsc::Sender<Event>) {
        events.send(Event::Opened(Ok(()))).unwrap();
        loop {
            let event = match commands.recv().await {
                Command::Serve => Event::Serving(Ok(())),
                Command::Drain { .. } => Event::Drained,
                Command::CloseStore => Event::StoreClosed(Ok(())),
                Command::End => return,
            };
            events.send(event).unwrap();
        }
    }

    #[test]
    fn shards_that_obey_end_in_order() {
        std::thread::spawn(|| {
            let signals = install_stop_signals().unwrap();
            let mut conductor = conduct(|_, commands, events| obey(commands, events));
            assert!(conductor.open(&signals).unwrap());
            conductor.serve().unwrap();
            assert_eq!(conductor.wait(&signals, || true).unwrap(), "asked over the local socket");
            conductor.shut_down().unwrap();
        })
        .join()
        .unwrap();
    }

    #[test]
    fn a_panicking_shard_takes_the_node_down_and_is_named() {
        std::thread::spawn(|| {
            let signals = install_stop_signals().unwrap();
            let mut conductor = conduct(|shard, commands, events| async move {
                if shard == 1 {
                    events.send(Event::Opened(Ok(()))).unwrap();
                    sleep(Duration::from_millis(20)).await;
                    panic!("out of cheese");
                }
                obey(commands, events).await;
            });
            assert!(conductor.open(&signals).unwrap());
            let error = conductor.wait(&signals, || false).unwrap_err();
            match conductor.abandon(error) {
                Err(NodeError::Shard(panic)) => {
                    assert_eq!((panic.shard.0, panic.message.as_str()), (1, "out of cheese"));
                }
                other => panic!("{other:?}"),
            }
        })
        .join()
        .unwrap();
    }
}
