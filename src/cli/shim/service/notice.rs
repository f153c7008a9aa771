//! What a shim notices of its containers, and tells.

use std::sync::atomic::Ordering;

use super::super::events::{Event, TaskExec, TaskExit, TaskNamed, TaskStart};
use super::super::memory::Watch;
use super::super::task::{Ended, Task};
use super::Shim;
use crate::oci::oom;

impl Shim {
    /// Readable when it may have to be [noted](Shim::note_short_memory) that memory was short.
    pub fn memory(&self) -> Option<&Watch> {
        self.0.memory.as_ref()
    }

    /// Tells containerd of containers whose memory was short.
    pub fn note_short_memory(&self) {
        let marked = self.memory().map(Watch::marked).unwrap_or_default();
        marked.iter().filter_map(|id| self.task(id).ok()).for_each(|task| self.tell_short_memory(&task));
    }

    fn tell_short_memory(&self, task: &Task) {
        if !task.is_short_of_memory.swap(true, Ordering::Relaxed) {
            self.publish(&Event::OutOfMemory(TaskNamed { container_id: task.id.clone() }));
        }
    }

    /// Tells everybody that a process has ended, unless its start is still to be told.
    pub(super) fn note_end(&self, task: &Task, exec_id: &str, ended: Ended) {
        let noted = task.with(exec_id, |process| Ok(process.end(ended).map(|waiters| (waiters, process.pid))));
        let Ok(Some((waiters, pid))) = noted else { return };
        let container_id = task.id.clone();
        // It may be the reason, and is told first.
        if exec_id.is_empty() && oom::is_marked(&self.0.root.dir(&task.id)) {
            self.tell_short_memory(task);
        }
        let id = if exec_id.is_empty() { container_id.clone() } else { exec_id.to_owned() };
        self.publish(&Event::Exit(TaskExit {
            container_id,
            id,
            pid,
            exit_status: ended.code,
            exited_at: Some(ended.at),
        }));
        waiters.into_iter().for_each(|waiter| waiter.send(Ok(ended.to_answer())));
    }

    pub(super) fn publish(&self, event: &Event) {
        self.0.events.publish(event);
    }
}

/// That a process is running.
pub(super) fn started(id: &str, exec_id: &str, pid: u32) -> Event {
    let container_id = id.to_owned();
    match exec_id {
        "" => Event::Start(TaskStart { container_id, pid }),
        _ => Event::ExecStarted(TaskExec { container_id, exec_id: exec_id.to_owned(), pid }),
    }
}
