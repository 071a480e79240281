/* SPDX-License-Identifier: Apache-2.0
 *
 * What only tests know of the page server. */
#ifndef PC_PAGESERVER_H
#define PC_PAGESERVER_H

#include <pthread.h>

#include "postcopy/engine.h"

/* What a bulk thread holds while it looks for pages to send. */
pthread_mutex_t *pc_pageserver_push_lock(struct pc_pageserver *server);

#endif
