/* SPDX-License-Identifier: Apache-2.0
 *
 * The room as it is without OpenSSL's headers, built on every host: plain connections work, and TLS is refused with a line that helps.
 */
#include "tls/none.c"

#include <fcntl.h>
#include <string.h>

#include "postcopy/core.h"
#include "tests/support/tcp_pair.h"

static void it_says_what_is_missing(void)
{
    struct pc_tls_context *context;
    char line[PC_ERROR_BYTES] = "";

    CHECK_EQ(pc_tls_available(line, sizeof(line)), -ENOENT);
    CHECK(strstr(line, "libssl-dev"));
    line[0] = '\0';
    CHECK_EQ(pc_tls_context_new(1, "", 0, "", 0, "", 0, &context, line, sizeof(line)), -ENOENT);
    CHECK(strstr(line, "libssl-dev"));
}

static void plain_connections_work(void)
{
    struct pc_stream streams[2];
    struct iovec part = {.iov_base = (char[]){"hello"}, .iov_len = 5};
    char got[5];
    int pair[2];

    tcp_pair(pair);
    for (int i = 0; i < 2; i++)
        CHECK_EQ(pc_stream_open(&streams[i], pair[i], NULL, i), 0);
    CHECK_EQ(pc_stream_write_all(&streams[0], &part, 1), 0);
    CHECK_EQ(pc_stream_read_all(&streams[1], got, sizeof(got)), 0);
    CHECK(!memcmp(got, "hello", sizeof(got)));
    pc_stream_close(&streams[0]);
    CHECK_EQ(pc_stream_read_all(&streams[1], got, 1), -ENODATA);
    pc_stream_close(&streams[1]);
}

static void no_descriptor_is_left_open(void)
{
    struct pc_stream stream;
    int pair[2];

    tcp_pair(pair);
    CHECK_EQ(pc_tls_relay(pair[0], NULL, 1), -ENOENT);
    CHECK_EQ(recv(pair[1], &(char){0}, 1, 0), 0); /* it is closed */
    CHECK_EQ(pc_stream_open(&stream, pair[1], (struct pc_tls *)&stream, false), -ENOENT);
    CHECK_EQ(stream.fd, -1);
    CHECK_EQ(fcntl(pair[1], F_GETFD), -1);
}

int main(int argc, char **argv)
{
    test_begin(argc, argv);
    RUN(it_says_what_is_missing);
    RUN(plain_connections_work);
    RUN(no_descriptor_is_left_open);
    return test_end();
}
