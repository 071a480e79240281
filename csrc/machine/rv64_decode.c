/* SPDX-License-Identifier: Apache-2.0
 *
 * The decoder of the rv64 engine: RV64I with M, A, Zicsr, Zifencei.
 */
#include "machine/rv64.h"

static int32_t signed_bits(uint32_t insn, int from, int count)
{
    return (int32_t)(insn << (32 - from - count)) >> (32 - count);
}

static int32_t branch_offset(uint32_t insn)
{
    return signed_bits(insn, 31, 1) * 4096 + pc_rv64_bits(insn, 7, 1) * 2048 + pc_rv64_bits(insn, 25, 6) * 32 + pc_rv64_bits(insn, 8, 4) * 2;
}

static int32_t jal_offset(uint32_t insn)
{
    return signed_bits(insn, 31, 1) * 1048576 + pc_rv64_bits(insn, 12, 8) * 4096 + pc_rv64_bits(insn, 20, 1) * 2048 +
           pc_rv64_bits(insn, 21, 10) * 2;
}

/* A jump by `offset` bytes from the entry `index`, as a distance in entries; false when it leads nowhere. */
static bool jump_distance(uint64_t index, int32_t offset, int32_t *distance)
{
    int64_t target = (int64_t)index * 4 + offset;

    *distance = offset / 4;
    return target >= 0 && target < PC_IMAGE_BYTES && target % 4 == 0;
}

static enum pc_rv64_code decode_register(uint32_t insn, bool word)
{
    static const uint8_t plain[8] = { C_ADD, C_SLL, C_SLT, C_SLTU, C_XOR, C_SRL, C_OR, C_AND };
    static const uint8_t plain_w[8] = { [0] = C_ADDW, [1] = C_SLLW, [5] = C_SRLW };
    static const uint8_t multiply[8] = { C_MUL, C_MULH, C_MULHSU, C_MULHU, C_DIV, C_DIVU, C_REM, C_REMU };
    static const uint8_t multiply_w[8] = { [0] = C_MULW, [4] = C_DIVW, [5] = C_DIVUW, [6] = C_REMW, [7] = C_REMUW };
    int funct3 = pc_rv64_bits(insn, 12, 3);
    uint8_t code = C_DECODE;

    switch (pc_rv64_bits(insn, 25, 7)) {
    case 0:
        code = (word ? plain_w : plain)[funct3];
        break;
    case 1:
        code = (word ? multiply_w : multiply)[funct3];
        break;
    case 0x20:
        if (funct3 == 0)
            code = word ? C_SUBW : C_SUB;
        else if (funct3 == 5)
            code = word ? C_SRAW : C_SRA;
        break;
    default:
        break;
    }
    return code == C_DECODE ? C_ILLEGAL : code;
}

static enum pc_rv64_code decode_immediate(uint32_t insn, bool word, int32_t *imm)
{
    static const uint8_t plain[8] = { C_ADDI, C_SLLI, C_SLTI, C_SLTIU, C_XORI, C_SRLI, C_ORI, C_ANDI };
    int funct3 = pc_rv64_bits(insn, 12, 3), shift_bits = word ? 5 : 6;
    int above = pc_rv64_bits(insn, 20 + shift_bits, 12 - shift_bits); /* the bits above a shift's amount */
    bool arithmetic = above == 0x400 >> shift_bits;

    *imm = signed_bits(insn, 20, 12);
    if (word && funct3 == 0)
        return C_ADDIW;
    if (funct3 != 1 && funct3 != 5)
        return word ? C_ILLEGAL : plain[funct3];
    *imm = pc_rv64_bits(insn, 20, shift_bits);
    if (above != 0 && !(arithmetic && funct3 == 5))
        return C_ILLEGAL;
    if (funct3 == 1)
        return word ? C_SLLIW : C_SLLI;
    if (arithmetic)
        return word ? C_SRAIW : C_SRAI;
    return word ? C_SRLIW : C_SRLI;
}

static enum pc_rv64_code decode_system(uint32_t insn)
{
    switch (insn) {
    case 0x00000073: return C_ECALL;
    case 0x00100073: return C_EBREAK;
    case 0x10500073: return C_WFI;
    default: return pc_rv64_bits(insn, 12, 3) % 4 ? C_CSR : C_ILLEGAL;
    }
}

static enum pc_rv64_code decode_atomic(uint32_t insn)
{
    int funct3 = pc_rv64_bits(insn, 12, 3), funct5 = pc_rv64_bits(insn, 27, 5);
    bool known = funct5 <= 4 || (funct5 % 4 == 0 && funct5 <= 28);

    if (!known || (funct5 == 2 && pc_rv64_bits(insn, 20, 5)))
        return C_ILLEGAL;
    return funct3 == 2 ? C_AMO_W : funct3 == 3 ? C_AMO_D : C_ILLEGAL;
}

struct pc_op pc_rv64_decode(uint64_t index, uint32_t insn)
{
    static const uint8_t branches[8] = { C_BEQ, C_BNE, C_ILLEGAL, C_ILLEGAL, C_BLT, C_BGE, C_BLTU, C_BGEU };
    static const uint8_t loads[8] = { C_LB, C_LH, C_LW, C_LD, C_LBU, C_LHU, C_LWU, C_ILLEGAL };
    static const uint8_t stores[8] = { C_SB,      C_SH,      C_SW,      C_SD,
                                       C_ILLEGAL, C_ILLEGAL, C_ILLEGAL, C_ILLEGAL };
    struct pc_op op = { .rs1 = (uint8_t)pc_rv64_bits(insn, 15, 5), .rs2 = (uint8_t)pc_rv64_bits(insn, 20, 5) };
    int funct3 = pc_rv64_bits(insn, 12, 3), rd = pc_rv64_bits(insn, 7, 5);
    enum pc_rv64_code code = C_ILLEGAL;

    op.rd = rd ? (uint8_t)rd : PC_SINK;
    op.imm = signed_bits(insn, 20, 12);
    switch (pc_rv64_bits(insn, 0, 7)) {
    case 0x37:
        code = C_LUI;
        op.imm = (int32_t)(insn & 0xfffff000);
        break;
    case 0x17:
        code = C_AUIPC;
        op.imm = (int32_t)(insn & 0xfffff000);
        break;
    case 0x6f:
        code = jump_distance(index, jal_offset(insn), &op.imm) ? C_JAL : C_BAD_JUMP;
        break;
    case 0x67:
        code = funct3 == 0 ? C_JALR : C_ILLEGAL;
        break;
    case 0x63:
        code = branches[funct3];
        if (code != C_ILLEGAL && !jump_distance(index, branch_offset(insn), &op.imm)) {
            code = C_BAD_BRANCH;
            op.imm = funct3;
        }
        break;
    case 0x03:
        code = loads[funct3];
        break;
    case 0x23:
        code = stores[funct3];
        op.imm = signed_bits(insn, 25, 7) * 32 + pc_rv64_bits(insn, 7, 5);
        break;
    case 0x13:
    case 0x1b:
        code = decode_immediate(insn, pc_rv64_bits(insn, 3, 1), &op.imm);
        break;
    case 0x33:
    case 0x3b:
        code = decode_register(insn, pc_rv64_bits(insn, 3, 1));
        break;
    case 0x0f:
        code = funct3 == 0 ? (insn == 0x0100000f ? C_PAUSE : C_FENCE) : funct3 == 1 ? C_FENCE_I : C_ILLEGAL;
        break;
    case 0x73:
        code = decode_system(insn);
        break;
    case 0x2f:
        code = decode_atomic(insn);
        break;
    default:
        break;
    }
    if (code == C_ILLEGAL || code == C_CSR || code == C_AMO_W || code == C_AMO_D)
        op.imm = (int32_t)insn;
    op.code = (uint8_t)code;
    return op;
}
