"""The processor's cores: which may be used, and how many."""

import contextlib
import math
import os
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's, as Docker and Kubernetes set it with cgroups v2


def usable() -> set[int]:
    """The cores that this process may run on, by number."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def count() -> int:
    """How many cores this process may keep busy: the usable ones, or as many as its container's quota is worth."""
    number = len(usable())
    with contextlib.suppress(OSError, ValueError):  # no such file, or no quota: "max"
        quota, period = map(int, QUOTA.read_text().split())
        return min(number, max(1, math.ceil(quota / period)))
    return number
