/* SPDX-License-Identifier: Apache-2.0
 *
 * Entry of the guest of a QEMU (-kernel), as the PVH boot protocol has it: 32-bit protected mode, segments flat, no paging,
 * EBX is the address of the start info. It maps the first GiB and goes to 64-bit mode. There is no IDT: an exception resets
 * the machine, which -no-reboot makes an end of QEMU.
 */
	.section .note.Xen, "a", @note
	.long	4, 8, 18		/* bytes of name and value; XEN_ELFNOTE_PHYS32_ENTRY */
	.asciz	"Xen"
	.quad	_start

	.code32
	.section .text.start, "ax"
	.globl	_start
_start:
	cld
	movl	$pointers + 3, top
	movl	$directories + 3, pointers
	xor	%ecx, %ecx
1:	mov	%ecx, %eax
	shl	$21, %eax
	or	$0x83, %eax
	mov	%eax, directories(, %ecx, 8)
	inc	%ecx
	cmp	$512, %ecx
	jne	1b
	mov	$top, %eax
	mov	%eax, %cr3
	mov	%cr4, %eax
	or	$0x20, %eax		/* PAE */
	mov	%eax, %cr4
	mov	$0xc0000080, %ecx	/* EFER: long mode */
	rdmsr
	or	$0x100, %eax
	wrmsr
	mov	%cr0, %eax
	or	$0x80000000, %eax	/* paging */
	mov	%eax, %cr0
	lgdt	table
	ljmp	$8, $2f

	.code64
2:	mov	$16, %eax
	mov	%eax, %ds
	mov	%eax, %es
	mov	%eax, %ss
	mov	$stack_end, %esp	/* here, so that the upper half of RSP is zero */
	mov	%ebx, %edi
	call	guest_main		/* does not return */

	.section .rodata
	.balign	8
segments:
	.quad	0, 0x00af9b000000ffff, 0x00cf93000000ffff
table:	.word	. - segments - 1
	.long	segments

	.section .bss
	.balign	4096
top:	.skip	4096
pointers:
	.skip	4096
	.skip	8192
stack_end:
	.section .note.GNU-stack, "", @progbits
