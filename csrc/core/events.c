/* SPDX-License-Identifier: Apache-2.0 */
#include "core/events.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "core/runtime.h"

int pc_events_init(struct pc_events *events)
{
    memset(events, 0, sizeof(*events));
    events->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (events->fd < 0)
        return -errno;
    pc_lock_init(&events->lock);
    return 0;
}

void pc_events_destroy(struct pc_events *events)
{
    close(events->fd);
    events->fd = -1;
    pthread_mutex_destroy(&events->lock);
}

static void remove_at(struct pc_events *events, size_t at)
{
    events->count--;
    memmove(&events->items[at], &events->items[at + 1], (events->count - at) * sizeof(events->items[0]));
}

void pc_events_push(struct pc_events *events, int type, int channel_kind, int channel, int error, const char *format, ...)
{
    struct pc_event event = {.type = type, .channel_kind = channel_kind, .channel = channel, .error = error};
    uint64_t one = 1;
    va_list arguments;
    size_t at = 0;

    va_start(arguments, format);
    (void)vsnprintf(event.text, sizeof(event.text), format, arguments);
    va_end(arguments);
    pthread_mutex_lock(&events->lock);
    while (at < events->count && (events->items[at].type != type || events->items[at].channel_kind != channel_kind ||
                                  events->items[at].channel != channel))
        at++;
    if (at < events->count && type == PC_EVENT_CHANNEL_DOWN) {
        remove_at(events, at); /* what went down again since was up in between: the last state is reported, in its place */
        at = events->count;
    }
    if (at == events->count && at < PC_EVENTS_MAX) {
        events->items[events->count++] = event;
        (void)!write(events->fd, &one, sizeof(one));
    }
    pthread_mutex_unlock(&events->lock);
}

int pc_events_next(struct pc_events *events, struct pc_event *event)
{
    int found = 0;

    pthread_mutex_lock(&events->lock);
    if (events->count) {
        *event = events->items[0];
        remove_at(events, 0);
        found = 1;
    }
    if (!events->count) {
        uint64_t drained;

        (void)!read(events->fd, &drained, sizeof(drained));
    }
    pthread_mutex_unlock(&events->lock);
    return found;
}
