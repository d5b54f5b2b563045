"""The benchmark's PyTorch side, in its best honest form.

Before the race it tries both memory formats (channels_last or not) and, in evaluation, BatchNorms folded into the
convolutions (torch.fx), TorchScript's frozen graph on a CPU, and weights already in bfloat16 on a GPU; it takes the
fastest form. `compiled` is torch.compile: on a GPU with CUDA graphs, in evaluation of that folded bfloat16 net; on a
CPU, in evaluation, with Inductor's freezing, which folds and repacks the weights.
"""

import contextlib
import copy
import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx.experimental.optimization import fuse

from jaxnets.benchmark_worker import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY, Task, fastest, ready_bytes
from jaxnets.torch_nets import FORMATS, NETS, set_fast, synchronize

# For each form in each round, after two steps that do not count: at least TRIAL_SECONDS, and at least TRIAL_STEPS.
TRIAL_SECONDS, TRIAL_STEPS, TRIAL_ROUNDS = 0.4, 5, 2
Step = Callable[[], torch.Tensor]  # returns the loss, or the logits


@dataclasses.dataclass(frozen=True)
class Trial:
    """How a form started, and how fast it is afterwards."""

    first_step_seconds: float  # including setup
    step_seconds: float  # of the fastest step
    ready_bytes: int  # resident between steps
    first: torch.Tensor  # the loss, or the logits


class _Contender:
    def __init__(self, step, wait_for_each, in_graphs, report):
        self._step, self._wait_for_each, self._in_graphs, self.report = step, wait_for_each, in_graphs, report

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self._step()
            if self._wait_for_each:
                synchronize()
        synchronize()

    def device_peak_bytes(self) -> int | None:
        if not torch.cuda.is_available():
            return None
        # The memory that CUDA graphs work in is reserved for them, and never counted as allocated while they run.
        return torch.cuda.max_memory_reserved() if self._in_graphs else torch.cuda.max_memory_allocated()


def prepare(task: Task, compiled: bool, cores: Collection[int]) -> _Contender:
    """Try the forms of the task and keep the fastest.

    `cores`: the CPU cores on which torch.compile may compile and, with a GPU, the thread that launches kernels may run.
    On a GPU the net computes in bfloat16, by autocast. `report`: parameters, compile_seconds (the first step's less a
    later one's), first_step_seconds, ready_bytes (resident between steps), dtype, form, loss, and `tried`: seconds per
    step by form.
    """
    torch.set_num_threads(task.threads)
    torch.manual_seed(0)
    set_fast()
    if _device() == "cuda":
        _unbind(cores)  # the thread that launches kernels, as on the JAX side
    warnings.simplefilter("ignore")  # advice from TorchScript and Inductor is not for the user
    net = NETS[task.model]().to(_device())
    forms = _forms(net, task, compiled)
    trials: dict[str, Trial] = {}
    # In rounds, or other load on the machine might affect one form alone; a single form needs no choice.
    for name, make in list(forms.items()) * (TRIAL_ROUNDS if len(forms) > 1 else 1):
        step = None  # frees the momenta that it holds
        step, last = _try(make, net, cores)
        tried = name
        before = trials.get(name, last)
        trials[name] = dataclasses.replace(before, step_seconds=min(before.step_seconds, last.step_seconds))
    best = min(trials, key=lambda name: trials[name].step_seconds)
    if tried != best:  # the net has been put into another form since
        step = None
        step, last = _try(forms[best], net, cores)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    report = {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "compile_seconds": max(0.0, trials[best].first_step_seconds - trials[best].step_seconds),
        "first_step_seconds": trials[best].first_step_seconds,
        "ready_bytes": last.ready_bytes,
        "temp_bytes": None,
        "argument_bytes": None,
        "dtype": "float32" if _device() == "cpu" else "bfloat16",
        "form": best,
        "loss": float(trials[best].first) if task.mode == "train" else None,
        "tried": {name: trial.step_seconds for name, trial in trials.items()},
    }
    return _Contender(step, task.mode != "train", compiled, report)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _unbind(cores: Collection[int]) -> None:
    """Let this thread, and those it starts, run on all of the cores: OpenMP has bound it to one."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


@contextlib.contextmanager
def _unbound(cores: Collection[int]) -> Iterator[None]:
    """`_unbind` temporarily, e.g. for compilers."""
    bound = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else cores
    _unbind(cores)
    try:
        yield
    finally:
        _unbind(bound)


def _try(make: Callable[[], Step], net: nn.Module, cores: Collection[int]) -> tuple[Step, Trial]:
    """Set up a form of the net and time its steps."""
    began = time.perf_counter()
    with _unbound(cores):
        step = make()
        first = step()
        synchronize()
    first_step_seconds = time.perf_counter() - began
    for _ in range(2):  # TorchScript optimises in the second step, CUDA graphs are recorded by the third
        step()
    synchronize()
    # As on the JAX side after compiling: momenta and compiled programs are there, but nothing of a step.
    net.zero_grad(set_to_none=True)
    resident = ready_bytes()
    began, seconds = time.perf_counter(), []
    while (step_began := time.perf_counter()) - began < TRIAL_SECONDS or len(seconds) < TRIAL_STEPS:
        step()
        synchronize()
        seconds.append(time.perf_counter() - step_began)
    # Other load on the machine makes a step slower, never faster.
    return step, Trial(first_step_seconds, min(seconds), resident, first)


def _forms(net: nn.Module, task: Task, compiled: bool) -> dict[str, Callable[[], Step]]:
    """The ways to run the net, each with the function that sets it up."""
    labels = torch.randint(task.num_classes, (task.batch_size,), device=_device())
    images = torch.randn(task.batch_size, 3, task.image_size, task.image_size, device=_device())

    def make(memory_format, change):
        batch = images.to(memory_format=memory_format)
        changed = change(net.train(task.mode == "train").to(memory_format=memory_format), batch)
        return _train_step(changed, batch, labels) if task.mode == "train" else _eval_step(changed, batch)

    if compiled:  # which chooses layouts itself
        return {"compiled": partial(make, torch.channels_last, _compiled)}
    changes = {"": _unchanged}
    if task.mode != "train":
        changes |= _evaluation_changes(_device())
    return {
        name + suffix: partial(make, memory_format, change)
        for name, memory_format in FORMATS.items()
        for suffix, change in changes.items()
    }


def _evaluation_changes(device: str) -> dict[str, Callable]:
    """Changes that may speed up a net in evaluation, by the suffix that they add to a form's name."""
    if device == "cpu":
        return {", fused": _fused, ", TorchScript": _frozen}
    return {", fused": _fused, ", bfloat16": _narrow, ", fused, bfloat16": _fused_narrow}


def _unchanged(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    return net


def _fused(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    """The net with BatchNorms folded into the preceding convolutions."""
    return fuse(net)


def _narrow(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    """A copy with bfloat16 weights, which autocast need not convert in every call."""
    return copy.deepcopy(net).to(torch.bfloat16)


def _fused_narrow(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    return _narrow(fuse(net), batch)


class _Marked(nn.Module):
    """A net in CUDA graphs that marks where each step begins."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return self.net(images)


def _compiled(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    if _device() == "cuda":
        return _Marked(torch.compile(net if net.training else _fused_narrow(net, batch), mode="reduce-overhead"))
    import torch._inductor.config as inductor

    inductor.freezing = not net.training
    return torch.compile(net)


def _frozen(net: nn.Module, batch: torch.Tensor) -> nn.Module:
    with torch.no_grad():
        return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(net, batch)))


def _autocast():
    return torch.autocast("cuda", torch.bfloat16) if _device() == "cuda" else contextlib.nullcontext()


def _train_step(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Step:
    optimizer = torch.optim.SGD(
        net.parameters(), LEARNING_RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )

    def step():
        optimizer.zero_grad(set_to_none=True)
        with _autocast():
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _eval_step(net: nn.Module, images: torch.Tensor) -> Step:
    @torch.inference_mode()
    def step():
        with _autocast():
            return net(images)

    return step


def rates(threads: int) -> dict[str, Any]:
    """Bytes per second read and written in a copy, floating-point operations per second in a matrix product."""
    torch.set_num_threads(threads)
    on_cpu = _device() == "cpu"
    source = torch.zeros(1 << 26 if on_cpu else 1 << 28, device=_device())
    target = torch.zeros_like(source)
    n, dtype = (2048, torch.float32) if on_cpu else (8192, torch.bfloat16)
    a = torch.randn(n, n, dtype=dtype, device=_device())  # with all ones a GPU draws less power and runs faster
    product = torch.empty_like(a)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / fastest(lambda: target.copy_(source), lambda _: synchronize()),
        "flops_per_second": 2 * n**3 / fastest(lambda: torch.mm(a, a, out=product), lambda _: synchronize()),
        "about": {"device": torch.cuda.get_device_name() if not on_cpu else None, "threads": threads},
    }
