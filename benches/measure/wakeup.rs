//! The time in which the host's kernel wakes a thread: what a doorbell costs beside its exit, and an interrupt beside its
//! injection.

use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use vmm_sys_util::eventfd::EventFd;

const ROUNDS: u32 = 10_000;

/// The time from a write to an event counter until a thread that waits for it runs: half of a round trip.
pub fn one_way() -> Result<Duration> {
    let (there, back) = (EventFd::new(0)?, EventFd::new(0)?);
    let (inbox, outbox) = (there.try_clone()?, back.try_clone()?);
    let echo = std::thread::spawn(move || -> Result<()> {
        for _ in 0..ROUNDS {
            inbox.read()?;
            outbox.write(1)?;
        }
        Ok(())
    });
    let start = Instant::now();
    for _ in 0..ROUNDS {
        there.write(1)?;
        back.read()?;
    }
    let took = start.elapsed();
    echo.join().map_err(|_| anyhow!("the echo failed"))??;
    Ok(took / (2 * ROUNDS))
}
