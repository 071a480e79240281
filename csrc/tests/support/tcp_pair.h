/* SPDX-License-Identifier: Apache-2.0
 *
 * Two ends of one TCP connection over loopback, for tests of the data plane.
 */
#ifndef PC_TCP_PAIR_H
#define PC_TCP_PAIR_H

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#include "tests/support/test.h"

__attribute__((unused)) static void tcp_pair(int pair[2])
{
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof(address);
    int listener = CHECK_SYS(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));

    CHECK_SYS(bind(listener, (struct sockaddr *)&address, sizeof(address)));
    CHECK_SYS(listen(listener, 1));
    CHECK_SYS(getsockname(listener, (struct sockaddr *)&address, &length));
    pair[0] = CHECK_SYS(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK_SYS(connect(pair[0], (struct sockaddr *)&address, sizeof(address)));
    pair[1] = CHECK_SYS(accept4(listener, NULL, NULL, SOCK_CLOEXEC));
    close(listener);
    for (int i = 0; i < 2; i++) /* a script sends header and payload one after the other */
        CHECK_SYS(setsockopt(pair[i], IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int)));
}

#endif
