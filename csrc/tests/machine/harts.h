/* SPDX-License-Identifier: Apache-2.0
 *
 * What the tests of the rv64 machine share: an assembler, and a hart that stands before a program.
 */
#ifndef PC_TESTS_RV64_HARTS_H
#define PC_TESTS_RV64_HARTS_H

#include "machine/rv64.h"
#include "tests/machine/machines.h"

#define DATA 0x100000 /* in the shared block, past everything a program of these tests has */
#define COUNT(array) PC_ARRAY_LENGTH(array)

__attribute__((unused)) static void run_until(struct pc_machine *machine, uint64_t instructions)
{
    uint64_t now;

    if (pc_rv64_run_until(machine, instructions, RUN_MS, error, sizeof error))
        FAIL("%s", error);
    for (uint32_t i = 0; i < machine->config.vcpus; i++) {
        CHECK_EQ(pc_rv64_instructions(machine, i, &now), 0);
        CHECK_EQ(now, instructions);
    }
}

/* ---- an assembler ---- */

__attribute__((unused)) static uint32_t r_type(uint32_t funct7, uint32_t rs2, uint32_t rs1, uint32_t funct3, uint32_t rd, uint32_t opcode)
{
    return funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode;
}

__attribute__((unused)) static uint32_t i_type(int32_t imm, uint32_t rs1, uint32_t funct3, uint32_t rd, uint32_t opcode)
{
    return (uint32_t)imm << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | opcode;
}

__attribute__((unused)) static uint32_t s_type(int32_t imm, uint32_t rs2, uint32_t rs1, uint32_t funct3)
{
    return ((uint32_t)imm >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | ((uint32_t)imm & 0x1f) << 7 | 0x23;
}

__attribute__((unused)) static uint32_t b_type(int32_t imm, uint32_t rs2, uint32_t rs1, uint32_t funct3)
{
    uint32_t u = (uint32_t)imm;

    return (u >> 12 & 1) << 31 | (u >> 5 & 0x3f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (u >> 1 & 0xf) << 8 |
           (u >> 11 & 1) << 7 | 0x63;
}

__attribute__((unused)) static uint32_t jal(int32_t imm, uint32_t rd)
{
    uint32_t u = (uint32_t)imm;

    return (u >> 20 & 1) << 31 | (u >> 1 & 0x3ff) << 21 | (u >> 11 & 1) << 20 | (u >> 12 & 0xff) << 12 | rd << 7 | 0x6f;
}

__attribute__((unused)) static uint32_t addi(uint32_t rd, uint32_t rs1, int32_t imm)
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

__attribute__((unused)) static struct bench make_bench(const uint32_t *words, size_t count)
{
    struct bench b = { .config = make_config(PC_ENGINE_RV64, PC_WORKLOAD_IDLE, 1, PC_MEMORY_MEMFD) };

    b.machine = boot_machine(&b.config);
    memset((uint8_t *)b.config.shared.base + PCG_IMAGE, 0, PCG_IMAGE_END - PCG_IMAGE);
    memcpy((uint8_t *)b.config.shared.base + PCG_IMAGE, words, count * 4);
    memset(&b.hart, 0, sizeof b.hart);
    b.hart.pc = PCG_IMAGE;
    return b;
}

__attribute__((unused)) static void run_bench(struct bench *b, uint64_t instructions)
{
    pc_rv64_set_state(&b->machine->vcpu[0], &b->hart);
    run_until(b->machine, instructions);
    pc_rv64_get_state(&b->machine->vcpu[0], &b->hart);
}

__attribute__((unused)) static void close_bench(struct bench *b)
{
    close_machine(b->machine);
    drop_memory(&b->config);
}

__attribute__((unused)) static uint32_t amo(uint32_t funct5, uint32_t rs2, uint32_t funct3)
{
    return r_type(funct5 << 2, rs2, 5, funct3, 7, 0x2f);
}

#endif
