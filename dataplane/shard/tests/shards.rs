//! Executors, tasks, time, files and the mesh, on real threads.

#![allow(clippy::unwrap_used)] // clippy's exception for tests doesn't reach the helpers here

use std::{
    cell::Cell,
    fs,
    io::{self, Write as _},
    os::{fd::OwnedFd, unix::net::UnixStream},
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use metanode_shard::{
    Companion, Elapsed, ShardCount, ShardId, ShardsConfig, Timer, current_shard,
    fd::Readiness,
    file::{ALIGNMENT, AlignedBuffer, CachedFile, DirectFile, DirectReader, LogFile},
    mesh::{Injector, Mesh},
    run_blocking, sleep, spawn_local, start, timeout, yield_now, yield_queue_now,
};

/// Longest that anything in these tests may take; reached only when something hangs.
const DEADLINE: Duration = Duration::from_secs(60);

fn count(n: u16) -> ShardCount {
    ShardCount::new(n).unwrap()
}

/// Runs a future in one unpinned shard.
fn on_a_shard<T: Send + 'static, Fut: Future<Output = T> + 'static>(main: impl FnOnce() -> Fut + Send + 'static) -> T {
    let mut main = Some(main);
    let shards = start(&ShardsConfig::unpinned("test", count(1)), |_| {
        let main = main.take().unwrap();
        move || async move { timeout(DEADLINE, main()).await.expect("the test ends in time") }
    });
    shards.unwrap().join().pop().unwrap().unwrap()
}

#[test]
fn every_shard_runs_on_its_own_thread_and_a_panic_is_reported() {
    let shards = start(&ShardsConfig::new("test", vec![Some(0), None, None]), |shard| {
        move || async move {
            assert_eq!(current_shard(), Some(shard));
            sleep(Duration::from_millis(1)).await;
            assert_ne!(shard, ShardId(1), "on purpose");
            std::thread::current().name().map(str::to_owned)
        }
    });
    let ends = shards.unwrap().join();
    assert_eq!(ends[0], Ok(Some("test-0".to_owned())));
    assert_eq!(ends[2], Ok(Some("test-2".to_owned())));
    let panic = ends[1].as_ref().unwrap_err();
    assert_eq!(panic.shard, ShardId(1));
    assert!(panic.message.contains("on purpose"), "{panic}");
    assert_eq!(current_shard(), None);
}

#[test]
fn the_end_of_a_shard_drops_all_its_tasks() {
    struct Dropped(mpsc::Sender<&'static str>, &'static str);
    impl Drop for Dropped {
        fn drop(&mut self) {
            self.0.send(self.1).ok();
        }
    }
    for panics in [false, true] {
        let (sender, dropped) = mpsc::channel();
        let shards = start(&ShardsConfig::unpinned("end", count(1)), |_| {
            let sender = sender.clone();
            move || async move {
                let (socket, _other) = UnixStream::pair().unwrap();
                let ready = Rc::new(Readiness::new(socket).unwrap());
                let token = Dropped(sender.clone(), "waits");
                // Waits for ever, held only by a waker that it owns itself.
                spawn_local(async move {
                    let _token = token;
                    ready.readable().await.unwrap();
                    std::future::pending::<()>().await;
                })
                .detach();
                let token = Dropped(sender.clone(), "main");
                sleep(Duration::from_millis(2)).await;
                if panics {
                    spawn_local(async { panic!("on purpose") }).await;
                }
                drop(token);
            }
        });
        drop(sender);
        assert_eq!(shards.unwrap().join()[0].is_err(), panics);
        let mut seen: Vec<_> = std::iter::from_fn(|| dropped.recv_timeout(DEADLINE).ok()).collect();
        seen.sort_unstable();
        assert_eq!(seen, ["main", "waits"]);
    }
}

#[test]
fn a_core_that_does_not_exist_starts_nothing() {
    let ran = Arc::new(AtomicU64::new(0));
    let result = start(&ShardsConfig::new("test", vec![None, Some(4095)]), |_| {
        let ran = ran.clone();
        move || async move { ran.fetch_add(1, Ordering::Relaxed) }
    });
    assert!(result.is_err());
    assert_eq!(ran.load(Ordering::Relaxed), 0);
}

#[test]
fn tasks_timers_and_timeouts() {
    on_a_shard(|| async {
        let done = Rc::new(Cell::new(0));
        let task = spawn_local({
            let done = done.clone();
            async move {
                yield_now().await;
                yield_queue_now().await;
                done.set(done.get() + 1);
                7
            }
        });
        assert_eq!(task.await, 7);
        drop(spawn_local(std::future::pending::<()>()));
        assert_eq!(spawn_local(std::future::pending::<()>()).cancel().await, None);
        assert_eq!(spawn_local(async { 3 }).detach().await, Some(3));
        let handle = spawn_local(std::future::pending::<()>()).detach();
        handle.cancel();
        assert_eq!(handle.await, None);

        let begin = Instant::now();
        assert_eq!(timeout(Duration::from_millis(20), std::future::pending::<()>()).await, Err(Elapsed));
        assert!(begin.elapsed() >= Duration::from_millis(20));
        assert_eq!(timeout(DEADLINE, async { 5 }).await, Ok(5));

        // A timer that is polled a thousand times while it waits, is moved, and expires once.
        let mut timer = Timer::after(DEADLINE);
        timer.reset_after(Duration::from_millis(10));
        for _ in 0..1000 {
            let polled = std::future::poll_fn(|cx| std::task::Poll::Ready(timer.poll_expired(cx))).await;
            if polled.is_ready() {
                break;
            }
            yield_now().await;
        }
        std::future::poll_fn(|cx| timer.poll_expired(cx)).await;
        assert!(Instant::now() >= timer.deadline());
        timer.reset_after(Duration::from_millis(5));
        std::future::poll_fn(|cx| timer.poll_expired(cx)).await;
        assert_eq!(run_blocking(|| 1 + 1).await, 2);
    });
}

#[test]
fn readiness_tells_data_room_and_the_end() {
    on_a_shard(|| async {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let ready = Readiness::new(OwnedFd::from(ours.try_clone().unwrap())).unwrap();
        ready.writable().await.unwrap();
        for round in 0..100u8 {
            // Waits that are given up keep the one registration.
            assert_eq!(timeout(Duration::from_micros(50), ready.readable()).await.map(drop), Err(Elapsed));
            if round % 2 == 0 {
                theirs.write_all(&[round]).unwrap();
                ready.readable().await.unwrap();
                let mut byte = [0];
                assert_eq!(io::Read::read(&mut &ours, &mut byte).unwrap(), 1);
                assert_eq!(byte, [round]);
            }
        }
        drop(theirs);
        ready.readable().await.unwrap();
        assert_eq!(io::Read::read(&mut &ours, &mut [0]).unwrap(), 0);
    });
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

async fn exercise_log(file: LogFile, path: &std::path::Path) {
    let data = pattern(3 * ALIGNMENT);
    file.allocate(16 * ALIGNMENT as u64).unwrap();
    assert_eq!(fs::metadata(path).unwrap().len(), 16 * ALIGNMENT as u64);
    let mut buffer = AlignedBuffer::default();
    buffer.extend_from_slice(&data);
    file.write_at(&buffer, ALIGNMENT as u64).unwrap();
    file.fdatasync().unwrap();
    let unaligned = AlignedBuffer::zeroed(100);
    assert_eq!(file.write_at(&unaligned, 0).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    assert_eq!(file.write_at(&buffer, 7).unwrap_err().kind(), io::ErrorKind::InvalidInput);
    let (reader, mut used_again) = (DirectReader::open(path).unwrap(), AlignedBuffer::default());
    for (offset, len, expected) in
        [(0, 10, 10), (1, 4095, 4095), (37, 9001, 9001), (4097, 512, 512), (0, 99_999, 61_440)]
    {
        let range = reader.read_at(&mut used_again, (ALIGNMENT + offset) as u64, len).unwrap();
        let read = &used_again.as_slice()[range];
        assert_eq!(read.len(), expected, "{offset} {len}");
        let written = &data[offset..data.len().min(offset + len)];
        assert_eq!(read[..written.len()], *written, "{offset} {len}");
        assert!(read[written.len()..].iter().all(|byte| *byte == 0));
    }
    assert_eq!(reader.read_at(&mut used_again, 99 * ALIGNMENT as u64 + 1, 10).unwrap().len(), 0);
    for file in [DirectFile::open(path).await.unwrap(), DirectFile::open_refused(path).await.unwrap()] {
        for (offset, len) in [(0, 10), (1, 4095), (37, 9001), (4097, 512)] {
            let read = file.read_at(ALIGNMENT as u64 + offset as u64, len).await.unwrap();
            assert_eq!(read, data[offset..offset + len], "{offset} {len}");
        }
        assert_eq!(file.read_at(15 * ALIGNMENT as u64, 10 * ALIGNMENT).await.unwrap(), [0; ALIGNMENT][..]);
        assert_eq!(file.read_at(99 * ALIGNMENT as u64, 10).await.unwrap(), b""[..]);
    }
}

#[test]
fn log_files_write_aligned_and_direct_files_read_anything() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("log");
    on_a_shard(move || async move {
        exercise_log(LogFile::create_new(&path).unwrap(), &path).await;
        assert_eq!(LogFile::create_new(&path).unwrap_err().raw_os_error(), Some(17)); // EEXIST
        let refused = LogFile::open_refused(&path).unwrap();
        assert!(!refused.is_direct());
        exercise_log(refused, &path).await;
        exercise_log(LogFile::open(&path).unwrap(), &path).await;
        let missing = path.with_extension("missing");
        assert_eq!(LogFile::open(&missing).unwrap_err().raw_os_error(), Some(2)); // ENOENT
        assert_eq!(DirectFile::open(missing).await.unwrap_err().raw_os_error(), Some(2));
    });
}

#[test]
fn log_files_work_on_tmpfs() {
    let Ok(dir) = tempfile::tempdir_in("/dev/shm") else {
        return; // no tmpfs here
    };
    let path = dir.path().join("log");
    on_a_shard(move || async move { exercise_log(LogFile::create_new(&path).unwrap(), &path).await });
}

#[test]
fn a_full_disk_is_recognisable() {
    let full = LogFile::open_refused("/dev/full").unwrap();
    let error = full.write_at(&AlignedBuffer::zeroed(ALIGNMENT), 0).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(28)); // ENOSPC
}

#[test]
fn a_companion_wakes_a_shard_that_sleeps_and_one_that_is_busy() {
    on_a_shard(|| async {
        let companion = Companion::start("companion", 1).unwrap();
        // Asleep: nothing else is there to do, and nobody else wakes it.
        let slept = || thread::sleep(Duration::from_millis(20));
        let answer = companion.run(move || (slept(), 42).1);
        let second = companion.run(|| 7);
        assert_eq!(answer.await, 42);
        assert_eq!(second.await, 7);
        // Busy: only yields, as a driver under load.
        let done = Rc::new(Cell::new(0));
        let (seen, call) = (done.clone(), companion.run(|| 9));
        spawn_local(async move { seen.set(call.await) }).detach();
        let begin = Instant::now();
        let mut yields = 0u64;
        while done.get() == 0 && begin.elapsed() < DEADLINE {
            yields += 1;
            yield_now().await;
        }
        assert_eq!(done.get(), 9, "after {yields} yields");
        drop(companion.run(|| 1)); // given up, and done all the same
        drop(companion);
        let two = Companion::start("two", 2).unwrap();
        let (go, wait) = mpsc::channel();
        let waiting = two.run(move || wait.recv());
        two.run(move || go.send(5)).await.unwrap(); // not behind the one that waits
        assert_eq!(waiting.await, Ok(5));
    });
}

#[test]
fn a_panic_of_a_companions_job_is_the_callers() {
    let shards = start(&ShardsConfig::unpinned("test", count(1)), |_| {
        || async {
            let companion = Companion::start("companion", 1).unwrap();
            companion.run(|| panic!("of the job")).await;
        }
    });
    let ended: Vec<Result<(), _>> = shards.unwrap().join();
    assert_eq!(ended[0].as_ref().unwrap_err().message, "of the job");
}

#[test]
fn cached_files_read_resident_and_absent_pages() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = dir.path().join("data");
    let data = pattern(300_000);
    fs::write(&path, &data).unwrap();
    fs::File::open(&path).unwrap().sync_all().unwrap();
    on_a_shard(move || async move {
        let file = CachedFile::open(&path).await.unwrap();
        assert_eq!(file.size().await.unwrap(), data.len() as u64);
        file.advise_random().unwrap();
        for drop_pages in [false, true] {
            for (offset, len) in [(0, 1), (5, 4096), (4095, 100_000), (299_990, 100), (300_000, 10), (400_000, 1)] {
                if drop_pages {
                    file.advise_dontneed(0, 0).unwrap();
                }
                let from = data.len().min(offset);
                let to = data.len().min(offset + len);
                assert_eq!(file.read_at(offset as u64, len).await.unwrap(), data[from..to], "{offset} {len}");
            }
        }
        file.read_at(0, data.len()).await.unwrap();
        assert_eq!(file.try_read_at(7, 1000).unwrap().unwrap(), data[7..1007]);
        assert_eq!(file.try_read_at(299_999, 2).unwrap(), None);
        file.close().await.unwrap();
    });
}

#[test]
fn the_mesh_loses_nothing_under_stress() {
    // Small rings, so that senders wait for room all the time and receivers sleep all the time.
    const SHARDS: u16 = 4;
    const MESSAGES: u64 = 20_000;
    let mut ports = Mesh::<u64>::new(count(SHARDS), 4).into_iter();
    let shards = start(&ShardsConfig::unpinned("mesh", count(SHARDS)), |_| {
        let port = ports.next().unwrap();
        move || async move {
            let port = Rc::new(port);
            let sends = (0..SHARDS).map(|to| {
                let port = port.clone();
                spawn_local(async move {
                    for n in 0..MESSAGES {
                        port.send(ShardId(to), n).await.expect("receivers outlive senders");
                    }
                })
            });
            let sends: Vec<_> = sends.collect();
            let mut next = [0; SHARDS as usize];
            for _ in 0..MESSAGES * u64::from(SHARDS) {
                let received = timeout(DEADLINE, port.recv()).await;
                let (from, n) = received.unwrap_or_else(|_| panic!("nothing came; so far {next:?}"));
                assert_eq!(n, next[from.index()], "from {from}");
                next[from.index()] += 1;
            }
            for send in sends {
                send.await;
            }
            Rc::into_inner(port) // all ports live until every shard is done
        }
    });
    for end in shards.unwrap().join() {
        assert!(end.is_ok(), "{end:?}");
    }
}

#[test]
fn a_message_that_arrives_while_its_receiver_falls_asleep_wakes_it() {
    const ROUNDS: u32 = 20_000;
    let mut ports = Mesh::<u32>::new(count(2), 2).into_iter();
    let shards = start(&ShardsConfig::new("asleep", vec![Some(0), Some(1)]), |shard| {
        let port = ports.next().unwrap();
        move || async move {
            for round in 0..ROUNDS {
                if shard == ShardId(0) {
                    port.try_send(ShardId(1), round).unwrap();
                    let received = timeout(DEADLINE, port.recv()).await.expect("the answer wakes");
                    assert_eq!(received, (ShardId(1), round));
                } else {
                    // Never sleeps, and answers after 0 to 2 µs: about when the other one falls asleep.
                    while port.try_recv().is_none() {
                        std::hint::spin_loop();
                    }
                    let begin = Instant::now();
                    while begin.elapsed() < Duration::from_nanos(u64::from(round) * 7 % 2000) {
                        std::hint::spin_loop();
                    }
                    port.try_send(ShardId(0), round).unwrap();
                }
            }
            port
        }
    });
    assert!(shards.unwrap().join().iter().all(Result::is_ok));
}

#[test]
fn a_send_that_waits_ends_when_the_receiver_goes() {
    let mut ports = Mesh::<u8>::new(count(2), 1).into_iter();
    let (full_sender, full) = mpsc::channel();
    let mut halves = Some((full_sender, full));
    let mut sender = None;
    let mut receiver = None;
    let (s, r) = halves.take().unwrap();
    sender.replace(s);
    receiver.replace(r);
    let shards = start(&ShardsConfig::unpinned("mesh", count(2)), |shard| {
        let port = ports.next().unwrap();
        let (sender, receiver) = if shard.0 == 0 { (sender.take(), None) } else { (None, receiver.take()) };
        move || async move {
            if let Some(receiver) = receiver {
                run_blocking(move || receiver.recv_timeout(DEADLINE)).await.unwrap();
                drop(port);
                return None;
            }
            port.try_send(ShardId(1), 1).unwrap();
            let mut send = Box::pin(port.send(ShardId(1), 2));
            assert!(std::future::poll_fn(|cx| std::task::Poll::Ready(send.as_mut().poll(cx))).await.is_pending());
            sender.unwrap().send(()).unwrap();
            Some(timeout(DEADLINE, send).await)
        }
    });
    assert_eq!(shards.unwrap().join()[0], Ok(Some(Ok(Err(2)))));
}

#[test]
fn a_foreign_thread_injects_and_hears_back() {
    let (injector, port) = Injector::<(u64, mpsc::Sender<u64>)>::new(2);
    let mut port = Some(port);
    let shards = start(&ShardsConfig::unpinned("inject", count(1)), |_| {
        let port = port.take().unwrap();
        move || async move {
            let mut answered = 0;
            while answered < 4000 {
                let (n, reply) = timeout(DEADLINE, port.recv()).await.unwrap();
                reply.send(n * 2).ok();
                answered += 1;
            }
        }
    });
    let foreign: Vec<_> = (0..4)
        .map(|_| {
            let injector = injector.clone();
            std::thread::spawn(move || {
                for n in 0..1000 {
                    let (reply, answer) = mpsc::channel();
                    let mut message = (n, reply);
                    while let Err(back) = injector.try_send(message) {
                        message = back;
                        std::thread::yield_now();
                    }
                    assert_eq!(answer.recv_timeout(DEADLINE), Ok(n * 2));
                }
            })
        })
        .collect();
    for thread in foreign {
        thread.join().unwrap();
    }
    assert!(shards.unwrap().join()[0].is_ok());
    assert!(injector.is_closed());
    let (reply, _) = mpsc::channel();
    assert!(injector.try_send((0, reply)).is_err());
}
