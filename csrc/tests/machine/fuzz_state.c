/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: device states, rv64 and (where there is /dev/kvm) kvm. The input is a list of edits to the state of a machine that
 * has really been saved; its length, count and checksum are then made right, which no fuzzer guesses. What is refused is
 * refused by name and changes nothing. What is accepted may make the guest do anything at all: the machine can be run, paused,
 * saved and closed. A kvm state is loaded over memory that is missing and stays so: it must not be touched. A hang is ended by
 * an alarm, and is a finding.
 */
#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "machine/machine.h"
#include "machine/rv64.h"
#include "postcopy/core.h"
#include "postcopy/uffd.h"

#define HANG_S       30
#define CLOSE_MS     10000
#define STATE_MAX    65536u
#define HEADER_BYTES 32u
#define EDIT_BYTES   12u
#define EDITS_MAX    16u
#define SECTIONS_MAX 64u

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes);
int LLVMFuzzerInitialize(int *argc, char ***argv);

struct subject {
    bool usable;
    struct pc_machine_config present; /* memory as the saved machine had it */
    struct pc_machine_config missing; /* the same for rv64, which a load could touch by its own code only */
    struct pc_machine *fresh;         /* over `missing`; a refused state sets nothing, so it serves again */
    uint8_t state[STATE_MAX];
    size_t bytes;
};

static struct subject subjects[2]; /* by enum pc_engine_kind */
static char error[PC_ERROR_BYTES];

static void require_at(int line, bool condition, const char *what)
{
    if (!condition) {
        fprintf(stderr, "fuzz_state.c:%d: %s does not hold; last error: %s\n", line, what, error);
        abort();
    }
}
#define REQUIRE(condition) require_at(__LINE__, condition, #condition)

static struct pc_machine_config make_config(uint32_t engine)
{
    struct pc_machine_config config = {.engine = engine, .vcpus = 2, .workload = PC_WORKLOAD_RANDOM, .seed = 11, .disk_fd = -1,
                                   .working_set_bytes = 32 * 4096};
    uint64_t shared_bytes, private_bytes;

    REQUIRE(pc_machine_split_memory(16 << 20, 2, 4096, &shared_bytes, &private_bytes, error, sizeof error) == 0);
    REQUIRE(pc_memory_create(PC_MEMORY_ANON, shared_bytes, &config.shared, error, sizeof error) == 0);
    for (uint32_t i = 0; i < 2; i++)
        REQUIRE(pc_memory_create(PC_MEMORY_ANON, private_bytes, &config.private_[i], error, sizeof error) == 0);
    return config;
}

static struct pc_machine *open_machine(const struct pc_machine_config *config)
{
    struct pc_machine *machine;

    REQUIRE(pc_machine_open(config, &machine, error, sizeof error) == 0);
    return machine;
}

/* Of a machine that has computed for a moment. */
static bool prepare(struct subject *subject, uint32_t engine)
{
    struct timespec moment = {.tv_nsec = 50000000};
    struct pc_machine *machine;
    int64_t saved;
    int uffd;

    subject->present = make_config(engine);
    if (pc_machine_open(&subject->present, &machine, error, sizeof error))
        return false;
    REQUIRE(pc_machine_boot(machine) == 0);
    REQUIRE(pc_machine_resume(machine) == 0);
    nanosleep(&moment, NULL);
    REQUIRE(pc_machine_pause(machine, CLOSE_MS, error, sizeof error) == 0);
    saved = pc_machine_save_state(machine, subject->state, sizeof subject->state, error, sizeof error);
    REQUIRE(saved > 0 && saved <= (int64_t)sizeof subject->state);
    subject->bytes = (size_t)saved;
    REQUIRE(pc_machine_close(machine, CLOSE_MS) == 0);
    subject->missing = make_config(engine);
    uffd = pc_uffd_open(PC_UFFD_ANY, 0, NULL); /* stays open, and nobody reads it */
    if (uffd >= 0) {
        REQUIRE(pc_uffd_register(uffd, (uintptr_t)subject->missing.shared.base, subject->missing.shared.size_bytes,
                                 PC_UFFD_MISSING, NULL) == 0);
        for (uint32_t i = 0; i < 2; i++)
            REQUIRE(pc_uffd_register(uffd, (uintptr_t)subject->missing.private_[i].base,
                                     subject->missing.private_[i].size_bytes, PC_UFFD_MISSING, NULL) == 0);
    }
    subject->fresh = open_machine(&subject->missing);
    return true;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    for (uint32_t engine = 0; engine < 2; engine++) {
        subjects[engine].usable = prepare(&subjects[engine], engine);
        if (!subjects[engine].usable)
            fprintf(stderr, "%s states are not tried: %s\n", engine == PC_ENGINE_KVM ? "kvm" : "rv64", error);
    }
    return 0;
}

/* ---- edits ---- */

struct sections {
    size_t at[SECTIONS_MAX]; /* of the header */
    size_t count;
};

static uint64_t section_bytes(const uint8_t *state, size_t at)
{
    uint64_t bytes;

    memcpy(&bytes, state + at + 8, sizeof bytes);
    return bytes;
}

/* As far as they are whole. */
static struct sections find_sections(const uint8_t *state, size_t bytes)
{
    struct sections found = {.count = 0};

    for (size_t at = HEADER_BYTES; bytes - at >= 16 && at < bytes && found.count < SECTIONS_MAX;) {
        uint64_t length = section_bytes(state, at);

        if (length > bytes - at - 16 || ((length + 7) & ~7ull) > bytes - at - 16)
            break;
        found.at[found.count++] = at;
        at += 16 + ((length + 7) & ~7ull);
    }
    return found;
}

static void insert(uint8_t *state, size_t *bytes, size_t at, const void *what, size_t length)
{
    if (*bytes + length > STATE_MAX)
        return;
    memmove(state + at + length, state + at, *bytes - at);
    memcpy(state + at, what, length);
    *bytes += length;
}

static void edit(uint8_t *state, size_t *bytes, const uint8_t how[EDIT_BYTES])
{
    struct sections found = find_sections(state, *bytes);
    uint64_t value, length, word;
    uint16_t offset;
    size_t at;

    memcpy(&offset, how + 2, sizeof offset);
    memcpy(&value, how + 4, sizeof value);
    if (!found.count)
        return;
    at = found.at[how[0] % found.count];
    length = section_bytes(state, at);
    switch (how[1] % 10) {
    case 0: /* a word of the payload */
    case 1:
        if (length >= 8)
            memcpy(state + at + 16 + offset % (length / 8) * 8, &value, 8);
        break;
    case 2: /* half a word */
        if (length >= 4)
            memcpy(state + at + 16 + offset % (length / 4) * 4, &value, 4);
        break;
    case 3: /* one bit */
        if (length)
            state[at + 16 + offset % length] ^= (uint8_t)(1u << value % 8);
        break;
    case 4: /* a word, a little more or less */
        if (length >= 8) {
            memcpy(&word, state + at + 16 + offset % (length / 8) * 8, 8);
            word += (value & 0xff) - 128;
            memcpy(state + at + 16 + offset % (length / 8) * 8, &word, 8);
        }
        break;
    case 5: /* another header */
        state[at + offset % 16] = (uint8_t)value;
        break;
    case 6: /* cut */
        *bytes = HEADER_BYTES + value % (*bytes - HEADER_BYTES);
        break;
    case 7: /* without the section */
        length = 16 + ((length + 7) & ~7ull);
        memmove(state + at, state + at + length, *bytes - at - length);
        *bytes -= length;
        break;
    case 8: /* the section twice, the second for another vCPU */
        length = 16 + ((length + 7) & ~7ull);
        insert(state, bytes, at, state + at, length);
        if (value % 2)
            state[at + 4] = (uint8_t)offset;
        break;
    default: /* a pair of index and value more, as in MSRS */
        word = offset % 2 ? value >> 32 : 0x4b564d00u + value % 8;
        for (size_t i = 0; i < found.count; i++)
            if (!memcmp(state + found.at[i], "MSRS", 4)) {
                uint64_t pair[2] = {word, value};

                at = found.at[i];
                length = section_bytes(state, at) + sizeof pair;
                if (*bytes + sizeof pair > STATE_MAX)
                    break;
                insert(state, bytes, at + 16, pair, sizeof pair);
                memcpy(state + at + 8, &length, sizeof length);
                break;
            }
        break;
    }
}

static void seal(uint8_t *state, size_t bytes)
{
    uint32_t sections = (uint32_t)find_sections(state, bytes).count, crc;
    uint64_t length = bytes;

    memcpy(state + 16, &length, sizeof length);
    memcpy(state + 24, &sections, sizeof sections);
    crc = pc_crc32c(0, state + HEADER_BYTES, bytes - HEADER_BYTES);
    memcpy(state + 12, &crc, sizeof crc);
}

/* ---- what is accepted ---- */

static void use(const struct pc_machine_config *config, const uint8_t *state, size_t bytes)
{
    static uint8_t again[STATE_MAX];
    struct timespec moment = {.tv_nsec = 1000000};
    struct pc_machine *machine = open_machine(config);
    struct pc_machine_stats stats;
    int rc = pc_machine_load_state(machine, state, bytes, error, sizeof error);

    REQUIRE(rc == 0 || error[0]); /* this time KVM may see it otherwise: the time stamp counter runs */
    if (!rc) {
        REQUIRE(pc_machine_save_state(machine, again, sizeof again, error, sizeof error) > 0);
        REQUIRE(pc_machine_resume(machine) == 0);
        nanosleep(&moment, NULL);
        rc = pc_machine_pause(machine, CLOSE_MS, error, sizeof error);
        REQUIRE(rc == 0 || (rc == -EIO && error[0]));
        REQUIRE(pc_machine_stats(machine, &stats) == 0);
        if (!rc)
            REQUIRE(pc_machine_save_state(machine, again, sizeof again, error, sizeof error) > 0);
    }
    REQUIRE(pc_machine_close(machine, CLOSE_MS) == 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t bytes)
{
    static uint8_t state[STATE_MAX];
    struct subject *subject = &subjects[bytes && data[0] % 2 ? PC_ENGINE_RV64 : PC_ENGINE_KVM];
    uint8_t *copy;
    size_t length;
    int rc;

    if (!subject->usable)
        return 0;
    memcpy(state, subject->state, subject->bytes);
    length = subject->bytes;
    for (size_t at = 1, edits = 0; at + EDIT_BYTES <= bytes && edits < EDITS_MAX; at += EDIT_BYTES, edits++)
        edit(state, &length, data + at);
    seal(state, length);
    copy = malloc(length); /* to the byte, for AddressSanitizer */
    REQUIRE(copy != NULL);
    memcpy(copy, state, length);
    error[0] = '\0';
    alarm(HANG_S);
    rc = pc_machine_load_state(subject->fresh, copy, length, error, sizeof error);
    REQUIRE(rc == 0 || (rc < 0 && error[0] && memchr(error, '\0', sizeof error)));
    /* What KVM has refused half way may have been set in part, and such a machine can only be closed. */
    if (rc != -EBADMSG && rc != -EPROTO) {
        REQUIRE(pc_machine_close(subject->fresh, CLOSE_MS) == 0);
        if (!rc)
            use(&subject->present, copy, length);
        subject->fresh = open_machine(&subject->missing);
    }
    alarm(0);
    free(copy);
    return 0;
}
