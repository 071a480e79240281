# SPDX-License-Identifier: Apache-2.0
"""TLS: a host's credentials, connections under TLS, who is at their other end, and what that may do here.

OpenSSL does the work, in the core (`postcopy/tls.h`); a host without it can do everything but this. `Credentials` are a
directory of files, and are read again when those change. A `TlsStream` is a Trio stream; of a data connection the core
gets both parts (`DataChannel`). `Authorisation` is what an operator allows.

The room owns what it has read of certificates and keys, for as long as the `Credentials`; a stream is its maker's.
"""

from __future__ import annotations

from postcopy.tls._connection import (
    Context,
    DataChannel,
    InPlace,
    TlsError,
    TlsStream,
    detach,
    in_place,
    stream_of,
)
from postcopy.tls._credentials import Credentials
from postcopy.tls._names import Action, Authorisation, PeerCertificate, parse_pattern

__all__ = [
    "Action",
    "Authorisation",
    "Context",
    "Credentials",
    "DataChannel",
    "InPlace",
    "PeerCertificate",
    "TlsError",
    "TlsStream",
    "detach",
    "in_place",
    "parse_pattern",
    "stream_of",
]
