//! Timers as file descriptors, and detection of clock changes.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer whose descriptor becomes readable when it expires (timerfd_create(2)). It may be set from any thread.
///
/// It need not be read if it is watched edge-triggered: each expiration is a new event, and setting the timer again
/// makes the descriptor unreadable until then.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
}

impl Timer {
    /// Creates a disarmed timer.
    pub fn new() -> io::Result<Timer> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: no pointer is passed; the returned descriptor is new and has no other owner.
        unsafe {
            let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Timer { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// Expires once after `wait`, replacing an earlier setting.
    pub fn set(&self, wait: Duration) {
        // Zero would disarm it.
        let wait = wait.max(Duration::from_nanos(1));
        let value = libc::timespec {
            tv_sec: libc::time_t::try_from(wait.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: the call reads the structure and does not return the old setting. The descriptor is a timer and the
        // time is in range, so it cannot fail.
        unsafe { libc::timerfd_settime(self.fd.as_raw_fd(), 0, &once, ptr::null_mut()) };
    }

    /// Expires immediately.
    pub fn ring(&self) {
        self.set(Duration::ZERO);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Becomes readable when the wall clock was set or the host was suspended (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET;
/// the kernel sets its clock on resume).
#[derive(Debug)]
pub struct ClockJumps(OwnedFd);

impl ClockJumps {
    /// Starts watching.
    pub fn new() -> io::Result<ClockJumps> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        // The expiration time is irrelevant, and lies after the year 36000.
        let never = Timespec { tv_sec: 1 << 40, tv_nsec: 0 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &once)?;
        Ok(ClockJumps(timer))
    }

    /// Whether the clock has changed since the last call.
    pub fn take(&self) -> bool {
        rustix::io::read(&self.0, &mut [0; 8]) == Err(rustix::io::Errno::CANCELED)
    }
}

impl AsFd for ClockJumps {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

    use super::*;

    #[test]
    fn every_alarm_is_an_event_at_its_time() {
        let (timer, epoll) = (Timer::new().unwrap(), Epoll::new().unwrap());
        let edges = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 1);
        epoll.ctl(ControlOperation::Add, timer.as_fd().as_raw_fd(), edges).unwrap();
        let events = |timeout_ms| epoll.wait(timeout_ms, &mut [EpollEvent::default()]).unwrap();
        assert_eq!(events(0), 0, "it is not set");
        for _ in 0..3 {
            timer.ring();
            assert_eq!(events(1000), 1, "nobody has read it, and it is an event again");
            assert_eq!(events(0), 0);
        }
        let started = Instant::now();
        timer.set(Duration::from_millis(20));
        assert_eq!((events(1000), started.elapsed() >= Duration::from_millis(20)), (1, true));
        timer.set(Duration::from_secs(1000));
        assert_eq!(events(20), 0, "far away");
        timer.set(Duration::MAX);
        assert_eq!(events(0), 0);
    }

    #[test]
    fn a_running_clock_has_not_jumped() {
        let jumps = ClockJumps::new().unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, jumps.as_fd().as_raw_fd(), EpollEvent::new(EventSet::IN, 1)).unwrap();
        assert_eq!(epoll.wait(20, &mut [EpollEvent::default()]).unwrap(), 0);
        assert!(!jumps.take());
    }
}
