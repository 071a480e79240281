/* SPDX-License-Identifier: Apache-2.0
 *
 * Entry of the guest of a Firecracker, as Linux' boot protocol has it: 64-bit mode, the first GiB mapped, RSI is the
 * address of the boot parameters. There is no IDT: an exception ends the microVM, and Firecracker says so.
 */
	.code64
	.section .text.start, "ax"
	.globl	_start
_start:
	cld
	mov	$stack_end, %esp
	mov	%rsi, %rdi
	call	guest_main		/* does not return */
1:	hlt
	jmp	1b

	.section .bss
	.balign	4096
	.skip	8192
stack_end:
	.section .note.GNU-stack, "", @progbits
