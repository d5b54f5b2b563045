"""Race our nets against PyTorch's: training, evaluation, and the latency of one image.

Every contender runs in a process of its own. They take short turns, so that other load on the machine affects all of
them; compilation and first steps are timed separately. A turn in which the host of a virtual machine takes processor
time away is repeated, a few times at most. A round's figure is the median of its turns. A ratio is theirs to ours in
the same round, above 1 where jaxnets is faster; shown are medians, and the lowest and highest round. The contenders:

jaxnets        a jitted step with create_model, value_and_grad and optax, as a user writes it
torch          eager PyTorch in its fastest form: memory format and, in evaluation, fused or frozen graph
torch_compile  torch.compile; on a GPU with CUDA graphs, on a CPU in evaluation with frozen weights
flax           our net on the convolutions of lax, as in flax, and a plain BatchNorm: JAXNETS_OPS=reference

On a CPU, PyTorch gets huge pages, which our kernels use, unless THP_MEM_ALLOC_ENABLE=0, and threads pinned to their
cores, unless OMP_PROC_BIND=false. Our kernels keep XLA's large buffers from step to step; JAXNETS_KEEP_MEMORY=0 has
them freed, as PyTorch frees its own. On a GPU, all compute in bfloat16.

The floor of a step is the larger of two times. Memory: every convolution and dense layer reads its input and
writes its output once, in training their gradients too, at the bandwidth of a large copy; parameters are read once, in
training they and their momenta are read and written. Arithmetic: two operations per multiply-accumulate, in training
three times that minus the image's gradient, at the rate of a large matrix product. Both rates are measured in the same
run, with the same threads, and the better of the libraries' figures is used.
The floor is not a bound for feature maps that stay in a cache.
"""

from jaxnets import interruption

if __name__ == "__main__":
    interruption.end_quietly()

import argparse
import datetime
import importlib.util
import itertools
import json
import math
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib import metadata
from statistics import median
from typing import Any

import jax

from jaxnets import benchmark_report, benchmark_worker, cores, create_model, machine, runtime
from jaxnets.arguments import count
from jaxnets.benchmark_worker import CONTENDERS, MODES, Task, Worker
from jaxnets.errors import ArgumentParser, UserError, exit_on_user_error, writing
from jaxnets.layer_list import layers_of
from jaxnets.models import default_image_size
from jaxnets.plain_files import replacing, user_path
from jaxnets.summary import summarize

MODELS = (
    "mobilenet_v1",
    "mobilenet_v2",
    "squeezenet1_1",
    "shufflenet_v1_g3",
    "shufflenet_v2_x1_0",
    "mobilenet_v1_cifar",
    "mobilenet_v2_cifar",
    "squeezenet1_1_cifar",
    "shufflenet_v1_g3_cifar",
    "shufflenet_v2_x1_0_cifar",
)
# All nets that the PyTorch side has: `torch_nets.NETS`, without importing PyTorch.
TORCH_MODELS = (
    *MODELS,
    "squeezenet1_0",
    "squeezenet1_0_cifar",
    *(f"shufflenet_v2_{size}{kind}" for size in ("x0_5", "x1_5", "x2_0") for kind in ("", "_cifar")),
)
# A turn is as many steps as take at least TURN_SECONDS; a round is TURNS turns of everyone, fewer if steps are slow.
# Turns are shorter than the slowdowns of a shared machine, which may last for seconds, and enough for a median.
TURN_SECONDS, TURNS, ROUND_SECONDS = 0.2, 8, 30.0
QUIET, TRIES = 0.03, 8  # the host's share of processor time in a turn, above which it is retried; the most tries
IMAGE_SIZE, BATCH_SIZE = 96, 64  # for ImageNet nets, except for latency
CIFAR_BATCH_SIZE = 128
PACKAGES = ("jaxnets", "jax", "jaxlib", "flax", "optax", "numpy", "torch", "torchvision")
PACKAGES += ("nvidia-cudnn-cu12", "nvidia-cudnn-cu13")  # whichever is installed: a GPU's convolutions
# Prefixes of environment variables that affect speed; suffixes (SILENT) of those that do not.
VARIABLES = ("JAX", "XLA_", "GLIBC_", "MALLOC_", "LD_PRELOAD", "OMP_", "GOMP_", "KMP_", "MKL_", "TORCH", "PYTORCH_")
VARIABLES += ("LD_LIBRARY_PATH", "TF_XLA_", "TF_GPU_", "TRITON_")
VARIABLES += ("CUDA_", "NVIDIA_TF32_", "NCCL_", "CUBLAS", "CUDNN", "THP_", "ATEN_", "ONEDNN_", "DNNL_", "OPENBLAS_")
SILENT = ("_HOME", "_VERSION")
FORMATS = ("table", "markdown", "json")


@dataclass(frozen=True)
class Race:
    """A task and its contenders, "jaxnets" first."""

    task: Task
    contenders: tuple[str, ...]


@dataclass(frozen=True)
class Floor:
    """What a step must move and compute at least, and the seconds for each at the machine's rates."""

    bytes: int
    flops: int
    memory_seconds: float
    compute_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.memory_seconds, self.compute_seconds)


def task_of(model: str, mode: str, batch_size: int | None = None, image_size: int | None = None) -> Task:
    """The task, with sizes of None chosen by the kind of net: 128 x 32 px for CIFAR, 64 x 96 px for ImageNet.

    Latency is that of one image, 224 px for ImageNet. Raises UserError for an unknown net or a size it cannot take.
    """
    net = create_model(model)
    own_size = default_image_size(model)
    if image_size is None:
        image_size = own_size if mode == "latency" else min(own_size, IMAGE_SIZE)
    else:
        summarize(model, image_size)  # refuses what the net cannot take
    if mode == "latency":
        batch_size = 1
    elif batch_size is None:
        batch_size = BATCH_SIZE if own_size > IMAGE_SIZE else CIFAR_BATCH_SIZE
    if mode == "train" and batch_size == 1:
        for layer in layers_of(net, image_size):
            if layer.kind == "batch_norm" and math.prod(layer.output_shape[:-1]) == 1:
                raise UserError(
                    f"--batch_size=1 leaves BatchNorm one value per channel in training ({layer.name} of {model}); it "
                    "must be at least 2"
                )
    return Task(model, mode, batch_size, image_size, net.num_classes, cores.count())


def floor_of(task: Task, rates: dict[str, float], float_bytes: int) -> Floor:
    """The floor of one step, as defined above, with `float_bytes` per number of a feature map."""
    model, train = create_model(task.model), task.mode == "train"
    layers = [layer for layer in layers_of(model, task.image_size) if layer.kind != "batch_norm"]
    numbers = [math.prod(layer.input_shape) + math.prod(layer.output_shape) for layer in layers]
    summary = summarize(task.model, task.image_size)
    moved, macs = sum(numbers), summary.macs
    if train:
        moved = 2 * moved - math.prod(layers[0].input_shape)
        macs = 3 * macs - summary.rows[0].macs
    parameter_bytes = 4 * summary.parameters * (4 if train else 1)
    total = task.batch_size * float_bytes * moved + parameter_bytes
    flops = 2 * task.batch_size * macs
    return Floor(total, flops, total / rates["copy_bytes_per_second"], flops / rates["flops_per_second"])


def statistics_of(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, and the values themselves by round."""
    return {"median": median(values), "low": min(values), "high": max(values), "rounds": list(values)}


def run_race(race: Race, rounds: int, rates: dict[str, float]) -> dict[str, Any]:
    """Start the contenders, warm each up, and let them take turns.

    UserError if a process dies, or if a contender's net differs from ours in the number of parameters or, as on another
    kind of device, in dtype.
    """
    task, name = race.task, f"{race.task.model} {race.task.mode}"
    expected = summarize(task.model, task.image_size).parameters
    with ExitStack() as stack:
        workers = {contender: stack.enter_context(benchmark_worker.start(contender)) for contender in race.contenders}
        idle = {contender: worker.ask("hello")["idle_bytes"] for contender, worker in workers.items()}
        entries, steps = {}, {}
        for contender, worker in workers.items():
            runtime.logger.info("%s: %s is compiling and taking its first step", name, contender)
            entries[contender] = worker.ask("prepare", **asdict(task))
            require_equal(entries, contender, task.model, expected)
            steps[contender] = steps_per_turn(worker)
            runtime.logger.info(
                "%s: %s took %.1f s to finish its first step", name, contender, entries[contender]["first_step_seconds"]
            )
        taken, stolen = take_turns(workers, steps, rounds)
    for contender in workers:
        turns = [[turn[contender] for turn in of_round] for of_round in taken]
        entries[contender] |= measured(turns, steps[contender], task.batch_size)
        entries[contender]["idle_bytes"] = idle[contender]
    ours = entries["jaxnets"]["step_seconds"]
    ratios = {
        contender: statistics_of([b / a for a, b in zip(ours["rounds"], entries[contender]["step_seconds"]["rounds"])])
        for contender in race.contenders[1:]
    }
    for contender, ratio in ratios.items():
        runtime.logger.info("%s: %.2f times as fast as %s", name, ratio["median"], contender)
    floor = floor_of(task, rates, 4 if entries["jaxnets"]["dtype"] == "float32" else 2)
    share = floor.seconds / ours["median"]
    return asdict(task) | {
        "parameters": expected,
        "contenders": entries,
        "ratios": ratios,
        "stolen": stolen,
        "floor": asdict(floor) | {"seconds": floor.seconds, "share": share},
    }


def require_equal(entries: dict[str, dict[str, Any]], contender: str, model: str, parameters: int) -> None:
    """UserError where a contender's net is not ours: it has other parameters, or computes in another dtype."""
    found = entries[contender]["parameters"]
    if found != parameters:
        raise UserError(f"{contender}'s {model} has {found:,} parameters, ours {parameters:,}")
    first = next(iter(entries))
    ours, theirs = (entries[one]["dtype"] for one in (first, contender))
    if theirs != ours:
        raise UserError(
            f"{contender} computes in {theirs}, {first} in {ours}: one is on a GPU, the other is not; install "
            "GPU builds of both, or set JAX_PLATFORMS=cpu and CUDA_VISIBLE_DEVICES="
        )


def measured(rounds: list[list[dict[str, Any]]], steps: int, batch_size: int) -> dict[str, Any]:
    """What a contender's turns, round by round, say of its steps and its memory."""
    of_turns = [[turn["seconds"] / steps for turn in turns] for turns in rounds]
    seconds = [median(turns) for turns in of_turns]
    last = rounds[-1][-1]
    return {
        "steps_per_turn": steps,
        "step_seconds": statistics_of(seconds),
        "turn_seconds": of_turns,  # per step, turn by turn, for anyone who doubts the medians
        "images_per_second": batch_size / median(seconds),
        "peak_bytes": last["peak_bytes"],
        "device_peak_bytes": last["device_peak_bytes"],
    }


def steps_per_turn(worker: Worker) -> int:
    """How many steps take `TURN_SECONDS`, judging by one step, or by several if one is too short to tell."""
    steps = 1
    while (seconds := worker.ask("turn", steps=steps)["seconds"]) < TURN_SECONDS / 5:
        steps = max(2 * steps, math.ceil(steps * TURN_SECONDS / 4 / seconds))
    return math.ceil(steps * TURN_SECONDS / seconds)


def take_turns(
    workers: dict[str, Worker], steps: dict[str, int], rounds: int
) -> tuple[list[list[dict[str, dict[str, Any]]]], float]:
    """The answers by round, turn and contender, and the share of processor time that the host took meanwhile.

    A round is `TURNS` turns, or as many as begin within `ROUND_SECONDS`; who goes first changes from turn to turn.
    """
    taken, shares, orders = [], [], itertools.cycle(_rotations(list(workers)))
    for _ in range(rounds):
        until, turns = time.monotonic() + ROUND_SECONDS, []
        while not turns or (len(turns) < TURNS and time.monotonic() < until):
            share, answers = quiet_turn(workers, steps, next(orders), until)
            shares.append(share)
            turns.append(answers)
        taken.append(turns)
    return taken, sum(shares) / len(shares)


def _rotations(names: Sequence[str]) -> list[list[str]]:
    return [[*names[shift:], *names[:shift]] for shift in range(len(names))]


def quiet_turn(
    workers: dict[str, Worker], steps: dict[str, int], order: Sequence[str], until: float
) -> tuple[float, dict[str, dict[str, Any]]]:
    """A turn of every contender: the share of processor time that the host took, and the answers.

    It is repeated while that share is above `QUIET`, up to `TRIES` tries and not after `until`; the quietest counts.
    """
    tries = []
    while not tries or (tries[-1][0] > QUIET and len(tries) < TRIES and time.monotonic() < until):
        before = machine.processor_ticks()
        answers = {contender: workers[contender].ask("turn", steps=steps[contender]) for contender in order}
        worked, stolen = (now - then for then, now in zip(before, machine.processor_ticks()))
        tries.append((stolen / max(1, worked + stolen), answers))
    return min(tries, key=lambda tried: tried[0])


def measure_rates(contenders: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """The best copy bandwidth and matrix rate of the libraries that take part, and each one's answer."""
    answers = {}
    for library, contender in {"jax": "jaxnets", "torch": "torch"}.items():
        if library == "torch" and not {"torch", "torch_compile"} & set(contenders):
            continue
        runtime.logger.info("%s is measuring how fast this machine copies and multiplies", library)
        with benchmark_worker.start(contender) as worker:
            answers[library] = worker.ask("rates", threads=cores.count())
    best = {
        key: max(answer[key] for answer in answers.values()) for key in ("copy_bytes_per_second", "flops_per_second")
    }
    return best, answers


def describe_run(argv: Sequence[str]) -> dict[str, Any]:
    """The date, command, machine, versions and environment of this run."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "jaxnets.benchmark", *argv[1:]]),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": cores.count(),
        "versions": versions,
        "environment": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(VARIABLES) and not name.endswith(SILENT)
        },
        "contender_environments": {name: benchmark_worker.environment(name) for name in CONTENDERS},
    }


def _listed(text: str, what: str, known: Sequence[str]) -> tuple[str, ...]:
    """The comma-separated names, each once; UserError for an unknown one."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in known:
            raise UserError(f"--{what}: {name!r} must be one of {', '.join(known)}")
    return names


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m jaxnets.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated nets; default: ten of them")
    parser.add_argument("--batch_size", type=count, help="for training and evaluation; default: 64, and 128 for CIFAR")
    parser.add_argument("--image_size", type=count, help="side in pixels; default: 96, 224 for latency, 32 for CIFAR")
    parser.add_argument("--mode", default=",".join(MODES), help=f"comma-separated: {', '.join(MODES)}; default: all")
    others = ", ".join(CONTENDERS[1:])
    parser.add_argument("--against", default="torch", help=f"comma-separated: {others}; default: torch")
    parser.add_argument("--rounds", type=count, default=5, help="each of several turns per contender; default: 5")
    parser.add_argument("--format", choices=FORMATS, default="table", help="json is one object on one line")
    parser.add_argument("--out", type=user_path, help="a new file for all results, as JSON")
    return parser


def plan(args) -> list[Race]:
    """The races that the arguments ask for; UserError for bad arguments."""
    modes = _listed(args.mode, "mode", MODES)
    against = _listed(args.against, "against", CONTENDERS[1:])
    names = dict.fromkeys(args.models.split(","))
    for name in names:
        create_model(name)  # refuses an unknown one
    if any(contender.startswith("torch") for contender in against):
        missing = [package for package in ("torch", "torchvision") if importlib.util.find_spec(package) is None]
        if missing:
            raise UserError(f"{missing[0]} is not installed: pip install -e '.[torch]', or --against=flax")
        for name in names:
            if name not in TORCH_MODELS:
                raise UserError(f"--models: PyTorch's side has no {name!r}, only {', '.join(TORCH_MODELS)}")
    if args.out is not None:
        if os.path.lexists(args.out):
            raise UserError(f"--out={args.out} exists already, and is not overwritten")
        if not (args.out.parent.is_dir() and os.access(args.out.parent, os.W_OK)):
            raise UserError(f"--out={args.out}: {args.out.parent} must be a writable folder")
    tasks = [task_of(name, mode, args.batch_size, args.image_size) for name in names for mode in modes]
    return [Race(task, ("jaxnets", *against)) for task in tasks]


def main(argv: list[str]) -> None:
    """Run the command; UserError for bad arguments, before any work, and at the end if a race failed."""
    # This process only traces, which needs no accelerator: that is for the contenders.
    jax.config.update("jax_platforms", "cpu")
    args = _parser().parse_args(argv[1:])
    races = plan(args)
    runtime.configure_logging()
    rates, answers = measure_rates(races[0].contenders)
    record = describe_run(argv) | {
        "device": answers["jax"]["about"]["device"],
        "rounds": args.rounds,
        "rates": rates,
        "rates_by_library": answers,
        "races": [],
        "failed": [],
    }
    try:
        for race in races:
            try:
                record["races"].append(run_race(race, args.rounds, rates))
            except UserError as error:  # the other races are worth hours
                record["failed"].append(f"{race.task.model} {race.task.mode}: {error}")
                runtime.logger.warning("%s", record["failed"][-1])
            if args.out is not None:  # after every race, so that an early end loses none
                with writing(args.out, ""), replacing(args.out, f".{os.getpid()}") as scratch:
                    scratch.write_text(json.dumps(record, indent=1) + "\n")
    finally:
        if args.format == "json":
            print(json.dumps(record))
        elif record["races"]:
            benchmark_report.show(record, markdown=args.format == "markdown")
    if failed := record["failed"]:
        raise UserError(f"{len(failed)} of {len(races)} races failed; the first: {failed[0]}")


if __name__ == "__main__":
    exit_on_user_error(main)(sys.argv)
