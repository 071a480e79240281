/* SPDX-License-Identifier: Apache-2.0
 *
 * How much memory this host can give.
 */
#include <errno.h>
#include <inttypes.h>
#include <limits.h>
#include <stdbool.h>
#include <unistd.h>

#include "memory/internal.h"

/* A small file of /proc or /sys as a string; its length or -errno. */
static int read_text(const char *path, char *text, size_t cap)
{
    FILE *file = fopen(path, "re");
    size_t used;
    int error;

    if (!file)
        return -errno;
    used = fread(text, 1, cap - 1, file);
    text[used] = '\0';
    error = ferror(file) ? -EIO : (int)used;
    (void)fclose(file);
    return error;
}

/* The number after `key` at the start of a line; false when there is none. */
static bool number_after(const char *text, const char *key, uint64_t *value)
{
    size_t length = strlen(key);

    for (const char *line = text; line; line = strchr(line, '\n')) {
        if (*line == '\n')
            line++;
        if (!strncmp(line, key, length)) {
            char *end;

            errno = 0;
            *value = strtoull(line + length, &end, 10);
            return end != line + length && !errno;
        }
    }
    return false;
}

/* The smallest limit of a control group (the path after the last ':' of a line of /proc/self/cgroup) and those above it. */
static uint64_t group_limit_bytes(const char *line, const char *root, const char *file)
{
    char group[PATH_MAX], path[PATH_MAX + 64], value[64];
    const char *begin = strchr(line, '/');
    uint64_t limit = UINT64_MAX, one;
    char *end;

    if (!begin || strcspn(line, "\n") < (size_t)(begin - line))
        return limit;
    (void)snprintf(group, sizeof(group), "%.*s", (int)strcspn(begin, "\n"), begin);
    for (;;) {
        (void)snprintf(path, sizeof(path), "%s%s/%s", root, group, file);
        if (read_text(path, value, sizeof(value)) > 0 && number_after(value, "", &one))
            limit = pc_least(limit, one); /* "max" is no number */
        end = strrchr(group, '/');
        if (!end)
            return limit;
        *end = '\0';
    }
}

/* What the control groups that this process is in allow, of either version; UINT64_MAX without a limit. In a container
 * /proc/meminfo shows the host, and going past this limit is not an error but the end of the process. */
static uint64_t cgroup_limit_bytes(void)
{
    uint64_t limit = UINT64_MAX;
    char text[PATH_MAX];
    const char *line;

    if (read_text("/proc/self/cgroup", text, sizeof(text)) < 0)
        return limit;
    line = !strncmp(text, "0::", 3) ? text : strstr(text, "\n0::");
    if (line)
        limit = group_limit_bytes(line + 1, "/sys/fs/cgroup", "memory.max");
    line = strstr(text, ":memory:"); /* version 1: alone in its hierarchy, as everywhere where it is still used */
    if (line)
        limit = pc_least(limit, group_limit_bytes(line, "/sys/fs/cgroup/memory", "memory.limit_in_bytes"));
    return limit;
}

const char *pc_human(uint64_t bytes, char *out, size_t cap)
{
    const char *const units[] = {"bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    size_t unit = 0;
    double value = (double)bytes;

    for (; value >= 1024 && unit + 1 < PC_ARRAY_LENGTH(units); unit++)
        value /= 1024;
    (void)snprintf(out, cap, "%.*f %s", value < 10 && unit ? 1 : 0, value, units[unit]);
    return out;
}

uint64_t pc_page_bytes(void)
{
    return (uint64_t)sysconf(_SC_PAGESIZE);
}

uint64_t pc_huge_page_bytes(void)
{
    char text[8192];
    uint64_t kib;

    if (read_text("/proc/meminfo", text, sizeof(text)) < 0 || !number_after(text, "Hugepagesize:", &kib))
        return 0;
    return kib * 1024;
}

static int check_huge_pool(uint64_t bytes, uint64_t page_bytes, char *error, size_t error_bytes)
{
    uint64_t total = 0, unused = 0, reserved = 0, surplus = 0, overcommit = 0, usable, wanted = bytes / page_bytes;
    char text[8192];
    int result = read_text("/proc/meminfo", text, sizeof(text));

    if (result < 0)
        return pc_fail(-result, error, error_bytes, "hugetlb: cannot read /proc/meminfo: %s", strerror(-result));
    (void)number_after(text, "HugePages_Total:", &total);
    (void)number_after(text, "HugePages_Free:", &unused);
    (void)number_after(text, "HugePages_Rsvd:", &reserved);
    (void)number_after(text, "HugePages_Surp:", &surplus);
    if (read_text("/proc/sys/vm/nr_overcommit_hugepages", text, sizeof(text)) > 0)
        (void)number_after(text, "", &overcommit);
    usable = unused > reserved ? unused - reserved : 0;
    if (wanted > usable + (overcommit > surplus ? overcommit - surplus : 0))
        return pc_fail(ENOMEM, error, error_bytes,
                       "hugetlb: %" PRIu64 " huge pages of %" PRIu64 " KiB wanted, %" PRIu64
                       " are free; remedy: sysctl vm.nr_hugepages=%" PRIu64,
                       wanted, page_bytes / 1024, usable, total - surplus + wanted - usable);
    return 0;
}

int pc_memory_check(int kind, uint64_t total_bytes, char *error, size_t error_bytes)
{
    uint64_t page_bytes, available = 0, swap = 0;
    char text[8192], want[32], have[32];
    int result;

    if (kind != PC_MEMORY_MEMFD && kind != PC_MEMORY_ANON && kind != PC_MEMORY_HUGETLB)
        return pc_fail(EINVAL, error, error_bytes, "memory: unknown kind %d", kind);
    page_bytes = kind == PC_MEMORY_HUGETLB ? pc_huge_page_bytes() : pc_page_bytes();
    if (!page_bytes)
        return pc_fail(ENOTSUP, error, error_bytes, "hugetlb: this kernel has no huge pages");
    if (!total_bytes)
        return pc_fail(EINVAL, error, error_bytes, "memory: a size of 0 bytes");
    if (total_bytes % page_bytes)
        return pc_fail(EINVAL, error, error_bytes, "memory: %" PRIu64 " bytes are not a multiple of the page size, %" PRIu64,
                       total_bytes, page_bytes);
    if (kind == PC_MEMORY_HUGETLB)
        return check_huge_pool(total_bytes, page_bytes, error, error_bytes);
    result = read_text("/proc/meminfo", text, sizeof(text));
    if (result < 0)
        return pc_fail(-result, error, error_bytes, "memory: cannot read /proc/meminfo: %s", strerror(-result));
    if (!number_after(text, "MemAvailable:", &available))
        (void)number_after(text, "MemTotal:", &available);
    (void)number_after(text, "SwapFree:", &swap);
    available = (available + swap) * 1024;
    if (total_bytes > available)
        return pc_fail(ENOMEM, error, error_bytes, "memory: %s wanted, this host has %s available",
                       pc_human(total_bytes, want, sizeof(want)), pc_human(available, have, sizeof(have)));
    available = cgroup_limit_bytes();
    if (total_bytes > available)
        return pc_fail(ENOMEM, error, error_bytes, "memory: %s wanted, the control group of this process allows %s",
                       pc_human(total_bytes, want, sizeof(want)), pc_human(available, have, sizeof(have)));
    return 0;
}
