/* SPDX-License-Identifier: Apache-2.0
 *
 * The rv64 machine: what each instruction does, that a machine is the same to the bit whether or not it was moved on the
 * way, that it moves by postcopy without any right, and that it is stopped where it waits for a page.
 */
#include "tests/support/test.h"

#include <sched.h>
#include <sys/mman.h>
#include <sys/socket.h>

#include "machine/machine.h"
#include "machine/rv64.h"
#include "postcopy/core.h"
#include "postcopy/engine.h"
#include "postcopy/uffd.h"

#define MIB    (1ull << 20)
#define RUN_MS 15000
#define DATA   0x100000 /* in the shared block, past everything a program of these tests has */

static char error[PC_ERROR_BYTES];

/* ---- machines ---- */

static struct pc_machine_config make_config(uint32_t workload, uint32_t harts, uint64_t bytes)
{
    struct pc_machine_config config = { .engine = PC_ENGINE_RV64, .vcpus = harts, .workload = workload, .seed = 99, .disk_fd = -1 };
    uint64_t shared_bytes, private_bytes;

    CHECK_EQ(pc_machine_split_memory(bytes, harts, 4096, &shared_bytes, &private_bytes, error, sizeof error), 0);
    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, shared_bytes, &config.shared, error, sizeof error), 0);
    for (uint32_t i = 0; i < harts; i++)
        CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, private_bytes, &config.private_[i], error, sizeof error), 0);
    if (workload == PC_WORKLOAD_DISK) {
        char path[256];
        const char *dir = getenv("TMPDIR");

        (void)snprintf(path, sizeof path, "%s/postcopy-rv64-disk.%d", dir ? dir : "/var/tmp", (int)getpid());
        config.disk_bytes = 1 * MIB * harts;
        config.disk_fd = pc_disk_open(path, config.disk_bytes, error, sizeof error);
        (void)unlink(path);
        if (config.disk_fd == -EINVAL)
            SKIP("odirect", "%s", error);
        if (config.disk_fd < 0)
            FAIL("%s", error);
    }
    return config;
}

static struct pc_machine_config make_twin(const struct pc_machine_config *of)
{
    struct pc_machine_config config = *of;

    CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, of->shared.size_bytes, &config.shared, error, sizeof error), 0);
    for (uint32_t i = 0; i < of->vcpus; i++)
        CHECK_EQ(pc_memory_create(PC_MEMORY_MEMFD, of->private_[i].size_bytes, &config.private_[i], error, sizeof error), 0);
    return config;
}

static struct pc_memory *block(struct pc_machine_config *config, uint32_t index)
{
    return index ? &config->private_[index - 1] : &config->shared;
}

static void drop(struct pc_machine_config *config)
{
    for (uint32_t i = 0; i <= config->vcpus; i++)
        pc_memory_destroy(block(config, i));
}

static struct pc_machine *open_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine;

    if (pc_machine_open(config, &machine, error, sizeof error))
        FAIL("%s", error);
    return machine;
}

static struct pc_machine *boot_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine = open_machine(config);

    CHECK_EQ(pc_machine_boot(machine), 0);
    return machine;
}

static void run_until(struct pc_machine *machine, uint64_t instructions)
{
    uint64_t now;

    if (pc_rv64_run_until(machine, instructions, RUN_MS, error, sizeof error))
        FAIL("%s", error);
    for (uint32_t i = 0; i < machine->config.vcpus; i++) {
        CHECK_EQ(pc_rv64_instructions(machine, i, &now), 0);
        CHECK_EQ(now, instructions);
    }
}

static void verify(struct pc_machine *machine)
{
    struct pc_machine_check check;

    CHECK_EQ(pc_machine_verify(machine, &check), 0);
    if (!check.ok)
        FAIL("%s", check.text);
    CHECK(check.operations > 0 && check.nonce != 0);
}

struct saved {
    uint8_t bytes[65536];
    int64_t count;
};

static void save(struct pc_machine *machine, struct saved *to)
{
    to->count = pc_machine_save_state(machine, to->bytes, sizeof to->bytes, error, sizeof error);
    if (to->count <= 0)
        FAIL("%s", error);
}

static void load(struct pc_machine *machine, const struct saved *from)
{
    if (pc_machine_load_state(machine, from->bytes, (size_t)from->count, error, sizeof error))
        FAIL("%s", error);
}

static struct pc_machine_stats stats_of(struct pc_machine *machine)
{
    struct pc_machine_stats stats;

    CHECK_EQ(pc_machine_stats(machine, &stats), 0);
    return stats;
}

/* Runs freely until every hart is ready and has done some more. */
static void run_past_ready(struct pc_machine *machine, uint64_t more)
{
    struct pollfd ring = { .fd = pc_machine_event_fd(machine), .events = POLLIN };
    uint64_t count;

    CHECK_EQ(pc_machine_resume(machine), 0);
    for (;;) {
        struct pc_machine_stats stats = stats_of(machine);
        bool enough = stats.ready;

        if (stats.state == PC_MACHINE_FAILED || stats.failures)
            FAIL("%s", stats.failure_text);
        for (uint32_t i = 0; i < stats.vcpus; i++)
            enough = enough && stats.vcpu[i].operations >= more;
        if (enough)
            break;
        CHECK(poll(&ring, 1, RUN_MS) == 1);
        CHECK_SYS(read(ring.fd, &count, sizeof count));
    }
    CHECK_EQ(pc_machine_pause(machine, RUN_MS, error, sizeof error), 0);
}

/* ---- an assembler ---- */

static uint32_t r_type(uint32_t funct7, uint32_t rs2, uint32_t rs1, uint32_t funct3, uint32_t rd, uint32_t opcode)
{
    return funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode;
}

static uint32_t i_type(int32_t imm, uint32_t rs1, uint32_t funct3, uint32_t rd, uint32_t opcode)
{
    return (uint32_t)imm << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode;
}

static uint32_t s_type(int32_t imm, uint32_t rs2, uint32_t rs1, uint32_t funct3)
{
    return ((uint32_t)imm >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | ((uint32_t)imm & 0x1f) << 7 | 0x23;
}

static uint32_t b_type(int32_t imm, uint32_t rs2, uint32_t rs1, uint32_t funct3)
{
    uint32_t u = (uint32_t)imm;

    return (u >> 12 & 1) << 31 | (u >> 5 & 0x3f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (u >> 1 & 0xf) << 8 |
           (u >> 11 & 1) << 7 | 0x63;
}

static uint32_t jal(int32_t imm, uint32_t rd)
{
    uint32_t u = (uint32_t)imm;

    return (u >> 20 & 1) << 31 | (u >> 1 & 0x3ff) << 21 | (u >> 11 & 1) << 20 | (u >> 12 & 0xff) << 12 | rd << 7 | 0x6f;
}

static uint32_t addi(uint32_t rd, uint32_t rs1, int32_t imm)
{
    return i_type(imm, rs1, 0, rd, 0x13);
}

#define OP      0x33
#define OP_32   0x3b
#define OP_IMM  0x13
#define OP_IMMW 0x1b
#define WFI     0x10500073
#define NOP     addi(0, 0, 0)

/* One hart, stopped before its first instruction, with `words` as its program. */
struct bench {
    struct pc_machine_config config;
    struct pc_machine *machine;
    struct pc_hart_state hart;
};

static struct bench make_bench(const uint32_t *words, size_t count)
{
    struct bench b = { .config = make_config(PC_WORKLOAD_IDLE, 1, 16 * MIB) };

    b.machine = boot_machine(&b.config);
    memset((uint8_t *)b.config.shared.base + PCG_IMAGE, 0, PCG_IMAGE_END - PCG_IMAGE);
    memcpy((uint8_t *)b.config.shared.base + PCG_IMAGE, words, count * 4);
    memset(&b.hart, 0, sizeof b.hart);
    b.hart.pc = PCG_IMAGE;
    return b;
}

static void run_bench(struct bench *b, uint64_t instructions)
{
    pc_rv64_set_state(&b->machine->vcpu[0], &b->hart);
    run_until(b->machine, instructions);
    pc_rv64_get_state(&b->machine->vcpu[0], &b->hart);
}

static void close_bench(struct bench *b)
{
    CHECK_EQ(pc_machine_close(b->machine, RUN_MS), 0);
    drop(&b->config);
}

/* Runs a program that must fail; the line it fails with must contain `text`. */
static void must_fail(const uint32_t *words, size_t count, struct pc_hart_state hart, const char *text, uint64_t pc)
{
    struct bench b = make_bench(words, count);
    struct pc_machine_stats stats;

    hart.pc = PCG_IMAGE;
    pc_rv64_set_state(&b.machine->vcpu[0], &hart);
    CHECK_EQ(pc_rv64_run_until(b.machine, 1000000, RUN_MS, error, sizeof error), -EIO);
    stats = stats_of(b.machine);
    CHECK_EQ(stats.state, PC_MACHINE_FAILED);
    if (!strstr(stats.failure_text, text) || !strstr(error, text))
        FAIL("failed with \"%s\", not with \"%s\"", stats.failure_text, text);
    CHECK_EQ(stats.failure_where, pc);
    close_bench(&b);
}

/* ---- instructions: registers ---- */

#define MIN64 0x8000000000000000u
#define MAX64 0x7fffffffffffffffu
#define ONES  0xffffffffffffffffu

/* x7 = x5 op x6, expectations worked out from the manual's text. */
static const struct {
    const char *name;
    uint32_t funct7, funct3, opcode;
    uint64_t a, b, expected;
} register_cases[] = {
    { "add", 0, 0, OP, 1, 2, 3 },
    { "add wraps", 0, 0, OP, ONES, 1, 0 },
    { "add signs", 0, 0, OP, MAX64, 1, MIN64 },
    { "sub", 0x20, 0, OP, 1, 2, ONES },
    { "sub wraps", 0x20, 0, OP, MIN64, 1, MAX64 },
    { "sll", 0, 1, OP, 1, 63, MIN64 },
    { "sll masks to 6 bits", 0, 1, OP, 3, 64 + 4, 48 },
    { "sll ignores high bits", 0, 1, OP, 3, 0xffffffffffffffc1u, 6 },
    { "slt", 0, 2, OP, ONES, 0, 1 },
    { "slt equal", 0, 2, OP, 5, 5, 0 },
    { "slt extremes", 0, 2, OP, MIN64, MAX64, 1 },
    { "slt extremes, other way", 0, 2, OP, MAX64, MIN64, 0 },
    { "sltu", 0, 3, OP, ONES, 0, 0 },
    { "sltu less", 0, 3, OP, 0, ONES, 1 },
    { "xor", 0, 4, OP, 0xff00ff00ff00ff00u, 0x0ff00ff00ff00ff0u, 0xf0f0f0f0f0f0f0f0u },
    { "srl", 0, 5, OP, MIN64, 63, 1 },
    { "srl masks", 0, 5, OP, MIN64, 64 + 60, 8 },
    { "sra", 0x20, 5, OP, MIN64, 63, ONES },
    { "sra positive", 0x20, 5, OP, MAX64, 62, 1 },
    { "sra by 0", 0x20, 5, OP, MIN64, 64, MIN64 },
    { "or", 0, 6, OP, 0xf0, 0x0f, 0xff },
    { "and", 0, 7, OP, 0xff, 0x3c, 0x3c },
    { "addw", 0, 0, OP_32, 0x7fffffff, 1, 0xffffffff80000000u },
    { "addw drops high bits", 0, 0, OP_32, 0xdeadbeef00000001u, 0xcafe000000000001u, 2 },
    { "subw", 0x20, 0, OP_32, 0, 1, ONES },
    { "subw wraps", 0x20, 0, OP_32, 0x80000000u, 1, 0x7fffffff },
    { "sllw", 0, 1, OP_32, 1, 31, 0xffffffff80000000u },
    { "sllw masks to 5 bits", 0, 1, OP_32, 1, 32 + 1, 2 },
    { "srlw", 0, 5, OP_32, 0xffffffff80000000u, 31, 1 },
    { "srlw by 0 extends the sign", 0, 5, OP_32, 0x80000000u, 0, 0xffffffff80000000u },
    { "srlw masks", 0, 5, OP_32, 0x80000000u, 32 + 4, 0x08000000 },
    { "sraw", 0x20, 5, OP_32, 0x80000000u, 31, ONES },
    { "sraw ignores high bits", 0x20, 5, OP_32, 0xffffffff7fffffffu, 1, 0x3fffffff },
    { "mul", 1, 0, OP, 0x100000001u, 0x100000001u, 0x200000001u },
    { "mul signs", 1, 0, OP, ONES, ONES, 1 },
    { "mulh", 1, 1, OP, ONES, ONES, 0 },
    { "mulh extremes", 1, 1, OP, MIN64, MIN64, 0x4000000000000000u },
    { "mulh mixed", 1, 1, OP, MIN64, MAX64, 0xc000000000000000u },
    { "mulhsu", 1, 2, OP, ONES, ONES, ONES },
    { "mulhsu positive", 1, 2, OP, MAX64, ONES, 0x7ffffffffffffffeu },
    { "mulhsu extreme", 1, 2, OP, MIN64, ONES, MIN64 },
    { "mulhu", 1, 3, OP, ONES, ONES, 0xfffffffffffffffeu },
    { "mulhu small", 1, 3, OP, 0x100000000u, 0x100000000u, 1 },
    { "div", 1, 4, OP, (uint64_t)-20, 6, (uint64_t)-3 },
    { "div negative", 1, 4, OP, 20, (uint64_t)-6, (uint64_t)-3 },
    { "div by zero", 1, 4, OP, 7, 0, ONES },
    { "div overflow", 1, 4, OP, MIN64, ONES, MIN64 },
    { "divu", 1, 5, OP, ONES, 2, MAX64 },
    { "divu by zero", 1, 5, OP, 0, 0, ONES },
    { "rem", 1, 6, OP, (uint64_t)-20, 6, (uint64_t)-2 },
    { "rem sign of the dividend", 1, 6, OP, 20, (uint64_t)-6, 2 },
    { "rem by zero", 1, 6, OP, (uint64_t)-7, 0, (uint64_t)-7 },
    { "rem overflow", 1, 6, OP, MIN64, ONES, 0 },
    { "remu", 1, 7, OP, ONES, 10, 5 },
    { "remu by zero", 1, 7, OP, 12345, 0, 12345 },
    { "mulw", 1, 0, OP_32, 0x7fffffff, 2, 0xfffffffffffffffeu },
    { "mulw drops high bits", 1, 0, OP_32, 0xffffffff00000003u, 0xabcdef0000000005u, 15 },
    { "divw", 1, 4, OP_32, 0x12345678ffffffecu, 6, (uint64_t)-3 },
    { "divw by zero", 1, 4, OP_32, 1, 0xffffffff00000000u, ONES },
    { "divw overflow", 1, 4, OP_32, 0x80000000u, 0xffffffffu, 0xffffffff80000000u },
    { "divuw", 1, 5, OP_32, 0xffffffffu, 1, ONES },
    { "divuw halves", 1, 5, OP_32, 0xffffffffu, 2, 0x7fffffff },
    { "divuw by zero", 1, 5, OP_32, 5, 0, ONES },
    { "remw", 1, 6, OP_32, 0xffffffecu, 6, (uint64_t)-2 },
    { "remw by zero", 1, 6, OP_32, 0x80000000u, 0, 0xffffffff80000000u },
    { "remw overflow", 1, 6, OP_32, 0x80000000u, ONES, 0 },
    { "remuw", 1, 7, OP_32, 0xffffffffu, 10, 5 },
    { "remuw by zero extends the sign", 1, 7, OP_32, 0x80000001u, 0, 0xffffffff80000001u },
};

static const struct {
    const char *name;
    uint32_t funct3, opcode;
    int32_t imm;
    uint64_t a, expected;
} immediate_cases[] = {
    { "addi", 0, OP_IMM, -1, 0, ONES },
    { "addi largest", 0, OP_IMM, 2047, 1, 2048 },
    { "addi smallest", 0, OP_IMM, -2048, 0, (uint64_t)-2048 },
    { "slti", 2, OP_IMM, -1, (uint64_t)-2, 1 },
    { "slti not less", 2, OP_IMM, -2, (uint64_t)-1, 0 },
    { "sltiu extends the sign first", 3, OP_IMM, -1, 5, 1 },
    { "sltiu as seqz", 3, OP_IMM, 1, 0, 1 },
    { "sltiu of the largest", 3, OP_IMM, -1, ONES, 0 },
    { "xori", 4, OP_IMM, -1, 0xf0, 0xffffffffffffff0fu },
    { "ori", 6, OP_IMM, -2048, 1, 0xfffffffffffff801u },
    { "andi", 7, OP_IMM, 0xf, 0x1234567f, 0xf },
    { "andi extends the sign", 7, OP_IMM, -16, ONES, (uint64_t)-16 },
    { "slli", 1, OP_IMM, 63, 1, MIN64 },
    { "slli by 32", 1, OP_IMM, 32, 0x1ffffffffu, 0xffffffff00000000u },
    { "srli", 5, OP_IMM, 63, MIN64, 1 },
    { "srai", 5, OP_IMM, 0x400 | 63, MIN64, ONES },
    { "srai of a positive", 5, OP_IMM, 0x400 | 32, 0x7fffffff00000000u, 0x7fffffff },
    { "addiw", 0, OP_IMMW, 1, 0x7fffffff, 0xffffffff80000000u },
    { "addiw as sext.w", 0, OP_IMMW, 0, 0x12345678ffffffffu, ONES },
    { "slliw", 1, OP_IMMW, 31, 0xffffffff00000001u, 0xffffffff80000000u },
    { "srliw", 5, OP_IMMW, 1, 0xffffffffffffffffu, 0x7fffffff },
    { "srliw by 0", 5, OP_IMMW, 0, 0x80000000u, 0xffffffff80000000u },
    { "sraiw", 5, OP_IMMW, 0x400 | 31, 0x80000000u, ONES },
    { "sraiw ignores high bits", 5, OP_IMMW, 0x400 | 4, 0xffffffff00000010u, 1 },
};

#define COUNT(array) (sizeof(array) / sizeof *(array))

static void register_operations(void)
{
    struct bench b = make_bench(&(uint32_t){ NOP }, 1);

    close_bench(&b);
    for (size_t i = 0; i < COUNT(register_cases); i++) {
        /* The result into another register, into the first operand's, and nowhere. */
        const uint32_t rd[] = { 7, 5, 0 };
        uint32_t words[6];

        for (size_t k = 0; k < 3; k++)
            words[k] = r_type(register_cases[i].funct7, 6, k == 2 ? 8 : 5, register_cases[i].funct3, rd[k],
                              register_cases[i].opcode);
        b = make_bench(words, 3);
        b.hart.x[5] = b.hart.x[8] = register_cases[i].a;
        b.hart.x[6] = register_cases[i].b;
        run_bench(&b, 3);
        if (b.hart.x[7] != register_cases[i].expected || b.hart.x[5] != register_cases[i].expected || b.hart.x[0])
            FAIL("%s: 0x%llx, should be 0x%llx", register_cases[i].name, (unsigned long long)b.hart.x[7],
                 (unsigned long long)register_cases[i].expected);
        CHECK_EQ(b.hart.x[6], register_cases[i].b);
        CHECK_EQ(b.hart.pc, PCG_IMAGE + 12);
        close_bench(&b);
    }
}

static void immediate_operations(void)
{
    for (size_t i = 0; i < COUNT(immediate_cases); i++) {
        uint32_t words[] = {
            i_type(immediate_cases[i].imm, 5, immediate_cases[i].funct3, 7, immediate_cases[i].opcode),
            i_type(immediate_cases[i].imm, 5, immediate_cases[i].funct3, 0, immediate_cases[i].opcode),
            addi(8, 0, 0), /* x0 reads as zero after it was "written" */
        };
        struct bench b = make_bench(words, COUNT(words));

        b.hart.x[5] = immediate_cases[i].a;
        b.hart.x[8] = 77;
        run_bench(&b, 3);
        if (b.hart.x[7] != immediate_cases[i].expected)
            FAIL("%s: 0x%llx, should be 0x%llx", immediate_cases[i].name, (unsigned long long)b.hart.x[7],
                 (unsigned long long)immediate_cases[i].expected);
        CHECK_EQ(b.hart.x[8], 0);
        close_bench(&b);
    }
}

static void upper_immediates(void)
{
    const uint32_t words[] = {
        0x80000u << 12 | 5 << 7 | 0x37,  /* lui x5: the sign is extended */
        0x12345u << 12 | 6 << 7 | 0x37,  /* lui x6 */
        0x00001u << 12 | 7 << 7 | 0x17,  /* auipc x7, at +8 */
        0xfffffu << 12 | 28 << 7 | 0x17, /* auipc x28, -4096, at +12 */
        0x12345u << 12 | 0 << 7 | 0x37,  /* lui x0 */
        0x7ffffu << 12 | 29 << 7 | 0x17, /* auipc x29 beyond 31 bits, at +20 */
    };
    struct bench b = make_bench(words, COUNT(words));

    run_bench(&b, COUNT(words));
    CHECK_EQ(b.hart.x[5], 0xffffffff80000000u);
    CHECK_EQ(b.hart.x[6], 0x12345000);
    CHECK_EQ(b.hart.x[7], PCG_IMAGE + 8 + 4096);
    CHECK_EQ(b.hart.x[28], PCG_IMAGE + 12 - 4096);
    CHECK_EQ(b.hart.x[0], 0);
    CHECK_EQ(b.hart.x[29], 0x7ffff000ull + PCG_IMAGE + 20);
    close_bench(&b);
}

/* ---- instructions: where to go on ---- */

static void branches(void)
{
    static const struct {
        uint32_t funct3;
        uint64_t a, b;
        bool taken;
    } cases[] = {
        { 0, 5, 5, true },          { 0, 5, 6, false },         { 0, ONES, ONES, true },   { 0, MIN64, 0, false },
        { 1, 5, 6, true },          { 1, 5, 5, false },         { 4, ONES, 0, true },      { 4, 0, ONES, false },
        { 4, 7, 7, false },         { 4, MIN64, MAX64, true },  { 5, 0, ONES, true },      { 5, 7, 7, true },
        { 5, ONES, 0, false },      { 6, 0, ONES, true },       { 6, ONES, 0, false },     { 6, 7, 7, false },
        { 6, MAX64, MIN64, true },  { 7, ONES, 0, true },       { 7, 7, 7, true },         { 7, 0, ONES, false },
    };

    for (size_t i = 0; i < COUNT(cases); i++)
        for (int backwards = 0; backwards < 2; backwards++) {
            /* Forwards over one instruction, or back over one: the program begins at its third word. */
            const uint32_t words[] = {
                addi(7, 7, 1),
                NOP,
                b_type(backwards ? -8 : 8, 6, 5, cases[i].funct3),
                addi(7, 7, 16),
                addi(7, 7, 64),
            };
            struct bench b = make_bench(words, COUNT(words));

            b.hart.x[5] = cases[i].a;
            b.hart.x[6] = cases[i].b;
            b.hart.pc = PCG_IMAGE + 8;
            run_bench(&b, 2);
            if (b.hart.x[7] != (!cases[i].taken ? 16u : backwards ? 1u : 64u))
                FAIL("branch %u of 0x%llx, 0x%llx: x7 is %llu", cases[i].funct3, (unsigned long long)cases[i].a,
                     (unsigned long long)cases[i].b, (unsigned long long)b.hart.x[7]);
            close_bench(&b);
        }
}

static void jumps(void)
{
    uint32_t words[1024] = { 0 };
    struct bench b;

    words[0] = jal(0x800, 1);                 /* over the bit that the encoding keeps apart */
    words[0x800 / 4] = jal(-0x7f0, 2);        /* back to +0x10 */
    words[0x10 / 4] = i_type(1, 5, 0, 5, 0x67); /* jalr x5, 1(x5): the low bit goes, the link replaces the base last */
    words[0x20 / 4] = i_type(-4, 5, 0, 0, 0x67); /* jalr x0, -4(x5): to +0x10 again */
    b = make_bench(words, COUNT(words));
    b.hart.x[5] = PCG_IMAGE + 0x20;
    run_bench(&b, 3);
    CHECK_EQ(b.hart.x[1], PCG_IMAGE + 4);
    CHECK_EQ(b.hart.x[2], PCG_IMAGE + 0x804);
    CHECK_EQ(b.hart.x[5], PCG_IMAGE + 0x14);
    CHECK_EQ(b.hart.pc, PCG_IMAGE + 0x20);
    run_until(b.machine, 4);
    pc_rv64_get_state(&b.machine->vcpu[0], &b.hart);
    CHECK_EQ(b.hart.pc, PCG_IMAGE + 0x10);
    CHECK_EQ(b.hart.x[0], 0);
    close_bench(&b);
}

/* ---- instructions: memory ---- */

static void loads_and_stores(void)
{
    static const struct {
        uint32_t funct3, bytes;
        uint64_t expected;
    } loads[] = {
        { 0, 1, 0xfffffffffffffff8u }, { 1, 2, 0xfffffffffffff7f8u }, { 2, 4, 0xfffffffff5f6f7f8u },
        { 3, 8, 0xf1f2f3f4f5f6f7f8u }, { 4, 1, 0xf8 },                { 5, 2, 0xf7f8 },
        { 6, 4, 0xf5f6f7f8 },
    };
    const uint64_t value = 0xf1f2f3f4f5f6f7f8u;
    /* Aligned, misaligned within a page, across pages, the last bytes of the block, and the area below the image. */
    uint64_t places[] = { DATA, DATA + 3, DATA + 4096 - 3, 0, PCG_STACKS + 5, PCG_PRIVATE_GVA + 1, 0 };

    for (size_t place = 0; place < COUNT(places); place++)
        for (size_t i = 0; i < COUNT(loads); i++) {
            const uint32_t words[] = {
                i_type(-16, 5, loads[i].funct3, 7, 0x03),
                s_type(16, 7, 6, loads[i].funct3 & 3),
                i_type(-16, 5, loads[i].funct3, 5, 0x03), /* into its own base */
            };
            struct bench b = make_bench(words, COUNT(words));
            uint64_t from = places[place], to, stored = 0, untouched = 0x55;
            uint8_t *target;

            if (place == 3)
                from = b.config.shared.size_bytes - loads[i].bytes;
            if (place == 6)
                from = PCG_PRIVATE_GVA + b.config.private_[0].size_bytes - loads[i].bytes;
            to = place == 3 || place == 6 ? from - 64 : from + 32;
            memcpy(pc_layout_gva(&b.config, from, loads[i].bytes), &value, loads[i].bytes);
            target = pc_layout_gva(&b.config, to, loads[i].bytes + 1);
            memset(target, 0x55, loads[i].bytes + 1);
            b.hart.x[5] = from + 16;
            b.hart.x[6] = to - 16;
            run_bench(&b, 3);
            if (b.hart.x[7] != loads[i].expected || b.hart.x[5] != loads[i].expected)
                FAIL("load %u from 0x%llx: 0x%llx", loads[i].funct3, (unsigned long long)from,
                     (unsigned long long)b.hart.x[7]);
            memcpy(&stored, target, loads[i].bytes);
            CHECK_EQ(memcmp(&stored, &value, loads[i].bytes), 0);
            CHECK_EQ(target[loads[i].bytes], untouched);
            close_bench(&b);
        }
}

static uint32_t amo(uint32_t funct5, uint32_t rs2, uint32_t funct3)
{
    return r_type(funct5 << 2, rs2, 5, funct3, 7, 0x2f);
}

static void atomics(void)
{
    static const struct {
        const char *name;
        uint32_t funct5;
        uint64_t memory, operand, word, doubleword; /* what memory holds afterwards; words: the low half */
    } cases[] = {
        { "add", 0, 0xffffffff7fffffffu, 1, 0x80000000u, 0xffffffff80000000u },
        { "swap", 1, 1, 0x123456789abcdef0u, 0x9abcdef0u, 0x123456789abcdef0u },
        { "xor", 4, 0xff00, 0xfff, 0xf0ff, 0xf0ff },
        { "or", 8, 0xff00, 0xfff, 0xffff, 0xffff },
        { "and", 12, 0xff00, 0xfff, 0xf00, 0xf00 },
        { "min", 16, 0xffffffffffffffffu, 1, 0xffffffffu, ONES },
        { "min other", 16, 5, (uint64_t)-5, (uint32_t)-5, (uint64_t)-5 },
        { "max", 20, 0xffffffffffffffffu, 1, 1, 1 },
        { "minu", 24, 0xffffffffffffffffu, 1, 1, 1 },
        { "maxu", 28, 1, 0xffffffffffffffffu, 0xffffffffu, ONES },
    };

    for (size_t i = 0; i < COUNT(cases); i++)
        for (uint32_t funct3 = 2; funct3 <= 3; funct3++) {
            const uint32_t words[] = { amo(cases[i].funct5, 6, funct3) };
            struct bench b = make_bench(words, 1);
            uint64_t *memory = pc_layout_gva(&b.config, DATA, 8);
            uint64_t found;

            *memory = cases[i].memory;
            b.hart.x[5] = DATA;
            b.hart.x[6] = cases[i].operand;
            run_bench(&b, 1);
            found = funct3 == 2 ? (uint32_t)*memory : *memory;
            if (found != (funct3 == 2 ? cases[i].word : cases[i].doubleword))
                FAIL("amo%s %u: memory has 0x%llx", cases[i].name, funct3, (unsigned long long)*memory);
            if (funct3 == 2)
                CHECK_EQ(*memory >> 32, cases[i].memory >> 32);
            CHECK_EQ(b.hart.x[7], funct3 == 2 ? (uint64_t)(int64_t)(int32_t)cases[i].memory : cases[i].memory);
            close_bench(&b);
        }
}

static void reservations(void)
{
    for (uint32_t funct3 = 2; funct3 <= 3; funct3++) {
        const uint32_t words[] = {
            amo(2, 0, funct3),                 /* lr x7 */
            amo(3, 6, funct3),                 /* sc: succeeds, 0 */
            addi(8, 7, 0),
            amo(3, 6, funct3),                 /* sc without a reservation: 1 */
            addi(9, 7, 0),
            amo(2, 0, funct3),                 /* lr, then a store that changes it, then sc: 1 */
            s_type(0, 10, 5, 2),
            amo(3, 6, funct3),
        };
        struct bench b = make_bench(words, COUNT(words));
        uint64_t *memory = pc_layout_gva(&b.config, DATA, 8);

        *memory = 41;
        b.hart.x[5] = DATA;
        b.hart.x[6] = 42;
        b.hart.x[10] = 43;
        run_bench(&b, COUNT(words));
        CHECK_EQ(b.hart.x[8], 0);
        CHECK_EQ(b.hart.x[9], 1);
        CHECK_EQ(b.hart.x[7], 1);
        CHECK_EQ(*memory, 43);
        close_bench(&b);
    }
}

static void control_registers(void)
{
    const uint32_t words[] = {
        i_type(0x340, 5, 1, 7, 0x73),  /* csrrw x7, mscratch, x5 */
        i_type(0x340, 6, 2, 8, 0x73),  /* csrrs */
        i_type(0x340, 6, 3, 9, 0x73),  /* csrrc */
        i_type(0x340, 21, 5, 10, 0x73), /* csrrwi 21 */
        i_type(0x340, 2, 6, 11, 0x73), /* csrrsi 2 */
        i_type(0x340, 1, 7, 12, 0x73), /* csrrci 1 */
        i_type(0x340, 0, 2, 13, 0x73), /* csrr */
        i_type((int32_t)0xfffffc02, 0, 2, 14, 0x73), /* csrr x14, instret */
        i_type((int32_t)0xffffff14, 0, 2, 15, 0x73), /* csrr x15, mhartid */
        0x0ff0000f, 0x0000100f, 0x0100000f, /* fence, fence.i, pause */
    };
    struct bench b = make_bench(words, COUNT(words));

    b.hart.mscratch = 1;
    b.hart.x[5] = 0xf0;
    b.hart.x[6] = 0x18;
    b.hart.x[15] = 9;
    run_bench(&b, COUNT(words));
    CHECK_EQ(b.hart.x[7], 1);
    CHECK_EQ(b.hart.x[8], 0xf0);
    CHECK_EQ(b.hart.x[9], 0xf8);
    CHECK_EQ(b.hart.x[10], 0xe0);
    CHECK_EQ(b.hart.x[11], 21);
    CHECK_EQ(b.hart.x[12], 23);
    CHECK_EQ(b.hart.x[13], 22);
    CHECK_EQ(b.hart.x[14], 7); /* executed before it */
    CHECK_EQ(b.hart.x[15], 0);
    close_bench(&b);
}

/* Registers of devices: an empty one reads as all ones, the serial line is counted, entropy follows from the seed. */
static void devices(void)
{
    static const uint64_t expected[] = { ONES, ONES, ONES, 0xffffffff, 0xff, 0xffff, 0xffffffff };
    uint32_t words[9];
    struct pc_hart_state first;
    struct bench b;

    for (uint32_t funct3 = 0; funct3 < 7; funct3++)
        words[funct3] = i_type(0x700, 5, funct3, 16 + funct3, 0x03);
    words[7] = s_type(PCG_PORT_SERIAL, 6, 5, 0);
    words[8] = i_type(PCG_PORT_ENTROPY, 5, 2, 7, 0x03);
    for (int again = 0; again < 2; again++) {
        b = make_bench(words, COUNT(words));
        b.hart.x[5] = PCG_MMIO;
        run_bench(&b, COUNT(words));
        for (uint32_t i = 0; i < 7; i++)
            CHECK_EQ(b.hart.x[16 + i], expected[i]);
        CHECK_EQ(stats_of(b.machine).serial_bytes, 1);
        CHECK_EQ(b.hart.entropy_draws, 1);
        CHECK(!again || first.x[7] == b.hart.x[7]);
        first = b.hart;
        close_bench(&b);
    }
}

/* Requests that no disk would do are refused, whatever memory they name. */
static void refuses_disk_requests(void)
{
    static const uint64_t requests[][4] = {
        /* what, offset, address, bytes */
        { 1, 0, DATA, 4096 },             { 3, 0, DATA, 4096 },           { 1, 0, PCG_MMIO, 4096 },
        { 1, 0, DATA, 0 },                { 1, 0, DATA, ONES },           { 2, ONES - 4095, DATA, 4096 },
        { 2, 0, ONES - 4095, 4096 },      { 1, 0, DATA, PCG_DISK_REQUEST_MAX + 4096 },
    };
    const uint32_t words[] = { s_type(0, 6, 5, 2), i_type(4, 5, 2, 7, 0x03) };

    for (size_t i = 0; i < COUNT(requests); i++) {
        struct bench b = make_bench(words, COUNT(words)); /* which has no disk, so that even a good one is refused */

        b.hart.x[5] = PCG_MMIO + PCG_PORT_DISK;
        b.hart.x[6] = requests[i][0];
        b.hart.x[11] = requests[i][1];
        b.hart.x[12] = requests[i][2];
        b.hart.x[13] = requests[i][3];
        run_bench(&b, 2);
        CHECK_EQ(b.hart.x[7], PCG_DISK_BAD_REQUEST);
        CHECK_EQ(stats_of(b.machine).disk_errors, 1);
        close_bench(&b);
    }
}

static void impossible_programs_fail(void)
{
    static const uint32_t illegal[] = {
        0x00000000, 0xffffffff, 0x00000001 /* compressed */, 0x00002063 /* branch 2 */, 0x00007003 /* load 7 */,
        0x00004023 /* store 4 */, 0x40001013 /* slli with an odd top */, 0x0200101b /* slliw by 32 */,
        0x40007033 /* and, funct7 0x20 */, 0x02001033 | 1u << 26 /* funct7 3 */, 0x0200103b /* no mulhw */,
        0x30200073 /* mret */, 0x00004073 /* system 4 */, 0x1005202f /* lr.w with rs2... */ | 1u << 20, 0x0005102f,
        0x30001073 /* csrw mstatus */, 0xc0001073 /* csrw cycle */, 0x00002067 /* jalr 2 */, 0x0000200f,
    };
    struct pc_hart_state hart = { 0 };
    uint32_t words[4] = { NOP };

    for (size_t i = 0; i < COUNT(illegal); i++) {
        char text[64];

        words[1] = illegal[i];
        (void)snprintf(text, sizeof text, "illegal instruction 0x%08x, PC 0x20004", illegal[i]);
        must_fail(words, 2, hart, text, PCG_IMAGE + 4);
    }
    hart.x[5] = 0x7fffffff0000;
    words[1] = i_type(8, 5, 3, 7, 0x03);
    must_fail(words, 2, hart, "load from 0x7fffffff0008, where no memory is", PCG_IMAGE + 4);
    words[1] = s_type(8, 6, 5, 3);
    must_fail(words, 2, hart, "store to 0x7fffffff0008, where no memory is", PCG_IMAGE + 4);
    words[1] = amo(0, 6, 3);
    must_fail(words, 2, hart, "atomic access to 0x7fffffff0000", PCG_IMAGE + 4);
    hart.x[5] = DATA + 4;
    must_fail(words, 2, hart, "atomic access to 0x100004, which is not memory or not aligned", PCG_IMAGE + 4);
    hart.x[5] = ONES - 3; /* wraps */
    words[1] = i_type(0, 5, 3, 7, 0x03);
    must_fail(words, 2, hart, "load from 0xfffffffffffffffc, where no memory is", PCG_IMAGE + 4);
    hart.x[5] = PCG_IMAGE - 4; /* reaches into the program */
    words[1] = s_type(0, 6, 5, 3);
    must_fail(words, 2, hart, "store to 0x1fffc", PCG_IMAGE + 4);
    hart.x[5] = PCG_IMAGE_END - 1;
    words[1] = s_type(0, 6, 5, 0);
    must_fail(words, 2, hart, "instructions cannot be written", PCG_IMAGE + 4);
    words[1] = 0x00000073;
    must_fail(words, 2, hart, "environment call", PCG_IMAGE + 4);
    words[1] = 0x00100073;
    must_fail(words, 2, hart, "breakpoint", PCG_IMAGE + 4);
    words[1] = jal(-8, 1);
    must_fail(words, 2, hart, "jump to where no instruction can be", PCG_IMAGE + 4);
    words[1] = jal(6, 1);
    must_fail(words, 2, hart, "jump to where no instruction can be", PCG_IMAGE + 4);
    words[1] = b_type(-8, 0, 0, 0);
    must_fail(words, 2, hart, "branch to where no instruction can be", PCG_IMAGE + 4);
    hart.x[5] = DATA;
    words[1] = i_type(0, 5, 0, 1, 0x67);
    must_fail(words, 2, hart, "jump to 0x100000", PCG_IMAGE + 4);
    hart.x[5] = PCG_IMAGE + 2;
    must_fail(words, 2, hart, "jump to 0x20002", PCG_IMAGE + 4);
    words[1] = b_type(-8, 0, 0, 1); /* not taken: harmless */
    words[2] = 0x00100073;
    must_fail(words, 3, hart, "breakpoint", PCG_IMAGE + 8);
}

/* A straight run to the end of the area, as long as there can be one: counted and stopped exactly, then found out. */
static void stops_exactly_in_a_straight_run(void)
{
    uint32_t count = (PCG_IMAGE_END - PCG_IMAGE) / 4, *words = calloc(count, 4);
    struct bench b;
    uint64_t now;

    CHECK(words != NULL);
    for (uint32_t i = 0; i < count; i++)
        words[i] = addi(7, 7, 1);
    b = make_bench(words, count);
    run_bench(&b, 1);
    CHECK_EQ(b.hart.x[7], 1);
    for (uint64_t until = 2; until < count; until += 1 + until) {
        run_until(b.machine, until);
        pc_rv64_get_state(&b.machine->vcpu[0], &b.hart);
        CHECK_EQ(b.hart.x[7], until);
        CHECK_EQ(b.hart.pc, PCG_IMAGE + 4 * until);
    }
    CHECK_EQ(pc_rv64_run_until(b.machine, count + 1, RUN_MS, error, sizeof error), -EIO);
    CHECK(strstr(error, "not for instructions"));
    CHECK_EQ(pc_rv64_instructions(b.machine, 0, &now), 0);
    CHECK_EQ(now, count);
    close_bench(&b);
    free(words);
}

/* ---- workloads ---- */

static void workload(uint32_t kind, uint32_t harts, uint64_t more)
{
    struct pc_machine_config config = make_config(kind, harts, 16 * MIB);
    struct pc_machine *machine = boot_machine(&config);

    run_past_ready(machine, more);
    verify(machine);
    run_past_ready(machine, more * 2);
    verify(machine);
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
    drop(&config);
}

static void workload_idle(void) { workload(PC_WORKLOAD_IDLE, 2, 1); }
static void workload_dirty(void) { workload(PC_WORKLOAD_DIRTY, 2, 5000); }
static void workload_random(void) { workload(PC_WORKLOAD_RANDOM, 1, 5000); }
static void workload_random_eight_harts(void) { workload(PC_WORKLOAD_RANDOM, 8, 2000); }
static void workload_disk(void) { workload(PC_WORKLOAD_DISK, 2, 100); }

/* ---- determinism ---- */

struct fingerprint {
    uint64_t digest[2];
    struct saved state;
};

static void take(struct pc_machine *machine, struct pc_machine_config *config, struct fingerprint *to)
{
    for (uint32_t i = 0; i < 2; i++)
        CHECK_EQ(pc_memory_digest(block(config, i), &to->digest[i]), 0);
    save(machine, &to->state);
}

static void check_same(const struct fingerprint *a, const struct fingerprint *b)
{
    CHECK_EQ(a->digest[0], b->digest[0]);
    CHECK_EQ(a->digest[1], b->digest[1]);
    CHECK_EQ(a->state.count, b->state.count);
    CHECK_EQ(memcmp(a->state.bytes, b->state.bytes, (size_t)a->state.count), 0);
}

#define TOTAL 4000000

static void reference(const struct pc_machine_config *config, struct fingerprint *to)
{
    struct pc_machine_config twin = make_twin(config);
    struct pc_machine *machine = boot_machine(&twin);

    run_until(machine, TOTAL);
    take(machine, &twin, to);
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
    drop(&twin);
}

/* The same after so many instructions, however often it was moved on the way, and at whatever instruction. */
static void moved_often(uint32_t kind)
{
    struct pc_machine_config config = make_config(kind, 1, 16 * MIB);
    static struct fingerprint expected, found;
    static struct saved state;
    struct pc_machine *machine = boot_machine(&config);
    uint64_t at = 0;

    reference(&config, &expected);
    for (int moves = 0; moves < 12; moves++) {
        struct pc_machine_config twin = make_twin(&config);
        struct pc_machine *next = open_machine(&twin);

        at += 1 + test_below(TOTAL / 13);
        run_until(machine, at);
        save(machine, &state);
        for (uint32_t i = 0; i < 2; i++)
            memcpy(block(&twin, i)->base, block(&config, i)->base, block(&config, i)->size_bytes);
        load(next, &state);
        CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
        drop(&config);
        config = twin;
        machine = next;
    }
    run_until(machine, TOTAL);
    take(machine, &config, &found);
    check_same(&found, &expected);
    verify(machine);
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
    drop(&config);
}

static void the_same_however_often_moved_dirty(void) { moved_often(PC_WORKLOAD_DIRTY); }
static void the_same_however_often_moved_random(void) { moved_often(PC_WORKLOAD_RANDOM); }

static void the_same_however_often_moved_disk(void) { moved_often(PC_WORKLOAD_DISK); }

static void another_seed_is_another_machine(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB);
    static struct fingerprint one, other;

    reference(&config, &one);
    config.seed++;
    reference(&config, &other);
    CHECK(one.digest[0] != other.digest[0]);
    drop(&config);
}

/* ---- postcopy ---- */

static void user_uffd_or_skip(void)
{
    struct pc_uffd_api api;

    if (pc_uffd_probe(PC_UFFD_USER_ONLY, &api))
        SKIP("uffd-user", "no userfaultfd, not even for user-mode faults");
}

/* Moves a paused machine with the real engine, over a userfaultfd that nobody needs rights for; every page on demand or by
 * push. Returns the machine at the destination, running or not yet resumed. */
struct move {
    struct pc_pager *pager;
    struct pc_pageserver *server;
};

static struct move begin_move(struct pc_machine_config *from, struct pc_machine_config *to, bool bulk)
{
    struct move m;
    uint32_t shards = from->vcpus + 1;

    CHECK_EQ(pc_pager_new(&m.pager), 0);
    CHECK_EQ(pc_pageserver_new(0, &m.server), 0);
    for (uint32_t i = 0; i < shards; i++) {
        uint64_t pages = block(to, i)->size_bytes / 4096, words = pc_bitmap_words(pages);
        uint64_t *present = calloc(words, 8), *zero = calloc(words, 8);
        int pair[2];

        CHECK(present && zero);
        CHECK_EQ(pc_memory_present(block(from, i), present), 0);
        for (uint64_t page = 0; page < pages; page++)
            if (!(present[page / 64] >> page % 64 & 1))
                zero[page / 64] |= 1ull << page % 64;
        CHECK_EQ(pc_pager_add_block(m.pager, block(to, i)), i);
        CHECK_EQ(pc_pager_set_zero(m.pager, i, zero), 0);
        CHECK_EQ(pc_pager_add_shard(m.pager, PC_UFFD_USER_ONLY, 0, error, sizeof error), i);
        CHECK_EQ(pc_pager_arm(m.pager, i, i, 0, pages, error, sizeof error), 0);
        CHECK_EQ(pc_pageserver_add_block(m.server, block(from, i), 4096), i);
        CHECK_EQ(pc_pageserver_set_present(m.server, i, present), 0);
        CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
        CHECK_EQ(pc_pager_attach_urgent(m.pager, i, pair[0]), 0);
        CHECK_EQ(pc_pageserver_attach_urgent(m.server, i, pair[1], 0), 0);
        free(present);
        free(zero);
    }
    if (bulk) {
        int pair[2];

        CHECK_SYS(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair));
        CHECK_EQ(pc_pager_attach_bulk(m.pager, 0, pair[0]), 0);
        CHECK_EQ(pc_pageserver_attach_bulk(m.server, 0, pair[1]), 0);
    }
    return m;
}

static void wait_complete(struct pc_pager *pager)
{
    struct pollfd ring = { .fd = pc_pager_event_fd(pager), .events = POLLIN };
    struct pc_event event;
    uint64_t count;

    for (;;) {
        while (pc_pager_next_event(pager, &event) == 1) {
            if (event.type == PC_EVENT_COMPLETE)
                return;
            if (event.type == PC_EVENT_FATAL || event.type == PC_EVENT_CHANNEL_DOWN)
                FAIL("%s", event.text);
        }
        CHECK(poll(&ring, 1, RUN_MS) == 1);
        (void)!read(ring.fd, &count, sizeof count);
    }
}

static void end_move(struct move *m)
{
    CHECK_EQ(pc_pager_disarm(m->pager), 0);
    CHECK_EQ(pc_pager_free(m->pager), 0);
    pc_pageserver_free(m->server);
}

/* One move in the middle through the engine, the same bits in the end: each page comes because the guest touched it, and
 * then the rest on request. */
static void the_same_when_moved_by_postcopy(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB), twin = make_twin(&config);
    static struct fingerprint expected, found;
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_pager_stats stats;
    struct move m;

    user_uffd_or_skip();
    reference(&config, &expected);
    source = boot_machine(&config);
    run_until(source, TOTAL / 2 + test_below(1000));
    save(source, &state);
    m = begin_move(&config, &twin, false);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    dest = open_machine(&twin);
    load(dest, &state);
    run_until(dest, TOTAL);
    CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    CHECK(stats.demand_pages > 100);
    CHECK(stats.resident_pages < stats.total_pages);
    while (stats.resident_pages < stats.total_pages) {
        CHECK(pc_pager_request_missing(m.pager, 256) >= 0);
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    }
    wait_complete(m.pager);
    end_move(&m);
    take(dest, &twin, &found);
    check_same(&found, &expected);
    verify(dest);
    CHECK_EQ(pc_machine_close(dest, RUN_MS), 0);
    CHECK_EQ(pc_machine_close(source, RUN_MS), 0);
    drop(&config);
    drop(&twin);
}

static void moves_live(uint32_t kind, uint32_t harts, uint64_t more)
{
    struct pc_machine_config config = make_config(kind, harts, 16 * MIB), twin = make_twin(&config);
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_machine_stats before;
    struct move m;

    user_uffd_or_skip();
    source = boot_machine(&config);
    run_past_ready(source, more);
    before = stats_of(source);
    save(source, &state);
    m = begin_move(&config, &twin, true);
    dest = open_machine(&twin);
    load(dest, &state);
    CHECK_EQ(pc_machine_resume(dest), 0);
    CHECK_EQ(pc_pageserver_start(m.server), 0); /* only now: everything the guest touches first is missing */
    wait_complete(m.pager);
    run_past_ready(dest, before.vcpu[0].operations + more);
    end_move(&m);
    verify(dest);
    CHECK_EQ(stats_of(dest).nonce, before.nonce);
    CHECK_EQ(stats_of(dest).disk_errors, 0);
    CHECK_EQ(pc_machine_close(dest, RUN_MS), 0);
    CHECK_EQ(pc_machine_close(source, RUN_MS), 0);
    drop(&config);
    drop(&twin);
}

static void moves_dirty(void) { moves_live(PC_WORKLOAD_DIRTY, 2, 5000); }
static void moves_random(void) { moves_live(PC_WORKLOAD_RANDOM, 4, 1000); }
static void moves_disk(void) { moves_live(PC_WORKLOAD_DISK, 2, 100); }

#if defined(__SANITIZE_THREAD__)
#define SIGNALS_WAIT "TSan delivers a signal only when its thread makes a call, which a thread in a page fault does not"
#endif

/* Each kind of access waits for its page, is stopped there with its instruction not done, and is done once the page has
 * come. Misaligned ones wait for their second page. */
static void every_access_can_be_paused(void)
{
    static const struct {
        const char *name;
        uint64_t x5;      /* address */
        uint64_t missing; /* the page that is */
        uint32_t word;    /* index in `kinds` */
    } cases[] = {
        { "load", DATA + 8, DATA, 0 },
        { "store", DATA + 8, DATA, 1 },
        { "byte store", DATA + 4095, DATA, 2 },
        { "load across pages", DATA - 4, DATA, 0 },
        { "store across pages", DATA - 4, DATA, 1 },
        { "add", DATA + 16, DATA, 3 },
        { "load reserved", DATA + 16, DATA, 4 },
        { "store in the low area", PCG_STACKS + 8, PCG_STACKS, 1 },
        { "private store", PCG_PRIVATE_GVA + 8, PCG_PRIVATE_GVA, 1 },
        { "disk write from its first page", PCG_MMIO + PCG_PORT_DISK, DATA, 5 },
        { "disk write from its last page", PCG_MMIO + PCG_PORT_DISK, DATA + 8192, 5 },
        { "fetch", PCG_IMAGE + 4096, PCG_IMAGE + 4096, 6 },
    };
    const uint32_t kinds[] = { i_type(0, 5, 3, 7, 0x03), s_type(0, 6, 5, 3), s_type(0, 6, 5, 0), amo(0, 6, 3),
                               amo(2, 0, 3),             s_type(0, 6, 5, 2), i_type(0, 5, 0, 0, 0x67) };

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    for (size_t i = 0; i < COUNT(cases); i++) {
        const uint32_t words[1024] = { NOP, kinds[cases[i].word], NOP };
        struct bench b = { .config = make_config(PC_WORKLOAD_IDLE, 1, 16 * MIB) };
        struct pc_hart_state before, after;
        struct pc_uffd_api api;
        struct pc_uffd_event event;
        uint8_t *page = pc_layout_gva(&b.config, cases[i].missing, 4096);
        uint64_t ioctls, done, fetch = cases[i].word == 6;
        int uffd = pc_uffd_open(PC_UFFD_USER_ONLY, 0, &api), n;
        struct pollfd fault = { .fd = uffd, .events = POLLIN };

        CHECK(uffd >= 0);
        b.machine = open_machine(&b.config);
        CHECK_EQ(pc_machine_boot(b.machine), 0); /* writes low memory and the program, so that the rest comes after it */
        memcpy((uint8_t *)b.config.shared.base + PCG_IMAGE, words, 3 * sizeof *words);
        if (fetch)
            CHECK_SYS(madvise(page, 4096, MADV_REMOVE));
        CHECK_EQ(pc_uffd_register(uffd, (uint64_t)(uintptr_t)page, 4096, PC_UFFD_MISSING, &ioctls), 0);
        before = (struct pc_hart_state){ .pc = PCG_IMAGE };
        before.x[5] = cases[i].x5;
        before.x[6] = 2;
        before.x[7] = 77;
        before.x[12] = DATA;
        before.x[13] = 12288;
        pc_rv64_set_state(&b.machine->vcpu[0], &before);
        CHECK_EQ(pc_machine_resume(b.machine), 0);
        CHECK(poll(&fault, 1, RUN_MS) == 1);
        while ((n = pc_uffd_read(uffd, &event, 1)) == 0)
            ;
        CHECK_EQ(n, 1);
        CHECK_EQ(event.address & ~4095ull, (uintptr_t)page);
        if (pc_machine_pause(b.machine, RUN_MS, error, sizeof error))
            FAIL("%s: %s", cases[i].name, error);
        pc_rv64_get_state(&b.machine->vcpu[0], &after);
        before.pc = fetch ? PCG_IMAGE + 4096 : PCG_IMAGE + 4;
        before.instructions = 1 + fetch;
        if (memcmp(&before, &after, sizeof after))
            FAIL("%s: stopped at 0x%llx after %llu instructions", cases[i].name, (unsigned long long)after.pc,
                 (unsigned long long)after.instructions);
        if (fetch)
            CHECK_EQ(pc_uffd_copy(uffd, (uint64_t)(uintptr_t)page, words, 4096, 0, &done), 0);
        else
            CHECK_EQ(pc_uffd_zeropage(uffd, (uint64_t)(uintptr_t)page, 4096, 0, &done), 0);
        run_until(b.machine, 3);
        pc_rv64_get_state(&b.machine->vcpu[0], &after);
        CHECK_EQ(after.pc, fetch ? PCG_IMAGE + 4096 + 4 : PCG_IMAGE + 12);
        if (cases[i].word == 1)
            CHECK_EQ(*(uint8_t *)pc_layout_gva(&b.config, cases[i].x5, 1), 2);
        if (cases[i].word == 0 || cases[i].word == 3)
            CHECK_EQ(after.x[7], 0);
        close(uffd);
        close_bench(&b);
    }
}

/* A hart that waits for a page is stopped with its instruction not done, its state moves on, and the twin does it. */
static void pauses_on_a_missing_page(uint32_t kind)
{
    struct pc_machine_config config = make_config(kind, 1, 16 * MIB), twin = make_twin(&config), third = make_twin(&config);
    static struct fingerprint expected, found;
    static struct saved state, again;
    struct pc_machine *source, *dest, *last;
    struct pc_pager_stats stats;
    struct move m;

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    source = boot_machine(&config);
    if (kind == PC_WORKLOAD_DISK) {
        run_past_ready(source, 64);
    } else {
        reference(&config, &expected);
        run_until(source, TOTAL / 2);
    }
    save(source, &state);
    m = begin_move(&config, &twin, true); /* not started: no page comes */
    dest = open_machine(&twin);
    load(dest, &state);
    CHECK_EQ(pc_machine_resume(dest), 0);
    do {
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
        (void)sched_yield();
    } while (stats.faults == 0);
    if (pc_machine_pause(dest, RUN_MS, error, sizeof error))
        FAIL("%s", error);
    save(dest, &again);
    /* It had not even its first instruction. */
    CHECK_EQ(again.count, state.count);
    CHECK_EQ(memcmp(again.bytes, state.bytes, (size_t)state.count), 0);
    CHECK_EQ(pc_machine_resume(dest), 0);
    CHECK_EQ(pc_machine_pause(dest, RUN_MS, error, sizeof error), 0);
    CHECK_EQ(pc_machine_close(dest, RUN_MS), 0);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    wait_complete(m.pager);
    end_move(&m);
    for (uint32_t i = 0; i < 2; i++)
        memcpy(block(&third, i)->base, block(&twin, i)->base, block(&twin, i)->size_bytes);
    last = open_machine(&third);
    load(last, &again);
    if (kind == PC_WORKLOAD_DISK) {
        run_past_ready(last, 300);
    } else {
        run_until(last, TOTAL);
        take(last, &third, &found);
        check_same(&found, &expected);
    }
    verify(last);
    CHECK_EQ(pc_machine_close(last, RUN_MS), 0);
    CHECK_EQ(pc_machine_close(source, RUN_MS), 0);
}

static void pauses_random_on_a_missing_page(void) { pauses_on_a_missing_page(PC_WORKLOAD_RANDOM); }
static void pauses_disk_on_a_missing_page(void) { pauses_on_a_missing_page(PC_WORKLOAD_DISK); }

/* Stopped again and again while pages trickle in, each at another kind of access: loads, stores, atomics, requests. */
static void survives_many_pauses(uint32_t kind)
{
    struct pc_machine_config config = make_config(kind, 2, 16 * MIB), twin = make_twin(&config);
    static struct saved state;
    struct pc_machine *source, *dest;
    struct pc_pager_stats stats;
    struct move m;

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    user_uffd_or_skip();
    source = boot_machine(&config);
    run_past_ready(source, 100);
    save(source, &state);
    m = begin_move(&config, &twin, false);
    CHECK_EQ(pc_pageserver_start(m.server), 0);
    dest = open_machine(&twin);
    load(dest, &state);
    for (int i = 0; i < 200; i++) {
        CHECK_EQ(pc_machine_resume(dest), 0);
        if (pc_machine_pause(dest, RUN_MS, error, sizeof error))
            FAIL("%s", error);
    }
    run_past_ready(dest, 3000);
    do {
        CHECK(pc_pager_request_missing(m.pager, 256) >= 0);
        CHECK_EQ(pc_pager_stats(m.pager, &stats), 0);
    } while (stats.resident_pages < stats.total_pages);
    wait_complete(m.pager);
    end_move(&m);
    verify(dest);
    CHECK_EQ(pc_machine_close(dest, RUN_MS), 0);
    CHECK_EQ(pc_machine_close(source, RUN_MS), 0);
}

static void survives_many_pauses_random(void) { survives_many_pauses(PC_WORKLOAD_RANDOM); }
static void survives_many_pauses_disk(void) { survives_many_pauses(PC_WORKLOAD_DISK); }

/* ---- state from elsewhere ---- */

static void refuses_a_damaged_state(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB), twin = make_twin(&config);
    static struct saved good, bad;
    struct pc_machine *machine = boot_machine(&config), *other;
    struct pc_hart_state hart;

    run_until(machine, 1000);
    save(machine, &good);
    other = open_machine(&twin);
    for (int64_t at = 0; at < good.count; at += 1 + (int64_t)test_below(7)) {
        bad = good;
        bad.bytes[at] ^= (uint8_t)(1 + test_below(255));
        CHECK(pc_machine_load_state(other, bad.bytes, (size_t)bad.count, error, sizeof error) < 0);
    }
    for (int64_t cut = 0; cut < good.count; cut += 5)
        CHECK(pc_machine_load_state(other, good.bytes, (size_t)cut, error, sizeof error) < 0);
    /* A whole blob that says something impossible. */
    pc_rv64_get_state(&machine->vcpu[0], &hart);
    hart.pc = DATA;
    pc_rv64_set_state(&machine->vcpu[0], &hart);
    save(machine, &bad);
    CHECK_EQ(pc_machine_load_state(other, bad.bytes, (size_t)bad.count, error, sizeof error), -EBADMSG);
    CHECK(strstr(error, "HART"));
    load(other, &good);
    run_until(other, 1000);
    CHECK_EQ(pc_machine_close(other, RUN_MS), 0);
    twin.seed++;
    other = open_machine(&twin);
    CHECK_EQ(pc_machine_load_state(other, good.bytes, (size_t)good.count, error, sizeof error), -EINVAL);
    CHECK(strstr(error, "seed"));
    CHECK_EQ(pc_machine_close(other, RUN_MS), 0);
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
}

/* Prints; `postcopy bench rv64` judges. */
static void speed(void)
{
    struct pc_machine_config config = make_config(PC_WORKLOAD_RANDOM, 1, 16 * MIB);
    struct pc_machine *machine = boot_machine(&config);
    uint64_t begin_ns = pc_now_ns(), took_ns;

    run_until(machine, 100000000);
    took_ns = pc_now_ns() - begin_ns;
    (void)printf("     random: %llu million instructions a second\n", 100000000000ull / took_ns);
    CHECK_EQ(pc_machine_close(machine, RUN_MS), 0);
    drop(&config);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(register_operations);
    RUN(immediate_operations);
    RUN(upper_immediates);
    RUN(branches);
    RUN(jumps);
    RUN(loads_and_stores);
    RUN(atomics);
    RUN(reservations);
    RUN(control_registers);
    RUN(devices);
    RUN(refuses_disk_requests);
    RUN(impossible_programs_fail);
    RUN(stops_exactly_in_a_straight_run);
    RUN(workload_idle);
    RUN(workload_dirty);
    RUN(workload_random);
    RUN(workload_random_eight_harts);
    RUN(workload_disk);
    RUN(the_same_however_often_moved_dirty);
    RUN(the_same_however_often_moved_random);
    RUN(the_same_however_often_moved_disk);
    RUN(another_seed_is_another_machine);
    RUN(the_same_when_moved_by_postcopy);
    RUN(moves_dirty);
    RUN(moves_random);
    RUN(moves_disk);
    RUN(every_access_can_be_paused);
    RUN(pauses_random_on_a_missing_page);
    RUN(pauses_disk_on_a_missing_page);
    RUN(survives_many_pauses_random);
    RUN(survives_many_pauses_disk);
    RUN(refuses_a_damaged_state);
    RUN(speed);
    return test_end();
}
