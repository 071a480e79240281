/* SPDX-License-Identifier: Apache-2.0
 *
 * Entry of every guest program, on every vCPU: the machine has set 64-bit mode, paging, GDT, IDT and the stack;
 * RDI is the vCPU's number. Exceptions have nobody to return to: each stub reports and stops.
 */
#include "abi.h"

	.code64
	.section .text.start, "ax"
	.globl	_start
_start:
	cld
	call	guest_main		/* does not return */
1:	hlt
	jmp	1b

/*
 * 32 stubs, 16 bytes each, so that the machine computes their addresses: EXCEPTION_STUBS + 16 * vector.
 * Vectors 8, 10..14, 17, 21, 29, 30 push an error code; the others get a zero in its place.
 */
	.balign	16
	.org	0x40
	.globl	exception_stubs
exception_stubs:
	.set	vector, 0
	.rept	32
	.balign	16
	.if	(vector == 8) || (vector >= 10 && vector <= 14) || (vector == 17) || (vector == 21) || (vector == 29) || (vector == 30)
	.else
	push	$0
	.endif
	push	$vector
	jmp	exception_common
	.set	vector, vector + 1
	.endr

exception_common:
	pop	%rsi			/* vector */
	pop	%rdi			/* error code */
	pop	%rcx			/* RIP */
	cmp	$14, %rsi
	jne	1f
	mov	%cr2, %rdi		/* of a page fault the address says more */
1:	mov	$PCG_FAILURE_EXCEPTION, %ebx
	mov	$PCG_REPORT_FAILURE, %eax
	mov	$PCG_PORT_REPORT, %edx
	out	%eax, (%dx)
2:	hlt
	jmp	2b

	.section .note.GNU-stack, "", @progbits
