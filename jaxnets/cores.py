"""The processor's cores."""

import os


def usable() -> set[int]:
    """The cores that this process may run on, by their numbers."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
