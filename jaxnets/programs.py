"""Compiled programs, kept within a process for runs that differ only in what does not reach them, such as the seed."""

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

Program = TypeVar("Program")

LIMIT = 96  # programs; a net takes four or more, and a comparison comes back to each net for every seed
_kept: dict[Hashable, object] = {}
_lock = threading.Lock()  # the first state is compiled at the same time as the first step


def keep(key: Hashable, make: Callable[[], Program]) -> Program:
    """What `make` returned for this key before, else what it returns now; beyond LIMIT, the oldest are forgotten."""
    with _lock:
        if key in _kept:
            return _kept[key]
    made = make()  # unlocked, since that takes long, and may ask for other programs
    with _lock:
        if key not in _kept:
            while len(_kept) >= LIMIT:
                del _kept[next(iter(_kept))]
            _kept[key] = made
        return _kept[key]


def forget() -> None:
    """Drop all kept programs."""
    _kept.clear()
