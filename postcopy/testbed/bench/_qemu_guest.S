/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest that `postcopy bench qemu` runs in QEMU: what the workload `random` of our own machine does with memory. It gives
 * every page nine words, spread from its first to its last, then picks pages by a xorshift generator, compares the nine words,
 * and writes them one higher. No BIOS call, no interrupt, no device but the debug console, on which it writes a line
 *
 *     r    when every page has content
 *     p    after each 65536 pages that it has changed
 *     X    when a page is not as it left it; then it stops
 *
 * QEMU loads it as a Multiboot kernel (-kernel), so it begins in 32-bit protected mode, all segments flat, no paging.
 * `as --32 -o guest.o _qemu_guest.S && ld -m elf_i386 --oformat binary -Ttext 0x100000 -o _qemu_guest.bin guest.o` makes the
 * binary that is checked in beside this file; tests/unit/testbed/test_bench_qemu.py compares the two.
 */
        .set    PROGRAM, 0x100000
        .set    PAGES, PROGRAM + 0x1000 /* behind the page of this program, up to the end of memory */
        .set    CONSOLE, 0xe9
        .set    MAGIC, 0x1badb002
        .set    FLAGS, 0x00010002       /* tell how much memory there is; a flat binary, whose addresses follow */

        .macro  at_each_word instruction
        .irp    offset, 0, 512, 1024, 1536, 2048, 2560, 3072, 3584, 4092
        \instruction \offset
        .endr
        .endm

        .macro  store offset
        movl    %eax, \offset(%edi)
        .endm

        .macro  compare offset
        cmpl    %eax, \offset(%edi)
        jne     wrong
        .endm

        .macro  line letter
        movb    $\letter, %al
        outb    %al, $CONSOLE
        movb    $'\n', %al
        outb    %al, $CONSOLE
        .endm

        .code32
        .globl  _start
        .text
header:
        .long   MAGIC, FLAGS, -(MAGIC + FLAGS)
        .long   header, PROGRAM, 0, 0, _start   /* all of the file is loaded, there is no bss */

_start:
        movl    8(%ebx), %ebp           /* KiB of memory above the first MiB */
        shrl    $2, %ebp
        decl    %ebp                    /* pages, from PAGES on */

        movl    $PAGES, %edi
        movl    %ebp, %ecx
        movl    $1, %eax
1:      at_each_word store
        addl    $4096, %edi
        decl    %ecx
        jnz     1b
        line    'r'

        movl    $0x2545f491, %esi       /* the generator; ECX counts */
2:      movl    %esi, %eax
        shll    $13, %eax
        xorl    %eax, %esi
        movl    %esi, %eax
        shrl    $17, %eax
        xorl    %eax, %esi
        movl    %esi, %eax
        shll    $5, %eax
        xorl    %eax, %esi
        movl    %esi, %eax
        mull    %ebp                    /* EDX: below the number of pages */
        movl    %edx, %edi
        shll    $12, %edi
        addl    $PAGES, %edi
        movl    (%edi), %eax
        at_each_word compare
        incl    %eax
        at_each_word store
        incl    %ecx
        testw   %cx, %cx
        jnz     2b
        line    'p'
        jmp     2b

wrong:  line    'X'
        cli
3:      hlt
        jmp     3b
