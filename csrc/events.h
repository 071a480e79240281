/* SPDX-License-Identifier: Apache-2.0
 *
 * The way from the C threads to the control plane: a queue of struct pc_event behind an eventfd. Events are rare (a
 * channel went down, the end came); pages and faults are counted, never queued.
 */
#ifndef PC_EVENTS_H
#define PC_EVENTS_H

#include <pthread.h>
#include <stddef.h>

#include "postcopy.h"

struct pc_events {
    pthread_mutex_t lock;
    int fd;
    struct pc_event *items;
    size_t first, count, capacity;
};

int pc_events_init(struct pc_events *events);
void pc_events_destroy(struct pc_events *events);
/* Any thread. `format` makes the event's text. */
void pc_events_push(struct pc_events *events, int type, int channel_kind, int channel, int error, const char *format, ...)
    __attribute__((format(printf, 6, 7)));
/* 1 and the oldest event, or 0; the eventfd is readable exactly while there is one. */
int pc_events_next(struct pc_events *events, struct pc_event *event);

#endif
