//! A clock's alarm as a file descriptor, and its jumps.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr;
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer whose descriptor becomes readable when it goes off (timerfd_create(2)). It may be set from any thread.
///
/// It is not read: to who watches it edge-triggered each alarm is an event, and setting it anew makes it silent first.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
}

impl Timer {
    /// A timer that is not set.
    pub fn new() -> io::Result<Timer> {
        let flags = libc::TFD_CLOEXEC | libc::TFD_NONBLOCK;
        // SAFETY: no pointer is passed; the descriptor that is returned is new and owned by nobody else.
        unsafe {
            let fd = libc::timerfd_create(libc::CLOCK_MONOTONIC, flags);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Timer { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// Goes off once after `wait`, and no more at the time that was set before.
    pub fn set(&self, wait: Duration) {
        // Zero would mean never.
        let wait = wait.max(Duration::from_nanos(1));
        let value = libc::timespec {
            tv_sec: libc::time_t::try_from(wait.as_secs()).unwrap_or(libc::time_t::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let once = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: the call reads the structure, and is told not to return the old one. The descriptor is a timer's and the
        // time is in its range, so that it cannot fail.
        unsafe { libc::timerfd_settime(self.fd.as_raw_fd(), 0, &once, ptr::null_mut()) };
    }

    /// Goes off at once.
    pub fn ring(&self) {
        self.set(Duration::ZERO);
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Becomes readable when the wall clock has jumped: somebody set it, or the host has slept (timerfd_create(2),
/// TFD_TIMER_CANCEL_ON_SET; the kernel sets its clock anew when it wakes).
#[derive(Debug)]
pub struct ClockJumps(OwnedFd);

impl ClockJumps {
    /// Watches from now on.
    pub fn new() -> io::Result<ClockJumps> {
        let timer = timerfd_create(TimerfdClockId::Realtime, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?;
        // An alarm is not what it is for: none comes before the year 36000.
        let never = Timespec { tv_sec: 1 << 40, tv_nsec: 0 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        timerfd_settime(&timer, TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET, &once)?;
        Ok(ClockJumps(timer))
    }

    /// Whether the clock has jumped since the last time.
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
    fn every_alarm_is_an_event_and_comes_when_it_was_set_for() {
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
    fn a_clock_that_goes_on_has_not_jumped() {
        let jumps = ClockJumps::new().unwrap();
        let epoll = Epoll::new().unwrap();
        epoll.ctl(ControlOperation::Add, jumps.as_fd().as_raw_fd(), EpollEvent::new(EventSet::IN, 1)).unwrap();
        assert_eq!(epoll.wait(20, &mut [EpollEvent::default()]).unwrap(), 0);
        assert!(!jumps.take());
    }
}
