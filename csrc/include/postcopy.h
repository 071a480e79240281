/* SPDX-License-Identifier: Apache-2.0
 *
 * postcopy: all public headers of the data plane. Each can be used alone; the order here is the one in which they build on each
 * other.
 *
 * Everything between a header's two cffi markers is plain C that both a compiler and CFFI's cdef parser read; the Python
 * extension is generated from it, so what Python sees cannot drift from what C offers.
 *
 * Conventions
 *   - Functions return 0 (or a count) on success and -errno on failure; nothing sets errno for the caller, nothing is
 *     global (but pc_device_keep): any number of pagers, page servers and machines live side by side in one process.
 *   - Numbers say what they are: *_bytes, *_pages, *_ns. An *address* is a pointer value in this process, an *offset*
 *     counts bytes from the start of a RAM block, a *page* counts pages of that block; they never share a name.
 *   - Functions that may block or take a lock are marked so. None of them needs Python's GIL, all are called without it.
 *   - A file descriptor handed to an `attach` function belongs to the callee from then on, even when it fails.
 *   - An `error` buffer receives one line for a person, without a newline, always terminated; it may be NULL.
 */
#ifndef POSTCOPY_H
#define POSTCOPY_H

#include "postcopy/core.h"
#include "postcopy/devices.h"
#include "postcopy/uffd.h"
#include "postcopy/memory.h"
#include "postcopy/tls.h"
#include "postcopy/engine.h"
#include "postcopy/bench.h"
#include "postcopy/machine.h"
#include "postcopy/recorder.h"
#include "postcopy/faultpaths.h"
#include "postcopy/keeper.h"

#endif
