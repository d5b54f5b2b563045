"""Where a run is, told to whoever started it: a line on the file descriptor CHAOS_TELL; in CHAOS_STAY the run stays."""

import ctypes
import os
import time


def tell(phase: str) -> None:
    """Say that the run has come to a phase, and stay there if asked to."""
    os.write(int(os.environ["CHAOS_TELL"]), f"{phase}\n".encode())
    if phase == os.environ["CHAOS_STAY"]:
        (wait_in_c if phase == "compile" else wait)()


def wait() -> None:
    """Five seconds of Python's instructions."""
    for _ in range(100):
        time.sleep(0.05)


def wait_in_c() -> None:
    """For ever, as in a compilation that takes minutes: locked twice, and no instruction of Python follows."""
    lock = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(lock)
