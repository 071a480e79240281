# SPDX-License-Identifier: Apache-2.0
"""A toy in place of `postcopy pager`: the command that becomes a keeper, and the engine that this runs.

Each connection is one request, a JSON line, and is answered by one, with what the engine knows.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
import types
from typing import Any

import trio

import postcopy
from postcopy.errors import PostcopyError

# The room's own `__init__` imports the whole pager, three times what a toy needs, and a test starts a dozen of them.
sys.modules["postcopy.handler"] = room = types.ModuleType("postcopy.handler")
room.__path__ = [os.path.join(postcopy.__path__[0], "handler")]

from postcopy.handler._keeper import in_keeper, keep, open_store  # noqa: E402
from postcopy.handler._store import Store, kind_of  # noqa: E402


def listen(path: str) -> int:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    return listener.detach()


async def answer(store: Store, name: str, sock: trio.socket.SocketType) -> None:
    data = await sock.recv(4096)
    if not data:  # the engine before this one has answered, and died before it dropped the name
        sock.close()
        await store.drop(name)
        return
    request = json.loads(data)
    known: dict[str, Any] = {"error": ""}
    try:
        match request["do"]:
            case "put":
                memories = [os.memfd_create(f"toy-{index}") for index in range(request["count"])]
                await store.put(request.get("name", name), memories)
                for memory in memories:
                    os.close(memory)
            case "drop":
                await store.drop(request["name"])
            case "upgrade":
                await store.upgrade(request["command"])
            case "listen":
                await store.put(request["name"], [listen(request["at"])])
    except PostcopyError as error:
        known["error"] = str(error)
    known["taken"] = {other: sorted(map(kind_of, fds)) for other, fds in store.taken.items()}
    known |= {"pid": os.getpid(), "keeper": os.getppid(), "name": name, "deaths": store.deaths, "reason": store.reason}
    known |= {
        "trial": store.on_trial,
        "arguments": sys.argv[1:],
        "listeners": sorted(store.listeners),
        **store.status(),
    }
    await sock.send(json.dumps(known).encode())
    sock.close()
    if request["do"] != "put" or "name" in request:
        await store.drop(name)


async def engine() -> None:
    with trio.open_signal_receiver(signal.SIGTERM) as signals:
        async with open_store(spare="--no-spare" not in sys.argv) as store, trio.open_nursery() as nursery:
            leave = trio.Event()

            @nursery.start_soon
            async def replaced() -> None:
                await store.leave.wait()
                leave.set()

            @nursery.start_soon
            async def end() -> None:
                await leave.wait()
                nursery.cancel_scope.cancel()

            @nursery.start_soon
            async def stop() -> None:
                async for _ in signals:
                    leave.set()

            if not store.listeners:
                await store.put("pager", [listen(sys.argv[1])])
            await store.ready()
            while True:
                name, fd = await store.accept()
                nursery.start_soon(answer, store, name, trio.socket.from_stdlib_socket(socket.socket(fileno=fd)))


def main() -> None:
    if in_keeper():
        logging.basicConfig(level=logging.INFO)
        trio.run(engine)
        return
    command = [sys.executable, "-P", os.path.abspath(__file__), *sys.argv[1:]]
    keep(command, spare="--no-spare" not in sys.argv, burst=1000)


if __name__ == "__main__":
    main()
