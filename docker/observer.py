# SPDX-License-Identifier: Apache-2.0
"""Watches the sides of a migration by their metrics alone, as a host with a certificate can.

    observer.py DIR HOST:PORT...

DIR has the certificates (docs/tls.md).

One JSON object a line, with ``of`` (the host's name): ``up`` when it answers for the first time, ``status`` when the
status of its migration has changed, ``gone`` when it answers no more. Ends, with status 0, when all of them have gone.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import ssl
import sys
import time

POLL_S = 0.1
TIMEOUT_S = 1.0
MISSES = 3  # in a row, before a side counts as gone
STATUS = re.compile(r'^postcopy_migration_status\{[^}]*\bstatus="([^"]+)"[^}]*\} 1(?:\.0)?$', re.MULTILINE)


def ask(address: str, known: dict[str, str], tls: ssl.SSLContext) -> str:
    """The metrics. A host is looked up until it has answered: the name of a container goes when that ends."""
    host, _, port = address.rpartition(":")
    number = known.get(host) or socket.gethostbyname(host)
    connection = http.client.HTTPConnection(number, int(port), timeout=TIMEOUT_S)
    try:
        connection.connect()
        known[host] = number
        connection.sock = tls.wrap_socket(connection.sock, server_hostname=host)
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()


def tell(event: str, address: str, **more: str) -> None:
    line = {"event": event, "of": address.rpartition(":")[0], "time": round(time.time(), 3), **more}
    print(json.dumps(line), flush=True)


def main(directory: str, *addresses: str) -> int:
    tls = ssl.create_default_context(cafile=f"{directory}/ca-cert.pem")
    tls.load_cert_chain(f"{directory}/client-cert.pem", f"{directory}/client-key.pem")
    up: dict[str, int] = {}
    statuses: dict[str, str] = {}
    gone: set[str] = set()
    known: dict[str, str] = {}
    while len(gone) < len(addresses):
        for address in [address for address in addresses if address not in gone]:
            try:
                text = ask(address, known, tls)
            except (OSError, http.client.HTTPException):
                if address in up:
                    up[address] += 1
                    if up[address] == MISSES:
                        gone.add(address)
                        tell("gone", address)
                continue
            if address not in up:
                tell("up", address)
            up[address] = 0
            found = STATUS.search(text)
            if found and statuses.get(address) != found[1]:
                statuses[address] = found[1]
                tell("status", address, status=found[1])
        time.sleep(POLL_S)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
