/* SPDX-License-Identifier: Apache-2.0
 *
 * postcopy-keeper [OPTION...] -- COMMAND [WORD...]     see keeper.h; postcopy/handler/_keeper.py starts it
 *
 *   --no-spare              no engine waits while another one serves
 *   --burst N               deaths in short order before the next engine has to wait (5)
 *   --log-json VERSION      log lines as JSON
 *   --adopt SOCKET,PIDFD    an engine that serves already, and has lost its keeper
 *   --deaths N              of engines before that
 */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "keeper/keeper.h"

static bool parse_adopt(struct options *options, const char *word)
{
    return sscanf(word, "%d,%d", &options->adopt_socket, &options->adopt_pidfd) == 2 &&
           !fcntl(options->adopt_socket, F_SETFD, FD_CLOEXEC) && !fcntl(options->adopt_pidfd, F_SETFD, FD_CLOEXEC);
}

int keeper_main(int argc, char **argv)
{
    static struct options options;
    bool right = true;
    int at = 1;

    options = (struct options){.spare = true, .adopt_socket = -1, .adopt_pidfd = -1, .burst = 5};
    for (; at < argc && right && strcmp(argv[at], "--"); at++) {
        const char *name = argv[at];

        if (!strcmp(name, "--no-spare"))
            options.spare = false;
        else if (++at >= argc)
            right = false;
        else if (!strcmp(name, "--burst"))
            options.burst = (uint32_t)strtoul(argv[at], NULL, 10);
        else if (!strcmp(name, "--log-json"))
            say_as_json(atoi(argv[at]));
        else if (!strcmp(name, "--adopt"))
            right = parse_adopt(&options, argv[at]);
        else if (!strcmp(name, "--deaths"))
            options.deaths = atoi(argv[at]);
        else
            right = false;
    }
    if (!right || at + 1 >= argc || argv[at + 1][0] != '/') {
        (void)fprintf(stderr, "usage: postcopy-keeper [OPTION...] -- /ABSOLUTE/COMMAND [WORD...]: it is started by `postcopy pager`\n");
        return 2;
    }
    options.command = argv + at + 1;
    return keeper_run(&options);
}
