/* SPDX-License-Identifier: Apache-2.0
 *
 * A case for each kind of memory out of one function that takes the kind: kind_feature, defined by ON_*, run by RUN_*.
 */
#ifndef PC_UFFD_TABLE_H
#define PC_UFFD_TABLE_H

#define ON_KIND(feature, kind, value)                                                                                  \
    static void kind##_##feature(void)                                                                                 \
    {                                                                                                                  \
        feature(value);                                                                                                \
    }
#define ON_FILES(feature) ON_KIND(feature, memfd, MEMFD) ON_KIND(feature, private, PRIVATE) ON_KIND(feature, hugetlb, HUGETLB)
#define ON_ALL(feature) ON_KIND(feature, anon, ANON) ON_FILES(feature)

#define RUN_FILES(feature)                                                                                             \
    do {                                                                                                               \
        RUN(memfd_##feature);                                                                                          \
        RUN(private_##feature);                                                                                        \
        RUN(hugetlb_##feature);                                                                                        \
    } while (0)
#define RUN_ALL(feature)                                                                                               \
    do {                                                                                                               \
        RUN(anon_##feature);                                                                                           \
        RUN_FILES(feature);                                                                                            \
    } while (0)

#endif
