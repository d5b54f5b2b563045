"""Several processes as one run: JAX's distributed runtime, and what the processes of a run agree on.

With a single process, agreement is a no-op and no collective is run.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxnets.errors import UserError, first_line
from jaxnets.interruption import Ended, Interruption, leave
from jaxnets.runtime import configure_logging, logger, share_cores

HEARTBEAT_SECONDS = 15  # a process silent for this long is gone
POLL_SECONDS = 1.0  # between two checks of which processes are alive
LEAVE_SECONDS = 10  # the longest that process 0 waits for the others to leave first

_ProcessFailureError = getattr(multihost_utils, "ProcessFailureError", ValueError)  # the latter: JAX 0.10.0

T = TypeVar("T")


def many() -> bool:
    """Whether this process is one of several."""
    return jax.process_count() > 1


def is_primary() -> bool:
    """Whether this is process 0, which writes what is to be written only once: records, logs, the result."""
    return jax.process_index() == 0


def share() -> tuple[int, int]:
    """`(i, n)`: this process feeds the i-th of n equal parts of every batch."""
    return jax.process_index(), jax.process_count()


def local_processes() -> int:
    """How many processes of the run are on this machine, if SLURM or Open MPI tells, else 1."""
    told = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("SLURM_STEP_TASKS_PER_NODE") or ""
    found = re.match(r"[1-9]\d*", told)  # SLURM's may be 8(x2)
    return int(found[0]) if found else 1


def devices() -> list[jax.Device]:
    """The devices of all processes, grouped by process; UserError if some processes have more than others."""
    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    counts = np.bincount([device.process_index for device in found], minlength=jax.process_count())
    if len(set(counts.tolist())) > 1:
        raise UserError(f"every process needs the same number of devices; they have {counts.tolist()}")
    return found


@contextlib.contextmanager
def joined(
    coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> Iterator[None]:
    """Within the block, this process is part of the cluster it was started in, or on its own if there is none.

    The cluster is what the arguments say, else the environment (`JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`,
    `JAX_PROCESS_ID`), else what JAX detects: SLURM, Open MPI, a Kubernetes job, TPU pods. To be entered before
    anything asks for a device. When another process is lost, this one ends with status 1 and one sentence that
    names it, within `HEARTBEAT_SECONDS` and a few more.

    Raises UserError for a cluster that is only partly described or cannot be joined.
    """
    share_cores()
    if not _initialize(coordinator_address, num_processes, process_id):
        yield
        return
    watch = _Watch()
    try:
        yield
    except Ended:  # on a signal that the others need not know about
        watch.leave_alone()
        raise
    except SystemExit:  # on a signal, agreed by all
        watch.leave()
        raise
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        watch.leave_alone()
        raise SystemExit(1) from None
    except BaseException as error:
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError):  # JAX 0.12 raises either
            # A collective may fail before the loss of a process is noticed: then the watch ends this one.
            time.sleep(HEARTBEAT_SECONDS + 5 * POLL_SECONDS)
        watch.leave_alone()
        raise
    else:
        watch.leave()


def _initialize(address: str | None, num_processes: int | None, process_id: int | None) -> bool:
    """Join the cluster; returns whether it has more processes than this one."""
    configure_logging()  # before JAX logs how it joins
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number("num_processes", num_processes)
    process_id = _number("process_id", process_id)
    described = any(value is not None for value in (address, num_processes, process_id))
    whole = all(value is not None for value in (address, num_processes, process_id))
    # In every Kubernetes pod, JAX asks the API server about the job; let it only where that can help.
    asks_in_vain = "KUBERNETES_SERVICE_HOST" in os.environ and (whole or "JOB_COMPLETION_INDEX" not in os.environ)
    before = jax.config.jax_enable_recoverability, jax.config.jax_enable_preemption_service
    # With the first, a process that loses another is told rather than aborted, and can say so. The second would take
    # SIGTERM away from Python.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate" if asks_in_vain else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except Exception as error:  # ValueError, KeyError, RuntimeError or the Kubernetes client's, as the case may be
        nothing_found = isinstance(error, ValueError) and str(error) == "coordinator_address should be defined."
        if nothing_found and not described:
            jax.config.update("jax_enable_recoverability", before[0])
            jax.config.update("jax_enable_preemption_service", before[1])
            return False
        if "must be called before" in str(error):
            raise UserError(
                "the configuration has JAX compute, or list its devices, before this process can join others: have it "
                "give numbers instead"
            ) from None
        raise UserError(
            f"the cluster cannot be joined ({first_line(error)}); describe it with --coordinator_address=HOST:PORT "
            "--num_processes=N --process_id=0..N-1"
        ) from None
    if many():
        logger.setLevel("INFO" if is_primary() else "WARNING")
    return many()


def _number(name: str, value: int | None) -> int | None:
    variable = f"JAX_{name.upper()}"
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not text.isdecimal():
        raise UserError(f"{variable}={text!r} in the environment must be a number")
    return int(text)


class _Watch:
    """A thread that ends this process, with one sentence, when another process of the run is lost."""

    def __init__(self):
        self._leaving = threading.Event()
        self._devices = jax.devices()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _alive(self) -> set[int]:
        """The processes that are alive; waits until all of them ask."""

        def ask():
            with multihost_utils.live_devices(self._devices) as alive:
                pass
            return {device.process_index for device in alive}

        for _ in range(jax.process_count()):
            # The first query after each loss raises; the next one is told who is left.
            with contextlib.suppress(_ProcessFailureError):
                return ask()
        return ask()

    def _look(self) -> None:
        while not self._leaving.is_set():
            try:
                gone = set(range(jax.process_count())) - self._alive()
            except Exception:  # the service, which runs in process 0, does not answer
                gone = {0}
            if gone and not self._leaving.is_set():
                _end_without(sorted(gone))
            self._leaving.wait(POLL_SECONDS)

    def leave(self) -> None:
        """End together with the others: process 0, which they all talk to, last."""
        multihost_utils.sync_global_devices("done")
        self._leaving.set()
        multihost_utils.sync_global_devices("leaving")  # from now on, nobody takes a departure for a loss
        self.leave_alone()

    def leave_alone(self) -> None:
        """End without the others, who notice it."""
        self._leaving.set()
        if is_primary():
            deadline = time.monotonic() + LEAVE_SECONDS
            with contextlib.suppress(Exception):
                self._thread.join(LEAVE_SECONDS)
                while time.monotonic() < deadline and len(self._alive()) > 1:
                    time.sleep(0.1)
        else:
            self._thread.join(LEAVE_SECONDS)
        jax.distributed.shutdown()


def _end_without(gone: list[int]) -> None:
    names = " and ".join(map(str, gone))
    print(
        f"error: process {names} of {jax.process_count()} has ended or cannot be reached, so this one "
        f"({jax.process_index()}) ends too; the same command on every machine resumes from the last checkpoint",
        file=sys.stderr,
        flush=True,
    )
    leave(1)  # the main thread may wait forever for the lost process in a collective


def on_primary(work: Callable[[], T]) -> T:
    """Run `work` on process 0 only and broadcast its result, which must be JSON, or its UserError to all processes."""
    if not many():
        return work()
    answer: dict[str, Any] = {}
    if is_primary():
        try:
            answer["value"] = work()
        except UserError as error:
            answer["error"] = str(error)
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    sent = text if is_primary() else np.zeros(size, np.uint8)
    answer = json.loads(multihost_utils.broadcast_one_to_all(sent).astype(np.uint8).tobytes())
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["value"]


def primary_first(work: Callable[[], T]) -> T:
    """Run `work` on every process and return its result; process 0 goes first, and the others find what it made."""
    done = []
    on_primary(lambda: done.append(work()))
    return done[0] if done else work()


def require_agreement(what: str, text: str) -> None:
    """UserError on every process unless all pass the same text."""
    if not many():
        return
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    differing = np.flatnonzero((digests != digests[0]).any(axis=1))
    if differing.size:
        raise UserError(f"{what} differs between process {differing[0]} and process 0")


def gather(tree):
    """The NumPy arrays of all processes concatenated along their first axis, in the order of the processes."""
    return multihost_utils.process_allgather(tree, tiled=True) if many() else tree


class SharedInterruption(Interruption):
    """The interruption of a run of several processes: if one is asked to end, all end at the same place.

    All must call `asked` at the same places. Each call sends what this process knows and reads what was sent at the
    previous call, so that no process waits for the devices to run dry.
    """

    def __init__(self, devices: list[jax.Device]):
        self._num_local = sum(device.process_index == jax.process_index() for device in devices)
        self._latest = jax.pmap(lambda x: jax.lax.pmax(x, "all"), "all", out_axes=None, devices=devices)
        self._sent = None
        self._agreed: int | None = None

    def asked(self) -> bool:
        if self._agreed is None:
            before, self._sent = self._sent, self._latest(np.full(self._num_local, self.signum or 0, np.int32))
            if before is not None:
                self._agreed = int(np.asarray(before)) or None
        return self._agreed is not None

    @property
    def status(self) -> int:
        return 128 + self._agreed


def interruption(devices: list[jax.Device]) -> Interruption:
    """The object that notes the signals of a run on these devices."""
    return SharedInterruption(devices) if many() else Interruption()
