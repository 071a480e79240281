/* SPDX-License-Identifier: Apache-2.0 */
#include "postcopy/core.h"

#ifndef POSTCOPY_VERSION
#error "POSTCOPY_VERSION comes from the build, which takes it from pyproject.toml"
#endif

const char *pc_version(void)
{
    return POSTCOPY_VERSION;
}
