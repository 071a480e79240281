/* SPDX-License-Identifier: Apache-2.0
 *
 * Devices that are opened while this process may still open them, for later.
 *
 * Threads: pc_device_open from any. pc_device_keep not while another thread opens that device. Both block as long as open(2) does.
 */
#ifndef POSTCOPY_DEVICES_H
#define POSTCOPY_DEVICES_H

#ifdef __cplusplus
extern "C" {
#endif

/* ==== begin cffi ==== */
enum pc_device { PC_DEVICE_USERFAULTFD = 0, PC_DEVICE_KVM = 1, PC_DEVICE_TUN = 2 };
/* Opens the device now and keeps it, for pc_device_open after this process has given up its rights. For the whole process and
 * as long as it lives. 0 or -errno of open(2). */
int pc_device_keep(int device);
/* A descriptor of the device, close-on-exec, the caller's: of the one that is kept (PC_DEVICE_TUN: that very one, once), else
 * by open(2). Or -errno. */
int pc_device_open(int device);
/* ==== end cffi ==== */

#ifdef __cplusplus
}
#endif

#endif
