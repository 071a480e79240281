/* SPDX-License-Identifier: Apache-2.0
 *
 * The guest programs inside the library. The directory of the .bin files is given with -Wa,-I or -I. */
	.section .rodata
	.macro	image name
	.globl	pc_guest_\name, pc_guest_\name\()_end
	.hidden	pc_guest_\name, pc_guest_\name\()_end
	.balign	16
	.type	pc_guest_\name, @object
pc_guest_\name:
	.incbin	"\name\().bin"
	.size	pc_guest_\name, . - pc_guest_\name
pc_guest_\name\()_end:
	.byte	0
	.endm

	image	idle
	image	dirty
	image	random
	image	disk
	image	echo
	.section .note.GNU-stack, "", @progbits
