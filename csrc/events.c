/* SPDX-License-Identifier: Apache-2.0 */
#include "events.h"

#include <errno.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

int pc_events_init(struct pc_events *events)
{
    memset(events, 0, sizeof(*events));
    events->capacity = 64;
    events->items = calloc(events->capacity, sizeof(*events->items));
    if (!events->items)
        return -ENOMEM;
    events->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (events->fd < 0) {
        int error = errno;

        free(events->items);
        return -error;
    }
    pthread_mutex_init(&events->lock, NULL);
    return 0;
}

void pc_events_destroy(struct pc_events *events)
{
    close(events->fd);
    events->fd = -1;
    free(events->items);
    events->items = NULL;
    pthread_mutex_destroy(&events->lock);
}

void pc_events_push(struct pc_events *events, int type, int channel_kind, int channel, int error, const char *format, ...)
{
    struct pc_event *event;
    uint64_t one = 1;
    va_list arguments;

    pthread_mutex_lock(&events->lock);
    if (events->count == events->capacity) {
        /* Nobody reads: double, unrolling the ring. Without memory the event is dropped; its cause is in the counters
         * and in the channel's state too. */
        struct pc_event *larger = calloc(events->capacity * 2, sizeof(*larger));

        if (!larger) {
            pthread_mutex_unlock(&events->lock);
            return;
        }
        for (size_t i = 0; i < events->count; i++)
            larger[i] = events->items[(events->first + i) % events->capacity];
        free(events->items);
        events->items = larger;
        events->first = 0;
        events->capacity *= 2;
    }
    event = &events->items[(events->first + events->count) % events->capacity];
    memset(event, 0, sizeof(*event));
    event->type = type;
    event->channel_kind = channel_kind;
    event->channel = channel;
    event->error = error;
    va_start(arguments, format);
    (void)vsnprintf(event->text, sizeof(event->text), format, arguments);
    va_end(arguments);
    events->count++;
    (void)!write(events->fd, &one, sizeof(one));
    pthread_mutex_unlock(&events->lock);
}

int pc_events_next(struct pc_events *events, struct pc_event *event)
{
    int found = 0;

    pthread_mutex_lock(&events->lock);
    if (events->count) {
        *event = events->items[events->first];
        events->first = (events->first + 1) % events->capacity;
        events->count--;
        found = 1;
    }
    if (!events->count) {
        uint64_t drained;

        (void)!read(events->fd, &drained, sizeof(drained));
    }
    pthread_mutex_unlock(&events->lock);
    return found;
}
