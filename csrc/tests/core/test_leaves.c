/* SPDX-License-Identifier: Apache-2.0
 *
 * The leaves that need nothing of the system: checksums, bitmaps, histograms, frames. Mostly properties over random input,
 * against a slow and obvious version of the same thing.
 */
#include <endian.h>

#include "core/crc32c.h"
#include "core/summary.h"
#include "core/util.h"
#include "postcopy/core.h"
#include "tests/support/test.h"

/* ---- crc64 ---- */

static void crc64_has_the_known_values(void)
{
    const char digits[] = "123456789";
    uint64_t crc = pc_crc64(0, digits, 9);

    CHECK(crc == UINT64_C(0xe9c6d914c4b8d9ca));
    CHECK(pc_crc64(pc_crc64(0, digits, 4), digits + 4, 5) == crc);
    CHECK_EQ(pc_crc64(crc, &crc, sizeof(crc)), 0); /* little endian, as it is written: of all that is there it is 0 */
    CHECK_EQ(pc_crc64(0, "", 0), 0);
}

/* ---- crc32c ---- */

static uint32_t crc_by_bits(uint32_t crc, const uint8_t *data, size_t bytes)
{
    crc = ~crc;
    for (size_t i = 0; i < bytes; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
    }
    return ~crc;
}

static void fill_random(uint8_t *data, size_t bytes)
{
    for (size_t i = 0; i < bytes; i++)
        data[i] = (uint8_t)test_random();
}

static void crc_has_the_vectors_of_rfc_3720(void)
{
    /* RFC 3720, B.4: given there as byte sequences in transmission order. */
    static const uint8_t iscsi_read[48] = {0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                           0x14, 0, 0, 0, 0, 0, 0x04, 0, 0, 0, 0, 0x14, 0, 0, 0, 0x18,
                                           0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0};
    uint8_t data[32];

    for (int by_cpu = pc_crc32c_has_cpu(); by_cpu >= 0; by_cpu--) {
        uint32_t (*crc32c)(uint32_t, const void *, size_t) = by_cpu ? pc_crc32c_by_cpu : pc_crc32c_portable;

        memset(data, 0, 32);
        CHECK_EQ(crc32c(0, data, 32), 0x8A9136AA);
        memset(data, 0xff, 32);
        CHECK_EQ(crc32c(0, data, 32), 0x62A8AB43);
        for (uint8_t i = 0; i < 32; i++)
            data[i] = i;
        CHECK_EQ(crc32c(0, data, 32), 0x46DD794E);
        for (uint8_t i = 0; i < 32; i++)
            data[i] = (uint8_t)(31 - i);
        CHECK_EQ(crc32c(0, data, 32), 0x113FDB5C);
        CHECK_EQ(crc32c(0, iscsi_read, 48), 0xD9963A56);
        CHECK_EQ(crc32c(0, "123456789", 9), 0xE3069283);
        CHECK_EQ(crc32c(0, "", 0), 0);
    }
}

static void crc_paths_agree(void)
{
    static uint8_t data[16384 + 16];

    fill_random(data, sizeof(data));
    for (int by_cpu = pc_crc32c_has_cpu(); by_cpu >= 0; by_cpu--) {
        uint32_t (*crc32c)(uint32_t, const void *, size_t) = by_cpu ? pc_crc32c_by_cpu : pc_crc32c_portable;

        /* Every short length, at every alignment: no byte before or behind is read into the sum. */
        for (size_t bytes = 0; bytes < 600; bytes++) {
            size_t from = bytes % 16;

            CHECK_EQ(crc32c(0, data + from, bytes), crc_by_bits(0, data + from, bytes));
        }
        /* Around the lengths at which the lanes change, and any others. */
        for (int i = 0; i < 400; i++) {
            static const size_t edges[] = {504, 1008, 4080, 4096, 8160, 8192, 12240, 16384};
            size_t from = test_below(16), bytes = i & 1 ? test_below(16384) : edges[test_below(8)] - test_below(10);
            uint32_t seed = (uint32_t)test_random();

            CHECK_EQ(crc32c(seed, data + from, bytes), crc_by_bits(seed, data + from, bytes));
        }
    }
}

static void crc_continues(void)
{
    static uint8_t data[9000];

    fill_random(data, sizeof(data));
    for (int i = 0; i < 200; i++) {
        size_t bytes = test_below(sizeof(data)), cut = test_below(bytes + 1);

        CHECK_EQ(pc_crc32c(pc_crc32c(0, data, cut), data + cut, bytes - cut), pc_crc32c(0, data, bytes));
    }
}

static void is_zero_sees_every_bit(void)
{
    static uint8_t data[4096 + 64];

    CHECK(pc_is_zero(data, 0));
    for (size_t bytes = 1; bytes <= 4096; bytes += bytes < 300 ? 1 : 379) {
        size_t from = test_below(64), where = test_below(bytes);

        CHECK(pc_is_zero(data + from, bytes));
        data[from + where] = (uint8_t)(1u << test_below(8));
        CHECK(!pc_is_zero(data + from, bytes));
        data[from + where] = 0;
        /* What is next to the range does not count. */
        data[from + bytes] = 1;
        if (from)
            data[from - 1] = 1;
        CHECK(pc_is_zero(data + from, bytes));
        data[from + bytes] = 0;
        if (from)
            data[from - 1] = 0;
    }
    for (size_t where = 0; where < 4096; where++) {
        data[where] = 0x80;
        CHECK(!pc_is_zero(data, 4096));
        data[where] = 0;
    }
    CHECK(pc_is_zero(data, 4096));
}

/* ---- bitmap ---- */

#define MAP_BITS 1000
#define MAP_WORDS ((MAP_BITS + 63) / 64)

static int bit_at(const uint64_t *words, uint64_t bit)
{
    return (int)(words[bit / 64] >> bit % 64 & 1);
}

/* Random runs, from nearly empty to nearly full; bits from `bits` on stay zero. */
static void random_map(uint64_t *words, uint64_t bits)
{
    uint64_t runs = test_below(40);

    memset(words, 0, MAP_WORDS * sizeof(*words));
    for (uint64_t i = 0; i < runs && bits; i++) {
        uint64_t first = test_below(bits), count = test_below(1 + test_below(bits - first + 1));

        for (uint64_t bit = first; bit < first + count; bit++)
            words[bit / 64] |= (uint64_t)1 << bit % 64;
    }
}

static void bitmap_words_does_not_overflow(void)
{
    CHECK_EQ(pc_bitmap_words(0), 0);
    CHECK_EQ(pc_bitmap_words(1), 1);
    CHECK_EQ(pc_bitmap_words(64), 1);
    CHECK_EQ(pc_bitmap_words(65), 2);
    CHECK_EQ(pc_bitmap_words(UINT64_MAX), (UINT64_MAX >> 6) + 1);
}

static void bitmap_next_and_count_agree_with_single_bits(void)
{
    uint64_t words[MAP_WORDS];

    for (int round = 0; round < 300; round++) {
        uint64_t bits = test_below(MAP_BITS + 1), count = 0;

        random_map(words, bits);
        for (uint64_t bit = 0; bit < bits; bit++)
            count += (uint64_t)bit_at(words, bit);
        CHECK_EQ(pc_bitmap_count(words, bits), count);
        for (int value = 0; value < 2; value++) {
            for (int i = 0; i < 20; i++) {
                uint64_t from = test_below(bits + 3), expected = from < bits ? from : bits;

                while (expected < bits && bit_at(words, expected) != value)
                    expected++;
                CHECK_EQ(pc_bitmap_next(words, bits, from, value), expected);
            }
        }
    }
}

static void bitmap_ranges_change_what_they_name_only(void)
{
    uint64_t words[MAP_WORDS], before[MAP_WORDS];

    for (int round = 0; round < 500; round++) {
        uint64_t first = test_below(MAP_BITS), count = test_below(MAP_BITS - first + 1);
        int set = round & 1;

        random_map(words, MAP_BITS);
        memcpy(before, words, sizeof(words));
        if (set)
            pc_bitmap_set_range(words, first, count);
        else
            pc_bitmap_clear_range(words, first, count);
        for (uint64_t bit = 0; bit < MAP_WORDS * 64; bit++)
            CHECK_EQ(bit_at(words, bit), bit >= first && bit < first + count ? set : bit_at(before, bit));
    }
}

static void bitmaps_of_bitmaps_agree_with_single_bits(void)
{
    uint64_t from[MAP_WORDS], to[MAP_WORDS], before[MAP_WORDS], scaled[MAP_WORDS];

    for (int round = 0; round < 300; round++) {
        uint64_t first = test_below(MAP_BITS), to_first = test_below(MAP_BITS);
        uint64_t count = test_below(MAP_BITS + 1 - (first > to_first ? first : to_first));
        uint64_t small = 1 + test_below(5), large = small * (1 + test_below(20));

        random_map(from, MAP_BITS);
        random_map(to, MAP_BITS);
        memcpy(before, to, sizeof(to));
        pc_bitmap_copy(to, to_first, from, first, count);
        for (uint64_t bit = 0; bit < MAP_BITS; bit++)
            CHECK_EQ(bit_at(to, bit),
                     bit >= to_first && bit < to_first + count ? bit_at(from, bit - to_first + first) : bit_at(before, bit));
        memcpy(before, to, sizeof(to));
        pc_bitmap_clear_those(to, from, MAP_BITS);
        for (uint64_t bit = 0; bit < MAP_BITS; bit++)
            CHECK_EQ(bit_at(to, bit), bit_at(before, bit) && !bit_at(from, bit));
        memset(scaled, 0, sizeof(scaled));
        memset(before, 0, sizeof(before));
        pc_bitmap_rescale(scaled, large, from, small, MAP_BITS);
        for (uint64_t bit = 0; bit < MAP_BITS; bit++)
            if (bit_at(from, bit))
                pc_bitmap_set_range(before, bit * small / large, 1);
        CHECK(!memcmp(scaled, before, sizeof(before)));
    }
}

static void rle_round_trip(void)
{
    uint64_t words[MAP_WORDS], back[MAP_WORDS + 1];
    uint8_t bytes[2 * MAP_BITS];

    for (int round = 0; round < 500; round++) {
        uint64_t bits = test_below(MAP_BITS + 1);
        int64_t needed, written;
        size_t cap;

        random_map(words, bits);
        needed = pc_bitmap_rle_encode(words, bits, NULL, 0);
        CHECK(needed >= 0 && needed <= (int64_t)sizeof(bytes));
        /* Never past `cap`, and always the whole length told. */
        cap = test_below((uint64_t)needed + 2);
        memset(bytes, 0xA5, sizeof(bytes));
        written = pc_bitmap_rle_encode(words, bits, bytes, cap);
        CHECK_EQ(written, needed);
        CHECK_EQ(bytes[cap], 0xA5);
        written = pc_bitmap_rle_encode(words, bits, bytes, sizeof(bytes));
        CHECK_EQ(written, needed);
        memset(back, 0xA5, sizeof(back));
        CHECK_EQ(pc_bitmap_rle_decode(bytes, (size_t)written, back, bits), 0);
        for (uint64_t bit = 0; bit < bits; bit++)
            CHECK_EQ(bit_at(back, bit), bit_at(words, bit));
        for (uint64_t bit = bits; bit < bits + 64; bit++)
            CHECK_EQ(bit_at(back, bit), 0xA5 >> bit % 8 & 1);
        /* One bit fewer than the last set one, or a cut anywhere: refused. */
        if (needed) {
            uint64_t last = bits;

            while (!bit_at(words, last - 1))
                last--;
            CHECK_EQ(pc_bitmap_rle_decode(bytes, (size_t)written, back, last - 1), -EBADMSG);
            CHECK_EQ(pc_bitmap_rle_decode(bytes, (size_t)written, back, last), 0);
        }
    }
}

static void rle_has_the_documented_form(void)
{
    uint64_t words[4] = {0};
    uint8_t bytes[8];

    CHECK_EQ(pc_bitmap_rle_encode(words, 256, bytes, sizeof(bytes)), 0);
    words[0] = 1; /* an empty run of zeros, one one */
    CHECK_EQ(pc_bitmap_rle_encode(words, 256, bytes, sizeof(bytes)), 2);
    CHECK(!memcmp(bytes, "\x00\x01", 2));
    words[0] = 0;
    pc_bitmap_set_range(words, 200, 3);
    CHECK_EQ(pc_bitmap_rle_encode(words, 256, bytes, sizeof(bytes)), 3);
    CHECK(!memcmp(bytes, "\xC8\x01\x03", 3));
}

static void rle_refuses_what_is_malformed(void)
{
#define REFUSED(literal) CHECK_EQ(pc_bitmap_rle_decode((const uint8_t *)(literal), sizeof(literal) - 1, words, 256), -EBADMSG)
    uint64_t words[4] = {0x1234, 0, 0, 0x5678};

    REFUSED("\x05");                     /* zeros with nothing behind them */
    REFUSED("\x05\x00");                 /* no ones */
    REFUSED("\x05\x01\x00\x01");         /* an empty run in the middle */
    REFUSED("\x80");                     /* cut off */
    REFUSED("\x80\x00\x01");             /* longer than needed */
    REFUSED("\x80\x02\x01");             /* past the end */
    REFUSED("\xFF\x01\x02");             /* the ones are */
    REFUSED("\x00\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01");     /* 2^64 - 1 */
    REFUSED("\x00\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x02");     /* more than 64 bits */
    REFUSED("\x01\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01"); /* much more */
    REFUSED("\x01\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF\x01");     /* 1 + (2^64 - 1) = 0 */
    CHECK(words[0] == 0x1234 && words[3] == 0x5678);
    CHECK_EQ(pc_bitmap_rle_decode((const uint8_t *)"\x00\x80\x02", 3, words, 256), 0);
    CHECK_EQ(pc_bitmap_count(words, 256), 256);
    CHECK_EQ(pc_bitmap_rle_decode((const uint8_t *)"", 0, words, 256), 0);
    CHECK_EQ(pc_bitmap_count(words, 256), 0);
#undef REFUSED
}

/* ---- histogram ---- */

static int by_value(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;

    return x < y ? -1 : x > y;
}

static void histogram_is_off_by_3_percent_at_most(void)
{
    static struct pc_histogram h;
    static uint64_t values[5000];
    const size_t n = PC_ARRAY_LENGTH(values);
    static const struct {
        double percentile;
        size_t rank;
    } points[] = {{0, 1}, {1, 50}, {50, 2500}, {90, 4500}, {99, 4950}, {99.9, 4995}, {99.98, 4999}};

    CHECK_EQ(pc_histogram_percentile(&h, 50), 0);
    for (size_t i = 0; i < n; i++) {
        values[i] = test_random() >> test_below(64);
        pc_histogram_add(&h, values[i]);
    }
    qsort(values, n, sizeof(values[0]), by_value);
    CHECK_EQ(h.count, n);
    CHECK_EQ(h.max_ns, values[n - 1]);
    CHECK_EQ(pc_histogram_percentile(&h, 100), values[n - 1]);
    for (size_t i = 0; i < PC_ARRAY_LENGTH(points); i++) {
        uint64_t exact = values[points[i].rank - 1], got = pc_histogram_percentile(&h, points[i].percentile);

        CHECK(got >= exact);
        CHECK(got - exact <= exact / 32);
    }
}

static void histogram_takes_every_value(void)
{
    static struct pc_histogram h;
    uint64_t last = 0;

    for (int exponent = 0; exponent < 64; exponent++) {
        for (int64_t off = -1; off <= 1; off++) {
            memset(&h, 0, sizeof(h));
            pc_histogram_add(&h, ((uint64_t)1 << exponent) + (uint64_t)off);
            CHECK_EQ(pc_histogram_percentile(&h, 50), h.max_ns);
        }
    }
    memset(&h, 0, sizeof(h));
    pc_histogram_add(&h, UINT64_MAX);
    CHECK_EQ(h.buckets[PC_HISTOGRAM_BUCKETS - 1], 1);
    CHECK_EQ(pc_histogram_percentile(&h, 0), UINT64_MAX);
    /* Small values are exact, and percentiles never fall. */
    memset(&h, 0, sizeof(h));
    for (uint64_t i = 0; i < 32; i++)
        pc_histogram_add(&h, i);
    for (double percentile = 0; percentile <= 100; percentile += 0.5) {
        uint64_t value = pc_histogram_percentile(&h, percentile);

        CHECK(value >= last);
        last = value;
    }
    CHECK_EQ(pc_histogram_percentile(&h, 50), 15);
    CHECK_EQ(last, 31);
}

static void histogram_merge_is_addition(void)
{
    static struct pc_histogram one, two, both;

    for (int i = 0; i < 2000; i++) {
        uint64_t value = test_random() >> test_below(60);

        pc_histogram_add(i % 3 ? &one : &two, value);
        pc_histogram_add(&both, value);
    }
    pc_histogram_merge(&one, &two);
    CHECK(!memcmp(&one, &both, sizeof(both)));
}

/* ---- frame ---- */

static struct pc_frame random_frame(void)
{
    struct pc_frame frame = {
        .type = (uint8_t)(1 + test_below(5)),
        .block = (uint16_t)test_random(),
        .first_page = test_random() >> 1 >> test_below(62),
        .pages = 1 + (uint32_t)test_below(1024),
        .request_id = (uint32_t)test_random(),
    };

    if (frame.type != PC_FRAME_REQUEST && frame.type != PC_FRAME_END)
        frame.flags = (uint8_t)test_below(2);
    if (frame.type == PC_FRAME_END)
        frame.pages = 0;
    if (frame.type == PC_FRAME_PAGES)
        frame.payload_bytes = frame.pages * 4096;
    if (frame.type == PC_FRAME_ERROR)
        frame.payload_bytes = (uint32_t)test_below(200);
    if (frame.payload_bytes)
        frame.payload_crc = (uint32_t)test_random();
    return frame;
}

static void frame_round_trip(void)
{
    uint8_t header[PC_FRAME_HEADER_BYTES];
    char error[PC_ERROR_BYTES];

    for (int i = 0; i < 2000; i++) {
        struct pc_frame frame = random_frame(), back;
        size_t where;

        pc_frame_encode(&frame, header);
        CHECK_EQ(pc_frame_decode(header, &back, error, sizeof(error)), 0);
        CHECK(back.type == frame.type && back.flags == frame.flags && back.block == frame.block &&
              back.pages == frame.pages && back.first_page == frame.first_page && back.request_id == frame.request_id &&
              back.payload_bytes == frame.payload_bytes && back.payload_crc == frame.payload_crc);
        /* A changed bit anywhere is found. */
        where = test_below(sizeof(header));
        header[where] = (uint8_t)(header[where] ^ 1u << test_below(8));
        error[0] = '\0';
        CHECK_EQ(pc_frame_decode(header, &back, error, sizeof(error)), -EBADMSG);
        CHECK(error[0] && !strchr(error, '\n'));
    }
}

static void frame_has_the_documented_layout(void)
{
    struct pc_frame frame = {.type = 2, .flags = 1, .block = 0x0304, .first_page = 0x1112131415161718, .pages = 2,
                             .request_id = 0x21222324, .payload_bytes = 8192, .payload_crc = 0x31323334};
    static const uint8_t expected[36] = {'P', 'C', 'P', 'F', 2, 1, 4, 3, 0x18, 0x17, 0x16, 0x15, 0x14, 0x13, 0x12, 0x11,
                                         2, 0, 0, 0, 0x24, 0x23, 0x22, 0x21, 0, 0x20, 0, 0, 0x34, 0x33, 0x32, 0x31};
    uint8_t header[PC_FRAME_HEADER_BYTES];
    uint32_t crc;

    pc_frame_encode(&frame, header);
    CHECK(!memcmp(header, expected, sizeof(expected)));
    memcpy(&crc, header + 36, sizeof(crc));
    CHECK_EQ(le32toh(crc), crc_by_bits(0, header, 36));
}

/* Each with a right checksum, so that it is the field which is refused. */
static void frame_refuses_what_makes_no_sense(void)
{
    static const struct {
        const char *what, *says;
        struct pc_frame frame;
    } bad[] = {
        {"type 0", "type", {.type = 0, .pages = 1}},
        {"type 6", "type", {.type = 6, .pages = 1}},
        {"flag 2", "flags", {.type = PC_FRAME_ZERO, .flags = 2, .pages = 1}},
        {"flag 128", "flags", {.type = PC_FRAME_ZERO, .flags = 0x81, .pages = 1}},
        {"a request that answers", "answer", {.type = PC_FRAME_REQUEST, .flags = 1, .pages = 1}},
        {"an end that answers", "answer", {.type = PC_FRAME_END, .flags = 1}},
        {"a request for nothing", "without pages", {.type = PC_FRAME_REQUEST}},
        {"no pages", "without pages", {.type = PC_FRAME_PAGES, .payload_bytes = 4096}},
        {"no zero pages", "without pages", {.type = PC_FRAME_ZERO}},
        {"an error about nothing", "without pages", {.type = PC_FRAME_ERROR}},
        {"an end with pages", "end with", {.type = PC_FRAME_END, .pages = 1}},
        {"pages past 2^64", "past every block", {.type = PC_FRAME_REQUEST, .first_page = UINT64_MAX, .pages = 1}},
        {"too long", "too long", {.type = PC_FRAME_PAGES, .pages = 1, .payload_bytes = PC_FRAME_MAX_PAYLOAD_BYTES + 1}},
        {"an error too long", "too long", {.type = PC_FRAME_ERROR, .pages = 1, .payload_bytes = UINT32_MAX}},
        {"pages without content", "pages in 0 bytes", {.type = PC_FRAME_PAGES, .pages = 1}},
        {"parts of pages", "3 pages in", {.type = PC_FRAME_PAGES, .pages = 3, .payload_bytes = 4096}},
        {"a request with payload", "payload", {.type = PC_FRAME_REQUEST, .pages = 1, .payload_bytes = 1}},
        {"zeros with payload", "payload", {.type = PC_FRAME_ZERO, .pages = 1, .payload_bytes = 4096}},
        {"an end with payload", "payload", {.type = PC_FRAME_END, .payload_bytes = 4096}},
        {"checksum of nothing", "checksum", {.type = PC_FRAME_ZERO, .pages = 1, .payload_crc = 1}},
    };
    uint8_t header[PC_FRAME_HEADER_BYTES];
    char error[PC_ERROR_BYTES], tiny[4];
    uint32_t crc;
    struct pc_frame frame;

    for (size_t i = 0; i < PC_ARRAY_LENGTH(bad); i++) {
        error[0] = '\0';
        pc_frame_encode(&bad[i].frame, header);
        if (pc_frame_decode(header, &frame, error, sizeof(error)) != -EBADMSG)
            FAIL("%s was accepted", bad[i].what);
        if (!strstr(error, bad[i].says))
            FAIL("%s: \"%s\" does not say \"%s\"", bad[i].what, error, bad[i].says);
    }
    pc_frame_encode(&(struct pc_frame){.type = PC_FRAME_ZERO, .pages = 1}, header);
    header[33] = 1;
    crc = htole32(pc_crc32c(0, header, 36));
    memcpy(header + 36, &crc, sizeof(crc));
    CHECK_EQ(pc_frame_decode(header, &frame, error, sizeof(error)), -EBADMSG);
    CHECK(strstr(error, "of content"));
    CHECK_EQ(pc_frame_decode(header, &frame, NULL, 0), -EBADMSG);
    memset(tiny, 'x', sizeof(tiny));
    CHECK_EQ(pc_frame_decode(header, &frame, tiny, sizeof(tiny)), -EBADMSG);
    CHECK_EQ(strlen(tiny), 3);
}

/* Against a look at every bit, with words that are full and not yet said to be among them. */
static void summary_finds_what_is_not_full(void)
{
    static const uint64_t sizes[] = {1, 63, 64, 65, 4096, 4097, 70000, 300000};

    for (size_t i = 0; i < PC_ARRAY_LENGTH(sizes); i++) {
        uint64_t bits = sizes[i], words = pc_bitmap_words(bits);
        uint64_t *map = calloc(words, sizeof(*map)), *levels = calloc(pc_summary_size(words), sizeof(*levels));
        struct pc_summary summary;

        CHECK(map && levels);
        pc_summary_init(&summary, words, levels);
        CHECK_EQ(pc_summary_next(&summary, 0), 0);
        pc_bitmap_set_range(map, 0, bits);
        pc_bitmap_clear_range(map, test_below(bits), 1);
        pc_bitmap_clear_range(map, test_below(bits), 1);
        pc_summary_make(&summary, map, bits);
        for (int turn = 0; turn < 200; turn++) {
            uint64_t from = test_below(words + 1), next = from;

            while (next < words && map[next] == pc_bits_mask(next, 0, bits))
                next++;
            CHECK_EQ(pc_summary_next(&summary, from), next);
            if (turn % 50 == 49 && next < words) { /* filled, one after the other */
                map[next] = pc_bits_mask(next, 0, bits);
                CHECK_EQ(pc_summary_next(&summary, from), next);
                pc_summary_fill(&summary, next);
            }
        }
        free(map);
        free(levels);
    }
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(crc64_has_the_known_values);
    RUN(crc_has_the_vectors_of_rfc_3720);
    RUN(crc_paths_agree);
    RUN(crc_continues);
    RUN(is_zero_sees_every_bit);
    RUN(bitmap_words_does_not_overflow);
    RUN(bitmap_next_and_count_agree_with_single_bits);
    RUN(bitmap_ranges_change_what_they_name_only);
    RUN(bitmaps_of_bitmaps_agree_with_single_bits);
    RUN(summary_finds_what_is_not_full);
    RUN(rle_round_trip);
    RUN(rle_has_the_documented_form);
    RUN(rle_refuses_what_is_malformed);
    RUN(histogram_is_off_by_3_percent_at_most);
    RUN(histogram_takes_every_value);
    RUN(histogram_merge_is_addition);
    RUN(frame_round_trip);
    RUN(frame_has_the_documented_layout);
    RUN(frame_refuses_what_makes_no_sense);
    return test_end();
}
