/* SPDX-License-Identifier: Apache-2.0
 *
 * The network device and the guest program that echoes, on both engines: what is answered and what is not, that the machine
 * answers on after it has moved, that it is paused where it waits for a page, and that neither a guest nor a saved state can
 * ask for what is not theirs. A socket pair takes the place of the TAP: one datagram is one frame.
 */
#include "tests/machine/machines.h"

#include <fcntl.h>
#include <sys/socket.h>

#include "postcopy/uffd.h"

#define MAC     0x525400a1b2c3ull
#define ADDRESS 0xa9fe0a0bu /* 169.254.10.11 */
#define PEER    0xa9fe0102u

static uint32_t engine; /* of the case */

/* ---- machines ---- */

static void attach(struct pc_machine_config *config, int *outside)
{
    int pair[2];

    CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, pair));
    config->net_fd = pair[0];
    *outside = pair[1];
}

static struct pc_machine_config make_networked(uint32_t vcpus, int *outside)
{
    struct pc_machine_config config = make_config(engine, PC_WORKLOAD_ECHO, vcpus, PC_MEMORY_MEMFD);

    config.working_set_bytes = MIB;
    config.has_net = 1;
    config.net_mac = MAC;
    config.net_address = ADDRESS;
    attach(&config, outside);
    return config;
}

/* The same machine on a network, and over memory, of its own. */
static struct pc_machine_config make_networked_twin(struct pc_machine_config *of, int *outside)
{
    struct pc_machine_config config = make_twin(of, PC_MEMORY_MEMFD);

    attach(&config, outside);
    return config;
}

/* ---- frames ---- */

struct frame {
    uint8_t bytes[2048];
    size_t count;
};

static const uint8_t peer_mac[6] = { 2, 0, 0, 0, 0, 9 };

static void put(struct frame *f, uint64_t value, int bytes)
{
    while (bytes--)
        f->bytes[f->count++] = (uint8_t)(value >> (8 * bytes));
}

static uint64_t get(const struct frame *f, size_t at, int bytes)
{
    uint64_t value = 0;

    for (int i = 0; i < bytes; i++)
        value = value << 8 | f->bytes[at + (size_t)i];
    return value;
}

static uint64_t get_little(const struct frame *f, size_t at)
{
    uint64_t value;

    memcpy(&value, f->bytes + at, sizeof value);
    return value;
}

/* The internet checksum of some bytes; over what contains its own sum: 0. */
static uint16_t sum_of(const uint8_t *bytes, size_t count, uint32_t sum)
{
    for (size_t i = 0; i < count; i++)
        sum += i % 2 ? bytes[i] : (uint32_t)bytes[i] << 8;
    while (sum >> 16)
        sum = (sum & 0xffff) + (sum >> 16);
    return (uint16_t)~sum;
}

static void put_sum(struct frame *f, size_t at, uint16_t sum)
{
    f->bytes[at] = (uint8_t)(sum >> 8);
    f->bytes[at + 1] = (uint8_t)sum;
}

static struct frame ethernet(uint64_t destination, uint16_t type)
{
    struct frame f = { .count = 0 };

    put(&f, destination, 6);
    for (int i = 0; i < 6; i++)
        put(&f, peer_mac[i], 1);
    put(&f, type, 2);
    return f;
}

static struct frame arp_for(uint32_t address)
{
    struct frame f = ethernet(0xffffffffffff, 0x806);

    put(&f, 0x0001080006040001, 8);
    for (int i = 0; i < 6; i++)
        put(&f, peer_mac[i], 1);
    put(&f, PEER, 4);
    put(&f, 0, 6);
    put(&f, address, 4);
    return f;
}

static struct frame ip_with(uint8_t protocol, const uint8_t *payload, size_t bytes)
{
    struct frame f = ethernet(MAC, 0x800);

    put(&f, 0x4500, 2);
    put(&f, 20 + bytes, 2);
    put(&f, 0x12344000, 4); /* id; do not fragment */
    put(&f, 64, 1);
    put(&f, protocol, 1);
    put(&f, 0, 2);
    put(&f, PEER, 4);
    put(&f, ADDRESS, 4);
    put_sum(&f, 24, sum_of(f.bytes + 14, 20, 0));
    memcpy(f.bytes + f.count, payload, bytes);
    f.count += bytes;
    return f;
}

static struct frame ping(uint16_t sequence, size_t bytes)
{
    uint8_t payload[1480] = { 8, 0, 0, 0, 0x77, 0x66, (uint8_t)(sequence >> 8), (uint8_t)sequence };
    struct frame f;

    for (size_t i = 8; i < bytes; i++)
        payload[i] = (uint8_t)test_random();
    f = ip_with(1, payload, bytes);
    put_sum(&f, 36, sum_of(f.bytes + 34, bytes, 0));
    return f;
}

#define PSEUDO(bytes) ((PEER >> 16) + (PEER & 0xffff) + (ADDRESS >> 16) + (ADDRESS & 0xffff) + 17 + (uint32_t)(bytes))

static struct frame datagram(uint16_t from, uint16_t to, size_t payload_bytes)
{
    uint8_t payload[1480] = { (uint8_t)(from >> 8), (uint8_t)from, (uint8_t)(to >> 8), (uint8_t)to };
    size_t bytes = payload_bytes + 8;
    struct frame f;

    payload[4] = (uint8_t)(bytes >> 8);
    payload[5] = (uint8_t)bytes;
    for (size_t i = 8; i < bytes; i++)
        payload[i] = (uint8_t)test_random();
    f = ip_with(17, payload, bytes);
    put_sum(&f, 40, sum_of(f.bytes + 34, bytes, PSEUDO(bytes)));
    return f;
}

static void throw_frame(int outside, const struct frame *f)
{
    CHECK_EQ(CHECK_SYS(write(outside, f->bytes, f->count)), f->count);
}

static bool answered_within(int outside, struct frame *answer, int ms)
{
    struct pollfd network = { .fd = outside, .events = POLLIN };

    if (poll(&network, 1, ms) == 0)
        return false;
    answer->count = (size_t)CHECK_SYS(read(outside, answer->bytes, sizeof answer->bytes));
    return true;
}

static struct frame ask(int outside, struct frame request)
{
    struct frame answer;

    throw_frame(outside, &request);
    if (!answered_within(outside, &answer, RUN_MS))
        FAIL("no answer");
    CHECK_EQ(get(&answer, 0, 6), get(&request, 6, 6));
    CHECK_EQ(get(&answer, 6, 6), MAC);
    CHECK_EQ(get(&answer, 12, 2), get(&request, 12, 2));
    return answer;
}

/* The number of the answer, and the nonce. */
static uint64_t count_answer(int outside, uint64_t *nonce)
{
    struct frame request = datagram(40000, PCG_UDP_COUNT, 40), answer = ask(outside, request);

    CHECK_EQ(answer.count, request.count);
    CHECK_EQ(get(&answer, 34, 4), (uint64_t)PCG_UDP_COUNT << 16 | 40000);
    CHECK_EQ(get(&answer, 40, 2), 0); /* no sum */
    CHECK(!memcmp(answer.bytes + 42, request.bytes + 42, 8));
    CHECK(!memcmp(answer.bytes + 66, request.bytes + 66, 16));
    *nonce = get_little(&answer, 58);
    return get_little(&answer, 50);
}

/* ---- what is answered ---- */

static void answers(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    struct pc_machine_stats stats;
    struct frame request, answer;
    uint64_t nonce, asked = 0;

    answer = ask(outside, arp_for(ADDRESS));
    CHECK_EQ(answer.count, 42);
    CHECK_EQ(get(&answer, 14, 8), 0x0001080006040002);
    CHECK_EQ(get(&answer, 22, 6), MAC);
    CHECK_EQ(get(&answer, 28, 4), ADDRESS);
    CHECK(!memcmp(answer.bytes + 32, peer_mac, 6));
    CHECK_EQ(get(&answer, 38, 4), PEER);

    for (size_t bytes = 8; bytes <= 1480; bytes += 92, asked++) {
        request = ping((uint16_t)asked, bytes);
        if (request.count < 60)
            request.count = 60; /* padding, as short frames have on a wire: it is no part of the answer */
        answer = ask(outside, request);
        CHECK_EQ(answer.count, 34 + bytes);
        CHECK_EQ(answer.bytes[34], 0);
        CHECK_EQ(sum_of(answer.bytes + 14, 20, 0), 0);
        CHECK_EQ(sum_of(answer.bytes + 34, bytes, 0), 0);
        CHECK_EQ(get(&answer, 26, 4), ADDRESS);
        CHECK_EQ(get(&answer, 30, 4), PEER);
        CHECK(!memcmp(answer.bytes + 38, request.bytes + 38, bytes - 4));
    }
    for (size_t bytes = 0; bytes <= 1472; bytes += 92, asked++) {
        request = datagram((uint16_t)(1000 + bytes), PCG_UDP_ECHO, bytes);
        answer = ask(outside, request);
        CHECK_EQ(answer.count, request.count);
        CHECK_EQ(get(&answer, 34, 4), (uint64_t)PCG_UDP_ECHO << 16 | (1000 + bytes));
        CHECK_EQ(sum_of(answer.bytes + 14, 20, 0), 0);
        CHECK_EQ(sum_of(answer.bytes + 34, bytes + 8, PSEUDO(bytes + 8)), 0);
        CHECK(!memcmp(answer.bytes + 42, request.bytes + 42, bytes));
    }
    CHECK_EQ(count_answer(outside, &nonce), asked + 1);
    CHECK_EQ(count_answer(outside, &nonce), asked + 2);
    answer = ask(outside, datagram(1234, PCG_UDP_COUNT, PCG_UDP_COUNT_BYTES - 1)); /* too short for a number: echoed */
    CHECK_EQ(sum_of(answer.bytes + 34, PCG_UDP_COUNT_BYTES + 7, PSEUDO(PCG_UDP_COUNT_BYTES + 7)), 0);
    pause_machine(machine);
    CHECK_EQ(verify_ok(machine).nonce, nonce);
    stats = healthy_stats_of(machine);
    CHECK_EQ(stats.net_received, asked + 4);
    CHECK_EQ(stats.net_sent, asked + 4);
    CHECK_EQ(stats.net_dropped + stats.net_errors, 0);
    close_machine(machine);
}

/* None of these is answered; an echo after each shows that it was looked at, and did no harm. */
static void does_not_answer(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    struct frame f[24], answer;
    size_t n = 0, dropped = 0;
    uint64_t nonce;

    f[n++] = arp_for(ADDRESS + 1);
    f[n] = arp_for(ADDRESS);
    f[n++].count--; /* cut short */
    f[n] = arp_for(ADDRESS);
    f[n++].bytes[21] = 2; /* an answer */
    f[n] = arp_for(ADDRESS);
    f[n++].bytes[6] |= 1; /* from a group */
    f[n] = ping(1, 64);
    f[n++].bytes[33]++; /* to another address */
    f[n] = ping(2, 64);
    f[n++].bytes[20] |= 0x20; /* fragments */
    f[n] = ping(2, 64);
    f[n++].bytes[21] = 1;
    f[n] = ping(3, 64);
    f[n++].bytes[14] = 0x46; /* options */
    f[n] = ping(3, 64);
    f[n++].bytes[14] = 0x65; /* another version */
    f[n] = ping(4, 64);
    f[n++].bytes[34] = 0; /* an answer */
    f[n] = ping(4, 64);
    f[n++].bytes[16] = 4; /* longer than its frame */
    f[n] = ping(4, 64);
    f[n++].bytes[17] = 27; /* too short for its header */
    f[n] = ping(4, 64);
    f[n++].bytes[17] = 19;
    f[n] = ping(4, 64);
    f[n++].bytes[26] = 224; /* from a group */
    f[n++] = datagram(1000, 8, 10);
    f[n++] = datagram(PCG_UDP_ECHO, PCG_UDP_ECHO, 10); /* two echoes would never end */
    f[n++] = datagram(PCG_UDP_COUNT, PCG_UDP_ECHO, 10);
    f[n++] = ip_with(6, f[0].bytes, 40);
    f[n++] = ethernet(MAC, 0x86dd);
    f[n] = ethernet(MAC, 0x800);
    f[n++].count = 13, dropped++; /* not even a header */
    f[n] = ping(5, 1480);
    f[n++].count = 1515, dropped++;
    f[n] = ping(5, 1480);
    f[n++].count = 2000, dropped++;
    for (size_t i = 0; i < n; i++) {
        throw_frame(outside, &f[i]);
        CHECK_EQ(count_answer(outside, &nonce), i + 1); /* and not an answer to f[i] */
    }
    CHECK(!answered_within(outside, &answer, 0));
    pause_machine(machine);
    verify_ok(machine);
    CHECK_EQ(healthy_stats_of(machine).net_dropped, dropped);
    CHECK_EQ(healthy_stats_of(machine).net_received, 2 * n - dropped);
    CHECK_EQ(healthy_stats_of(machine).net_sent, n);
    close_machine(machine);
}

/* Random bytes, some of them behind a header that lets them in. */
static void survives_noise(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    struct frame f, end, answer;

    end = arp_for(ADDRESS);
    for (int i = 28; i < 32; i++)
        end.bytes[i] ^= 0xff; /* who asks: no noise looks like this one */
    for (int i = 0; i < 400; i++) {
        f = i % 3 == 0 ? ping(1, 200) : i % 3 == 1 ? datagram(1000, PCG_UDP_COUNT, 100) : arp_for(ADDRESS);
        for (int k = 0; k < 1 + i % 7; k++)
            f.bytes[test_below(f.count)] = (uint8_t)test_random();
        f.count = test_below(f.count) + 1;
        throw_frame(outside, &f);
        throw_frame(outside, &end);
        do
            CHECK(answered_within(outside, &answer, RUN_MS));
        while (answer.count != 42 || memcmp(answer.bytes + 38, end.bytes + 28, 4));
    }
    pause_machine(machine);
    verify_ok(machine);
    close_machine(machine);
}

/* ---- moving ---- */

/* From one network to the next, ten times: one number after the other, from the same guest. */
static void moves(void)
{
    int outside, next_outside;
    struct pc_machine_config config = make_networked(2, &outside), twin;
    struct pc_machine *machine = boot_and_run(&config, 0), *next;
    struct pc_machine_stats before;
    static struct saved state;
    uint64_t nonce, first_nonce, number = count_answer(outside, &first_nonce);
    struct frame f = ping(1, 64), answer;

    for (int hop = 0; hop < 10; hop++) {
        pause_machine(machine);
        before = healthy_stats_of(machine);
        save(machine, &state);
        throw_frame(outside, &f); /* what comes now is lost: the machine is on its way */
        twin = make_networked_twin(&config, &next_outside);
        for (uint32_t i = 0; i <= config.vcpus; i++)
            memcpy(block(&twin, i)->base, block(&config, i)->base, block(&config, i)->size_bytes);
        next = open_machine(&twin);
        load(next, &state);
        CHECK_EQ(healthy_stats_of(next).net_received, before.net_received);
        CHECK_EQ(healthy_stats_of(next).net_sent, before.net_sent);
        CHECK_EQ(pc_machine_resume(next), 0);
        CHECK_EQ(count_answer(next_outside, &nonce), ++number);
        CHECK_EQ(nonce, first_nonce);
        CHECK(!answered_within(outside, &answer, 0));
        close_machine(machine);
        for (uint32_t i = 0; i <= config.vcpus; i++)
            pc_memory_destroy(block(&config, i));
        close(config.net_fd);
        close(outside);
        config = twin;
        machine = next;
        outside = next_outside;
    }
    pause_machine(machine);
    CHECK_EQ(verify_ok(machine).nonce, first_nonce);
    close_machine(machine);
}

/* The machine goes on where it was when a migration has failed: what came while it was paused is answered late. */
static void goes_on_where_it_was(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    static struct saved state;
    struct frame f = ping(1, 64), answer;
    uint64_t nonce;

    pause_machine(machine);
    save(machine, &state);
    throw_frame(outside, &f);
    CHECK_EQ(pc_machine_resume(machine), 0);
    CHECK(answered_within(outside, &answer, RUN_MS));
    CHECK_EQ(count_answer(outside, &nonce), 2);
    close_machine(machine);
}

#if defined(__SANITIZE_THREAD__)
#define SIGNALS_WAIT "TSan delivers a signal only when its thread makes a call, which a thread in a page fault does not"
#endif

/* The buffers' pages are missing at the destination: the device waits for one, is paused there, has then taken no frame, and
 * answers when the page has come. A userfaultfd for user-mode faults only is enough, whatever the engine. */
static void pauses_on_a_missing_buffer(void)
{
    int outside, next_outside;
    struct pc_machine_config config = make_networked(1, &outside), twin = make_networked_twin(&config, &next_outside);
    struct pc_machine *machine, *next;
    static struct saved state;
    struct frame f = datagram(40000, PCG_UDP_COUNT, 40), answer;
    uint64_t ioctls, done, nonce, buffers_bytes = PCG_NET_BUFFER_COUNT * PCG_PAGE_BYTES;
    uint8_t *buffers = (uint8_t *)twin.shared.base + PCG_NET_BUFFERS, *from = config.shared.base;
    struct pc_uffd_api api;
    struct pc_uffd_event event;
    struct pollfd fault = { .events = POLLIN };
    int n;

#ifdef SIGNALS_WAIT
    SKIP("signals", SIGNALS_WAIT);
#endif
    fault.fd = pc_uffd_open(PC_UFFD_USER_ONLY, 0, &api);
    if (fault.fd < 0)
        SKIP("uffd-user", "no userfaultfd, not even for user-mode faults");
    machine = boot_and_run(&config, 0);
    for (int i = 0; i < 5; i++) /* every buffer has been used, and the next one is the second */
        CHECK_EQ(count_answer(outside, &nonce), i + 1);
    pause_machine(machine);
    save(machine, &state);
    memcpy(twin.shared.base, from, PCG_NET_BUFFERS);
    memcpy(buffers + buffers_bytes, from + PCG_NET_BUFFERS + buffers_bytes,
           config.shared.size_bytes - PCG_NET_BUFFERS - buffers_bytes);
    memcpy(twin.private_[0].base, config.private_[0].base, config.private_[0].size_bytes);
    CHECK_EQ(pc_uffd_register(fault.fd, (uint64_t)(uintptr_t)buffers, buffers_bytes, PC_UFFD_MISSING, &ioctls), 0);
    next = open_machine(&twin);
    load(next, &state);
    throw_frame(next_outside, &f);
    for (int i = 0; i < 3; i++) {
        CHECK_EQ(pc_machine_resume(next), 0);
        CHECK(poll(&fault, 1, RUN_MS) == 1);
        while ((n = pc_uffd_read(fault.fd, &event, 1)) == 0)
            ;
        CHECK_EQ(n, 1);
        CHECK_EQ(event.address & ~4095ull, (uintptr_t)buffers + PCG_PAGE_BYTES);
        CHECK_EQ(healthy_stats_of(next).vcpu[0].activity, PC_VCPU_NET);
        pause_machine(next);
        CHECK_EQ(next->vcpu[0].net_status, PCG_NET_AGAIN);
        CHECK_EQ(healthy_stats_of(next).net_received, healthy_stats_of(machine).net_received);
    }
    CHECK_EQ(pc_machine_resume(next), 0);
    for (uint64_t i = 0; i < PCG_NET_BUFFER_COUNT; i++)
        CHECK_EQ(pc_uffd_zeropage(fault.fd, (uint64_t)(uintptr_t)buffers + i * PCG_PAGE_BYTES, PCG_PAGE_BYTES, 0, &done), 0);
    CHECK(answered_within(next_outside, &answer, RUN_MS));
    CHECK_EQ(get_little(&answer, 50), 6);
    CHECK_EQ(get_little(&answer, 58), nonce);
    for (uint64_t i = 7; i < 20; i++)
        CHECK_EQ(count_answer(next_outside, &nonce), i);
    pause_machine(next);
    CHECK_EQ(verify_ok(next).nonce, nonce);
    close_machine(next);
    close_machine(machine);
}

/* Paused wherever it is (asleep, receiving, answering): no frame is lost by it, none answered twice. */
static void survives_many_pauses(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    struct frame f, answer;
    uint64_t nonce, expected = 0;

    for (int i = 0; i < 300; i++) {
        uint64_t until_ns = pc_now_ns() + test_below(400000);
        int thrown = (int)test_below(4);

        for (int k = 0; k < thrown; k++) {
            f = datagram(40000, PCG_UDP_COUNT, 40);
            throw_frame(outside, &f);
        }
        while (pc_now_ns() < until_ns)
            ;
        pause_machine(machine);
        CHECK_EQ(pc_machine_resume(machine), 0);
        for (int k = 0; k < thrown; k++) {
            CHECK(answered_within(outside, &answer, RUN_MS));
            CHECK_EQ(get_little(&answer, 50), ++expected);
        }
    }
    CHECK_EQ(count_answer(outside, &nonce), expected + 1);
    pause_machine(machine);
    CHECK_EQ(verify_ok(machine).nonce, nonce);
    close_machine(machine);
}

/* The other end is gone: the guest sleeps instead of asking for ever, and can be paused and ended. */
static void a_dead_network_costs_nothing(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = boot_and_run(&config, 0);
    uint64_t reports;

    close(outside);
    reports = healthy_stats_of(machine).vcpu[0].reports;
    for (int i = 0; i < 4; i++)
        wait_event(machine);
    CHECK(healthy_stats_of(machine).vcpu[0].reports < reports + 50); /* one for each tick: asking on and on it makes thousands */
    pause_machine(machine);
    verify_ok(machine);
    close_machine(machine);
}

/* ---- what is refused ---- */

static void refuses_requests(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside);
    struct pc_machine *machine = open_machine(&config);
    struct pc_vcpu *vcpu = &machine->vcpu[0];
    uint64_t end = config.shared.size_bytes;
    struct frame answer, f = ping(1, 64);
    const struct {
        uint32_t op;
        uint64_t gpa, bytes;
    } bad[] = {
        { 0, 0xc000, 64 },
        { 4, 0xc000, 64 },
        { UINT32_MAX, 0xc000, 64 },
        { PCG_NET_SEND, 0xc000, 0 },
        { PCG_NET_SEND, 0xc000, 13 },
        { PCG_NET_SEND, 0xc000, 1515 },
        { PCG_NET_RECEIVE, 0xc000, UINT64_MAX },
        { PCG_NET_RECEIVE, 0xc000, 1ull << 32 | 64 },
        { PCG_NET_SEND, end, 64 },
        { PCG_NET_SEND, end - 63, 64 },
        { PCG_NET_RECEIVE, end - 63, 64 },
        { PCG_NET_RECEIVE, UINT64_MAX - 32, 64 },
        { PCG_NET_RECEIVE, PCG_MMIO, 64 },
    };

    throw_frame(outside, &f);
    atomic_store(&machine->leave, false); /* as if it ran: this thread is its vCPU */
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        CHECK_EQ(pc_net_request(vcpu, bad[i].op, bad[i].gpa, bad[i].bytes), PCG_NET_BAD_REQUEST);
        CHECK_EQ(atomic_load(&machine->net_errors), i + 1);
    }
    CHECK(!answered_within(outside, &answer, 0)); /* nothing left */
    /* At the very end of memory it is well, and a frame that does not fit is dropped whole. */
    memset((uint8_t *)config.shared.base + end - 64, 0x5a, 64);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_RECEIVE, end - 64, 64), PCG_NET_OK);
    CHECK_EQ(atomic_load(&machine->net_dropped), 1);
    CHECK_EQ(*((uint8_t *)config.shared.base + end - 64), 0x5a);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_SEND, end - 64, 64), PCG_NET_OK);
    CHECK(answered_within(outside, &answer, 0));
    CHECK(answer.count == 64 && answer.bytes[0] == 0x5a && answer.bytes[63] == 0x5a);
    throw_frame(outside, &f);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_RECEIVE, 0xc000 + 3000, 1200), f.count); /* across a page */
    CHECK(!memcmp((uint8_t *)config.shared.base + 0xc000 + 3000, f.bytes, f.count));
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_RECEIVE, 0xc000, 1514), PCG_NET_OK);
    /* Of a vCPU that must leave nothing is done. */
    throw_frame(outside, &f);
    atomic_store(&machine->leave, true);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_RECEIVE, 0xc000, 1514), PCG_NET_AGAIN);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_SEND, 0xc000, 64), PCG_NET_AGAIN);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_WAIT, 0, 0), PCG_NET_OK);
    CHECK(!answered_within(outside, &answer, 0));
    atomic_store(&machine->leave, false);
    CHECK_EQ(pc_net_request(vcpu, PCG_NET_RECEIVE, 0xc000, 1514), f.count);
    close_machine(machine);
}

static void refuse(struct pc_machine_config config, const char *text)
{
    struct pc_machine *machine;

    CHECK_EQ(pc_machine_open(&config, &machine, error, sizeof error), config.net_fd < 0 ? -EBADF : -EINVAL);
    if (!strstr(error, text))
        FAIL("\"%s\" is not about %s", error, text);
}

static void refuses_configurations(void)
{
    int outside, blocking[2];
    struct pc_machine_config config = make_networked(1, &outside), bad;

    CHECK_SYS(socketpair(AF_UNIX, SOCK_SEQPACKET, 0, blocking));
    bad = config, bad.has_net = 0;
    refuse(bad, "needs a network");
    bad = config, bad.net_fd = -1;
    refuse(bad, "cannot be used");
    bad = config, bad.net_fd = blocking[0];
    refuse(bad, "without blocking");
    bad = config, bad.net_mac = 0;
    refuse(bad, "MAC");
    bad = config, bad.net_mac = 1ull << 48;
    refuse(bad, "MAC");
    bad = config, bad.net_mac |= 1ull << 40;
    refuse(bad, "MAC");
    bad = config, bad.net_address = 0;
    refuse(bad, "IPv4");
    bad = config, bad.net_address = 0xe0000001;
    refuse(bad, "IPv4");
    bad = config, bad.net_address = 0x7f000001;
    refuse(bad, "IPv4");
}

static int load_changed(const struct pc_machine_config *config, const struct saved *good, size_t offset, uint32_t value)
{
    static struct saved bad;

    bad = *good;
    memcpy(bad.bytes + find_section(good, "NETD") + 16 + offset, &value, sizeof value);
    seal(&bad);
    return try_load(config, &bad);
}

static void refuses_states(void)
{
    int outside;
    struct pc_machine_config config = make_networked(1, &outside), other;
    struct pc_machine *machine = boot_and_run(&config, 0);
    static struct saved good, without;
    struct pc_machine *idle;

    pause_machine(machine);
    save(machine, &good);
    close_machine(machine);
    CHECK_EQ(try_load(&config, &good), 0);
    other = config, other.net_mac++;
    CHECK_EQ(try_load(&other, &good), -EINVAL);
    CHECK(strstr(error, "addresses"));
    other = config, other.net_address++;
    CHECK_EQ(try_load(&other, &good), -EINVAL);
    CHECK_EQ(load_changed(&config, &good, 0, 5), -EINVAL);          /* MAC */
    CHECK_EQ(load_changed(&config, &good, 8, 5), -EINVAL);          /* address */
    CHECK_EQ(load_changed(&config, &good, 12, 5), -EBADMSG);        /* zero */
    CHECK_EQ(load_changed(&config, &good, 48, 1515), -EBADMSG);     /* status */
    CHECK_EQ(load_changed(&config, &good, 48, UINT32_MAX), -EBADMSG);
    CHECK_EQ(load_changed(&config, &good, 52, 5), -EBADMSG);        /* status of a vCPU that is not there */
    CHECK_EQ(load_changed(&config, &good, 48, PCG_NET_AGAIN), 0);
    /* One has a network device and the other has not. */
    other = config, other.workload = PC_WORKLOAD_IDLE, other.has_net = 0;
    idle = open_machine(&other);
    CHECK_EQ(pc_machine_boot(idle), 0);
    save(idle, &without);
    close_machine(idle);
    other.has_net = 1;
    CHECK_EQ(try_load(&other, &without), -EBADMSG);
    CHECK(strstr(error, "NETD is missing"));
    idle = open_machine(&other);
    memset(other.shared.base, 0, PCG_IMAGE_END);
    CHECK_EQ(pc_machine_boot(idle), 0);
    save(idle, &without);
    close_machine(idle);
    other.has_net = 0;
    CHECK_EQ(try_load(&other, &without), -EPROTO);
    CHECK(strstr(error, "NETD"));
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(void);
    } cases[] = {
#define CASE(function) { #function, function }
        CASE(answers), CASE(does_not_answer), CASE(survives_noise), CASE(moves), CASE(goes_on_where_it_was),
        CASE(pauses_on_a_missing_buffer), CASE(survives_many_pauses), CASE(a_dead_network_costs_nothing),
        CASE(refuses_requests), CASE(refuses_configurations), CASE(refuses_states),
    };

    test_begin(argc, argv);
    for (engine = PC_ENGINE_KVM; engine <= PC_ENGINE_RV64; engine++)
        for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
            char name[64];
            (void)snprintf(name, sizeof name, "%s_%s", engine == PC_ENGINE_KVM ? "kvm" : "rv64", cases[i].name);
            test_run_(name, cases[i].run, TEST_DEADLINE_S);
        }
    return test_end();
}
