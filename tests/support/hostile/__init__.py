# SPDX-License-Identifier: Apache-2.0
"""A peer that knows the protocol by its documentation only, and the installed program as somebody outside sees it."""
