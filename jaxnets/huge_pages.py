"""Restarting a program so that its large buffers lie in huge pages.

The kernel hands out memory 4 KB at a time. A program that allocates its buffers anew in every step, on a CPU, loses a
third of a training step to that. glibc can ask for pages of 2 MB instead, if told so before the program starts. (The
native operators keep XLA's large buffers in huge pages even without that.)
"""

import contextlib
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from jaxnets.switches import is_off

SWITCH = "JAXNETS_HUGE_PAGES"  # 0: off
TUNABLES = "GLIBC_TUNABLES"
TUNABLE = "glibc.malloc.hugetlb"
FIRST_VERSION = (2, 35)  # of glibc that supports it


def restart() -> None:
    """Restart this process's program with huge pages, if that helps and has not been done.

    To be called before JAX is imported, which would otherwise be imported twice, and only under
    `__name__ == "__main__"`. Process, arguments, input and output stay the same; one line on standard error says so. A
    no-op within another program (a test, a notebook, a debugger), since that would be restarted too.
    """
    value = tunables(os.environ, _libc_version(), _kernel_modes())
    if value is None or "jax" in sys.modules or sys.gettrace() or not _is_the_command():
        return
    with contextlib.suppress(OSError):  # nobody reads the line, or the program cannot be executed: continue as it is
        line = f"huge pages: restarting with {TUNABLES}={value} ({SWITCH}=0 turns this off)"
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLES: value})


def tunables(environment: Mapping[str, str], libc_version: tuple[int, ...], kernel_modes: str) -> str | None:
    """The `GLIBC_TUNABLES` to start with; None if that would be of no use, is set already, or is not wanted.

    `libc_version` is glibc's, () for another library. In `kernel_modes`, "always [madvise] never", brackets mark the
    mode: glibc asks for huge pages only if the kernel waits to be asked.
    """
    before = environment.get(TUNABLES, "")
    if (
        is_off(SWITCH, environment)
        or TUNABLE in before
        or libc_version < FIRST_VERSION
        or "[madvise]" not in kernel_modes
    ):
        return None
    return f"{before}:{TUNABLE}=1".lstrip(":")


def _libc_version() -> tuple[int, ...]:
    try:
        found = re.fullmatch(r"glibc (\d+)\.(\d+).*", os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (AttributeError, ValueError, OSError):  # another system, another C library
        return ()
    return tuple(map(int, found.groups())) if found else ()


def _kernel_modes() -> str:
    try:
        return Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return ""


def _is_the_command() -> bool:
    """Whether the main module is the program that this process's command line names."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name.removesuffix(".__main__") if spec else sys.argv[0]) in sys.orig_argv[1:]
