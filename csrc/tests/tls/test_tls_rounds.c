/* SPDX-License-Identifier: Apache-2.0
 *
 * Precopy and postcopy together, with every connection encrypted.
 */
#define RIG_TLS
#include "tests/pager/test_rounds.c"
