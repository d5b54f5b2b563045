"""The configuration of a run: checked before any work, kept in the workdir, compared on resuming."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import ml_collections

import jaxnets
from jaxnets import optim
from jaxnets.errors import UserError

DTYPES = ("auto", "float32", "bfloat16", "float16")

# What may differ when a run goes on: none of it changes what is learned (a changed horizon is announced).
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
        "keep_checkpoints",
        "log_every_steps",
        "compilation_cache",
    }
)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested fields by their dotted names, as `--config.` takes them."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def as_dict(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The configuration as JSON gives it back: plain dicts, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def write(config: ml_collections.ConfigDict, path: Path) -> None:
    """Write `config.json`."""
    path.write_text(json.dumps(as_dict(config), indent=2) + "\n")


def read(path: Path) -> ml_collections.ConfigDict:
    """The configuration in a workdir's `config.json`; UserError where there is none or it cannot be read."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not the workdir of a run: it has no {path.name}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a run's configuration: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise UserError(f"{path} is not a run's configuration: it has no field model")
    return ml_collections.ConfigDict(values, convert_dict=True)


def differences(saved: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The fields, by dotted name, that keep a run saved with one configuration from going on with the other."""
    saved, new = flatten(saved), flatten(new)
    return {
        name: (saved.get(name), new.get(name))
        for name in sorted(saved.keys() | new.keys())
        if name not in FREE_FIELDS and saved.get(name) != new.get(name)
    }


def check(config: ml_collections.ConfigDict) -> None:
    """Raise UserError for the first field whose value no run can have."""

    def require(ok: bool, field: str, must: str) -> None:
        if not ok:
            raise UserError(f"config.{field} must be {must}, not {flatten(config.to_dict())[field]!r}")

    def one_of(field: str, choices) -> None:
        require(flatten(config.to_dict())[field] in choices, field, f"one of {', '.join(choices)}")

    def positive(*fields: str) -> None:
        for field in fields:
            value = flatten(config.to_dict())[field]
            require(math.isfinite(value) and value > 0, field, "greater than 0")

    def within(field: str, low: float, high: float, bounds: str) -> None:
        require(low <= flatten(config.to_dict())[field] < high, field, bounds)

    positive("batch_size", "num_epochs", "eval_batch_size", "image_size", "resident_limit", "steps_per_call")
    positive("eval_every_epochs", "checkpoint_every_epochs", "keep_checkpoints", "log_every_steps")
    positive("optimizer.learning_rate", "optimizer.epsilon", "schedule.decay")
    within("seed", 0, 2**32, "an integer from 0 to 2**32 - 1")
    within("num_workers", 0, math.inf, "0 or more")
    one_of("model.dtype", DTYPES)
    one_of("optimizer.name", optim.OPTIMIZERS)
    one_of("schedule.name", optim.SCHEDULES)
    for field in ("optimizer.momentum", "optimizer.beta1", "optimizer.beta2", "label_smoothing", "ema_decay"):
        within(field, 0, 1, "in [0, 1)")
    for field in ("optimizer.weight_decay", "optimizer.clip_norm", "schedule.warmup_epochs"):
        within(field, 0, math.inf, "0 or more, and finite")
    within("schedule.end_factor", 0, math.nextafter(1, 2), "in [0, 1]")
    within("augment.crop_padding", 0, config.image_size, f"from 0 to below image_size={config.image_size}")
    within("augment.cutout", 0, config.image_size + 1, f"from 0 to image_size={config.image_size}")
    for field in ("mean", "std"):
        require(len(config[field]) == 3, field, "three numbers, one a channel")
    require(min(config.std) > 0, "std", "greater than 0 in every channel")
    fractions = config.schedule.boundaries
    require(all(0 < f < 1 for f in fractions), "schedule.boundaries", "fractions of the run, in (0, 1)")


def compute_dtype(name: str) -> str:
    """The dtype a model computes in; "auto" is bfloat16 where the hardware is made for it."""
    if name != "auto":
        return name
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_model(config: ml_collections.ConfigDict, num_classes: int, **fields):
    """The net of `config.model` for a data set of `num_classes`; UserError for what it cannot be."""
    # None is a field left to the net, which may not even have it: `shortcut` is of no use to a SqueezeNet.
    model = {name: value for name, value in config.model.items() if value is not None}
    if model.get("num_classes") is None:
        model["num_classes"] = num_classes
    elif model["num_classes"] < num_classes:
        raise UserError(
            f"config.model.num_classes={model['num_classes']} is less than the {num_classes} classes "
            f"of {config.dataset}; leave it out to take those"
        )
    model["dtype"] = compute_dtype(model["dtype"])
    try:
        return jaxnets.create_model(**model, **fields)
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None
