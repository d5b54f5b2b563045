"""What every command sets up around its work: log lines, the compilation cache, XLA's determinism."""

import contextlib
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax

from jaxnets import cores
from jaxnets.errors import UserError, first_line

logger = logging.getLogger("jaxnets")

DETERMINISTIC = "--xla_gpu_deterministic_ops"  # the flag of XLA


class _StandardError(logging.Handler):
    """Writes to whatever standard error currently is, since a progress bar replaces it for a while."""

    def emit(self, record):
        with contextlib.suppress(OSError):  # from a terminal that closed: the run still has to save
            print(self.format(record), file=sys.stderr)


def configure_logging() -> None:
    """Log to standard error in one format, with next to nothing from the libraries: they raise what they fail at."""
    absl.logging.set_verbosity(absl.logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    ignore_warnings_of_images()
    if not logger.handlers:
        handler = _StandardError()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def ignore_warnings_of_images() -> None:
    """Ignore PIL's, about damaged EXIF data and photographs of half its limit; what it cannot read is an error."""
    warnings.filterwarnings("ignore", module="PIL")


def share_cores() -> None:
    """Let XLA start only as many threads as a container's CPU quota is worth; call before any device is used."""
    if cores.count() < len(cores.usable()):
        os.environ.setdefault("NPROC", str(cores.count()))


def require_device() -> None:
    """UserError if JAX has no device of the platform that JAX_PLATFORMS asks for."""
    share_cores()
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        why = first_line(error) if str(error) else "its plugin is missing, or does not start"  # JAX says nothing
        raise UserError(f"JAX_PLATFORMS={jax.config.jax_platforms}: JAX has no such device here ({why})") from error


def cache_directory() -> Path:
    """The user's folder for what can be recreated: `$XDG_CACHE_HOME/jaxnets`, else `~/.cache/jaxnets`.

    Raises UserError if there is neither, as in a container whose user has no home folder.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "jaxnets"
    except RuntimeError:
        raise UserError("there is no home folder to keep a cache in: set HOME or XDG_CACHE_HOME to one") from None


def enable_compilation_cache() -> None:
    """Keep compiled programs between starts, in `JAX_COMPILATION_CACHE_DIR` or this user's cache, if there is one."""
    if not jax.config.jax_compilation_cache_dir:
        try:
            jax.config.update("jax_compilation_cache_dir", str(cache_directory() / "xla"))
        except UserError as error:
            logger.warning("compiled programs are not cached: %s", error)
            return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def make_deterministic() -> None:
    """Let XLA choose operations that give the same bits every time; to be called before anything asks for a device.

    Only GPUs have others: sums by atomic additions, and operations chosen by timings that differ every time. So XLA's
    own cache of such timings, which earlier runs have filled, is not read either.
    """
    jax.config.update("jax_persistent_cache_enable_xla_caches", "")
    flags = os.environ.get("XLA_FLAGS", "").split()
    if not any(flag.startswith(DETERMINISTIC) for flag in flags):
        os.environ["XLA_FLAGS"] = " ".join([*flags, f"{DETERMINISTIC}=true"])


@contextlib.contextmanager
def short_of_memory(remedy: str) -> Iterator[None]:
    """UserError, with a remedy, if a device or the machine does not have enough memory for the block."""
    try:
        yield
    except MemoryError as error:
        raise UserError(f"this machine does not have enough memory ({first_line(error)}): {remedy}") from error
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(f"the device does not have enough memory ({first_line(error)}): {remedy}") from error
