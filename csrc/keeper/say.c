/* SPDX-License-Identifier: Apache-2.0
 *
 * Lines on stderr in the two forms that the rest of postcopy has (postcopy/_log.py). No more than a few a second, whatever happens:
 * some are about what an engine has sent.
 */
#include <poll.h>
#include <stdio.h>
#include <time.h>
#include <unistd.h>

#include "core/clock.h"
#include "keeper/keeper.h"

#define BURST 20 /* lines at once; then one a second */

static int schema;
static const char *const levels[] = {"info", "warning", "error"};

void say_as_json(int schema_version)
{
    schema = schema_version;
}

static bool may_say(uint32_t *dropped)
{
    static uint64_t last_ns, left_ns = BURST * 1000 * MS;
    static uint32_t silent;
    uint64_t now_ns = pc_now_ns();

    left_ns += last_ns ? now_ns - last_ns : 0;
    if (left_ns > BURST * 1000 * MS)
        left_ns = BURST * 1000 * MS;
    last_ns = now_ns;
    if (left_ns < 1000 * MS) {
        silent++;
        return false;
    }
    left_ns -= 1000 * MS;
    *dropped = silent;
    silent = 0;
    return true;
}

void say(enum level level, const char *format, ...)
{
    char text[512], line[1024];
    uint32_t dropped;
    va_list arguments;
    int bytes;

    if (!may_say(&dropped))
        return;
    va_start(arguments, format);
    (void)vsnprintf(text, sizeof(text), format, arguments);
    va_end(arguments);
    for (char *at = text; *at; at++)
        if (*at < ' ' || *at > '~' || (schema && (*at == '"' || *at == '\\')))
            *at = *at == '"' ? '\'' : '?';
    if (schema) {
        struct timespec now;
        struct tm utc;

        (void)clock_gettime(CLOCK_REALTIME, &now);
        (void)gmtime_r(&now.tv_sec, &utc);
        bytes = snprintf(line, sizeof(line),
                         "{\"schema\": %d, \"time\": \"%04d-%02d-%02dT%02d:%02d:%02d.%03dZ\", \"level\": \"%s\", "
                         "\"logger\": \"postcopy.keeper\", \"message\": \"%s\"",
                         schema, utc.tm_year + 1900, utc.tm_mon + 1, utc.tm_mday, utc.tm_hour, utc.tm_min, utc.tm_sec,
                         (int)(now.tv_nsec / 1000000), levels[level], text);
        bytes += dropped ? snprintf(line + bytes, sizeof(line) - (size_t)bytes, ", \"dropped\": %u}\n", dropped)
                         : snprintf(line + bytes, sizeof(line) - (size_t)bytes, "}\n");
    } else {
        bytes = snprintf(line, sizeof(line), "postcopy: %s: keeper: %s\n", levels[level], text);
    }
    /* A reader that is stuck must not stop this process: where there is no room, the line is lost. */
    if (poll(&(struct pollfd){.fd = STDERR_FILENO, .events = POLLOUT}, 1, 0) == 1)
        (void)!write(STDERR_FILENO, line, (size_t)bytes);
}
