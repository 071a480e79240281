/* SPDX-License-Identifier: Apache-2.0
 *
 * The engine's recovery from cuts, with every connection encrypted.
 */
#define RIG_TLS
#include "tests/pager/test_recovery.c"
