/* SPDX-License-Identifier: Apache-2.0
 *
 * echo: answers ARP for its address, ICMP echo, UDP echo and UDP count (abi.h), and does nothing else with the network.
 *
 * Each frame is answered in the buffer that it came in; the buffers take turns. The requests it has answered are counted in
 * memory and in the registers that belong to the workload, and the two are compared. Each is followed by a visit to the
 * next pages of vCPU 0's part of the working set, which are counted as `dirty` does, so that an echoing machine meets
 * missing pages too, and sees late ones and those from the past. The other vCPUs visit one page each tick.
 *
 * What the answer needs is the network's own order of octets turned round, so addresses are swapped and never computed: sums
 * that cover them stay right.
 */
#include "guest.h"

#define NET16(n) ((uint16_t)((n) >> 8 | (n) << 8))

/* Frames begin two octets into their page: what follows the Ethernet header is then aligned. */
#define FRAME_AT 2

struct __attribute__((packed, aligned(2), may_alias)) ethernet {
    uint16_t destination[3], source[3], type;
};

struct __attribute__((packed, aligned(2), may_alias)) arp {
    struct ethernet ethernet;
    uint16_t hardware, protocol, sizes, operation;
    uint16_t sender_mac[3];
    uint32_t sender;
    uint16_t target_mac[3];
    uint32_t target;
};

struct __attribute__((packed, aligned(2), may_alias)) ip {
    struct ethernet ethernet;
    uint8_t version_length, service;
    uint16_t bytes, id, fragment;
    uint8_t hops, protocol;
    uint16_t sum;
    uint32_t source, destination;
};

struct __attribute__((packed, aligned(2), may_alias)) icmp {
    struct ip ip;
    uint8_t type, code;
    uint16_t sum;
};

struct __attribute__((packed, aligned(2), may_alias)) udp {
    struct ip ip;
    uint16_t source, destination, bytes, sum;
    uint64_t payload[3];
};

#define IP_BYTES       (sizeof(struct ip) - sizeof(struct ethernet))
#define UDP_BYTES      8u
#define MORE_FRAGMENTS NET16(0x3fff) /* the flag, and the offset */

static void visit(struct pcg_vcpu *v, uint64_t count)
{
    uint64_t begin = pcg_slice_begin(boot->shared.pages, v->id, boot->vcpus);
    uint64_t own = boot->private_[v->id].pages, all = own + pcg_slice_begin(boot->shared.pages, v->id + 1, boot->vcpus) - begin;
    uint64_t pass = v->operations / all, at = v->operations % all;

    for (; count; count--) {
        uint64_t gva = at < own ? boot->private_[v->id].gva + at * PCG_PAGE_BYTES
                                : boot->shared.gva + (begin + at - own) * PCG_PAGE_BYTES;
        volatile uint64_t *word = (volatile uint64_t *)gva;
        uint64_t found = *word;

        if (found != pass)
            report_failure(v, PCG_FAIL_PASS, gva, pass, found);
        *word = pass + 1; /* from the pass, not from what was found: one bad page is one report */
        v->operations++;
        if (++at == all) {
            at = 0;
            pass++;
        }
    }
}

static void copy_mac(uint16_t to[3], const uint16_t from[3])
{
    to[0] = from[0];
    to[1] = from[1];
    to[2] = from[2];
}

static void set_own_mac(const struct pcg_vcpu *v, uint16_t to[3])
{
    to[0] = (uint16_t)v->net_mac;
    to[1] = (uint16_t)(v->net_mac >> 16);
    to[2] = (uint16_t)(v->net_mac >> 32);
}

static void read_addresses(struct pcg_vcpu *v)
{
    uint64_t mac = (uint64_t)in32(PCG_PORT_NET_MAC_HIGH) << 32 | in32(PCG_PORT_NET_MAC_LOW), turned = 0;
    uint32_t address = in32(PCG_PORT_NET_ADDRESS);

    for (int i = 0; i < 6; i++, mac >>= 8)
        turned = turned << 8 | (mac & 0xff);
    v->net_mac = turned;
    v->net_address = address >> 24 | (address >> 8 & 0xff00) | (address << 8 & 0xff0000) | address << 24;
}

/* The number of this answer, the same in memory and in the registers. */
static uint64_t count_request(struct pcg_vcpu *v)
{
    uint64_t kept[2];

    xmm_store(kept);
    if (kept[0] != v->requests || kept[1] != ~kept[0])
        report_failure(v, PCG_FAIL_REQUESTS, (uint64_t)&v->requests, kept[0], v->requests);
    kept[0]++; /* from the register: it cannot have come late */
    kept[1] = ~kept[0];
    v->requests = kept[0];
    xmm_load(kept);
    return kept[0];
}

/* Each turns a request into its answer and returns the answer's length, or 0 when there is none to give. */

static uint32_t answer_arp(struct pcg_vcpu *v, struct arp *arp, uint32_t bytes)
{
    if (bytes < sizeof *arp || arp->hardware != NET16(1) || arp->protocol != NET16(0x800) || arp->sizes != NET16(0x604) ||
        arp->operation != NET16(1) || arp->target != v->net_address)
        return 0;
    arp->operation = NET16(2);
    copy_mac(arp->target_mac, arp->sender_mac);
    arp->target = arp->sender;
    set_own_mac(v, arp->sender_mac);
    arp->sender = v->net_address;
    return sizeof *arp;
}

static uint32_t answer_icmp(struct pcg_vcpu *v, struct icmp *icmp, uint32_t length)
{
    uint32_t sum;

    if (length < 8 || icmp->type != 8 || icmp->code != 0)
        return 0;
    /* Type 8 becomes 0: a sum that is to stay right grows by as much. */
    sum = icmp->sum + (uint32_t)NET16(0x800);
    icmp->sum = (uint16_t)(sum + (sum >> 16));
    icmp->type = 0;
    count_request(v);
    return length;
}

static uint32_t answer_udp(struct pcg_vcpu *v, struct udp *udp, uint32_t length)
{
    uint16_t port = udp->destination;
    uint64_t number;

    if (length < UDP_BYTES || (port != NET16(PCG_UDP_ECHO) && port != NET16(PCG_UDP_COUNT)))
        return 0;
    if (udp->source == NET16(PCG_UDP_ECHO) || udp->source == NET16(PCG_UDP_COUNT))
        return 0; /* another echo: the two would never end */
    udp->destination = udp->source;
    udp->source = port;
    number = count_request(v);
    if (port == NET16(PCG_UDP_COUNT) && length >= UDP_BYTES + PCG_UDP_COUNT_BYTES) {
        udp->payload[1] = number;
        udp->payload[2] = boot->nonce;
        udp->sum = 0; /* none */
    }
    return length;
}

static uint32_t answer_ip(struct pcg_vcpu *v, struct ip *ip, uint32_t bytes)
{
    uint32_t length, source;

    if (bytes < sizeof *ip || ip->version_length != 0x45 || (ip->fragment & MORE_FRAGMENTS) ||
        ip->destination != v->net_address)
        return 0;
    length = NET16(ip->bytes);
    if (length < IP_BYTES || length > bytes - sizeof(struct ethernet))
        return 0;
    source = ip->source;
    if ((source & 0xf0) >= 0xe0 || source == v->net_address)
        return 0; /* a group, or ourselves */
    length -= IP_BYTES;
    if (ip->protocol == 1)
        length = answer_icmp(v, (struct icmp *)ip, length);
    else if (ip->protocol == 17)
        length = answer_udp(v, (struct udp *)ip, length);
    else
        length = 0;
    if (!length)
        return 0;
    ip->source = ip->destination;
    ip->destination = source;
    return (uint32_t)sizeof *ip + length;
}

static uint32_t answer(struct pcg_vcpu *v, struct ethernet *frame, uint32_t bytes)
{
    uint32_t length = 0;

    if (frame->source[0] & 1)
        return 0; /* the address of a group cannot be answered */
    if (frame->type == NET16(0x806))
        length = answer_arp(v, (struct arp *)frame, bytes);
    else if (frame->type == NET16(0x800))
        length = answer_ip(v, (struct ip *)frame, bytes);
    if (length) {
        copy_mac(frame->destination, frame->source);
        set_own_mac(v, frame->source);
    }
    return length;
}

/* Until it is done; a pause in its middle is not. */
static uint32_t ask_device(uint32_t op, uint64_t gva, uint64_t bytes)
{
    uint32_t status;

    do {
        out32(PCG_PORT_NET, op, gva, bytes, 0, 0); /* the buffers lie below the hole: their gpa is their gva */
        status = in32(PCG_PORT_NET_STATUS);
    } while (status == PCG_NET_AGAIN);
    return status;
}

static void serve(struct pcg_vcpu *v) __attribute__((noreturn));
static void serve(struct pcg_vcpu *v)
{
    uint64_t buffer = 0, requests;

    for (;;) {
        uint64_t at = PCG_NET_BUFFERS + buffer * PCG_PAGE_BYTES + FRAME_AT;
        uint32_t bytes = ask_device(PCG_NET_RECEIVE, at, PCG_NET_FRAME_MAX);

        if (bytes == PCG_NET_OK) {
            report_progress(v);
            ask_device(PCG_NET_WAIT, 0, 0);
            continue;
        }
        if (bytes > PCG_NET_FRAME_MAX) {
            report_failure(v, PCG_FAIL_REQUESTS, at, 0, bytes); /* the device has refused a buffer that is right */
            halt();
            continue;
        }
        requests = v->requests;
        bytes = answer(v, (struct ethernet *)at, bytes);
        if (bytes)
            ask_device(PCG_NET_SEND, at, bytes);
        if (v->requests != requests)
            visit(v, PCG_ECHO_PAGES);
        buffer = (buffer + 1) % PCG_NET_BUFFER_COUNT;
    }
}

void workload(struct pcg_vcpu *v)
{
    uint64_t shared = pcg_slice_begin(boot->shared.pages, v->id + 1, boot->vcpus) -
                      pcg_slice_begin(boot->shared.pages, v->id, boot->vcpus);
    uint64_t kept[2] = { 0, ~0ull };

    xmm_load(kept);
    visit(v, boot->private_[v->id].pages + shared);
    read_addresses(v);
    wait_for_all(v);
    report_ready(v);
    if (v->id == 0)
        serve(v);
    for (;;) {
        halt();
        visit(v, 1);
        report_progress(v);
    }
}
