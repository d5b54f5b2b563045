"""Compiled programs, kept within a process for runs that differ in nothing that reaches them, as in their seed."""

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

Program = TypeVar("Program")

LIMIT = 32  # programs, of which a net takes four or more
_kept: dict[Hashable, object] = {}
_lock = threading.Lock()  # the first state is compiled beside the first step


def keep(key: Hashable, make: Callable[[], Program]) -> Program:
    """What `make` gave when it was last asked for by this key; the oldest of many are forgotten."""
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
    """Give up all of them."""
    _kept.clear()
