"""The nets of a comparison, from the command line or a preset, as labels and configurations."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

import jaxnets
from jaxnets import config_file, datasets
from jaxnets.arguments import literal
from jaxnets.errors import UserError, as_utf8

JAXNETS, TORCH = "jaxnets", "torch"  # what a net is trained in
DEFAULT = "configs/default.py"  # the configuration if none is named


@dataclasses.dataclass(frozen=True)
class Entry:
    """One net to train: its label in the table, and its configuration for the first seed."""

    label: str
    config: ml_collections.ConfigDict
    framework: str = JAXNETS  # or TORCH

    def at_seed(self, number: int) -> ml_collections.ConfigDict:
        """The configuration for the `number`-th seed, counted from 0."""
        config = self.config.copy_and_resolve_references()
        config.seed += number
        return config


def folder_of(label: str) -> str:
    """The folder in OUT/runs for the net with this label."""
    return re.sub(r"[^\w.,=-]+", "_", label)


def workdir_at(out: Path, label: str, seed: int) -> Path:
    """The workdir of the run with this label and seed."""
    return out / "runs" / folder_of(label) / f"seed{seed}"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named comparison: the command-line arguments that it stands for."""

    models: tuple[str, ...]
    overrides: tuple[str, ...]
    latency_size: int | None = None


# Undoes what a family's recipe adds to training on plain images.
PLAIN = ("--config.augment.cutout=0", "--config.label_smoothing=0.0", "--config.progressive_sizes=()")
PRESETS = {
    # The comparison that the literature on light nets opens with: all trained for the same 3 epochs with Adam.
    "classic": Preset(
        models=(
            "mobilenet_v1_cifar",
            "mobilenet_v2_cifar",
            "vgg16_bn_cifar",
            "vgg19_bn_cifar",
            "resnet50_cifar",
            "resnet152_cifar",
        ),
        overrides=(
            "--config.num_epochs=3",
            "--config.batch_size=100",
            "--config.eval_batch_size=100",
            "--config.optimizer.name=adamw",  # without weight decay, AdamW is Adam
            "--config.optimizer.weight_decay=0.0",
            "--config.optimizer.learning_rate=1e-3",
            "--config.schedule.name=constant",
            "--config.schedule.warmup_epochs=0.0",
            "--config.augment.crop_padding=0",
            "--config.augment.flip=False",
            *PLAIN,
        ),
        latency_size=224,
    ),
}


def default_config() -> str:
    """The path of the configuration if none is named; UserError outside a checkout, where there is no such file."""
    if not config_file.is_file(DEFAULT):
        raise UserError(
            f"there is no {DEFAULT} here: run it from the jaxnets checkout, or name a configuration with --config"
        )
    return DEFAULT


def split_models(text: str) -> list[str]:
    """The nets of `--models`, split at commas outside brackets: a field may be a tuple. UserError if there are none."""
    models, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            models.append("")
        else:
            models[-1] += character
    if not any(models):
        raise UserError(f"--models={text!r} names no net; `python -m jaxnets.summary --all` lists them")
    return [model for model in models if model]


def load_configs(
    paths: Sequence[str], overrides: Sequence[str], models: Sequence[str] = ()
) -> dict[str, ml_collections.ConfigDict]:
    """The configurations by name; UserError for overriding a net's field where `models` set their own."""
    for override in overrides:
        field = override.split("=")[0].removeprefix(config_file.PREFIX)
        if models and field.startswith("model.") and field != "model.dtype":
            raise UserError(
                f"--config.{field} belongs to one net: `compare --models=mobilenet_v2_cifar:width=0.5` gives a net its "
                "fields, a figure chooses its own"
            )
    names = [config_file.name_of(path) for path in paths]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two configurations are called {name}; give each once, under a name of its own")
    configs = {name: config_file.load(path, overrides) for name, path in zip(names, paths)}
    for config in configs.values():
        config.dataset = datasets.absolute(config.dataset)  # as stored in a run's workdir
    return configs


def make_entries(configs: dict[str, ml_collections.ConfigDict], models: Sequence[str] = ()) -> list[Entry]:
    """The nets `models` under each of the configurations; without `models`, the net of each configuration.

    A model is `NAME[:FIELD=VALUE]...`, or a pattern of names; it keeps only the dtype of `config.model`, since
    the other fields there belong to another net. Raises UserError for an unknown net or field, and for a duplicate net.
    """
    entries = []
    for config_name, config in configs.items():
        if not models:
            entries.append(Entry(as_utf8(config_name), config))
        for text in models:
            for label, fields in expand_model(text):
                if unknown := fields.keys() - config.model.keys():
                    jaxnets.create_model(**fields)  # refuses fields that the net lacks, too
                    raise UserError(
                        f"--models={text!r}: {min(unknown)} is not a field of a run's net; configs/default.py lists "
                        "them"
                    )
                changed = config.copy_and_resolve_references()
                changed.unlock()
                changed.model = dict.fromkeys(config.model) | {"dtype": config.model.dtype} | fields
                entries.append(Entry(label if len(configs) == 1 else f"{label} ({as_utf8(config_name)})", changed))
    folders = [folder_of(entry.label).lower() for entry in entries]
    for entry, folder in zip(entries, folders):
        if folders.count(folder) > 1:
            raise UserError(f"the net {entry.label!r} is named twice; name it once")
    return entries


def net_fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What `config.model` sets besides the name, the dtype and the number of classes."""
    apart = ("name", "dtype", "num_classes")
    return {name: value for name, value in config.model.items() if value is not None and name not in apart}


def beside_torch(entries: Sequence[Entry]) -> list[Entry]:
    """Each entry followed by its PyTorch counterpart."""
    return [
        found
        for entry in entries
        for found in (entry, dataclasses.replace(entry, label=f"{entry.label} (PyTorch)", framework=TORCH))
    ]


def expand_model(text: str) -> list[tuple[str, dict[str, Any]]]:
    """`NAME[:FIELD=VALUE]...` as a label and the fields of `config.model`; a pattern gives every net that matches.

    Raises UserError for an unknown net or a malformed assignment.
    """
    name, *assignments = text.split(":")
    fields = {}
    for assignment in assignments:
        field, equals, value = assignment.partition("=")
        if not field or not equals:
            raise UserError(
                f"--models={text!r}: {assignment!r} must be FIELD=VALUE, as in mobilenet_v2_cifar:width=0.5"
            )
        if field == "name":
            raise UserError(f"--models={text!r}: the net's name comes before its fields")
        fields[field] = literal(value)
    if not set(name) & set("*?["):
        jaxnets.create_model(name)  # refuses an unknown net
        names = [name]
    elif not (names := jaxnets.list_models(name)):
        raise UserError(f"--models={text!r}: no net matches {name!r}; `python -m jaxnets.summary --all` lists them")
    return [(":".join([found, *assignments]), {"name": found} | fields) for found in names]
