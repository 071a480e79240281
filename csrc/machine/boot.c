/* SPDX-License-Identifier: Apache-2.0
 *
 * What is in guest memory when the machine starts: its program, boot information, and the tables that its processor needs.
 */
#include <errno.h>
#include <string.h>

#include "machine/machine.h"

int pc_boot_write(const struct pc_machine *machine, uint8_t *ram)
{
    const struct pc_machine_config *config = &machine->config;
    const struct pc_layout *layout = &machine->layout;
    struct pcg_boot *boot = (struct pcg_boot *)(ram + PCG_BOOT_INFO);
    const struct pc_image *image = &machine->engine->images[config->workload];
    size_t image_bytes = (size_t)(image->end - image->begin);
    int rc = machine->engine->write_tables ? machine->engine->write_tables(machine, ram) : 0;

    if (rc)
        return rc;
    if (image_bytes > PCG_IMAGE_END - PCG_IMAGE)
        return -E2BIG;
    memcpy(ram + PCG_IMAGE, image->begin, image_bytes);
    boot->vcpus = config->vcpus;
    boot->workload = config->workload;
    boot->pattern = pc_pattern_of(config->workload);
    boot->seed = config->seed;
    boot->shared = layout->shared;
    for (uint32_t i = 0; i < config->vcpus; i++) {
        boot->private_[i] = layout->private_[i];
        boot->private_gpa[i] = layout->private_gpa[i];
    }
    boot->disk_slice_bytes = layout->disk_slice_bytes;
    boot->disk_buffer_skew = machine->disk_skew;
    boot->magic = PCG_MAGIC;
    return 0;
}
