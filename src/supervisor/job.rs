//! Work that takes long, on a thread of its own, while the main thread goes on.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use vmm_sys_util::eventfd::EventFd;

use crate::sandbox;
use crate::sys::event;

/// A thread that computes a result. Dropping it cancels the work, and waits until the thread has ended.
pub(super) struct Job<T> {
    thread: Option<JoinHandle<Result<T>>>,
    /// Readable when the thread is done.
    done: Arc<EventFd>,
    is_cancelled: Arc<AtomicBool>,
}

/// Signals an event when it is dropped, also if its thread panics.
struct Signal(Arc<EventFd>);

impl<T: Send + 'static> Job<T> {
    /// Starts the thread. `work` looks whether it is cancelled from time to time, and fails if it is.
    pub fn start(work: impl FnOnce(&AtomicBool) -> Result<T> + Send + 'static) -> Result<Job<T>> {
        let start = || -> io::Result<Job<T>> {
            let (done, is_cancelled) = (Arc::new(event::create()?), Arc::<AtomicBool>::default());
            let (signal, cancelled) = (Signal(done.clone()), is_cancelled.clone());
            let run = move || {
                let _signal = signal;
                work(&cancelled)
            };
            Ok(Job { thread: Some(sandbox::spawn("snapshot", run)?), done, is_cancelled })
        };
        start().context("start a thread")
    }

    /// Whether it is done. Afterwards its descriptor is not readable any more.
    pub fn is_done(&self) -> bool {
        self.done.read().is_ok()
    }

    /// Waits until it is done.
    pub fn result(mut self) -> Result<T> {
        match self.thread.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(anyhow!("a thread panicked")),
            None => bail!("the thread has ended"),
        }
    }
}

impl<T> AsRawFd for Job<T> {
    fn as_raw_fd(&self) -> RawFd {
        self.done.as_raw_fd()
    }
}

impl<T> Drop for Job<T> {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.is_cancelled.store(true, Ordering::Relaxed);
            let _ = thread.join();
        }
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        let _ = self.0.write(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_result_of_a_job_can_be_had_once_it_is_done() {
        let (sender, receiver) = std::sync::mpsc::channel::<u8>();
        let job = Job::start(move |_| Ok(receiver.recv()?)).unwrap();
        assert!(!job.is_done());
        sender.send(7).unwrap();
        while !job.is_done() {
            std::thread::yield_now();
        }
        assert_eq!(job.result().unwrap(), 7);
    }

    #[test]
    fn a_dropped_job_is_cancelled() {
        let wait = |is_cancelled: &AtomicBool| {
            while !is_cancelled.load(Ordering::Relaxed) {
                std::thread::yield_now();
            }
            Ok(())
        };
        drop(Job::start(wait).unwrap());
    }
}
