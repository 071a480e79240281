#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
#
# run_test.sh CAPABILITY,... COMMAND...: runs a test program, and turns "skipped" (77) into a failure when
# $POSTCOPY_REQUIRE (comma-separated) names a capability without which the program is skipped: on a machine that is known
# to have it, a skipped test is a broken one.
needs=$1
shift
"$@"
status=$?
if [ "$status" = 77 ]; then
	for capability in $(echo "$needs" | tr ',' ' '); do
		case ",${POSTCOPY_REQUIRE-}," in
		*",$capability,"*)
			echo "skipped, although POSTCOPY_REQUIRE names $capability" >&2
			exit 1
			;;
		esac
	done
fi
exit "$status"
