# From the boot protocol to C: entered in long mode with interrupts off, RSI = zero page (boot.rst, 64-bit boot protocol).

    .section .text.start, "ax"
    .globl _start
_start:
    cld
    mov $boot_stack_top, %rsp
    mov %rsi, %rdi
    call guest_start

# One stub of 16 bytes a vector; each leaves an error code (or 0) and the vector on the stack.
    .text
    .globl interrupt_stubs
    .balign 16
interrupt_stubs:
    .set vector, 0
    .rept 256
    .balign 16
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    push $0
    .endif
    push $vector
    jmp interrupt_entry
    .set vector, vector + 1
    .endr

interrupt_entry:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    cld
    lea 15*8(%rsp), %rdi
    mov %rsp, %rbx
    and $-16, %rsp
    call interrupt
    mov %rbx, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    iretq

# enter_ring3(function, stack_top): to CPL 3 with interrupts off. There is no way back.
    .globl enter_ring3
enter_ring3:
    push $(0x20 | 3)
    push %rsi
    push $0x2
    push $(0x28 | 3)
    push %rdi
    iretq

# What a second vCPU runs after SIPI, copied to a page below 1 MiB: real mode to long mode with the first vCPU's tables.
    .globl ap_trampoline, ap_trampoline_end, ap_trampoline_gdt, ap_trampoline_cr3
    .code16
ap_trampoline:
    cli
    mov %cs, %ax
    mov %ax, %ds
    mov %cr4, %eax
    or $0x20, %eax
    mov %eax, %cr4
    mov (ap_trampoline_cr3 - ap_trampoline), %eax
    mov %eax, %cr3
    mov $0xc0000080, %ecx
    rdmsr
    or $0x100, %eax
    wrmsr
    lgdtl (ap_trampoline_gdt - ap_trampoline)
    mov %cr0, %eax
    or $0x80000001, %eax
    mov %eax, %cr0
    ljmpl $0x10, $ap_long_mode
    .balign 8
ap_trampoline_gdt:
    .word 0
    .long 0
    .balign 8
ap_trampoline_cr3:
    .long 0
ap_trampoline_end:

    .code64
ap_long_mode:
    mov $0x18, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov ap_stack_top, %rsp
    call ap_start
1:  hlt
    jmp 1b

    .section .bss
    .balign 16
    .skip 16384
boot_stack_top:
