/* SPDX-License-Identifier: Apache-2.0
 *
 * What the keeper (csrc/keeper, the program postcopy-keeper) and the engine that it runs say to each other, on a SOCK_SEQPACKET pair
 * of theirs. A keeper may be older than the engine that it runs (an engine can be replaced by another version): numbers never
 * change their meaning.
 *
 * A message is a u32 kind and an i32 value, in this host's byte order, then its text, and descriptors as SCM_RIGHTS:
 *
 *     from the engine    value                 text                                descriptors
 *     HELLO              PC_KEEPER_PROTOCOL    two i32: formats of records that    -                     once it could serve
 *                                              it reads, the oldest and its own
 *     PUT                number of the call    name                                1 to PC_KEEPER_FDS    answered
 *     DROP               number of the call    name                                -                     answered
 *     READY              -                     -                                   -                     it serves
 *     UPGRADE            number of the call    command, each word ends in a NUL    -                     answered when another waits
 *     END                exit status           -                                   -                     it ends, and in order
 *
 *     from the keeper
 *     ENTRY              -                     name                                what the name has     before GO: all that is kept;
 *                                                                                                        after it: connections
 *     GO                 deaths of engines     why the last one ended              -                     serve from now on
 *     ANSWER             number of the call    i32 errno, then a reason            -
 *     SPARE              1, or 0               -                                   -                     whether another engine waits
 *     LEAVE              -                     -                                   -                     end; another one goes on
 *
 * An engine of another command than the one before it finds $POSTCOPY_KEEPER_TRIAL: if it ends before it is READY, the command before
 * is started again.
 */
#ifndef POSTCOPY_KEEPER_H
#define POSTCOPY_KEEPER_H

/* ==== begin cffi ==== */
#define PC_KEEPER_PROTOCOL 1
#define PC_KEEPER_FD 3 /* an engine's descriptor for this, which $POSTCOPY_KEEPER names too */
#define PC_KEEPER_NAME_BYTES 63
#define PC_KEEPER_FDS 16 /* of a message, and of a name */
#define PC_KEEPER_ENTRIES 4096
#define PC_KEEPER_TEXT_BYTES 8192
enum pc_keeper_kind {
    PC_KEEPER_HELLO = 1,
    PC_KEEPER_PUT = 2,
    PC_KEEPER_DROP = 3,
    PC_KEEPER_READY = 4,
    PC_KEEPER_UPGRADE = 5,
    PC_KEEPER_END = 6,
    PC_KEEPER_ENTRY = 16,
    PC_KEEPER_GO = 17,
    PC_KEEPER_ANSWER = 18,
    PC_KEEPER_SPARE = 19,
    PC_KEEPER_LEAVE = 20,
};
/* ==== end cffi ==== */

#endif
