"""The C++ kernels: compiled once for this machine, kept in the user's cache, registered with XLA."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxlib

from jaxnets.errors import UserError
from jaxnets.runtime import cache_directory

SOURCE = Path(__file__).with_name("kernels.cc")
HANDLERS = (
    *("depthwise", "depthwise_gradients", "pointwise", "pointwise_gradients", "dense", "dense_gradients"),
    *("moments", "normalize", "normalize_gradient", "shuffle", "interleave", "interleave_gradients"),
    *("max_pool", "max_pool_gradient", "separable", "stem"),
)
KEEP_MEMORY = "JAXNETS_KEEP_MEMORY"
OFF = ("0", "false", "no", "off")  # its values that turn it off
COMPILERS = ("c++", "g++", "clang++")
# Neither -fno flag changes a value: NaN, infinity and the order of sums are preserved.
FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math"),
    *("-shared", "-fPIC", "-DNDEBUG", "-w"),
)
TIMEOUT = 300  # seconds; a build takes 20 to 40

logger = logging.getLogger("jaxnets")
_lock = threading.Lock()


def available() -> bool:
    """Whether the kernels are available, after building them if need be; if not, the log says why."""
    return _problem() is None


def require() -> None:
    """Raise UserError, saying why, if the kernels are not available."""
    if problem := _problem():
        raise UserError(f"the native operators are not available ({problem}): use JAXNETS_OPS=xla")


def _problem() -> str | None:
    return _loaded()[1]


def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    with _lock:  # one thread builds, the others wait
        return _load()


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """Build, load and register the kernels: the library, or why that failed."""
    try:
        library = _open()
        for name in HANDLERS:
            handler = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"jaxnets_{name}", handler, platform="cpu")
        _keep_buffers(library)
    except Exception as error:  # whatever it is, the portable operators still work
        problem = " ".join(str(error).split()) or type(error).__name__
        logger.warning("operators: native kernels not available, using xla's: %s", problem)
        return None, problem
    return library, None


def _keep_buffers(library: ctypes.CDLL) -> None:
    """Make XLA's CPU client keep its large buffers between calls, if the C library allows it and it is wanted."""
    if os.environ.get(KEEP_MEMORY, "").lower() in OFF:
        return
    library.keep_buffers.restype = ctypes.c_bool
    if library.keep_buffers():
        logger.info("operators: XLA keeps its buffers between calls (%s=0 turns this off)", KEEP_MEMORY)


def buffer_bytes() -> tuple[int, int, int]:
    """Bytes of XLA's large buffers: in use now, in use or kept for later, most in use at once so far.

    Only if the kernels are `available`.
    """
    count = (ctypes.c_uint64 * 3)()
    _loaded()[0].count_buffers(count)
    return tuple(count)


def _open() -> ctypes.CDLL:
    folder, machine, compiler = cache_directory() / "native", _machine_key(), _compiler()
    if compiler is None:  # as on cluster nodes: use a library built elsewhere for this kind of machine
        if library := next(filter(None, map(_open_built, sorted(folder.glob(f"{machine}-*.so")))), None):
            return library
        raise FileNotFoundError(f"no C++ compiler: $CXX, {', '.join(COMPILERS)}")
    path = folder / f"{machine}-{_compiler_key(compiler)}.so"
    if library := _open_built(path):
        return library
    path.parent.mkdir(parents=True, exist_ok=True)
    noexec = getattr(os, "ST_NOEXEC", 0)  # not on every system
    if noexec and os.statvfs(path.parent).f_flag & noexec:  # else it would be built at every start
        raise OSError(f"{path.parent} is on a file system mounted noexec: set XDG_CACHE_HOME to a folder elsewhere")
    with _one_process_at_a_time(path.parent):
        if library := _open_built(path):  # by another process, meanwhile
            return library
        _build(compiler, path)
        return ctypes.CDLL(str(path))


def _open_built(path: Path) -> ctypes.CDLL | None:
    """The library; None if it is missing or damaged, to be built anew."""
    try:
        return ctypes.CDLL(str(path)) if path.exists() else None
    except OSError:
        return None


@contextlib.contextmanager
def _one_process_at_a_time(folder: Path) -> Iterator[None]:
    """If the system and the file system have locks; otherwise, and after `TIMEOUT`, processes build concurrently."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl  # not on every system

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            for attempt in range(10 * TIMEOUT):  # the process that builds may have been stopped
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if not attempt:
                        logger.info("operators: waiting for another process to build the native kernels")
                    time.sleep(0.1)
                else:
                    stack.callback(fcntl.flock, descriptor, fcntl.LOCK_UN)  # else a process forked meanwhile keeps it
                    break
        yield


def _compiler() -> list[str] | None:
    """The command in $CXX, else the first C++ compiler found; None if there is none."""
    for command in [shlex.split(os.environ.get("CXX", "")), *([name] for name in COMPILERS)]:
        if command and shutil.which(command[0]):
            return command
    return None


def _machine_key() -> str:
    """Hash of everything that the library's code depends on, except the compiler."""
    sources = [path.read_text() for path in sorted(SOURCE.parent.iterdir()) if path.suffix in (".cc", ".h")]
    return _hash(*sources, *FLAGS, jaxlib.__version__, _cpu())


def _compiler_key(compiler: list[str]) -> str:
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    return _hash(*compiler, version.stdout)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _cpu() -> str:
    """Model and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(kinds)}))


def _build(compiler: list[str], path: Path) -> None:
    """Compile in a temporary folder, then rename: a library is whole or absent."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build-") as folder:
        built = Path(folder) / path.name
        command = [*compiler, *FLAGS, "-I", jax.ffi.include_dir(), str(SOURCE), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
        if done.returncode:
            lines = done.stderr.splitlines()
            error = next((line for line in lines if "error" in line), *lines[-1:] or ["no message"])
            raise RuntimeError(f"{shlex.join(compiler)} failed with status {done.returncode}: {error}")
        built.replace(path)
    logger.info("operators: built the native kernels in %.0f s: %s", time.perf_counter() - start, path)
