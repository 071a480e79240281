# SPDX-License-Identifier: Apache-2.0
"""What compression a host can do, and what a page server takes. The frames are tested in C (csrc/tests/pager)."""

from __future__ import annotations

import pytest

from postcopy.dataplane.compression import ALL, Compression, available, require
from postcopy.dataplane.pageserver import PageServer
from postcopy.errors import CoreError, ResourceError


@pytest.mark.parametrize("how", [Compression.LZ4, Compression.ZSTD])
async def test_what_is_available_can_be_required_and_set(how: Compression) -> None:
    async with PageServer() as server:
        if how in available(how):
            require(how)
            server.set_compression(how)
            server.set_compression(how, adaptive=True)
        else:
            with pytest.raises(ResourceError, match="apt-get install"):
                require(how)
            with pytest.raises(CoreError):
                server.set_compression(how)


async def test_a_set_is_for_an_adaptive_server_only() -> None:
    async with PageServer() as server:
        with pytest.raises(CoreError):
            server.set_compression(ALL)
        server.set_compression(Compression(0))
        server.set_compression(Compression(0), adaptive=True)
