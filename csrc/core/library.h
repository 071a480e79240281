/* SPDX-License-Identifier: Apache-2.0
 *
 * Shared libraries that are loaded when they are first needed, so that nothing else needs them.
 */
#ifndef PC_LIBRARY_H
#define PC_LIBRARY_H

#include <dlfcn.h>
#include <stddef.h>
#include <string.h>

struct pc_function {
    const char *name;
    void *to; /* the pointer to it */
};

/* Fills the pointers, the last of which has no name. NULL, or what is missing: the name of the library, or of the first function that it
 * and the libraries it needs have not. A library that is loaded stays: there is no moment at which no thread is inside. */
static inline const char *pc_library_load(const char *file, const struct pc_function *functions)
{
    void *handle = dlopen(file, RTLD_NOW | RTLD_LOCAL);

    if (!handle)
        return file;
    for (; functions->name; functions++) {
        void *found = dlsym(handle, functions->name);

        if (!found) {
            dlclose(handle);
            return functions->name;
        }
        memcpy(functions->to, &found, sizeof(found));
    }
    return NULL;
}

#endif
