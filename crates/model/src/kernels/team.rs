//! Threads that stay awake from one kernel of a pass to the next.
//!
//! A decoding step is some 150 kernels of ten to a hundred microseconds. A general thread pool wakes a sleeping thread for each and puts the caller to sleep
//! meanwhile, which takes as long as a small kernel does. Here the caller works too, and the others look for work for a while before they sleep.

use rayon::prelude::*;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::sync::{Arc, Mutex, OnceLock, TryLockError};
use std::thread::Thread;
use std::time::{Duration, Instant};

/// How long a thread looks for work before it sleeps: longer than what lies between two kernels.
const AWAKE: Duration = Duration::from_micros(200);
/// Looks between two glances at the clock, and before a waiting thread lets others run.
const LOOKS: u32 = 64;

/// Runs `task(0)`, …, `task(tasks - 1)`, each once, on as many threads as rayon has. Whoever comes while the team works goes to rayon.
pub(crate) fn for_each(tasks: usize, task: impl Fn(usize) + Sync) {
    static TEAM: OnceLock<Option<Team>> = OnceLock::new();
    if tasks < 2 {
        return (0..tasks).for_each(task);
    }
    let free = |team: &'static Team| match team.turn.try_lock() {
        Ok(turn) => Some((team, turn)),
        // (a task that panicked took nothing with it)
        Err(TryLockError::Poisoned(turn)) => Some((team, turn.into_inner())),
        Err(TryLockError::WouldBlock) => None,
    };
    match TEAM.get_or_init(|| Team::new(rayon::current_num_threads())).as_ref().and_then(free) {
        Some((team, _turn)) => team.run(tasks, &task),
        None => (0..tasks).into_par_iter().for_each(&task),
    }
}

/// As [`for_each`], over the parts of `out` of `size` elements each (the last one may be shorter): `task(i, part)`.
pub(crate) fn for_each_part<T: Send>(out: &mut [T], size: usize, task: impl Fn(usize, &mut [T]) + Sync) {
    struct Shared<T>(*mut T);
    // SAFETY: each task takes a part of its own
    unsafe impl<T: Send> Sync for Shared<T> {}
    impl<T> Shared<T> {
        fn get(&self) -> *mut T {
            self.0
        }
    }
    let (len, size) = (out.len(), size.max(1));
    let shared = Shared(out.as_mut_ptr());
    for_each(len.div_ceil(size), |i| {
        let from = i * size;
        // SAFETY: within the slice, and no other task has this part
        task(i, unsafe { std::slice::from_raw_parts_mut(shared.get().add(from), size.min(len - from)) });
    });
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct Team {
    /// Who gives work.
    turn: Mutex<()>,
    shared: Arc<Shared>,
    threads: Vec<Thread>,
}

/// On cache lines of its own.
#[repr(align(128))]
struct Apart<T>(T);

struct Shared {
    /// The number of the job, whether it is open to whoever finds it, and how many are at it: [`NUMBER`], [`OPEN`], [`ONE`].
    state: Apart<AtomicU64>,
    next: Apart<AtomicUsize>,
    tasks: AtomicUsize,
    job: UnsafeCell<Option<&'static Task<'static>>>,
    panicked: AtomicBool,
    asleep: Vec<AtomicBool>,
}

// SAFETY: `job` is written by who has the team's turn, while the state says that nobody is at it and nobody may join
unsafe impl Sync for Shared {}
// SAFETY: as above
unsafe impl Send for Shared {}

const ONE: u64 = 1;
const OPEN: u64 = 1 << 16;
const NUMBER: u64 = 1 << 17;

impl Team {
    /// `None` for a single thread, or where the system gives no more.
    fn new(threads: usize) -> Option<Self> {
        let others = threads.saturating_sub(1);
        let shared = Arc::new(Shared {
            state: Apart(AtomicU64::new(0)),
            next: Apart(AtomicUsize::new(0)),
            tasks: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            asleep: (0..others).map(|_| AtomicBool::new(false)).collect(),
        });
        let spawn = |i: usize| {
            let shared = Arc::clone(&shared);
            std::thread::Builder::new().name(format!("kernel-{i}")).spawn(move || shared.work(i)).ok().map(|handle| handle.thread().clone())
        };
        let threads: Vec<Thread> = (0..others).map_while(spawn).collect();
        (!threads.is_empty()).then_some(Self { turn: Mutex::new(()), shared, threads })
    }

    fn run(&self, tasks: usize, task: &Task<'_>) {
        let shared = &*self.shared;
        // SAFETY: the last job is closed and nobody is at it. Nobody joins this one after `Close`, which waits for those at it: the reference is not used longer.
        unsafe { *shared.job.get() = Some(std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task)) };
        // (left by a job whose caller panicked too)
        shared.panicked.store(false, Relaxed);
        shared.tasks.store(tasks, Relaxed);
        shared.next.0.store(0, Relaxed);
        let number = shared.state.0.load(Relaxed) / NUMBER;
        shared.state.0.store((number.wrapping_add(1) * NUMBER) | OPEN, SeqCst);
        for (thread, asleep) in self.threads.iter().zip(&shared.asleep) {
            if asleep.load(SeqCst) && asleep.swap(false, SeqCst) {
                thread.unpark();
            }
        }
        let close = Close(shared);
        shared.take(task);
        drop(close);
        assert!(!shared.panicked.swap(false, Relaxed), "a kernel's task panicked on another thread");
    }
}

/// Closes the job and waits for those who are at it, whatever happens.
struct Close<'a>(&'a Shared);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.state.0.fetch_and(!OPEN, SeqCst);
        let mut looks = 0u32;
        while self.0.state.0.load(Acquire) & (OPEN - 1) > 0 {
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(16 * LOOKS) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
    }
}

impl Shared {
    /// Takes tasks for as long as there are any.
    fn take(&self, task: &Task<'_>) {
        let tasks = self.tasks.load(Relaxed);
        loop {
            let next = self.next.0.fetch_add(1, Relaxed);
            if next >= tasks {
                return;
            }
            task(next);
        }
    }

    /// A thread's life.
    fn work(&self, me: usize) {
        let mut last = 0;
        let mut idle_since = Instant::now();
        let mut looks = 0u32;
        loop {
            let state = self.state.0.load(SeqCst);
            if state & OPEN > 0 && state / NUMBER != last {
                if self.state.0.compare_exchange(state, state + ONE, Acquire, Relaxed).is_err() {
                    continue;
                }
                last = state / NUMBER;
                // SAFETY: the job stays while somebody is at it
                if let Some(task) = unsafe { *self.job.get() }
                    && catch_unwind(AssertUnwindSafe(|| self.take(task))).is_err()
                {
                    self.panicked.store(true, Relaxed);
                }
                self.state.0.fetch_sub(ONE, Release);
                (idle_since, looks) = (Instant::now(), 0);
                continue;
            }
            looks = looks.wrapping_add(1);
            if !looks.is_multiple_of(LOOKS) || idle_since.elapsed() < AWAKE {
                std::hint::spin_loop();
                continue;
            }
            self.asleep[me].store(true, SeqCst);
            let state = self.state.0.load(SeqCst);
            if state & OPEN == 0 || state / NUMBER == last {
                std::thread::park();
            }
            self.asleep[me].store(false, SeqCst);
            (idle_since, looks) = (Instant::now(), 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_whoever_asks() {
        let team = Team::new(4).unwrap();
        for round in 0..2_000 {
            let counts: Vec<AtomicUsize> = (0..round % 37).map(|_| AtomicUsize::new(0)).collect();
            team.run(counts.len(), &|i| {
                counts[i].fetch_add(1, Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Relaxed) == 1), "round {round}");
            if round % 500 == 0 {
                std::thread::sleep(2 * AWAKE);
            }
        }
        // several at once, some of them on rayon's threads
        std::thread::scope(|scope| {
            for caller in 0..4 {
                scope.spawn(move || {
                    for round in 0..300 {
                        let mut out = vec![0usize; 1_000 + round];
                        let fill = |out: &mut [usize]| for_each_part(out, 64, |i, part| part.iter_mut().enumerate().for_each(|(j, o)| *o = 64 * i + j));
                        if caller == 0 {
                            rayon::scope(|_| fill(&mut out))
                        } else {
                            fill(&mut out)
                        }
                        assert!(out.iter().copied().eq(0..1_000 + round));
                    }
                });
            }
        });
    }

    #[test]
    fn a_panic_comes_back_to_the_caller_and_the_team_goes_on() {
        let team = Team::new(3).unwrap();
        for _ in 0..50 {
            let failed = catch_unwind(AssertUnwindSafe(|| team.run(20, &|i| assert!(i != 7, "no"))));
            assert!(failed.is_err());
        }
        let sum = AtomicUsize::new(0);
        team.run(20, &|i| {
            sum.fetch_add(i, Relaxed);
        });
        assert_eq!(sum.into_inner(), 190);
        // the caller and another thread at once: the next job has nothing to do with that
        let panicking = AtomicUsize::new(0);
        let both = |_: usize| {
            panicking.fetch_add(1, SeqCst);
            while panicking.load(SeqCst) < 2 {
                std::thread::yield_now();
            }
            assert!(panicking.load(SeqCst) < 2, "no");
        };
        assert!(catch_unwind(AssertUnwindSafe(|| team.run(2, &both))).is_err());
        team.run(2, &|_: usize| ());
        assert!(Team::new(1).is_none());
    }
}
