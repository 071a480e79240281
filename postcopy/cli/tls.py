# SPDX-License-Identifier: Apache-2.0
"""`postcopy tls`: an authority and certificates for ``--tls``, for sites that have none."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from postcopy.cli._parser import add_command
from postcopy.service.options import parse_path
from postcopy.units import argument, parse_whole

if TYPE_CHECKING:
    from postcopy.tls._authority import Certificate

MAX_DAYS = 3650


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="tls", required=True, metavar="COMMAND", title="commands")

    def add_days(command: argparse.ArgumentParser, default: int) -> None:
        command.add_argument(
            "--days", type=argument(parse_whole, 1, MAX_DAYS), default=default, metavar="N", help="how long it is valid"
        )

    new_ca = add_command(
        commands,
        "new-ca",
        "make an authority, which signs the certificates of hosts",
        "Makes an authority in a new directory: its certificate, which all hosts get, and its key, which no host gets:"
        " whoever has that key can be any host.",
        [("", "postcopy tls new-ca ca")],
    )
    new_ca.add_argument("directory", type=argument(parse_path), metavar="CA-DIR", help="directory to make")
    new_ca.add_argument(
        "--name", metavar="NAME", help="its name (default: of this host's name, the date and a random number)"
    )
    add_days(new_ca, 365)

    issue = add_command(
        commands,
        "issue",
        "make or renew the certificates of a host",
        "Makes the directory that a host's --tls names: the authority's certificate, one to listen and one to connect"
        " with, and their keys. In a directory that is there it renews them.",
        [("", "postcopy tls issue ca --host host-a --host 192.0.2.1 --out host-a.tls")],
    )
    issue.add_argument(
        "authority", type=argument(parse_path), metavar="CA-DIR", help="directory that `new-ca` has made"
    )
    issue.add_argument(
        "--host",
        action="append",
        required=True,
        dest="hosts",
        metavar="NAME",
        help="name or address by which others connect to it; repeat it for each",
    )
    issue.add_argument("--out", type=argument(parse_path), required=True, metavar="DIR", help="directory to write to")
    add_days(issue, 30)

    show = add_command(
        commands,
        "show",
        "show the certificates in a directory, and what is wrong with them",
        "Shows for whom and until when the certificates in a directory are, and what is wrong with them. The exit"
        " status is 0 when nothing is.",
        [("", "postcopy tls show /etc/postcopy/tls")],
    )
    show.add_argument(
        "directory", type=argument(parse_path), metavar="DIR", help="directory of --tls, or of an authority"
    )


def run(args: argparse.Namespace) -> int:
    """The exit status."""
    from postcopy.tls import _authority as authority  # which loads a library that no other command needs

    if args.tls == "new-ca":
        made = authority.new_authority(args.directory, args.name, args.days)
        print(f"{args.directory}: authority {made.subject}, until {made.ends:%Y-%m-%d %H:%M} UTC")
        print(f"Next, for each host: postcopy tls issue {args.directory} --host NAME --out DIR")
        return 0
    if args.tls == "issue":
        certificate = authority.issue(args.authority, args.hosts, args.out, args.days)[0]
        print(f"{args.out}: {', '.join(certificate.names)}, until {certificate.ends:%Y-%m-%d %H:%M} UTC")
        return 0
    certificates, problems = authority.show(args.directory)
    for certificate in certificates:
        print("\n".join(_shown(certificate)))
    for problem in problems:
        print(f"postcopy: problem: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _shown(certificate: Certificate) -> list[str]:
    rows = {
        "Subject": certificate.subject,
        "Names": ", ".join(certificate.names),
        "Signed by": certificate.issuer if certificate.issuer != certificate.subject else "itself",
        "Valid": f"{certificate.begins:%Y-%m-%d %H:%M} to {certificate.ends:%Y-%m-%d %H:%M} UTC",
        "SHA-256": certificate.sha256,
    }
    return [certificate.path, *(f"  {label + ':':<11}{value}" for label, value in rows.items() if value)]
