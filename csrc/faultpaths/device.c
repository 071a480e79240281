/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices that reach memory by themselves. They need hardware, or a set-up that is not this tool's to make: these rows say
 * whether the kernel has them, so that a reader knows that they were not forgotten.
 */
#include <unistd.h>

#include "faultpaths/fp.h"

#define DEVICE(name, path, what)                                                                                            \
    static void device_##name(struct pc_fp_cell *cell)                                                                      \
    {                                                                                                                       \
        if (access(path, F_OK))                                                                                             \
            pc_fp_unavailable(cell, 0, "no %s: this kernel has no %s, or it is not loaded", path, what);                    \
        else                                                                                                                \
            pc_fp_unavailable(cell, 0, "%s is there, but %s needs a device that is set up for it", path, what);             \
    }
DEVICE(rdma, "/dev/infiniband", "RDMA (ibv_reg_mr pins the memory)")
DEVICE(vfio, "/dev/vfio/vfio", "VFIO (VFIO_IOMMU_MAP_DMA pins the memory)")
DEVICE(iommufd, "/dev/iommu", "IOMMUFD (IOMMU_IOAS_MAP pins the memory)")
DEVICE(vhost_net, "/dev/vhost-net", "vhost-net (its worker copies from and to guest memory)")
DEVICE(vhost_vsock, "/dev/vhost-vsock", "vhost-vsock (its worker copies from and to guest memory)")

#define ROW(name, what) PC_FP_ROW_OF(device, name, 1u << PC_FP_MISSING, PC_FP_ALL_BACKINGS, NOTHING, 0, what)
static const struct pc_fp_operation operations[] = {
    ROW(rdma, "RDMA: a memory region is pinned when it is registered"),
    ROW(vfio, "VFIO: memory is pinned when it is mapped for a device"),
    ROW(iommufd, "IOMMUFD: memory is pinned when it is mapped for a device"),
    ROW(vhost_net, "vhost-net: a kernel thread copies packets from and to guest memory"),
    ROW(vhost_vsock, "vhost-vsock: a kernel thread copies packets from and to guest memory"),
};

const struct pc_fp_class pc_fp_device = {operations, PC_ARRAY_LENGTH(operations)};
