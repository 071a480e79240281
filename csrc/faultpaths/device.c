/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices that reach memory by themselves. They need hardware, or a set-up that is not this tool's to make: these rows say
 * whether the kernel has them, so that a reader knows that they were not forgotten.
 */
#include <unistd.h>

#include "core/util.h"
#include "faultpaths/fp.h"

static void look(struct pc_fp_cell *cell, const char *path, const char *what)
{
    if (access(path, F_OK))
        pc_fp_unavailable(cell, 0, "no %s: this kernel has no %s, or it is not loaded", path, what);
    else
        pc_fp_unavailable(cell, 0, "%s is there, but %s needs a device that is set up for it", path, what);
}

static void rdma(struct pc_fp_cell *cell)
{
    look(cell, "/dev/infiniband", "RDMA (ibv_reg_mr pins the memory)");
}

static void vfio(struct pc_fp_cell *cell)
{
    look(cell, "/dev/vfio/vfio", "VFIO (VFIO_IOMMU_MAP_DMA pins the memory)");
}

static void iommufd(struct pc_fp_cell *cell)
{
    look(cell, "/dev/iommu", "IOMMUFD (IOMMU_IOAS_MAP pins the memory)");
}

static void vhost_net(struct pc_fp_cell *cell)
{
    look(cell, "/dev/vhost-net", "vhost-net (its worker copies from and to guest memory)");
}

static void vhost_vsock(struct pc_fp_cell *cell)
{
    look(cell, "/dev/vhost-vsock", "vhost-vsock (its worker copies from and to guest memory)");
}

#define ROW(name, what, run) {{"device." name, "device", what, 1u << PC_FP_MISSING, PC_FP_ALL_BACKINGS, 0}, run}
static const struct pc_fp_operation operations[] = {
    ROW("rdma", "RDMA: a memory region is pinned when it is registered", rdma),
    ROW("vfio", "VFIO: memory is pinned when it is mapped for a device", vfio),
    ROW("iommufd", "IOMMUFD: memory is pinned when it is mapped for a device", iommufd),
    ROW("vhost_net", "vhost-net: a kernel thread copies packets from and to guest memory", vhost_net),
    ROW("vhost_vsock", "vhost-vsock: a kernel thread copies packets from and to guest memory", vhost_vsock),
};

const struct pc_fp_class pc_fp_device = {operations, PC_ARRAY_LENGTH(operations)};
