"""What glibc does with freed memory."""

import ctypes
import importlib.util
import os
import platform

SWITCH = "JAXNETS_KEEP_MEMORY"  # 1: on
# mallopt's parameters: no memory by mmap below 2 GiB, nothing trimmed, and one arena for all threads, since another
# arena's heaps end at 64 MiB.
KEEP = ((-3, 2**31 - 1), (-1, 2**31 - 1), (-8, 1))
ACCELERATORS = ("jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin", "libtpu")


def keep_freed() -> bool:
    """Whether this process now keeps what it frees for what it asks for next: if JAXNETS_KEEP_MEMORY is 1.

    XLA's CPU client asks for a step's intermediates anew at every step. By default glibc gives memory of that size
    back to the system, and the next step pays for its page faults. Kept, it holds more in the end, since what is
    asked for does not always fit what is free. Only threads that start later are served so: hence at the import of
    the package. Nothing is done for another C library or beside an accelerator's plugin.
    """
    if os.environ.get(SWITCH) != "1" or platform.libc_ver()[0] != "glibc":
        return False
    if any(importlib.util.find_spec(name) for name in ACCELERATORS):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(parameter, value) for parameter, value in KEEP]
    return all(done)
