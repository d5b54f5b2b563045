"""The runs of a comparison in PyTorch: the same net, initial weights, data, order and recipe as in `loop.train`.

They take whichever memory format trains faster. `torch_step` has what is trained. Needs PyTorch, pip install -e
'.[torch]'.
"""

import collections
import contextlib
import copy
import math
import time
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
import torch
from torch import nn

import jaxnets
from jaxnets import data, journal, machine, plan, sampling, settings, timing, torch_nets, workdir
from jaxnets.compare_entries import net_fields
from jaxnets.errors import UserError, first_line, writing
from jaxnets.plain_files import replacing
from jaxnets.runtime import logger
from jaxnets.torch_nets import FORMATS, set_fast, synchronize
from jaxnets.torch_step import OPTIMIZERS, TorchRun, evaluate, load_examples, make_net, make_optimizer, take_step
from jaxnets.weights import weight_files

CHECKPOINT = workdir.TORCH_CHECKPOINT
TRIAL_STEPS = 3  # for each memory format and image size


def check(config: ml_collections.ConfigDict) -> None:
    """UserError if the PyTorch side lacks the net of `config`, or a part of its recipe."""
    check_device()
    model = config.model
    if model.name not in torch_nets.NETS:
        raise UserError(
            f"--against=torch: there is no {model.name} in PyTorch here; there are {', '.join(torch_nets.NETS)}"
        )
    jaxnets.create_model(model.name, **net_fields(config))  # refuses an unknown field
    plain = jaxnets.create_model(model.name)
    other = {
        **{f"model.{name}": getattr(plain, name) != value for name, value in net_fields(config).items()},
        "deterministic": config.deterministic,
        "ema_decay": config.ema_decay,
        "augment.mixup": config.augment.mixup,
        "augment.cutmix": config.augment.cutmix,
        "crop_area": config.crop_area,
        "init_from": config.init_from,
        "optimizer.name": config.optimizer.name not in OPTIMIZERS,
    }
    if unknown := [name for name, value in other.items() if value]:
        raise UserError(f"--against=torch: the PyTorch side does not support config.{unknown[0]} as it is set")


def check_device() -> None:
    """UserError unless PyTorch has the device that JAX trains on, and this is the CPU or a single GPU."""
    backend = jax.default_backend()
    if backend not in ("cpu", "gpu") or backend == "gpu" and not torch.cuda.is_available():
        raise UserError(
            f"--against=torch: JAX trains on the {backend.upper()}, which PyTorch {torch.__version__} cannot use; "
            "install a PyTorch build for it, or set JAX_PLATFORMS=cpu"
        )
    if backend == "gpu" and len(jax.devices()) > 1:
        raise UserError(
            f"--against=torch: PyTorch trains on one GPU, JAX on all {len(jax.devices())}; set CUDA_VISIBLE_DEVICES=0"
        )


def check_batch_norm(made: plan.Plan) -> None:
    """UserError if our side normalises shares of a batch, as several CPU devices do by default."""
    count = len(made.devices)
    if count > 1 and not made.config.sync_batch_norm and jax.tree.leaves(made.state_shapes.batch_stats):
        raise UserError(
            f"--against=torch: PyTorch normalises over a whole batch, JAX over the share of each of its {count} CPU "
            "devices; set config.sync_batch_norm=True"
        )


def train(config: ml_collections.ConfigDict, directory: Path) -> None:
    """Train the net of `config` in PyTorch, or resume it after its last complete epoch.

    The workdir gets the records of a run, `metrics.jsonl` and `timing.jsonl`. Raises UserError as `check` and
    `loop.train` do.
    """
    check(config)
    config = settings.with_absolute_places(config)
    made = plan.make_plan(config)
    check_plan(made)
    with workdir.claim(directory, config):
        saved = read(directory / CHECKPOINT)
        at = saved["step"] if saved else 0
        require_resumable(made, directory, at)
        clock = timing.Clock(directory)
        clock.step = at
        run = set_up(made, saved)
        workdir.keep(directory, config)
        workdir.keep_data(directory, made.data_record)
        if at < made.total_steps:
            machine.note(directory, at, "torch")
        with contextlib.closing(journal.Journal(directory, at, evaluated=True)) as records:
            for epoch in range(at // made.steps_per_epoch, config.num_epochs):
                step = train_and_evaluate(run, epoch, records, clock)
                with clock.phase("checkpoint"):
                    save(run, directory / CHECKPOINT, step)
                clock.write(step)


def evaluate_training(config: ml_collections.ConfigDict, directory: Path, step: int) -> dict[str, Any] | None:
    """Loss and accuracy on the training images as they are, of the weights at a step; None if these are not saved."""
    saved = read(directory / CHECKPOINT)
    if saved is None or saved["step"] != step:
        return None
    made = plan.make_plan(config)
    set_fast()
    net = torch_nets.NETS[config.model.name](num_classes=made.model.num_classes)
    net.load_state_dict(saved["net"])
    memory_format = FORMATS[saved["format"]]
    net = net.to(device_name(), memory_format=memory_format)
    metrics = evaluate(net, load_examples(made.train_split, device_name()), config, memory_format)
    return {"loss": metrics["eval_loss"], "accuracy": metrics["eval_accuracy"]}


def device_name() -> str:
    """PyTorch's name of the kind of device that JAX trains on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def require_resumable(made: plan.Plan, directory: Path, at: int) -> None:
    """UserError unless the run in `directory`, whose checkpoint is of step `at` (0: none), can resume as planned."""
    if at > made.total_steps:
        raise UserError(
            f"the run in {directory} is at step {at}, beyond config.num_epochs={made.config.num_epochs}, which ends at "
            f"{made.total_steps}; it is unchanged"
        )
    if at:
        plan.require_same_data(made, directory)
    if at == made.total_steps and not any(
        record["step"] == at and journal.is_evaluation(record) for record in journal.read_strictly(directory)
    ):
        raise UserError(
            f"the run in {directory} has finished, but its last evaluation is no longer in {journal.FILE}; delete "
            "its folder to train that net again"
        )


def check_plan(made: plan.Plan) -> None:
    """`check` for what is only known once the data are open and the net is traced."""
    check_resident(made)
    check_batch_norm(made)


def check_resident(made: plan.Plan) -> None:
    """UserError for images that are to be streamed: the PyTorch side keeps all of them in memory."""
    config, nbytes = made.config, made.train_split.nbytes + made.eval_split.nbytes
    if not data.is_resident(config.resident, nbytes, config.resident_limit):
        raise UserError(
            f"--against=torch: the PyTorch side keeps all images in memory, {nbytes / 1e9:.1f} GB, but "
            f"config.resident={config.resident} and config.resident_limit={config.resident_limit} would stream them"
        )


def release() -> None:
    """Release the GPU memory that PyTorch caches, since JAX needs it next."""
    torch.cuda.empty_cache()


def set_up(made: plan.Plan, saved: dict[str, Any] | None) -> TorchRun:
    """The run of a plan as `saved`, from `read`, left it, or before its first step.

    It takes the faster memory format and keeps it: the optimizer's state is laid out in memory as the weights are, and
    PyTorch's fused steps do not check that.
    """
    config = made.config
    device = device_name()
    set_fast()
    net = make_net(config.model.name, made.model, plan.compile_and_create_state(made).variables).to(device)
    examples = [load_examples(split, device) for split in (made.train_split, made.eval_split)]

    def running(name: str, net: nn.Module) -> TorchRun:
        net = net.to(memory_format=FORMATS[name])
        return TorchRun(made, net, make_optimizer(net, config.optimizer), *examples, name)

    trials = {name: running(name, copy.deepcopy(net)) for name in ([saved["format"]] if saved else FORMATS)}
    for trial in trials.values():
        warm_up(trial)
    best = fastest(trials) if len(trials) > 1 else next(iter(trials))
    logger.info("PyTorch %s trains %s in %s", torch.__version__, config.model.name, best)
    run = running(best, net)
    if saved:
        run.net.load_state_dict(saved["net"])
        run.optimizer.load_state_dict(saved["optimizer"])
    return run


def warm_up(trial: TorchRun) -> None:
    """Take a step at every image size of the run, at a learning rate of 0, and evaluate a batch of every size.

    cuDNN tries its kernels at the first of each, which is no more a part of training than XLA's compilation.
    """
    config = trial.plan.config
    for size in epochs_by_size(trial.plan):
        time_step(trial, size)
    last = (len(trial.plan.eval_split) - 1) // config.eval_batch_size * config.eval_batch_size
    for part in (slice(config.eval_batch_size), slice(last, None)):  # the last batch may be smaller
        examples = {name: values[part] for name, values in trial.eval_examples.items()}
        evaluate(trial.net, examples, config, trial.memory_format)


def fastest(trials: dict[str, TorchRun]) -> str:
    """The format in which the run's epochs take least time: by the fastest of some steps of every size, in turns."""
    epochs = epochs_by_size(next(iter(trials.values())).plan)
    rounds = [
        {name: {size: time_step(trial, size) for size in epochs} for name, trial in trials.items()}
        for _ in range(TRIAL_STEPS)
    ]

    def seconds(name: str) -> float:
        return sum(min(found[name][size] for found in rounds) * count for size, count in epochs.items())

    return min(trials, key=seconds)


def epochs_by_size(made: plan.Plan) -> collections.Counter[int]:
    """How many epochs train on images of each size."""
    return collections.Counter(map(made.training_size, range(made.config.num_epochs)))


def time_step(trial: TorchRun, size: int) -> float:
    """Seconds of a training step on images of a size, at a learning rate of 0."""
    indices = torch.arange(trial.plan.config.batch_size, device=trial.device)
    trial.net.train()
    synchronize()
    began = time.perf_counter()
    take_step(trial, indices, 0.0, size)
    synchronize()
    return time.perf_counter() - began


def read(path: Path) -> dict[str, Any] | None:
    """What `save` wrote, or None; UserError for a damaged or hostile file."""
    if not path.exists():
        return None
    try:
        saved = weight_files.read_torch(path)
        if saved.keys() != {"net", "optimizer", "step", "format"} or saved["format"] not in list(FORMATS):
            raise UserError("it is not a checkpoint of this program")
    except UserError as error:
        remedy = "" if isinstance(error.__cause__, OSError) else "; delete its folder to train that net again"
        raise UserError(f"{path} cannot be read ({error}){remedy}") from None
    return saved


def save(run: TorchRun, path: Path, step: int) -> None:
    """Write what `read` returns, all that is needed to resume the run; UserError if it cannot be written."""
    if not all(bool(torch.isfinite(value).all()) for value in run.net.state_dict().values()):
        raise UserError(f"PyTorch's weights are no longer finite at step {step}; they were not saved")
    saved = {"net": run.net.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step, "format": run.layout}
    with writing(path), replacing(path) as scratch:
        try:
            torch.save(saved, scratch)
        except RuntimeError as error:  # from a full disk
            raise OSError(first_line(error)) from error


def train_and_evaluate(run: TorchRun, epoch: int, records: journal.Journal, clock: timing.Clock) -> int:
    """Train one epoch, evaluate it if that is due, and record both; the step at which the epoch ends."""
    config = run.plan.config
    with clock.phase("train"):
        record = train_epoch(run, epoch)
    records.write(record)
    logger.info(
        f"PyTorch, epoch {record['epoch']}: loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}, "
        f"{record['images_per_second']:.0f} images/s"
    )
    if (epoch + 1) % config.eval_every_epochs == 0 or epoch + 1 == config.num_epochs:
        with clock.phase("evaluate"):
            metrics = evaluate(run.net, run.eval_examples, config, run.memory_format)
        if not math.isfinite(metrics["eval_loss"]):
            raise UserError(f"PyTorch's evaluation loss became {metrics['eval_loss']} in epoch {epoch + 1}")
        records.write({name: record[name] for name in ("step", "epoch")} | metrics)
        logger.info(f"PyTorch, epoch {record['epoch']}: accuracy {metrics['eval_accuracy']:.2%}")
    return record["step"]


def train_epoch(run: TorchRun, epoch: int) -> dict[str, Any]:
    """Take the steps of an epoch, numbered from 0; returns their record."""
    config, steps, size = run.plan.config, run.plan.steps_per_epoch, run.plan.training_size(epoch)
    # An epoch's draws depend only on the seed and its number, so that a run can resume after any epoch.
    torch.manual_seed((config.seed << 20) + epoch)
    run.net.train()
    order = sampling.train_indices(config.seed, len(run.plan.train_split), config.batch_size, epoch * steps, steps)
    order = torch.from_numpy(order.astype(np.int64)).to(run.device)
    loss, correct = torch.zeros((), device=run.device), torch.zeros((), device=run.device)
    synchronize()
    began = time.perf_counter()
    for step, indices in enumerate(order, start=epoch * steps):
        rate = float(run.plan.learning_rates[step])
        of_step = take_step(run, indices, rate, size)
        loss += of_step[0]
        correct += of_step[1]
    mean_loss = float(loss) / steps  # waits for the device
    seconds = time.perf_counter() - began
    if not math.isfinite(mean_loss):
        raise UserError(f"PyTorch's loss became {mean_loss} in epoch {epoch + 1}")
    return {
        "step": (epoch + 1) * steps,
        "epoch": epoch + 1,
        "loss": mean_loss,
        "accuracy": int(correct) / (steps * config.batch_size),
        "learning_rate": rate,
        "images_per_second": round(steps * config.batch_size / seconds, 1),
    }
