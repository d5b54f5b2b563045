"""The processor's cores."""

import contextlib
import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, as Docker and Kubernetes set it by version 2 of cgroups


def usable() -> set[int]:
    """The cores that this process may run on, by their numbers."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def count() -> int:
    """How many it may keep at work: the usable ones, or as many as its container's share of their time is worth."""
    number = len(usable())
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota: "max"
        quota, period = map(int, QUOTA.read_text().split())
        return min(number, max(1, math.ceil(quota / period)))
    return number
