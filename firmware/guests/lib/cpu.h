/* The processor and its interrupt controllers: descriptor tables, paging, ring 3, interrupts, the clock, a second vCPU. */
#pragma once

#include "guest.h"

/* The stack frame of an interrupt or exception. */
struct interrupt_frame {
    u64 vector, error, rip, cs, rflags, rsp, ss;
};

/* Loads the guest's own GDT, TSS and IDT. An unhandled exception is reported on the console and ends the guest. */
void cpu_start(void);

/* Sets the handler of `vector` (0 to 255), which runs with interrupts disabled. */
void handle(u8 vector, void (*handler)(struct interrupt_frame *frame));

/* Identity-maps the first `gib` GiB (4 to 16) with 2 MiB pages accessible to ring 3. */
void map_memory(unsigned gib);

/* Switches to CPL 3 with interrupts disabled; the TSS allows the ports below 0x800. There is no way back. Requires map_memory. */
_Noreturn void enter_ring3(void (*function)(void), void *stack_top);

/* Masks the PIC, enables the local APIC. */
void interrupts_start(void);

/* Routes pin `gsi` of the I/O APIC, edge-triggered, to this vCPU as `vector`. */
void route(u32 gsi, u8 vector);

void end_of_interrupt(void);

/* Called with interrupts disabled: atomically enables them for one HLT. */
static inline void wait_for_interrupt(void) { asm volatile("sti; hlt; cli" ::: "memory"); }

/* Local APIC registers (Intel SDM volume 3, table 11-1). */
enum {
    LAPIC = 0xfee00000,
    LAPIC_ID = 0x020,
    LAPIC_EOI = 0x0b0,
    LAPIC_SPURIOUS = 0x0f0,
    LAPIC_ICR_LOW = 0x300,
    LAPIC_ICR_HIGH = 0x310,
    LAPIC_TIMER = 0x320,
    LAPIC_TIMER_COUNT = 0x380,
    LAPIC_TIMER_DIVIDE = 0x3e0,
};

/* Starts the vCPU with this APIC id (below PROCESSORS_MAX) at `function`, by INIT and SIPI. Wait for a sign of life before
 * the next one is started. */
enum { PROCESSORS_MAX = 32 };
void start_processor(u8 apic_id, void (*function)(void));

/* Finds kvm-clock. Returns whether the machine has it. At CPL 0 only. */
bool clock_start(void);

/* Nanoseconds of kvm-clock, at any CPL. */
u64 clock_ns(void);

/* Whether the host has reported, since the last call, that this vCPU was stopped. */
bool clock_was_stopped(void);

/* Whether `waited_since`, a rdtsc() value, is some seconds ago, so that waiting is futile. */
bool waited_too_long(u64 waited_since);

struct cpuid {
    u32 eax, ebx, ecx, edx;
};
struct cpuid cpuid(u32 leaf, u32 subleaf);
