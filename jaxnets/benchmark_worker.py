"""A benchmark contender in its own process: it is asked in lines of JSON and blocks on its input between turns.

The process answers four questions: "hello" (its libraries are imported), "rates" (how fast it copies and multiplies
matrices), "prepare" (a task: weights, compilation, the first step) and "turn" (the seconds for a number of steps).
Anything else it prints goes to standard error.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TextIO

from jaxnets import cores
from jaxnets.errors import UserError, first_line

MODES = ("train", "eval", "latency")
CONTENDERS = ("jaxnets", "torch", "torch_compile", "flax")
# What PyTorch gets unless told otherwise: threads pinned to their cores, and huge pages, as XLA has with our kernels.
PYTORCH = {"OMP_PROC_BIND": "true", "THP_MEM_ALLOC_ENABLE": "1"}
# The same on every machine; `environment` adds the rest.
ENVIRONMENTS = {
    "jaxnets": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    "flax": {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAXNETS_OPS": "reference"},
    "torch": PYTORCH,
    # It compiles anew, as ours does, so that the times of compilation compare.
    "torch_compile": PYTORCH | {"TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"},
}
LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 0.01, 0.9, 5e-4


@dataclasses.dataclass(frozen=True)
class Task:
    """What every contender of a race is to do."""

    model: str
    mode: str
    batch_size: int
    image_size: int
    num_classes: int
    threads: int  # CPU cores to use


class Contender(Protocol):
    """A warmed-up net. `report`: the answer to "prepare"."""

    report: dict[str, Any]

    def run(self, steps: int) -> None:
        """Take that many steps; returns when they are done."""

    def device_peak_bytes(self) -> int | None:
        """Peak device memory so far; None on a CPU."""


class Worker:
    """The parent's side of one process; close it, or use it in a `with`."""

    def __init__(self, name: str, command: Sequence[str], environment: dict[str, str] | None = None):
        self.name = name
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  as long as this object
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | (environment or {}),
        )

    def ask(self, question: str, **details) -> dict[str, Any]:
        """Send a question and wait for the answer. UserError with the process's last words if it has died."""
        try:
            self._process.stdin.write(json.dumps({"question": question} | details) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise self._died() from None
        answer = self._process.stdout.readline()
        if not answer:
            raise self._died()
        return json.loads(answer)

    def _died(self) -> UserError:
        status = self._process.wait()
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors if line.strip()]
        return UserError(f"the process of {self.name} ended {how}: {lines[-1] if lines else 'it said nothing'}")

    def close(self) -> None:
        """End the process, gently if it listens."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):  # a dead process takes nothing more
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def start(contender: str) -> Worker:
    """Start a process for one of `CONTENDERS`."""
    command = [sys.executable, "-m", "jaxnets.benchmark_worker", contender]
    return Worker(contender, command, environment(contender))


def environment(contender: str) -> dict[str, str]:
    """The variables a contender is started with, besides the environment that all share."""
    own = dict(ENVIRONMENTS[contender])
    if contender.startswith("torch"):
        own = {name: os.environ.get(name, value) for name, value in own.items()}
    if contender != "torch_compile":
        return own
    # Otherwise it compiles on the one core that OpenMP leaves to the calling thread.
    return own | {"TORCHINDUCTOR_COMPILE_THREADS": str(cores.count())}


def peak_bytes() -> int:
    """Peak resident memory, since `reset_peak` where that works."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def reset_peak() -> None:
    """Have `peak_bytes` start anew, on Linux; elsewhere it stays that of the process's whole life.

    Memory that the process has freed is first returned to the system, where the C library can do so (glibc).
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def ready_bytes() -> int:
    """What is resident while no step runs: what `peak_bytes` has beyond it is due to the steps."""
    gc.collect()
    reset_peak()
    return peak_bytes()


def fastest(call: Callable[[], Any], wait: Callable[[Any], Any]) -> float:
    """Seconds of the fastest of ten calls, or of fewer if they take more than a second, after two to warm up.

    `wait` is given what a call returns, and returns when that is ready.
    """
    seconds: list[float] = []
    while len(seconds) < 5 or len(seconds) < 12 and sum(seconds[2:]) < 1:
        began = time.perf_counter()
        wait(call())
        seconds.append(time.perf_counter() - began)
    return min(seconds[2:])


def serve(
    prepare: Callable[[Task], Contender],
    rates: Callable[..., dict[str, Any]],
    questions: Iterable[str],
    answers: TextIO,
) -> None:
    """Answer every line of `questions` with one in `answers`, until the parent hangs up."""
    contender = None
    for line in questions:
        details = json.loads(line)
        question = details.pop("question")
        if question == "hello":
            reset_peak()
            answer = {"idle_bytes": peak_bytes()}
        elif question == "rates":
            answer = rates(**details)
        elif question == "prepare":
            contender = prepare(Task(**details))
            reset_peak()  # memory for compiling and trying out does not count, unless it stays
            answer = contender.report
        else:
            contender.run(1)  # fills the caches, while the other's threads may still be spinning
            began = time.perf_counter()
            contender.run(details["steps"])
            seconds = time.perf_counter() - began
            peaks = {"peak_bytes": peak_bytes(), "device_peak_bytes": contender.device_peak_bytes()}
            answer = {"seconds": seconds} | peaks
        print(json.dumps(answer), file=answers, flush=True)


def main(contender: str) -> None:
    """Run as one of `CONTENDERS`."""
    # Libraries may print: the answers have a pipe of their own, and anything printed goes to standard error.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    own = sorted(cores.usable())[: cores.count()]  # before OpenMP binds this thread to one of them
    if hasattr(os, "sched_setaffinity"):  # XLA uses all cores that it may run on, even beyond a container's quota
        os.sched_setaffinity(0, own)
    try:
        if contender in ("jaxnets", "flax"):
            from jaxnets import benchmark_jax

            serve(benchmark_jax.prepare, benchmark_jax.rates, sys.stdin, answers)
        else:
            from jaxnets import benchmark_torch

            prepare = partial(benchmark_torch.prepare, compiled=contender == "torch_compile", cores=own)
            serve(prepare, benchmark_torch.rates, sys.stdin, answers)
    except Exception as error:
        traceback.print_exc()
        # The last line is what the parent says; JAX and torch.compile end theirs with advice.
        name = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        sys.exit(f"{name}{first_line(error)}")


if __name__ == "__main__":
    main(sys.argv[1])
