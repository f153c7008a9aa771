//! Reports to the host that the kernel has killed processes because memory was short.

use husk_protocol::ToHost;

use super::{MAIN_SESSION, Session};
use crate::cgroup;

impl Session {
    /// Reports it of the machine.
    pub fn report_oom_kill(&mut self) {
        self.control.say(&ToHost::OutOfMemory);
    }

    /// Reports it of the container of this session, once, if there is one. The main session reports it of the whole machine.
    pub fn report_oom_kills_of_container(&mut self) {
        let Some(id) = self.container.as_ref().filter(|_| self.id != MAIN_SESSION && !self.oom_told) else { return };
        if cgroup::ran_out_of_memory(id) {
            self.oom_told = true;
            self.control.say(&ToHost::OutOfMemory);
        }
    }
}
