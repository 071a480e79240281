/* SPDX-License-Identifier: Apache-2.0
 *
 * The rv64 engine: an interpreter of RISC-V, RV64I with M, A, Zicsr, Zifencei, in machine mode, for hosts without KVM and
 * users without rights. It is deterministic: what a hart does follows from memory, registers and the seed, never from a
 * clock. After the same number of instructions a machine with one hart is the same to the bit, however often it was moved.
 *
 * Instructions live in one place: the image area (guest/abi.h), which the guest can read and cannot write. So each is
 * decoded once, when it is first met, into an array with one entry for each word of the area; the end of the array is the
 * end of the area, and a jump elsewhere fails. Nothing is ever invalidated, and FENCE.I has nothing to do: self-modifying
 * code is refused by its first store.
 *
 * Counting. An instruction costs no counter: with `bias` = executed - index of the next entry, going on to the next entry
 * leaves it as it is, and only taken branches change it. They also look whether the hart is to stop. Where a limit is nearer
 * than the longest straight run, every entry goes through a second dispatch table whose entries all look first.
 *
 * Missing pages. Loads and stores go straight to the mapped memory, so a missing page is a fault raised in user mode, which
 * a userfaultfd without any privilege can answer. A hart that waits for one is brought out by the kick's signal:
 * `accessing` says that the thread may be inside an access, and the handler leaves it with siglongjmp, its registers as before
 * the instruction. That must be harmless wherever the signal lands between setting and clearing `accessing`: what an instruction
 * changes is stored before the window opens or after it has closed (window_opens, window_closes), whatever the compiler would
 * rather do. A load may be
 * repeated. A store may not, since another hart could have written in between: it first reads its target, which
 * brings the page, and then happens outside of that window, where nothing is missing any more. Atomics likewise.
 * A signal that lands before the window opens is lost; whoever waits for the pause kicks again.
 *
 * The disk needs no buffer of its own: its pages are read in the same way, before the kernel is asked to transfer, so
 * that no fault is raised inside the kernel, where a user-mode-only userfaultfd would answer EFAULT.
 *
 * Guest memory is shared by harts that race in it by their own will; the accesses are plain host accesses of the guest's
 * size, and the interpreter is not instrumented for thread sanitizers, which would report the guest's races as ours.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "machine/rv64.h"

#include <errno.h>
#include <sched.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "guest memory is accessed as host memory");

#define IMAGE_BYTES (PCG_IMAGE_END - PCG_IMAGE)
#define IMAGE_OPS   (IMAGE_BYTES / 4)
#define NO_LIMIT    UINT64_MAX
#define MMIO_BYTES  0x1000
#define SINK        32 /* what writes x0 writes here */

#if defined(__GNUC__) && !defined(__clang__)
#define RACY __attribute__((no_sanitize_thread))
#else
#define RACY __attribute__((no_sanitize("thread")))
#endif

/* Unaligned accesses of the guest's size. Volatile, so that each is done once, where it stands. */
typedef struct { uint16_t v; } __attribute__((packed, may_alias)) u16_any;
typedef struct { uint32_t v; } __attribute__((packed, may_alias)) u32_any;
typedef struct { uint64_t v; } __attribute__((packed, may_alias)) u64_any;

/* clang-format off */
#define CODES(X) \
    X(DECODE) X(FETCH_FAULT) X(ILLEGAL) X(BAD_JUMP) X(BAD_BRANCH) \
    X(LUI) X(AUIPC) X(JAL) X(JALR) X(BEQ) X(BNE) X(BLT) X(BGE) X(BLTU) X(BGEU) \
    X(LB) X(LH) X(LW) X(LD) X(LBU) X(LHU) X(LWU) X(SB) X(SH) X(SW) X(SD) \
    X(ADDI) X(SLTI) X(SLTIU) X(XORI) X(ORI) X(ANDI) X(SLLI) X(SRLI) X(SRAI) X(ADDIW) X(SLLIW) X(SRLIW) X(SRAIW) \
    X(ADD) X(SUB) X(SLL) X(SLT) X(SLTU) X(XOR) X(SRL) X(SRA) X(OR) X(AND) X(ADDW) X(SUBW) X(SLLW) X(SRLW) X(SRAW) \
    X(MUL) X(MULH) X(MULHSU) X(MULHU) X(DIV) X(DIVU) X(REM) X(REMU) X(MULW) X(DIVW) X(DIVUW) X(REMW) X(REMUW) \
    X(FENCE) X(PAUSE) X(FENCE_I) X(ECALL) X(EBREAK) X(WFI) X(CSR) X(AMO_W) X(AMO_D)
/* clang-format on */

enum code {
#define X(name) C_##name,
    CODES(X)
#undef X
};

struct op {
    uint8_t code, rd, rs1, rs2;
    int32_t imm; /* branches: distance in entries; CSR, atomics: the instruction */
};

struct pc_hart {
    uint64_t x[33];
    /* Where `interpret` is; the one below is current only while a signal could need it. */
    struct op *volatile accessing;
    uint64_t bias;
    _Atomic uint64_t threshold; /* taken branches leave when so many instructions were executed */
    _Atomic bool kicked;
    _Atomic uint64_t limit;
    /* Memory: an access of up to 8 bytes at `a` is inside when a - base < limit. */
    uint8_t *shared, *private_;
    uint64_t shared_limit, high_limit, private_base, private_limit;
    struct op *ops;
    struct pc_vcpu *vcpu;

    uint64_t pc, entropy_draws, mscratch;
    uint64_t reservation_address, reservation_value;
    uint32_t reservation_bytes;
    _Atomic uint64_t instructions;
    char failure[96];
    sigjmp_buf escape;
};

/* Initial-exec: a signal handler reads it, which must not allocate. */
static _Thread_local struct pc_hart *volatile current __attribute__((tls_model("initial-exec")));

void pc_rv64_kicked(void)
{
    struct pc_hart *hart = current;

    if (hart && hart->accessing && atomic_load_explicit(&hart->kicked, memory_order_relaxed))
        siglongjmp(hart->escape, 1);
}

/* ---- decoding ---- */

static int32_t bits(uint32_t insn, int from, int count)
{
    return (int32_t)(insn >> from & ((1u << count) - 1));
}

static int32_t signed_bits(uint32_t insn, int from, int count)
{
    return (int32_t)(insn << (32 - from - count)) >> (32 - count);
}

static int32_t branch_offset(uint32_t insn)
{
    return signed_bits(insn, 31, 1) * 4096 + bits(insn, 7, 1) * 2048 + bits(insn, 25, 6) * 32 + bits(insn, 8, 4) * 2;
}

static int32_t jal_offset(uint32_t insn)
{
    return signed_bits(insn, 31, 1) * 1048576 + bits(insn, 12, 8) * 4096 + bits(insn, 20, 1) * 2048 +
           bits(insn, 21, 10) * 2;
}

/* A jump by `offset` bytes from the entry `index`, as a distance in entries; false when it leads nowhere. */
static bool jump_distance(uint64_t index, int32_t offset, int32_t *distance)
{
    int64_t target = (int64_t)index * 4 + offset;

    *distance = offset / 4;
    return target >= 0 && target < IMAGE_BYTES && target % 4 == 0;
}

static enum code decode_register(uint32_t insn, bool word)
{
    static const uint8_t plain[8] = { C_ADD, C_SLL, C_SLT, C_SLTU, C_XOR, C_SRL, C_OR, C_AND };
    static const uint8_t plain_w[8] = { [0] = C_ADDW, [1] = C_SLLW, [5] = C_SRLW };
    static const uint8_t multiply[8] = { C_MUL, C_MULH, C_MULHSU, C_MULHU, C_DIV, C_DIVU, C_REM, C_REMU };
    static const uint8_t multiply_w[8] = { [0] = C_MULW, [4] = C_DIVW, [5] = C_DIVUW, [6] = C_REMW, [7] = C_REMUW };
    int funct3 = bits(insn, 12, 3);
    uint8_t code = C_DECODE;

    switch (bits(insn, 25, 7)) {
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

static enum code decode_immediate(uint32_t insn, bool word, int32_t *imm)
{
    static const uint8_t plain[8] = { C_ADDI, C_SLLI, C_SLTI, C_SLTIU, C_XORI, C_SRLI, C_ORI, C_ANDI };
    int funct3 = bits(insn, 12, 3), shift_bits = word ? 5 : 6;
    int above = bits(insn, 20 + shift_bits, 12 - shift_bits); /* what stands above a shift's amount */
    bool arithmetic = above == 0x400 >> shift_bits;

    *imm = signed_bits(insn, 20, 12);
    if (word && funct3 == 0)
        return C_ADDIW;
    if (funct3 != 1 && funct3 != 5)
        return word ? C_ILLEGAL : plain[funct3];
    *imm = bits(insn, 20, shift_bits);
    if (above != 0 && !(arithmetic && funct3 == 5))
        return C_ILLEGAL;
    if (funct3 == 1)
        return word ? C_SLLIW : C_SLLI;
    if (arithmetic)
        return word ? C_SRAIW : C_SRAI;
    return word ? C_SRLIW : C_SRLI;
}

static enum code decode_system(uint32_t insn)
{
    switch (insn) {
    case 0x00000073: return C_ECALL;
    case 0x00100073: return C_EBREAK;
    case 0x10500073: return C_WFI;
    default: return bits(insn, 12, 3) % 4 ? C_CSR : C_ILLEGAL;
    }
}

static enum code decode_atomic(uint32_t insn)
{
    int funct3 = bits(insn, 12, 3), funct5 = bits(insn, 27, 5);
    bool known = funct5 <= 4 || (funct5 % 4 == 0 && funct5 <= 28);

    if (!known || (funct5 == 2 && bits(insn, 20, 5)))
        return C_ILLEGAL;
    return funct3 == 2 ? C_AMO_W : funct3 == 3 ? C_AMO_D : C_ILLEGAL;
}

static struct op decode(uint64_t index, uint32_t insn)
{
    static const uint8_t branches[8] = { C_BEQ, C_BNE, C_ILLEGAL, C_ILLEGAL, C_BLT, C_BGE, C_BLTU, C_BGEU };
    static const uint8_t loads[8] = { C_LB, C_LH, C_LW, C_LD, C_LBU, C_LHU, C_LWU, C_ILLEGAL };
    static const uint8_t stores[8] = { C_SB,      C_SH,      C_SW,      C_SD,
                                       C_ILLEGAL, C_ILLEGAL, C_ILLEGAL, C_ILLEGAL };
    struct op op = { .rs1 = (uint8_t)bits(insn, 15, 5), .rs2 = (uint8_t)bits(insn, 20, 5) };
    int funct3 = bits(insn, 12, 3), rd = bits(insn, 7, 5);
    enum code code = C_ILLEGAL;

    op.rd = rd ? (uint8_t)rd : SINK;
    op.imm = signed_bits(insn, 20, 12);
    switch (bits(insn, 0, 7)) {
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
        op.imm = signed_bits(insn, 25, 7) * 32 + bits(insn, 7, 5);
        break;
    case 0x13:
    case 0x1b:
        code = decode_immediate(insn, bits(insn, 3, 1), &op.imm);
        break;
    case 0x33:
    case 0x3b:
        code = decode_register(insn, bits(insn, 3, 1));
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

/* ---- memory ---- */

static inline uint8_t *load_address(const struct pc_hart *h, uint64_t address, uint64_t bytes)
{
    if (__builtin_expect(address < h->shared_limit, 1))
        return h->shared + address;
    if (__builtin_expect(address - h->private_base < h->private_limit, 1))
        return h->private_ + (address - h->private_base);
    return pc_layout_gva(&h->vcpu->machine->config, address, bytes);
}

/* As above; NULL for the image area too. */
static inline uint8_t *store_address(const struct pc_hart *h, uint64_t address, uint64_t bytes)
{
    if (__builtin_expect(address - PCG_IMAGE_END < h->high_limit, 1))
        return h->shared + address;
    if (__builtin_expect(address - h->private_base < h->private_limit, 1))
        return h->private_ + (address - h->private_base);
    if (__builtin_expect(address <= PCG_IMAGE - 8, 1))
        return h->shared + address;
    if (address < PCG_IMAGE_END && address + bytes > PCG_IMAGE)
        return NULL;
    return pc_layout_gva(&h->vcpu->machine->config, address, bytes);
}

/* Between the two a signal may end the instruction as if it had not begun. The handler runs in this thread: the order of what
 * the compiler emits is all that is needed. What stands between are volatile reads only, which keep their place by themselves. */
static inline void window_opens(struct pc_hart *h, struct op *op)
{
    atomic_signal_fence(memory_order_release); /* what was stored before stays before */
    h->accessing = op;
}

static inline void window_closes(struct pc_hart *h)
{
    h->accessing = NULL;
    atomic_signal_fence(memory_order_acquire); /* what is stored after stays after: no store passes a volatile one up */
}

/* Brings the pages of a store or an atomic; see the top of this file. */
RACY static inline void touch(struct pc_hart *h, struct op *op, const uint8_t *memory, uint64_t bytes)
{
    window_opens(h, op);
    (void)*(const volatile uint8_t *)memory;
    if (__builtin_expect(((uintptr_t)memory & (bytes - 1)) != 0, 0))
        (void)*(const volatile uint8_t *)(memory + bytes - 1);
    window_closes(h);
}

/* Brings the pages of a disk request, if it is one that the disk will do. */
RACY static void touch_request(struct pc_hart *h, struct op *op)
{
    uint64_t gpa = h->x[12], bytes = h->x[13];
    const uint8_t *memory = pc_layout_gpa(&h->vcpu->machine->layout, gpa, bytes);

    if (!memory || bytes == 0 || bytes > PCG_DISK_REQUEST_MAX)
        return;
    window_opens(h, op);
    for (uint64_t at = 0; at < bytes; at += PCG_PAGE_BYTES)
        (void)*(const volatile uint8_t *)(memory + at);
    (void)*(const volatile uint8_t *)(memory + bytes - 1);
    window_closes(h);
}

RACY static uint64_t atomic_word(struct pc_hart *h, struct op *op, uint32_t *p, uint64_t address, uint32_t b)
{
    uint32_t old = 0, new = 0;
    int funct5 = bits((uint32_t)op->imm, 27, 5);

    switch (funct5) {
    case 0: old = __atomic_fetch_add(p, b, __ATOMIC_SEQ_CST); break;
    case 1: old = __atomic_exchange_n(p, b, __ATOMIC_SEQ_CST); break;
    case 2:
        old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
        h->reservation_address = address;
        h->reservation_value = old;
        h->reservation_bytes = 4;
        break;
    case 3:
        old = (uint32_t)h->reservation_value;
        old = !(h->reservation_bytes == 4 && h->reservation_address == address &&
                __atomic_compare_exchange_n(p, &old, b, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        h->reservation_bytes = 0;
        break;
    case 4: old = __atomic_fetch_xor(p, b, __ATOMIC_SEQ_CST); break;
    case 8: old = __atomic_fetch_or(p, b, __ATOMIC_SEQ_CST); break;
    case 12: old = __atomic_fetch_and(p, b, __ATOMIC_SEQ_CST); break;
    default:
        old = __atomic_load_n(p, __ATOMIC_RELAXED);
        do {
            bool less = funct5 < 24 ? (int32_t)b < (int32_t)old : b < old; /* min, max; minu, maxu */
            new = less == !(funct5 & 4) ? b : old;
        } while (!__atomic_compare_exchange_n(p, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        break;
    }
    return (uint64_t)(int64_t)(int32_t)old;
}

RACY static uint64_t atomic_double(struct pc_hart *h, struct op *op, uint64_t *p, uint64_t address, uint64_t b)
{
    uint64_t old = 0, new = 0;
    int funct5 = bits((uint32_t)op->imm, 27, 5);

    switch (funct5) {
    case 0: old = __atomic_fetch_add(p, b, __ATOMIC_SEQ_CST); break;
    case 1: old = __atomic_exchange_n(p, b, __ATOMIC_SEQ_CST); break;
    case 2:
        old = __atomic_load_n(p, __ATOMIC_SEQ_CST);
        h->reservation_address = address;
        h->reservation_value = old;
        h->reservation_bytes = 8;
        break;
    case 3:
        old = h->reservation_value;
        old = !(h->reservation_bytes == 8 && h->reservation_address == address &&
                __atomic_compare_exchange_n(p, &old, b, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        h->reservation_bytes = 0;
        break;
    case 4: old = __atomic_fetch_xor(p, b, __ATOMIC_SEQ_CST); break;
    case 8: old = __atomic_fetch_or(p, b, __ATOMIC_SEQ_CST); break;
    case 12: old = __atomic_fetch_and(p, b, __ATOMIC_SEQ_CST); break;
    default:
        old = __atomic_load_n(p, __ATOMIC_RELAXED);
        do {
            bool less = funct5 < 24 ? (int64_t)b < (int64_t)old : b < old;
            new = less == !(funct5 & 4) ? b : old;
        } while (!__atomic_compare_exchange_n(p, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
        break;
    }
    return old;
}

/* ---- control and status registers ---- */

/* False: there is none, or it cannot be written. */
static bool csr(struct pc_hart *h, const struct op *op, uint64_t executed)
{
    uint32_t insn = (uint32_t)op->imm;
    int funct3 = bits(insn, 12, 3), number = bits(insn, 20, 12);
    uint64_t operand = funct3 & 4 ? op->rs1 : h->x[op->rs1], old;
    bool writes = funct3 % 4 == 1 || op->rs1 != 0;

    switch (number) {
    case 0x340: old = h->mscratch; break;
    case 0xf14: old = h->vcpu->index; break; /* mhartid */
    case 0xb00: /* mcycle */
    case 0xb02: /* minstret */
    case 0xc00: /* cycle */
    case 0xc02: /* instret */
        old = executed;
        break;
    default: return false;
    }
    if (writes && number != 0x340)
        return false;
    if (writes)
        h->mscratch = funct3 % 4 == 1 ? operand : funct3 % 4 == 2 ? old | operand : old & ~operand;
    h->x[op->rd] = old;
    return true;
}

/* ---- arithmetic with corners ---- */

static inline uint64_t sext32(uint64_t value)
{
    return (uint64_t)(int64_t)(int32_t)(uint32_t)value;
}

static inline uint64_t shift_right(uint64_t value, uint64_t by)
{
    return (uint64_t)((int64_t)value >> by);
}

static uint64_t divide(int64_t a, int64_t b)
{
    if (b == 0)
        return UINT64_MAX;
    return a == INT64_MIN && b == -1 ? (uint64_t)a : (uint64_t)(a / b);
}

static uint64_t remainder_of(int64_t a, int64_t b)
{
    if (b == 0)
        return (uint64_t)a;
    return a == INT64_MIN && b == -1 ? 0 : (uint64_t)(a % b);
}

static bool branch_taken(int funct3, uint64_t a, uint64_t b)
{
    bool taken = funct3 < 4 ? a == b : funct3 < 6 ? (int64_t)a < (int64_t)b : a < b;

    return taken != (funct3 & 1);
}

/* What a load makes of a device's 32 bits. */
static uint64_t narrow(uint8_t code, uint64_t value)
{
    switch (code) {
    case C_LB: return (uint64_t)(int64_t)(int8_t)value;
    case C_LBU: return (uint8_t)value;
    case C_LH: return (uint64_t)(int64_t)(int16_t)value;
    case C_LHU: return (uint16_t)value;
    case C_LW: return sext32(value);
    default: return value;
    }
}

/* ---- the interpreter ---- */

enum outcome { LEAVE, AT_LIMIT, SLEEP, FAILED };

static void fail(struct pc_hart *h, const char *what, uint64_t number)
{
    snprintf(h->failure, sizeof h->failure, what, (unsigned long long)number);
}

static void device_begins(struct pc_hart *h)
{
    atomic_store(&h->vcpu->activity, PC_VCPU_DEVICE);
    atomic_fetch_add_explicit(&h->vcpu->exits, 1, memory_order_relaxed);
}

static void device_ends(struct pc_hart *h)
{
    atomic_store(&h->vcpu->activity, PC_VCPU_GUEST);
}

/* Goes on at h->pc and stops with h->pc and h->instructions current. */
RACY static enum outcome interpret(struct pc_hart *h)
{
    static const void *const labels[256] = {
#define X(name) [C_##name] = &&op_##name,
        CODES(X)
#undef X
    };
    static const void *const counted[256] = { [0 ... 255] = &&count };
    const void *const *table;
    struct op *const ops = h->ops;
    struct op *op = ops + (h->pc - PCG_IMAGE) / 4, *to;
    uint64_t *const x = h->x, *to_register;
    uint64_t executed = atomic_load_explicit(&h->instructions, memory_order_relaxed);
    uint64_t bias = executed - (uint64_t)(op - ops), address, value;
    const uint64_t limit = atomic_load(&h->limit);
    enum outcome outcome;
    uint8_t *p;

    h->bias = bias;

#define INDEX       ((uint64_t)(op - ops))
#define PC          (PCG_IMAGE + INDEX * 4)
#define A           x[op->rs1]
#define B           x[op->rs2]
#define IMM         ((uint64_t)(int64_t)op->imm)
#define DISPATCH    goto *table[op->code]
#define NEXT \
    do { \
        op++; \
        DISPATCH; \
    } while (0)
#define SET(expression) \
    do { \
        x[op->rd] = (expression); \
        NEXT; \
    } while (0)
#define JUMP(target) \
    do { \
        to = (target); \
        bias += (uint64_t)(op + 1 - to); \
        op = to; \
        h->bias = bias; \
        if (__builtin_expect(bias + INDEX >= atomic_load_explicit(&h->threshold, memory_order_relaxed), 0)) \
            goto look; \
        DISPATCH; \
    } while (0)
#define BRANCH(condition) \
    do { \
        if (condition) \
            JUMP(op + op->imm); \
        NEXT; \
    } while (0)
#define LOAD(bytes, read) \
    do { \
        address = A + IMM; \
        p = load_address(h, address, bytes); \
        if (__builtin_expect(!p, 0)) \
            goto device_load; \
        to_register = &x[op->rd]; /* here, since nothing is read early past the window's end */ \
        window_opens(h, op); \
        value = (uint64_t)(read); \
        window_closes(h); \
        *to_register = value; \
        NEXT; \
    } while (0)
#define STORE(bytes, write) \
    do { \
        address = A + IMM; \
        p = store_address(h, address, bytes); \
        if (__builtin_expect(!p, 0)) \
            goto device_store; \
        value = B; \
        touch(h, op, p, bytes); \
        write; \
        NEXT; \
    } while (0)
#define FAIL_WITH(text, number) \
    do { \
        fail(h, text, number); \
        outcome = FAILED; \
        goto out; \
    } while (0)

look:
    executed = bias + INDEX;
    if (executed >= limit) {
        outcome = AT_LIMIT;
        goto out;
    }
    if (limit - executed > IMAGE_OPS) {
        table = labels;
        atomic_store(&h->threshold, limit - IMAGE_OPS);
    } else {
        table = counted;
        atomic_store(&h->threshold, limit);
    }
    if (atomic_load(&h->kicked)) { /* after the store: the kick sets both, in the other order */
        outcome = LEAVE;
        goto out;
    }
    DISPATCH;

count:
    if (bias + INDEX >= limit) {
        outcome = AT_LIMIT;
        goto out;
    }
    goto *labels[op->code];

op_DECODE:
    window_opens(h, op);
    value = ((const volatile u32_any *)(h->shared + PC))->v;
    window_closes(h);
    *op = decode(INDEX, (uint32_t)value);
    goto *labels[op->code];

op_FETCH_FAULT:
    FAIL_WITH("the program ran into memory that is not for instructions%.0llu", 0);
op_ILLEGAL:
    FAIL_WITH("illegal instruction 0x%08llx", (uint32_t)op->imm);
op_BAD_JUMP:
    FAIL_WITH("jump to where no instruction can be%.0llu", 0);
op_BAD_BRANCH:
    if (branch_taken(op->imm, A, B))
        FAIL_WITH("branch to where no instruction can be%.0llu", 0);
    NEXT;

op_LUI: SET(IMM);
op_AUIPC: SET(PC + IMM);
op_JAL:
    x[op->rd] = PC + 4;
    JUMP(op + op->imm);
op_JALR:
    address = (A + IMM) & ~1ull;
    if (__builtin_expect(address - PCG_IMAGE >= IMAGE_BYTES || address % 4, 0))
        FAIL_WITH("jump to 0x%llx, where no instruction can be", address);
    x[op->rd] = PC + 4;
    JUMP(ops + (address - PCG_IMAGE) / 4);
op_BEQ: BRANCH(A == B);
op_BNE: BRANCH(A != B);
op_BLT: BRANCH((int64_t)A < (int64_t)B);
op_BGE: BRANCH((int64_t)A >= (int64_t)B);
op_BLTU: BRANCH(A < B);
op_BGEU: BRANCH(A >= B);

op_LB: LOAD(1, (int64_t)(int8_t)*(const volatile uint8_t *)p);
op_LH: LOAD(2, (int64_t)(int16_t)((const volatile u16_any *)p)->v);
op_LW: LOAD(4, (int64_t)(int32_t)((const volatile u32_any *)p)->v);
op_LD: LOAD(8, ((const volatile u64_any *)p)->v);
op_LBU: LOAD(1, *(const volatile uint8_t *)p);
op_LHU: LOAD(2, ((const volatile u16_any *)p)->v);
op_LWU: LOAD(4, ((const volatile u32_any *)p)->v);
op_SB: STORE(1, *(volatile uint8_t *)p = (uint8_t)value);
op_SH: STORE(2, ((volatile u16_any *)p)->v = (uint16_t)value);
op_SW: STORE(4, ((volatile u32_any *)p)->v = (uint32_t)value);
op_SD: STORE(8, ((volatile u64_any *)p)->v = value);

op_ADDI: SET(A + IMM);
op_SLTI: SET((int64_t)A < (int64_t)op->imm);
op_SLTIU: SET(A < IMM);
op_XORI: SET(A ^ IMM);
op_ORI: SET(A | IMM);
op_ANDI: SET(A & IMM);
op_SLLI: SET(A << op->imm);
op_SRLI: SET(A >> op->imm);
op_SRAI: SET(shift_right(A, (uint64_t)op->imm));
op_ADDIW: SET(sext32(A + IMM));
op_SLLIW: SET(sext32(A << op->imm));
op_SRLIW: SET(sext32((uint32_t)A >> op->imm));
op_SRAIW: SET(shift_right(sext32(A), (uint64_t)op->imm));
op_ADD: SET(A + B);
op_SUB: SET(A - B);
op_SLL: SET(A << (B & 63));
op_SLT: SET((int64_t)A < (int64_t)B);
op_SLTU: SET(A < B);
op_XOR: SET(A ^ B);
op_SRL: SET(A >> (B & 63));
op_SRA: SET(shift_right(A, B & 63));
op_OR: SET(A | B);
op_AND: SET(A & B);
op_ADDW: SET(sext32(A + B));
op_SUBW: SET(sext32(A - B));
op_SLLW: SET(sext32((uint32_t)A << (B & 31)));
op_SRLW: SET(sext32((uint32_t)A >> (B & 31)));
op_SRAW: SET(shift_right(sext32(A), B & 31));

op_MUL: SET(A * B);
op_MULH: SET((uint64_t)(((__int128)(int64_t)A * (int64_t)B) >> 64));
op_MULHSU: SET((uint64_t)(((__int128)(int64_t)A * (__int128)B) >> 64));
op_MULHU: SET((uint64_t)(((unsigned __int128)A * B) >> 64));
op_DIV: SET(divide((int64_t)A, (int64_t)B));
op_DIVU: SET(B ? A / B : UINT64_MAX);
op_REM: SET(remainder_of((int64_t)A, (int64_t)B));
op_REMU: SET(B ? A % B : A);
op_MULW: SET(sext32(A * B));
/* In 64 bits: the one quotient that overflows 32 is the dividend again when it is cut. */
op_DIVW: SET(sext32(divide((int32_t)A, (int32_t)B)));
op_DIVUW: SET((uint32_t)B ? sext32((uint32_t)A / (uint32_t)B) : UINT64_MAX);
op_REMW: SET(sext32(remainder_of((int32_t)A, (int32_t)B)));
op_REMUW: SET(sext32((uint32_t)B ? (uint32_t)A % (uint32_t)B : (uint32_t)A));

op_FENCE:
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    NEXT;
op_PAUSE:
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    sched_yield(); /* whom this hart waits for may need its processor */
    NEXT;
op_FENCE_I: NEXT;
op_ECALL:
    FAIL_WITH("environment call, which nobody answers%.0llu", 0);
op_EBREAK:
    FAIL_WITH("breakpoint%.0llu", 0);
op_WFI:
    op++;
    outcome = SLEEP;
    goto out;
op_CSR:
    if (!csr(h, op, bias + INDEX))
        FAIL_WITH("illegal instruction 0x%08llx", (uint32_t)op->imm);
    NEXT;
op_AMO_W:
    address = A;
    p = address % 4 ? NULL : store_address(h, address, 4);
    if (!p)
        FAIL_WITH("atomic access to 0x%llx, which is not memory or not aligned", address);
    touch(h, op, p, 4);
    SET(atomic_word(h, op, (uint32_t *)(void *)p, address, (uint32_t)B));
op_AMO_D:
    address = A;
    p = address % 8 ? NULL : store_address(h, address, 8);
    if (!p)
        FAIL_WITH("atomic access to 0x%llx, which is not memory or not aligned", address);
    touch(h, op, p, 8);
    SET(atomic_double(h, op, (uint64_t *)(void *)p, address, B));

device_load:
    if (address - PCG_MMIO >= MMIO_BYTES)
        FAIL_WITH("load from 0x%llx, where no memory is", address);
    device_begins(h);
    value = pc_device_in(h->vcpu, (uint16_t)(address - PCG_MMIO));
    device_ends(h);
    SET(narrow(op->code, value));

device_store:
    if (address - PCG_IMAGE < IMAGE_BYTES)
        FAIL_WITH("store to 0x%llx: instructions cannot be written", address);
    if (address - PCG_MMIO >= MMIO_BYTES)
        FAIL_WITH("store to 0x%llx, where no memory is", address);
    if (address - PCG_MMIO == PCG_PORT_DISK)
        touch_request(h, op);
    device_begins(h);
    h->pc = PC; /* for the line of a failure */
    if (!pc_device_out(h->vcpu, (uint16_t)(address - PCG_MMIO), op->code == C_SB ? (uint8_t)B : (uint32_t)B, &x[11])) {
        h->failure[0] = '\0'; /* the device has said why */
        outcome = FAILED;
        goto out;
    }
    device_ends(h);
    NEXT;

out:
    h->pc = PC;
    atomic_store_explicit(&h->instructions, bias + INDEX, memory_order_relaxed);
    return outcome;
}

/* ---- the engine ---- */

static bool run(struct pc_vcpu *vcpu)
{
    struct pc_hart *h = vcpu->hart;
    enum outcome outcome;

    if (sigsetjmp(h->escape, 1)) {
        uint64_t index = (uint64_t)(h->accessing - h->ops);

        h->accessing = NULL;
        current = NULL;
        h->pc = PCG_IMAGE + index * 4;
        atomic_store_explicit(&h->instructions, h->bias + index, memory_order_relaxed);
        atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
        return true;
    }
    current = h;
    atomic_store(&vcpu->activity, PC_VCPU_GUEST);
    outcome = interpret(h);
    atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
    current = NULL;
    switch (outcome) {
    case FAILED:
        if (h->failure[0])
            pc_vcpu_failed(vcpu, h->failure);
        return false;
    case SLEEP:
        pc_vcpu_halt(vcpu);
        return true;
    case AT_LIMIT:
        pc_vcpu_stand(vcpu);
        return true;
    case LEAVE:
    default:
        return true;
    }
}

static void kick(struct pc_vcpu *vcpu, bool on)
{
    atomic_store(&vcpu->hart->kicked, on);
    if (on)
        atomic_store(&vcpu->hart->threshold, 0);
}

static uint64_t where(struct pc_vcpu *vcpu)
{
    return vcpu->hart->pc;
}

static uint32_t entropy(struct pc_vcpu *vcpu)
{
    uint64_t draw = vcpu->hart->entropy_draws++;

    return (uint32_t)(pcg_mix(pcg_mix(vcpu->machine->config.seed) + pcg_mix((uint64_t)vcpu->index << 32) + draw) >> 32);
}

static int make_vcpu(struct pc_vcpu *vcpu, char *error, size_t error_bytes)
{
    const struct pc_machine_config *config = &vcpu->machine->config;
    const struct pc_memory *own = &config->private_[vcpu->index];
    struct pc_hart *h = calloc(1, sizeof *h);

    if (!h)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    vcpu->hart = h;
    h->vcpu = vcpu;
    h->ops = calloc(IMAGE_OPS + 1, sizeof *h->ops); /* all DECODE, nearly none of it touched */
    if (!h->ops)
        return pc_machine_error(error, error_bytes, -ENOMEM, "out of memory");
    h->ops[IMAGE_OPS].code = C_FETCH_FAULT;
    atomic_store(&h->limit, NO_LIMIT);
    h->pc = PCG_IMAGE;
    h->shared = config->shared.base;
    h->shared_limit = config->shared.size_bytes - 7;
    h->high_limit = config->shared.size_bytes - 7 - PCG_IMAGE_END;
    h->private_ = own->base;
    h->private_base = PCG_PRIVATE_GVA + vcpu->index * PCG_PRIVATE_STRIDE;
    h->private_limit = own->size_bytes ? own->size_bytes - 7 : 0;
    return 0;
}

static void destroy_vcpu(struct pc_vcpu *vcpu)
{
    if (vcpu->hart)
        free(vcpu->hart->ops);
    free(vcpu->hart);
}

static int set_start_state(struct pc_vcpu *vcpu)
{
    struct pc_hart_state state = { .pc = PCG_IMAGE };

    state.x[10] = vcpu->index;                                     /* a0 */
    state.x[2] = PCG_STACKS + (vcpu->index + 1) * PCG_STACK_BYTES; /* sp */
    pc_rv64_set_state(vcpu, &state);
    return 0;
}

const struct pc_engine pc_engine_rv64 = {
    .program_counter = "PC",
    .kick_again = true,
    .make_vcpu = make_vcpu,
    .set_start_state = set_start_state,
    .run = run,
    .kick = kick,
    .where = where,
    .entropy = entropy,
    .destroy_vcpu = destroy_vcpu,
};

/* ---- state ---- */

void pc_rv64_get_state(const struct pc_vcpu *vcpu, struct pc_hart_state *state)
{
    const struct pc_hart *h = vcpu->hart;

    memset(state, 0, sizeof *state);
    memcpy(state->x, h->x, sizeof state->x);
    state->pc = h->pc;
    state->instructions = atomic_load(&h->instructions);
    state->entropy_draws = h->entropy_draws;
    state->mscratch = h->mscratch;
    state->reservation_bytes = h->reservation_bytes;
    if (h->reservation_bytes) {
        state->reservation_address = h->reservation_address;
        state->reservation_value = h->reservation_value;
    }
}

void pc_rv64_set_state(struct pc_vcpu *vcpu, const struct pc_hart_state *state)
{
    struct pc_hart *h = vcpu->hart;

    memcpy(h->x, state->x, sizeof state->x);
    h->pc = state->pc;
    atomic_store(&h->instructions, state->instructions);
    h->entropy_draws = state->entropy_draws;
    h->mscratch = state->mscratch;
    h->reservation_address = state->reservation_address;
    h->reservation_value = state->reservation_value;
    h->reservation_bytes = state->reservation_bytes;
}

int pc_rv64_check_state(const struct pc_hart_state *state, uint32_t vcpu, char *error, size_t error_bytes)
{
    /* The end of the area is where a hart stands that ran off it. */
    bool pc_possible = state->pc % 4 == 0 && state->pc - PCG_IMAGE <= IMAGE_BYTES;

    /* Nobody lives to see half of what 64 bits count; past it a hart would come to the end of its numbers, and stand still. */
    if (!pc_possible || state->x[0] || state->zero || state->instructions > UINT64_MAX / 2 ||
        (state->reservation_bytes != 0 && state->reservation_bytes != 4 && state->reservation_bytes != 8))
        return pc_machine_error(error, error_bytes, -EBADMSG, "section HART of vCPU %u is not a state a hart can be in",
                                vcpu);
    return 0;
}

/* ---- run until ---- */

int pc_rv64_instructions(struct pc_machine *machine, uint32_t hart, uint64_t *instructions)
{
    if (machine->config.engine != PC_ENGINE_RV64)
        return -ENOTSUP;
    if (hart >= machine->vcpu_count)
        return -EINVAL;
    *instructions = atomic_load(&machine->vcpu[hart].hart->instructions);
    return 0;
}

/* Heeded from the next resume on. */
static void set_limit(struct pc_machine *machine, uint64_t limit)
{
    for (uint32_t i = 0; i < machine->vcpu_count; i++)
        atomic_store(&machine->vcpu[i].hart->limit, limit);
}

int pc_rv64_run_until(struct pc_machine *machine, uint64_t instructions, uint32_t timeout_ms, char *error,
                      size_t error_bytes)
{
    uint64_t until_ns = pc_machine_now_ns() + timeout_ms * 1000000ull;
    struct timespec until = { .tv_sec = (time_t)(until_ns / 1000000000u), .tv_nsec = (long)(until_ns % 1000000000u) };
    bool late = false, there;
    int rc;

    if (machine->config.engine != PC_ENGINE_RV64)
        return pc_machine_error(error, error_bytes, -ENOTSUP, "only an rv64 machine counts its instructions");
    if (atomic_load(&machine->state) != PC_MACHINE_PAUSED)
        return pc_machine_error(error, error_bytes, -EBUSY, "the machine is not paused");
    set_limit(machine, instructions);
    rc = pc_machine_resume(machine);
    if (rc) {
        set_limit(machine, NO_LIMIT);
        return pc_machine_error(error, error_bytes, rc, "the machine cannot be resumed: %s", strerrordesc_np(-rc));
    }
    pthread_mutex_lock(&machine->lock);
    for (;;) {
        there = true;
        for (uint32_t i = 0; i < machine->vcpu_count; i++)
            there = there && machine->vcpu[i].standing;
        if (there || late || atomic_load(&machine->state) != PC_MACHINE_RUNNING)
            break;
        late = pthread_cond_timedwait(&machine->changed, &machine->lock, &until) == ETIMEDOUT;
    }
    pthread_mutex_unlock(&machine->lock);
    rc = pc_machine_pause(machine, timeout_ms, error, error_bytes);
    set_limit(machine, NO_LIMIT);
    if (rc == 0 && !there)
        rc = pc_machine_error(error, error_bytes, -ETIMEDOUT, "not every hart came to %llu instructions in %u ms",
                              (unsigned long long)instructions, timeout_ms);
    return rc;
}
