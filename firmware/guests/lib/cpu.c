/* The processor and its interrupt controllers: see cpu.h. */
#include "cpu.h"

enum {
    SELECTOR_CODE = 0x10,
    SELECTOR_TSS = 0x30,
    EXCEPTIONS = 32,
    IOAPIC = 0xfec00000,
    IOAPIC_SELECT = 0x00,
    IOAPIC_WINDOW = 0x10,
    IOAPIC_REDIRECTION = 0x10,
    SPURIOUS_VECTOR = 0xff,
    TRAMPOLINE = 0x10000,
    MSR_KVM_SYSTEM_TIME = 0x4b564d01,
    PAGE_PRESENT_WRITE_USER = 7,
    PAGE_LARGE = 0x80,
    GIB_MAX = 16,
    PORTS = 0x800,
};

/* Intel SDM volume 3, §8.7. */
struct tss {
    u32 reserved0;
    u64 rsp[3];
    u64 reserved1;
    u64 ist[7];
    u64 reserved2;
    u16 reserved3, io_map;
    /* Ring 3 may access all ports up to here; the last byte must be all-ones (Intel SDM
     * volume 1, §19.5.2). IOPL 3 would say the same in one bit, but KVM does not keep it on every host. */
    u8 ports[PORTS / 8], ports_end;
} __attribute__((packed));

struct gate {
    u16 offset_low, selector;
    u8 ist, type;
    u16 offset_middle;
    u32 offset_high, reserved;
};

struct table_register {
    u16 limit;
    u64 base;
} __attribute__((packed));

/* pvclock_vcpu_time_info (msr.rst, MSR_KVM_SYSTEM_TIME_NEW). */
struct clock {
    u32 version, pad;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    int8_t tsc_shift;
    u8 flags, pad1[2];
};

/* The boot protocol's selectors are preserved, so that no segment needs to be reloaded. */
static u64 gdt[] = {
    0, 0,
    [2] = 0x00af9b000000ffff, /* 0x10: code, 64-bit */
    [3] = 0x00cf93000000ffff, /* 0x18: data */
    [4] = 0x00cff3000000ffff, /* 0x20: data, ring 3 */
    [5] = 0x00affb000000ffff, /* 0x28: code, 64-bit, ring 3 */
    [6] = 0, 0,               /* 0x30: TSS */
};
static struct tss tss;
static struct gate idt[256] __attribute__((aligned(16)));
static void (*handlers[256])(struct interrupt_frame *);
static u8 interrupt_stack[8192] __attribute__((aligned(16)));
static u64 page_tables[2 + GIB_MAX][512] __attribute__((aligned(4096)));
static volatile struct clock clock_page __attribute__((aligned(64)));

extern u8 interrupt_stubs[];

void interrupt(struct interrupt_frame *frame)
{
    if (handlers[frame->vector & 0xff]) {
        handlers[frame->vector & 0xff](frame);
        return;
    }
    u64 address;
    asm volatile("mov %%cr2, %0" : "=r"(address));
    print("exception %u, error %x, at %x, cr2 %x\n", frame->vector, frame->error, frame->rip, address);
    exit_with(EXIT_EXCEPTION);
}

static void set_gate(u8 vector)
{
    u64 offset = (u64)interrupt_stubs + 16 * vector;
    /* A present 64-bit interrupt gate. */
    idt[vector] = (struct gate){offset, SELECTOR_CODE, 0, 0x8e, offset >> 16, offset >> 32, 0};
}

void cpu_start(void)
{
    u64 base = (u64)&tss;
    tss.rsp[0] = (u64)(interrupt_stack + sizeof interrupt_stack);
    tss.io_map = offsetof(struct tss, ports);
    tss.ports_end = 0xff;
    gdt[6] = (sizeof tss - 1) | (base & 0xffffff) << 16 | 0x89ull << 40 | (base >> 24 & 0xff) << 56;
    gdt[7] = base >> 32;
    for (unsigned vector = 0; vector < EXCEPTIONS; vector++)
        set_gate(vector);
    struct table_register gdtr = {sizeof gdt - 1, (u64)gdt}, idtr = {sizeof idt - 1, (u64)idt};
    asm volatile("lgdt %0; lidt %1; ltr %w2" ::"m"(gdtr), "m"(idtr), "r"(SELECTOR_TSS) : "memory");
}

void handle(u8 vector, void (*handler)(struct interrupt_frame *frame))
{
    handlers[vector] = handler;
    set_gate(vector);
}

void map_memory(unsigned gib)
{
    u64(*directories)[512] = page_tables + 2;
    CHECK(gib >= 4 && gib <= GIB_MAX);
    page_tables[0][0] = (u64)page_tables[1] | PAGE_PRESENT_WRITE_USER;
    for (unsigned i = 0; i < gib; i++) {
        page_tables[1][i] = (u64)directories[i] | PAGE_PRESENT_WRITE_USER;
        for (unsigned j = 0; j < 512; j++)
            directories[i][j] = ((u64)i << 30 | (u64)j << 21) | PAGE_PRESENT_WRITE_USER | PAGE_LARGE;
    }
    asm volatile("mov %0, %%cr3" ::"r"(page_tables) : "memory");
}

void interrupts_start(void)
{
    out8(0x21, 0xff);
    out8(0xa1, 0xff);
    write32(LAPIC + LAPIC_SPURIOUS, 0x100 | SPURIOUS_VECTOR);
}

void route(u32 gsi, u8 vector)
{
    write32(IOAPIC + IOAPIC_SELECT, IOAPIC_REDIRECTION + 2 * gsi + 1);
    write32(IOAPIC + IOAPIC_WINDOW, read32(LAPIC + LAPIC_ID));
    write32(IOAPIC + IOAPIC_SELECT, IOAPIC_REDIRECTION + 2 * gsi);
    write32(IOAPIC + IOAPIC_WINDOW, vector);
}

void end_of_interrupt(void) { write32(LAPIC + LAPIC_EOI, 0); }

static void (*volatile ap_function)(void);
static u8 ap_stacks[PROCESSORS_MAX][2048] __attribute__((aligned(16)));
u8 *volatile ap_stack_top;

void ap_start(void)
{
    struct table_register idtr = {sizeof idt - 1, (u64)idt};
    asm volatile("lidt %0" ::"m"(idtr) : "memory");
    ap_function();
}

void start_processor(u8 apic_id, void (*function)(void))
{
    extern u8 ap_trampoline[], ap_trampoline_end[], ap_trampoline_gdt[], ap_trampoline_cr3[];
    u64 cr3;
    asm volatile("mov %%cr3, %0" : "=r"(cr3));
    CHECK(apic_id < PROCESSORS_MAX);
    ap_function = function;
    ap_stack_top = ap_stacks[apic_id] + sizeof ap_stacks[apic_id];
    memcpy((void *)TRAMPOLINE, ap_trampoline, ap_trampoline_end - ap_trampoline);
    u64 gdtr = TRAMPOLINE + (ap_trampoline_gdt - ap_trampoline);
    write16(gdtr, sizeof gdt - 1);
    write32(gdtr + 2, (u64)gdt);
    write32(TRAMPOLINE + (ap_trampoline_cr3 - ap_trampoline), cr3);
    write32(LAPIC + LAPIC_ICR_HIGH, (u32)apic_id << 24);
    write32(LAPIC + LAPIC_ICR_LOW, 0x4500);
    write32(LAPIC + LAPIC_ICR_HIGH, (u32)apic_id << 24);
    write32(LAPIC + LAPIC_ICR_LOW, 0x4600 | TRAMPOLINE >> 12);
}

bool waited_too_long(u64 waited_since) { return rdtsc() - waited_since > 1ull << 35; }

struct cpuid cpuid(u32 leaf, u32 subleaf)
{
    struct cpuid out;
    asm volatile("cpuid" : "=a"(out.eax), "=b"(out.ebx), "=c"(out.ecx), "=d"(out.edx) : "a"(leaf), "c"(subleaf));
    return out;
}

bool clock_start(void)
{
    struct cpuid signature = cpuid(0x40000000, 0);
    /* "KVMKVMKVM", and KVM_FEATURE_CLOCKSOURCE2. */
    if (signature.ebx != 0x4b4d564b || !(cpuid(0x40000001, 0).eax & 1 << 3))
        return false;
    u64 address = (u64)&clock_page | 1;
    asm volatile("wrmsr" ::"c"(MSR_KVM_SYSTEM_TIME), "a"((u32)address), "d"((u32)(address >> 32)) : "memory");
    return clock_page.tsc_to_system_mul != 0;
}

u64 clock_ns(void)
{
    for (;;) {
        u32 version = clock_page.version;
        u64 ticks = rdtsc() - clock_page.tsc_timestamp;
        ticks = clock_page.tsc_shift < 0 ? ticks >> -clock_page.tsc_shift : ticks << clock_page.tsc_shift;
        u64 ns = clock_page.system_time + (u64)((unsigned __int128)ticks * clock_page.tsc_to_system_mul >> 32);
        if (!(version & 1) && version == clock_page.version)
            return ns;
    }
}

bool clock_was_stopped(void)
{
    /* PVCLOCK_GUEST_STOPPED: set by the host, cleared by the guest. */
    enum { STOPPED = 1 << 1 };
    bool stopped = clock_page.flags & STOPPED;
    if (stopped)
        clock_page.flags &= ~STOPPED;
    return stopped;
}
