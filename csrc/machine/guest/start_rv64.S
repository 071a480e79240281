/* SPDX-License-Identifier: Apache-2.0
 *
 * Entry of every guest program on rv64: the machine has set a0, the hart's number, and sp. There are no traps to take:
 * the machine itself stops a hart that does something impossible, and says what. */
	.section .text.start, "ax"
	.globl _start
_start:
	call guest_main			/* does not return */
1:	wfi
	j 1b
