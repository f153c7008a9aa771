# The smallest guest: exit code 42 after three instructions.

    .section .text.start, "ax"
    .globl _start
_start:
    mov $0x604, %edx
    mov $42, %al
    out %al, %dx
1:  hlt
    jmp 1b
