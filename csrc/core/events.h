/* SPDX-License-Identifier: Apache-2.0
 *
 * The way from the C threads to the control plane: a queue of struct pc_event behind an eventfd. Events are rare (a
 * channel went down, the end came); pages and faults are counted, never queued.
 *
 * The queue is bounded whatever a peer does and however long they are not read: there is one place for each (type, kind, channel), all
 * of them are there from the beginning, and what happens again before it was read is reported once. So no event is ever dropped,
 * and none needs memory.
 */
#ifndef PC_EVENTS_H
#define PC_EVENTS_H

#include <pthread.h>
#include <stddef.h>

#include "postcopy/core.h"

/* Four types, for each urgent and each bulk channel and for none. */
#define PC_EVENTS_MAX (4 * (PC_MAX_SHARDS + PC_MAX_BULK_CHANNELS + 1))

struct pc_events {
    pthread_mutex_t lock; /* inherits priority: fault threads report events too. Held for microseconds */
    int fd;
    struct pc_event items[PC_EVENTS_MAX]; /* oldest first */
    size_t count;
};

int pc_events_init(struct pc_events *events);
void pc_events_destroy(struct pc_events *events);
/* Any thread. `format` makes the event's text. Of the same event unread, CHANNEL_DOWN keeps the later one, in its later place;
 * the others keep the first. */
void pc_events_push(struct pc_events *events, int type, int channel_kind, int channel, int error, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
/* 1 and the oldest event, or 0; the eventfd is readable exactly while there is one. */
int pc_events_next(struct pc_events *events, struct pc_event *event);

#endif
