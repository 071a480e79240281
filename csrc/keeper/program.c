/* SPDX-License-Identifier: Apache-2.0 */
#include "keeper/keeper.h"

int main(int argc, char **argv)
{
    return keeper_main(argc, argv);
}
