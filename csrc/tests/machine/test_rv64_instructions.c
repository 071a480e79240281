/* SPDX-License-Identifier: Apache-2.0
 *
 * What each instruction of the rv64 machine does, and what it refuses.
 */
#include "tests/machine/harts.h"

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
    return test_end();
}
