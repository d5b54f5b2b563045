"""The configuration of a run: checked before any work, kept in the workdir, compared on resuming."""

import json
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax
import ml_collections
from flax.traverse_util import flatten_dict

import jaxnets
from jaxnets import optim
from jaxnets.datasets import absolute, data_root, is_folder
from jaxnets.errors import UserError
from jaxnets.plain_files import parse_json, read_text

MAX_BYTES = 1 << 20  # of a config.json; one has about 2,000
# Numbers that evaluation uses, and their limits: more is a mistake, or a trap in a workdir from elsewhere.
LIMITS = {"eval_batch_size": 1 << 20, "image_size": 4096, "steps_per_call": 10_000}
DTYPES = ("auto", "float32", "bfloat16")  # float16 would need loss scaling
# Fields that runs of earlier versions do not have, with what they did.
ADDED = {"optimizer.decay_vectors": False}
SWITCHES = (
    "deterministic",
    "sync_batch_norm",
    "augment.flip",
    "optimizer.nesterov",
    "optimizer.decay_depthwise",
    "optimizer.decay_vectors",
)

# What may differ when a run resumes, besides what `_may_differ` allows: none of it changes what is learned, as
# long as the images are the same (another place is logged, as is another length of the run).
FREE_FIELDS = frozenset(
    {
        "num_epochs",
        "data_dir",
        "resident",
        "resident_limit",
        "num_workers",
        "steps_per_call",
        "eval_batch_size",
        "eval_every_epochs",
        "checkpoint_every_epochs",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "log_every_steps",
        "deterministic",
        "compilation_cache",
    }
)


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Nested fields by their dotted names, as `--config.` takes them."""
    return flatten_dict(config, sep=".")


def as_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as JSON gives it back: plain dicts, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def with_absolute_places(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """A copy with which evaluation finds the data, wherever and in whatever environment it is started."""
    config = config.copy_and_resolve_references()
    config.data_dir = str(data_root(config.data_dir).resolve())
    config.dataset = absolute(config.dataset)
    return config


def place_of(config: ml_collections.ConfigDict) -> str:
    """The field that says where the images are."""
    return "dataset" if is_folder(config.dataset) else "data_dir"


def write(config: ml_collections.ConfigDict, path: Path) -> None:
    """Write `config.json`."""
    path.write_text(json.dumps(as_dict(config), indent=2) + "\n")


def read(path: Path) -> ml_collections.ConfigDict:
    """The configuration in a workdir's `config.json`; UserError if there is none or it cannot be read."""
    if os.path.isfile(path.parent):
        raise UserError(f"{path.parent} is a file, not the folder of a run")
    try:
        values = parse_json(read_text(path, MAX_BYTES))
        if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
            raise ValueError("it has no field model")
        if odd := [
            name for name in flatten(values) if any(map(ml_collections.ConfigDict.__dict__.get, name.split(".")))
        ]:
            raise ValueError(f"no field can be called {odd[0]:.80}")
        return ml_collections.ConfigDict(values, convert_dict=True)
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the workdir of a run: it has no {path.name}") from None
    except Exception as error:  # ConfigDict raises KeyError for a field named like one of its methods
        raise UserError(f"{path} is not a run's configuration: {error}") from None


def differences(saved: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields, by dotted name, that keep a run saved with one configuration from resuming with the other."""
    saved, new = flatten(saved), flatten(new)
    saved = {name: value for name, value in ADDED.items() if name in new} | saved
    return {
        name: (saved.get(name), new.get(name))
        for name in sorted(saved.keys() | new.keys())
        if saved.get(name) != new.get(name) and not _may_differ(name, saved.get(name), new.get(name))
    }


def _may_differ(name: str, saved: Any, new: Any) -> bool:
    """Whether a field is free, or its values may mean the same; `plan.require_same_data` compares what they hold."""
    if name == "dataset" and isinstance(saved, str) and isinstance(new, str):
        if is_folder(saved) or is_folder(new):
            return is_folder(saved) and is_folder(new)  # it may have moved
        (was, _, old_version), (name, _, version) = saved.partition(":"), new.partition(":")
        return was == name and not (old_version and version)
    return name in FREE_FIELDS or (name == "model.width" and (saved, new) == (1.0, None))  # once given by MobileNets


class _Checks:
    """The conditions on the fields of a configuration, each a UserError that names the field."""

    def __init__(self, config: ml_collections.ConfigDict):
        self.values = flatten(config.to_dict())

    def require(self, field: str, must: str, ok: Callable[[Any], bool]) -> None:
        if field not in self.values:
            raise UserError(f"config.{field} is missing; it must be {must}")
        try:
            good = ok(self.values[field])
        except (TypeError, ValueError, OverflowError):  # not even of the right type, in a file from elsewhere
            good = False
        if not good:
            raise UserError(f"config.{field} must be {must}, not {self.values[field]!r}")

    def one_of(self, field: str, choices: Collection[str]) -> None:
        self.require(field, f"one of {', '.join(choices)}", lambda value: value in choices)

    def positive(self, *fields: str) -> None:
        for field in fields:
            self.require(field, "greater than 0", lambda value: math.isfinite(value) and value > 0)

    def within(self, field: str, low: float, high: float, bounds: str) -> None:
        self.require(field, bounds, lambda value: low <= value < high)


def check_evaluation(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first field that evaluation needs and whose value is invalid."""
    checks = _Checks(config)
    for field, most in LIMITS.items():
        checks.require(field, f"a whole number from 1 to {most}", lambda value, most=most: _whole(value, 1, most))
    checks.positive("resident_limit")
    checks.require("resident", "auto, true or false", lambda value: str(value).lower() in ("auto", "true", "false"))
    checks.require("data_dir", "a path, or None", _is_path)
    checks.require("crop", "True or False", lambda value: isinstance(value, bool))
    checks.require(
        "num_workers", "None or a whole number from 0 to 1000", lambda value: value is None or _whole(value, 0, 1000)
    )
    checks.require("compilation_cache", "True or False", lambda value: isinstance(value, bool))
    checks.one_of("model.dtype", DTYPES)
    for field in ("model.name", "dataset", "eval_split"):
        checks.require(field, "a name", lambda value: isinstance(value, str))
    checks.require("mean", "three numbers, one per channel", lambda value: len(value) == 3 and _finite(value))
    checks.require("std", "three numbers above 0", lambda value: len(value) == 3 and _finite(value) and min(value) > 0)


def _whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_path(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _is_size(value: Any, side: int) -> bool:
    """Whether it is a number of pixels up to `side`, or a float as a fraction of that."""
    return _whole(value, 1, side) or (isinstance(value, float) and 1 <= value * side <= side)


def _finite(values: Any) -> bool:
    return all(math.isfinite(value) for value in values)


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first field whose value is invalid for a training run."""
    check_evaluation(config)
    checks = _Checks(config)
    checks.positive("batch_size", "num_epochs", "eval_every_epochs", "checkpoint_every_epochs", "keep_checkpoints")
    checks.positive("log_every_steps", "optimizer.learning_rate", "optimizer.epsilon", "schedule.decay")
    for field in SWITCHES:
        checks.require(field, "True or False", lambda value: isinstance(value, bool))
    checks.require("train_split", "a name", lambda value: isinstance(value, str))
    checks.require("checkpoint_every_steps", "a whole number, 0 for off", lambda value: _whole(value, 0, 2**31))
    checks.within("seed", 0, 2**32, "an integer from 0 to 2**32 - 1")
    checks.one_of("optimizer.name", optim.OPTIMIZERS)
    checks.one_of("schedule.name", optim.SCHEDULES)
    checks.one_of("optimizer.batch_scaling", optim.BATCH_SCALINGS)
    for field in ("optimizer.momentum", "optimizer.beta1", "optimizer.beta2", "label_smoothing", "ema_decay"):
        checks.within(field, 0, 1, "in [0, 1)")
    for field in (
        "optimizer.weight_decay",
        "optimizer.clip_norm",
        "schedule.warmup_epochs",
        "augment.mixup",
        "augment.cutmix",
    ):
        checks.within(field, 0, math.inf, "0 or more, and finite")
    checks.require("init_from", "a path, or None", _is_path)
    checks.within("schedule.end_factor", 0, math.nextafter(1, 2), "in [0, 1]")
    side = config.image_size
    checks.within("augment.crop_padding", 0, side, f"from 0 to below image_size={side}")
    checks.within("augment.cutout", 0, side + 1, f"from 0 to image_size={side}")
    checks.require(
        "progressive_sizes",
        f"all whole numbers from 1 to image_size={side}, or all floats up to 1.0, fractions of it",
        lambda value: all(_is_size(size, side) for size in value) and len(set(map(type, value))) <= 1,
    )
    checks.within("crop_area", 0, math.nextafter(1, 2), "in [0, 1]")
    if config.crop_area and str(config.resident).lower() == "true":
        raise UserError(
            f"config.crop_area={config.crop_area} crops every image afresh as it is read, so config.resident must be "
            "auto or false"
        )
    in_the_run = "fractions of the run, in (0, 1)"
    checks.require("schedule.boundaries", in_the_run, lambda value: all(0 < fraction < 1 for fraction in value))


def compute_dtype(name: str) -> str:
    """The dtype that a model computes in; "auto" is bfloat16 if the hardware is made for it."""
    if name != "auto":
        return name
    return "bfloat16" if _is_made_for_bfloat16(jax.local_devices()[0]) else "float32"


def _is_made_for_bfloat16(device: jax.Device) -> bool:
    """Whether it is a TPU, an AMD GPU, or an NVIDIA GPU since Ampere."""
    if device.platform == "gpu":
        capability = getattr(device, "compute_capability", "")  # AMD's is the name of an architecture
        return not capability.replace(".", "").isdecimal() or float(capability) >= 8
    return device.platform != "cpu"


def make_model(config: ml_collections.ConfigDict, num_classes: int, **fields):
    """The net of `config.model` for a data set of `num_classes`; UserError if it cannot be made."""
    # None leaves a field to the net, which may not even have it: a SqueezeNet has no `shortcut`.
    model = {name: value for name, value in config.model.items() if value is not None}
    classes = model.setdefault("num_classes", num_classes)
    if isinstance(classes, int) and classes < num_classes:  # what is not a number is refused by the net
        raise UserError(
            f"config.model.num_classes={classes} is less than the {num_classes} classes "
            f"of {config.dataset}; leave it out to use those"
        )
    model["dtype"] = compute_dtype(model["dtype"])
    try:
        return jaxnets.create_model(**model, **fields)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None
