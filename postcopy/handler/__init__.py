# SPDX-License-Identifier: Apache-2.0
"""A userfaultfd handler for virtual machine monitors: the service behind ``postcopy pager``."""
