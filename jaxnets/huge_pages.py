"""A program started again so that its large buffers lie in huge pages.

The kernel hands memory out 4 KB at a time. To a program that takes its buffers afresh in every step, on a CPU, that
costs a third of a training step. glibc can ask for pages of 2 MB instead, if it is told so before the program starts.
(The native operators keep XLA's large buffers in huge pages even without that.)
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
FIRST_VERSION = (2, 35)  # of glibc, that knows it


def restart() -> None:
    """Start this process's program again with huge pages, where that helps and has not been done.

    Called before JAX is imported, which would be imported twice, and under `__name__ == "__main__"` only. Process,
    arguments, input and output stay; one line on standard error says it. Does nothing for a program that another one
    runs within itself (a test, a notebook, a debugger), since that would be started again with it.
    """
    value = tunables(os.environ, _libc_version(), _kernel_modes())
    if value is None or "jax" in sys.modules or sys.gettrace() or not _is_the_command():
        return
    with contextlib.suppress(OSError):  # nobody reads the line, or there is no executing it: go on as it is
        line = f"huge pages: restarting with {TUNABLES}={value} ({SWITCH}=0 turns this off)"
        print(time.strftime("%H:%M:%S"), line, file=sys.stderr, flush=True)
        os.execve(sys.executable, sys.orig_argv, os.environ | {TUNABLES: value})


def tunables(environment: Mapping[str, str], libc_version: tuple[int, ...], kernel_modes: str) -> str | None:
    """The `GLIBC_TUNABLES` to start with; None where it would be of no use, is set already, or is not wanted.

    `libc_version` is glibc's, () for another library. In `kernel_modes`, "always [madvise] never", brackets mark the
    mode: glibc asks for huge pages where the kernel waits to be asked, and only there.
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
    """Whether the main module is what this process's command line names."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return (spec.name.removesuffix(".__main__") if spec else sys.argv[0]) in sys.orig_argv[1:]
