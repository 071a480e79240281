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
#include "machine/rv64.h"

#include <sched.h>
#include <stdio.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "guest memory is accessed as host memory");

#define MMIO_BYTES 0x1000

/* Unaligned accesses of the guest's size. Volatile, so that each is done once, in its place. */
typedef struct { uint16_t v; } __attribute__((packed, may_alias)) u16_any;
typedef struct { uint32_t v; } __attribute__((packed, may_alias)) u32_any;
typedef struct { uint64_t v; } __attribute__((packed, may_alias)) u64_any;

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
 * the compiler emits is all that is needed. Between them are volatile reads only, which keep their place by themselves. */
static inline void window_opens(struct pc_hart *h, struct pc_op *op)
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
PC_RACY static inline void touch(struct pc_hart *h, struct pc_op *op, const uint8_t *memory, uint64_t bytes)
{
    window_opens(h, op);
    (void)*(const volatile uint8_t *)memory;
    if (__builtin_expect(((uintptr_t)memory & (bytes - 1)) != 0, 0))
        (void)*(const volatile uint8_t *)(memory + bytes - 1);
    window_closes(h);
}

/* Brings the pages of a disk request, if it is one that the disk will do. False: the vCPU must leave. */
static bool touch_request(struct pc_hart *h)
{
    uint64_t gpa = h->x[12], bytes = h->x[13];
    const uint8_t *memory = pc_layout_gpa(&h->vcpu->machine->layout, gpa, bytes);

    return !memory || bytes == 0 || bytes > PCG_DISK_REQUEST_MAX || pc_vcpu_touch(h->vcpu, memory, bytes);
}

/* The atomics of one width. */
#define ATOMIC(name, type, signed_type)                                                                                        \
    PC_RACY static uint64_t name(struct pc_hart *h, const struct pc_op *op, type *p, uint64_t address, type b)                 \
    {                                                                                                                          \
        int funct5 = pc_rv64_bits((uint32_t)op->imm, 27, 5);                                                                   \
        type old;                                                                                                              \
                                                                                                                               \
        switch (funct5) {                                                                                                      \
        case 0: old = __atomic_fetch_add(p, b, __ATOMIC_SEQ_CST); break;                                                       \
        case 1: old = __atomic_exchange_n(p, b, __ATOMIC_SEQ_CST); break;                                                      \
        case 2: /* LR */                                                                                                       \
            old = __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                                        \
            h->reservation_address = address;                                                                                  \
            h->reservation_value = old;                                                                                        \
            h->reservation_bytes = sizeof(type);                                                                               \
            break;                                                                                                             \
        case 3: /* SC: 0 when it stored */                                                                                     \
            old = (type)h->reservation_value;                                                                                  \
            old = !(h->reservation_bytes == sizeof(type) && h->reservation_address == address &&                               \
                    __atomic_compare_exchange_n(p, &old, b, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));                       \
            h->reservation_bytes = 0;                                                                                          \
            break;                                                                                                             \
        case 4: old = __atomic_fetch_xor(p, b, __ATOMIC_SEQ_CST); break;                                                       \
        case 8: old = __atomic_fetch_or(p, b, __ATOMIC_SEQ_CST); break;                                                        \
        case 12: old = __atomic_fetch_and(p, b, __ATOMIC_SEQ_CST); break;                                                      \
        default:                                                                                                               \
            old = __atomic_load_n(p, __ATOMIC_RELAXED);                                                                        \
            for (;;) {                                                                                                         \
                bool less = funct5 < 24 ? (signed_type)b < (signed_type)old : b < old; /* min, max; minu, maxu */              \
                type new = less == !(funct5 & 4) ? b : old;                                                                    \
                if (__atomic_compare_exchange_n(p, &old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))                      \
                    break;                                                                                                     \
            }                                                                                                                  \
        }                                                                                                                      \
        return (uint64_t)(int64_t)(signed_type)old;                                                                            \
    }
ATOMIC(atomic_word, uint32_t, int32_t)
ATOMIC(atomic_double, uint64_t, int64_t)

/* ---- control and status registers ---- */

/* False: there is none, or it cannot be written. */
static bool csr(struct pc_hart *h, const struct pc_op *op, uint64_t executed)
{
    uint32_t insn = (uint32_t)op->imm;
    int funct3 = pc_rv64_bits(insn, 12, 3), number = pc_rv64_bits(insn, 20, 12);
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

PC_RACY enum pc_rv64_outcome pc_rv64_run(struct pc_hart *h)
{
    static const void *const labels[256] = {
#define X(name) [C_##name] = &&op_##name,
        PC_RV64_CODES(X)
#undef X
    };
    static const void *const counted[256] = { [0 ... 255] = &&count };
    const void *const *table;
    struct pc_op *const ops = h->ops;
    struct pc_op *op = ops + (h->pc - PCG_IMAGE) / 4, *to;
    uint64_t *const x = h->x, *to_register;
    uint64_t executed = atomic_load_explicit(&h->instructions, memory_order_relaxed);
    uint64_t bias = executed - (uint64_t)(op - ops), address, value;
    const uint64_t limit = atomic_load(&h->limit);
    enum pc_rv64_outcome outcome;
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
#define ATOMICALLY(bytes, atomic, type) \
    do { \
        address = A; \
        p = address % (bytes) ? NULL : store_address(h, address, bytes); \
        if (!p) \
            FAIL_WITH("atomic access to 0x%llx, which is not memory or not aligned", address); \
        touch(h, op, p, bytes); \
        SET(atomic(h, op, (type *)(void *)p, address, (type)B)); \
    } while (0)
#define FAIL_WITH(text, number) \
    do { \
        fail(h, text, number); \
        outcome = PC_RV64_FAILED; \
        goto out; \
    } while (0)

look:
    executed = bias + INDEX;
    if (executed >= limit) {
        outcome = PC_RV64_AT_LIMIT;
        goto out;
    }
    if (limit - executed > PC_IMAGE_OPS) {
        table = labels;
        atomic_store(&h->threshold, limit - PC_IMAGE_OPS);
    } else {
        table = counted;
        atomic_store(&h->threshold, limit);
    }
    if (atomic_load(&h->kicked)) { /* after the store: the kick sets both, in the other order */
        outcome = PC_RV64_LEAVE;
        goto out;
    }
    DISPATCH;

count:
    if (bias + INDEX >= limit) {
        outcome = PC_RV64_AT_LIMIT;
        goto out;
    }
    goto *labels[op->code];

op_DECODE:
    window_opens(h, op);
    value = ((const volatile u32_any *)(h->shared + PC))->v;
    window_closes(h);
    *op = pc_rv64_decode(INDEX, (uint32_t)value);
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
    if (__builtin_expect(address - PCG_IMAGE >= PC_IMAGE_BYTES || address % 4, 0))
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
    outcome = PC_RV64_SLEEP;
    goto out;
op_CSR:
    if (!csr(h, op, bias + INDEX))
        FAIL_WITH("illegal instruction 0x%08llx", (uint32_t)op->imm);
    NEXT;
op_AMO_W: ATOMICALLY(4, atomic_word, uint32_t);
op_AMO_D: ATOMICALLY(8, atomic_double, uint64_t);

device_load:
    if (address - PCG_MMIO >= MMIO_BYTES)
        FAIL_WITH("load from 0x%llx, where no memory is", address);
    device_begins(h);
    value = pc_device_in(h->vcpu, (uint16_t)(address - PCG_MMIO));
    device_ends(h);
    SET(narrow(op->code, value));

device_store:
    if (address - PCG_IMAGE < PC_IMAGE_BYTES)
        FAIL_WITH("store to 0x%llx: instructions cannot be written", address);
    if (address - PCG_MMIO >= MMIO_BYTES)
        FAIL_WITH("store to 0x%llx, where no memory is", address);
    if (address - PCG_MMIO == PCG_PORT_DISK && !touch_request(h)) {
        outcome = PC_RV64_LEAVE;
        goto out;
    }
    device_begins(h);
    h->pc = PC; /* for the line of a failure */
    if (!pc_device_out(h->vcpu, (uint16_t)(address - PCG_MMIO), op->code == C_SB ? (uint8_t)B : (uint32_t)B, &x[11])) {
        h->failure[0] = '\0'; /* the device has said why */
        outcome = PC_RV64_FAILED;
        goto out;
    }
    device_ends(h);
    NEXT;

out:
    h->pc = PC;
    atomic_store_explicit(&h->instructions, bias + INDEX, memory_order_relaxed);
    return outcome;
}
