/* SPDX-License-Identifier: Apache-2.0
 *
 * Private to the rv64 engine: rv64.c is the interpreter, rv64_decode.c its decoder, rv64_engine.c what the machine calls.
 * The tests look at harts with it.
 */
#ifndef PC_RV64_H
#define PC_RV64_H

#include <setjmp.h>

#include "machine/machine.h"

#define PC_IMAGE_BYTES (PCG_IMAGE_END - PCG_IMAGE)
#define PC_IMAGE_OPS   (PC_IMAGE_BYTES / 4)
#define PC_NO_LIMIT    UINT64_MAX
#define PC_SINK        32 /* the register that writes to x0 go to */

/* clang-format off */
#define PC_RV64_CODES(X) \
    X(DECODE) X(FETCH_FAULT) X(ILLEGAL) X(BAD_JUMP) X(BAD_BRANCH) \
    X(LUI) X(AUIPC) X(JAL) X(JALR) X(BEQ) X(BNE) X(BLT) X(BGE) X(BLTU) X(BGEU) \
    X(LB) X(LH) X(LW) X(LD) X(LBU) X(LHU) X(LWU) X(SB) X(SH) X(SW) X(SD) \
    X(ADDI) X(SLTI) X(SLTIU) X(XORI) X(ORI) X(ANDI) X(SLLI) X(SRLI) X(SRAI) X(ADDIW) X(SLLIW) X(SRLIW) X(SRAIW) \
    X(ADD) X(SUB) X(SLL) X(SLT) X(SLTU) X(XOR) X(SRL) X(SRA) X(OR) X(AND) X(ADDW) X(SUBW) X(SLLW) X(SRLW) X(SRAW) \
    X(MUL) X(MULH) X(MULHSU) X(MULHU) X(DIV) X(DIVU) X(REM) X(REMU) X(MULW) X(DIVW) X(DIVUW) X(REMW) X(REMUW) \
    X(FENCE) X(PAUSE) X(FENCE_I) X(ECALL) X(EBREAK) X(WFI) X(CSR) X(AMO_W) X(AMO_D)
/* clang-format on */

enum pc_rv64_code {
#define X(name) C_##name,
    PC_RV64_CODES(X)
#undef X
};

struct pc_op {
    uint8_t code, rd, rs1, rs2;
    int32_t imm; /* branches: distance in entries; CSR, atomics: the instruction */
};

struct pc_hart {
    uint64_t x[33];
    /* Where `interpret` is; the one below is current only while a signal could need it. */
    struct pc_op *volatile accessing;
    uint64_t bias;
    _Atomic uint64_t threshold; /* taken branches leave when so many instructions were executed */
    _Atomic bool kicked;
    _Atomic uint64_t limit;
    /* Memory: an access of up to 8 bytes at `a` is inside when a - base < limit. */
    uint8_t *shared, *private_;
    uint64_t shared_limit, high_limit, private_base, private_limit;
    struct pc_op *ops;
    struct pc_vcpu *vcpu;

    uint64_t pc, entropy_draws, mscratch;
    uint64_t reservation_address, reservation_value;
    uint32_t reservation_bytes;
    _Atomic uint64_t instructions;
    char failure[96];
    sigjmp_buf escape;
};

/* A hart as it travels: little endian, no padding. */
struct pc_hart_state {
    uint64_t x[32]; /* x[0] is zero */
    uint64_t pc;
    uint64_t instructions;  /* executed since boot */
    uint64_t entropy_draws; /* from the entropy device: the next number follows from it and the seed */
    uint64_t mscratch;
    uint64_t reservation_address, reservation_value; /* of LR */
    uint32_t reservation_bytes;                      /* 4 or 8; 0: none */
    uint32_t zero;
};

enum pc_rv64_outcome { PC_RV64_LEAVE, PC_RV64_AT_LIMIT, PC_RV64_SLEEP, PC_RV64_FAILED };

/* rv64_decode.c: the entry for the instruction at word `index` of the image area. */
struct pc_op pc_rv64_decode(uint64_t index, uint32_t insn);
static inline int32_t pc_rv64_bits(uint32_t insn, int from, int count)
{
    return (int32_t)(insn >> from & ((1u << count) - 1));
}

/* rv64.c: goes on at h->pc, and stops with h->pc and h->instructions current. By the vCPU's thread; blocks on missing pages and on
 * devices, which a kick ends. */
enum pc_rv64_outcome pc_rv64_run(struct pc_hart *h);

/* rv64_engine.c. Of a vCPU at rest. */
void pc_rv64_get_state(const struct pc_vcpu *vcpu, struct pc_hart_state *state);
void pc_rv64_set_state(struct pc_vcpu *vcpu, const struct pc_hart_state *state);

/* rv64_images.c */
extern const struct pc_image pc_rv64_images[];

#endif
