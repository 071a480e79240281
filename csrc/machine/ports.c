/* SPDX-License-Identifier: Apache-2.0
 *
 * Device registers: what the guest reaches through them, and what it reports there.
 */
#include <stdio.h>
#include <sys/random.h>
#include <unistd.h>

#include "machine/machine.h"

#define REPORT_EVENT_INTERVAL_NS 50000000ull

/* ---- reports and failures ---- */

void pc_machine_raise_event(struct pc_machine *machine)
{
    uint64_t one = 1;
    /* EAGAIN means 2^64 - 2 unread events: readable anyway. */
    ssize_t n = write(machine->event_fd, &one, sizeof one);
    (void)n;
}

static const char *failure_name(uint64_t code)
{
    switch (code) {
    case PCG_FAIL_EXCEPTION: return "exception in the guest program (where: RIP, expected: vector)";
    case PCG_FAIL_BOOT: return "boot info is not there";
    case PCG_FAIL_CHECK_WORD: return "page with a wrong check word";
    case PCG_FAIL_PASS: return "page with a wrong pass count";
    case PCG_FAIL_XMM: return "a register changed that no instruction wrote (XMM7; rv64: s9, s10, s11)";
    case PCG_FAIL_GS_BASE: return "GS base (rv64: tp) changed";
    case PCG_FAIL_MSR: return "MSR (rv64: CSR) changed";
    case PCG_FAIL_DEBUGREG: return "debug register changed";
    case PCG_FAIL_CR2: return "CR2 changed";
    case PCG_FAIL_TSC: return "time stamp (rv64: instruction) counter decreased";
    case PCG_FAIL_DISK_STATUS: return "disk request failed";
    case PCG_FAIL_DISK_DATA: return "wrong data from the disk";
    case PCG_FAIL_REQUESTS: return "number of answered requests in memory is not that in the register";
    default: return "unknown failure";
    }
}

/* The first failure of any vCPU is kept; later ones only count. */
static void keep_failure(struct pc_vcpu *vcpu, uint64_t code, uint64_t where, uint64_t expected, uint64_t found,
                         const char *text)
{
    struct pc_machine *machine = vcpu->machine;

    if (atomic_exchange(&machine->failure_claimed, 1))
        return;
    machine->failure_vcpu = vcpu->index;
    machine->failure_code = (uint32_t)code;
    machine->failure_where = where;
    machine->failure_expected = expected;
    machine->failure_found = found;
    snprintf(machine->failure_text, sizeof machine->failure_text, "%s", text);
    atomic_store_explicit(&machine->failure_published, 1, memory_order_release);
}

static void guest_failure(struct pc_vcpu *vcpu, uint64_t code, uint64_t where, uint64_t expected, uint64_t found)
{
    char text[sizeof vcpu->machine->failure_text];

    snprintf(text, sizeof text, "vCPU %u: %s at 0x%llx: expected 0x%llx, found 0x%llx", vcpu->index, failure_name(code),
             (unsigned long long)where, (unsigned long long)expected, (unsigned long long)found);
    keep_failure(vcpu, code, where, expected, found, text);
    atomic_fetch_add(&vcpu->failures, 1);
}

void pc_vcpu_failed(struct pc_vcpu *vcpu, const char *what)
{
    struct pc_machine *machine = vcpu->machine;
    char text[sizeof machine->failure_text];
    uint64_t where = machine->engine->where(vcpu);

    snprintf(text, sizeof text, "vCPU %u: %s, %s 0x%llx", vcpu->index, what, machine->engine->program_counter,
             (unsigned long long)where);
    keep_failure(vcpu, 0, where, 0, 0, text);
    pthread_mutex_lock(&machine->lock);
    atomic_store(&machine->state, PC_MACHINE_FAILED);
    machine->want_run = false;
    pc_machine_kick_all(machine);
    pthread_mutex_unlock(&machine->lock);
    pc_machine_raise_event(machine);
}

/* ---- devices ---- */

/* False: the vCPU is to stop. */
static bool report(struct pc_vcpu *vcpu, uint32_t what, const uint64_t arguments[4])
{
    struct pc_machine *machine = vcpu->machine;
    uint64_t now_ns;

    switch (what) {
    case PCG_READY:
        atomic_store(&machine->nonce, arguments[0]);
        atomic_store(&vcpu->ready, 1);
        pc_machine_raise_event(machine);
        return true;
    case PCG_PROGRESS:
        atomic_fetch_add(&vcpu->reports, 1);
        atomic_store(&vcpu->operations, arguments[0]);
        atomic_store(&machine->nonce, arguments[1]);
        /* A fast guest makes 100,000 reports a second; who waits for the event need not wake for each. */
        now_ns = pc_now_ns();
        if (now_ns - vcpu->report_event_ns >= REPORT_EVENT_INTERVAL_NS) {
            vcpu->report_event_ns = now_ns;
            pc_machine_raise_event(machine);
        }
        return true;
    case PCG_FAILURE:
        guest_failure(vcpu, arguments[0], arguments[1], arguments[2], arguments[3]);
        if (arguments[0] == PCG_FAIL_EXCEPTION) {
            pc_vcpu_failed(vcpu, "stopped by an exception");
            return false;
        }
        pc_machine_raise_event(machine);
        return true;
    default:
        return true; /* like a write to a port where nothing is */
    }
}

bool pc_device_out(struct pc_vcpu *vcpu, uint16_t port, uint32_t value, const uint64_t arguments[4])
{
    struct pc_machine *machine = vcpu->machine;

    switch (port) {
    case PCG_PORT_SERIAL:
        atomic_fetch_add(&machine->serial_bytes, 1);
        return true;
    case PCG_PORT_REPORT:
        return report(vcpu, value, arguments);
    case PCG_PORT_DISK:
        atomic_store(&vcpu->activity, PC_VCPU_DISK);
        vcpu->disk_status = pc_disk_request(vcpu, value, arguments[0], arguments[1], arguments[2]);
        atomic_store(&vcpu->activity, PC_VCPU_DEVICE);
        return true;
    case PCG_PORT_NET:
        vcpu->net_status = pc_net_request(vcpu, value, arguments[0], arguments[1]);
        return true;
    default:
        return true;
    }
}

uint32_t pc_device_in(struct pc_vcpu *vcpu, uint16_t port)
{
    uint32_t value = UINT32_MAX; /* what an empty bus reads as */

    switch (port) {
    case PCG_PORT_SERIAL + 5:
        return 0x60; /* line status: ready to transmit */
    case PCG_PORT_ENTROPY:
        if (vcpu->machine->engine->entropy)
            return vcpu->machine->engine->entropy(vcpu);
        if (getrandom(&value, sizeof value, 0) != sizeof value)
            value = (uint32_t)pc_now_ns();
        return value;
    case PCG_PORT_DISK_STATUS:
        return vcpu->disk_status;
    case PCG_PORT_NET_STATUS:
    case PCG_PORT_NET_MAC_LOW:
    case PCG_PORT_NET_MAC_HIGH:
    case PCG_PORT_NET_ADDRESS:
        return pc_net_register(vcpu, port);
    default:
        return value;
    }
}
