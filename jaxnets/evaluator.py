"""The evaluation of a split, compiled once: every example counts once, however it is fed and grouped."""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np

from jaxnets import data, distributed, ops, programs, sampling, step, streaming

Evaluator = Callable[[dict[str, Any]], tuple[dict[str, Any], step.Predictions]]


def eval_calls(
    split: data.Split,
    resident: bool,
    config: ml_collections.ConfigDict,
    num_devices: int,
    part: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, as the mapped evaluation takes them: K batches per call, padding masked.

    `part` (i, n) is the share of a process, the i-th of n, for its `num_devices`.
    """
    size, per_call = call_size(len(split), config.eval_batch_size, config.steps_per_call, num_devices * part[1])
    if resident:
        index, mask = (sampling.take_part(values, part) for values in sampling.eval_indices(len(split), size))
        batches = ({"index": i, "mask": m} for i, m in zip(index, mask))
    else:
        batches = streaming.stream_eval(split, batch_size=size, num_workers=config.num_workers, part=part)
    pending: list[dict[str, np.ndarray]] = []
    with closing(batches):  # its worker processes end with the evaluation, even if that is abandoned
        for batch in batches:
            pending.append(batch)
            if len(pending) == per_call:
                yield step.shard({name: np.stack([b[name] for b in pending]) for name in batch}, num_devices)
                pending = []
    if pending:
        empty = pending[-1] | {"mask": np.zeros_like(pending[-1]["mask"])}
        pending += [empty] * (per_call - len(pending))
        yield step.shard({name: np.stack([b[name] for b in pending]) for name in empty}, num_devices)


def call_size(num_examples: int, most_images: int, most_batches: int, num_devices: int) -> tuple[int, int]:
    """Images per batch and batches per call, within the given limits, with least padding; equal shares by device."""
    batches = math.ceil(num_examples / most_images)
    share = math.ceil(num_examples / batches / num_devices)
    return share * num_devices, math.ceil(batches / math.ceil(batches / most_batches))


def make_evaluator(
    model: nn.Module,
    split: data.Split,
    examples: dict[str, jax.Array],
    config: ml_collections.ConfigDict,
    devices: list[jax.Device],
    between_calls: Callable[[], None] = lambda: None,
) -> Evaluator:
    """A function from variables to the metrics of `split`, as from `summarize`, and its predictions in order.

    Compiled on first use; predictions are NumPy arrays.
    `examples` are the resident images and labels, or {} to stream them. `between_calls` may raise to
    abandon the evaluation.
    """
    mean, std = tuple(config.mean), tuple(config.std)
    one_step = partial(step.eval_step, model=model, mean=mean, std=std, axis_name=step.AXIS)
    key = ("evaluation", model, mean, std, tuple(devices), ops.formulation())
    call = programs.keep(key, lambda: step.pmap_eval(one_step, devices))

    def evaluate(variables):
        variables = step.replicate(variables, devices)
        total, of_calls, part = None, [], distributed.share()

        def start(batches):
            started = call(variables, examples, step.assemble(batches, devices))
            between_calls()
            return started

        with closing(eval_calls(split, bool(examples), config, len(devices) // part[1], part)) as calls:
            for totals, of_call in one_behind(map(start, calls)):
                total = _add(total, totals)
                of_calls.append(jax.tree.map(np.asarray, of_call))
        # Only the end of the last call is padding.
        predicted = distributed.gather(jax.tree.map(lambda *calls: np.concatenate(calls, axis=1), *of_calls))
        return summarize(total), jax.tree.map(lambda values: values[: len(split)], step.unshard(predicted))

    return evaluate


def evaluate_split(
    model: nn.Module, variables: dict[str, Any], split: data.Split, config: ml_collections.ConfigDict
) -> dict[str, Any]:
    """The metrics of a split, as from `summarize`, on this process's devices."""
    devices = jax.local_devices()
    # As many as divide the batch evenly, so that a run on eight devices can be evaluated on three.
    devices = devices[: max(d for d in range(1, len(devices) + 1) if config.eval_batch_size % d == 0)]
    metrics, _ = make_evaluator(model, split, load_examples(split, config, devices), config, devices)(variables)
    return metrics


def load_examples(
    split: data.Split, config: ml_collections.ConfigDict, devices: list[jax.Device]
) -> dict[str, jax.Array]:
    """The decoded split on every device, or {} if it is to be streamed."""
    if not data.is_resident(config.resident, split.nbytes, config.resident_limit):
        return {}
    return step.replicate(data.decode(split), devices)


def one_behind(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each once the next has been taken: the devices compute that one while the host reads this one."""
    waiting = []
    for item in items:
        yield from waiting
        waiting = [item]
    yield from waiting


def _add(total: step.EvalTotals | None, of_call: step.EvalTotals) -> step.EvalTotals:
    """The sum in float64, which holds any count exactly; None counts as nothing.

    Added batch by batch, so that it is the same to the last bit however batches are grouped into calls.
    """
    of_call = jax.tree.map(lambda values: np.asarray(values).astype(np.float64), of_call)
    for batch in range(len(of_call.count)):
        of_batch = jax.tree.map(operator.itemgetter(batch), of_call)
        total = of_batch if total is None else jax.tree.map(np.add, total, of_batch)
    return total


def summarize(totals: step.EvalTotals) -> dict[str, Any]:
    """Means over examples: loss (nats), accuracy, top5_accuracy, class_accuracy (NaN: no example of it)."""
    count = int(totals.count)
    with np.errstate(invalid="ignore"):
        class_accuracy = totals.class_correct / totals.class_count
    return {
        "loss": float(totals.loss) / count,
        "accuracy": float(totals.correct) / count,
        "top5_accuracy": float(totals.correct_top5) / count,
        "num_examples": count,
        "class_accuracy": class_accuracy.tolist(),
    }
