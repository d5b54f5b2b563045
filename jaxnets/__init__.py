"""Lightweight image classifiers in JAX: checked against PyTorch's nets and weights, and fast to train on CPUs.

JAX is imported on first use: before that, a command sets what a signal does (see `interruption`).
"""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import fields as dataclass_fields
from fnmatch import fnmatchcase
from functools import partial
from importlib import metadata
from typing import TYPE_CHECKING

from jaxnets.errors import UserError

if TYPE_CHECKING:
    import flax.linen as nn

__all__ = ["UserError", "create_model", "list_models"]
MODULES = ("augment", "models", "ops", "torch_weights", "trained_run")  # imported on first use


def __getattr__(name: str):
    if name == "__version__":
        return metadata.version("jaxnets")
    if name in MODULES:
        return importlib.import_module(f"jaxnets.{name}")
    raise AttributeError(f"module 'jaxnets' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *MODULES, "__version__"})


def list_models(pattern: str = "*") -> list[str]:
    """The names of the nets that match a shell pattern such as "shufflenet*", sorted."""
    from jaxnets.models import MODELS

    return sorted(name for name in MODELS if fnmatchcase(name, pattern))


def create_model(name: str, **fields) -> "nn.Module":
    """Make the net called `name`, one of `list_models()`, with `fields` overriding its own values.

    A field given as None keeps the net's own value. `net.init(key, images, train=False)` and
    `net.apply(variables, images, train=False)` take normalised float images `(N, H, W, 3)`.
    The fields that nets share are those of `jaxnets.models.net.Net`; each class lists its own.
    Raises UserError, a ValueError, for an unknown name or field (listing those that exist), for a bad value, and for
    one that would make a net of another name, such as depth 19 for "vgg16".
    """
    from jaxnets.models import MODELS, NAMED

    if name not in MODELS:
        raise UserError(f"there is no net {name!r}; there are {_nearest_first(name, list_models())}")
    make = MODELS[name]
    cls = make.func if isinstance(make, partial) else make
    known = [f.name for f in dataclass_fields(cls) if f.name not in ("parent", "name")]
    for field in fields:
        if field not in known:
            of_weights = "; jaxnets.torch_weights.load(model, FILE) reads weights"
            hint = of_weights if field in ("pretrained", "weights") else ""
            raise UserError(f"{name} has no field {field!r}; it has {_nearest_first(field, known)}{hint}")
    changed = {field: value for field, value in fields.items() if value is not None}
    own = make.keywords if isinstance(make, partial) else {}
    for field in NAMED & own.keys() & changed.keys():
        wanted = cls, own | {field: changed[field]}
        alike = [
            other
            for other, made in MODELS.items()
            if isinstance(made, partial) and (made.func, made.keywords) == wanted
        ]
        if alike and alike != [name]:
            raise UserError(f"{name} has {field}={own[field]!r}; the net with {changed[field]!r} is {alike[0]}")
    return make(**changed)


def _nearest_first(word: str, words: Iterable[str]) -> str:
    similarity = difflib.SequenceMatcher(b=str(word))

    def distance(other):
        similarity.set_seq1(other)
        return -similarity.ratio()

    return ", ".join(sorted(words, key=distance))
