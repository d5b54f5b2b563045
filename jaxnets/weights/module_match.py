"""Which PyTorch module belongs to which layer of a net: by the names of a known layout, or else by order."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from jaxnets.errors import UserError
from jaxnets.layer_list import Layer
from jaxnets.weights.layouts import Layout, layouts_of
from jaxnets.weights.weight_files import Weights

STATISTICS = ("weight", "bias", "running_mean", "running_var")
TRACKED = "num_batches_tracked"  # a counter without effect on our nets; older files do not have it
ANY = -1  # in a layer's shape: whatever the file has
LISTED = 4  # entries in a message

Module = dict[str, Any]  # the entries of one PyTorch module by suffix: weight, bias, ...


class Match(NamedTuple):
    """A PyTorch module for every layer."""

    layers: Sequence[Layer]
    modules: Sequence[Module]
    layout: Layout | None  # None: matched by order


def group(weights: Weights) -> dict[str, Module]:
    """The entries by PyTorch module, in the order in which the modules first appear."""
    entries = weights.entries
    if weights.ordered and not any(_split(name)[1] in (*STATISTICS, TRACKED) for name in entries):
        entries = _named_by_position(entries)
    modules: dict[str, Module] = {}
    for name, value in entries.items():
        module, suffix = _split(name)
        modules.setdefault(module, {})[suffix] = value
    tracked = {TRACKED in module for module in modules.values() if "running_mean" in module}
    if len(tracked) > 1:
        lacking = [n for n, m in modules.items() if "running_mean" in m and TRACKED not in m]
        raise UserError(f"{weights.origin}: {lacking[0]}.{TRACKED} is missing, while other BatchNorms have theirs")
    return modules


def _split(name: str) -> tuple[str, str]:
    module, _, suffix = name.rpartition(".")
    return module, suffix


def _named_by_position(entries: dict[str, Any]) -> dict[str, Any]:
    """Entries with meaningless names, named by the order that PyTorch has in a module: weight, bias, statistics."""
    named: dict[str, Any] = {}
    count = 0
    for (dimensions, _), run in groupby(entries.values(), lambda value: (len(value.shape), tuple(value.shape))):
        run = list(run)
        if dimensions > 1:
            for value in run:
                count += 1
                named[f"{count}.weight"] = value
        elif dimensions == 1:
            if len(run) % len(STATISTICS) == 1:
                named[f"{count}.bias"] = run.pop(0)
            for i, value in enumerate(run):
                suffix = STATISTICS[i % len(STATISTICS)]
                count += suffix == "weight"
                named[f"{count}.{suffix}"] = value
        else:
            named[f"{count}.{TRACKED}"] = run[0]
            named |= {f"{count}.{TRACKED}.{i}": value for i, value in enumerate(run[1:])}
    return named


def find_match(model: nn.Module, layers: Sequence[Layer], weights: Weights, modules: dict[str, Module]) -> Match | None:
    """The `Match` of the modules with the layers, or None; UserError if the weights are for another variant."""
    for stripped in _without_prefixes(modules):
        for code_base, layout in layouts_of(model).items():
            names = layout.names(layers)
            needed = {name for name in stripped if name.partition(".")[0] not in layout.training_only}
            if names and set(names) == needed:
                if not weights.fields:  # which would say what net it is
                    layout.require_fields(model, code_base)
                ordered = [stripped[name] for name in names]
                if not _misfits(_expected(layout, layers, ordered[-1]), names, ordered):
                    return Match(layers, ordered, layout)
    if weights.ordered and len(modules) == len(layers) and not _misfits(layers, modules, modules.values()):
        return Match(layers, list(modules.values()), None)
    return None


def _expected(layout: Layout, layers: Sequence[Layer], classifier: Module) -> list[Layer]:
    """The layers as a file of this code base has them: its classifier may have got a bias when it was replaced."""
    *body, last = layout.expected(layers)
    return [*body, replace(last, use_bias=last.use_bias or (layers[-1].use_bias and "bias" in classifier))]


def _without_prefixes(modules: dict[str, Module]) -> Iterator[dict[str, Module]]:
    """The modules by name, with more and more of the leading names that all of them share removed."""
    yield modules
    while len({name.partition(".")[0] for name in modules}) == 1 and all("." in name for name in modules):
        modules = {name.partition(".")[2]: module for name, module in modules.items()}
        yield modules


def _beside_others(modules: dict[str, Module]) -> Iterator[tuple[dict[str, Module], dict[str, Module]]]:
    """As `_without_prefixes` yields them; then those under the most frequent leading name, with all the others.

    So that what does not belong to the net is named, such as a loss's weights next to `model`.
    """
    for stripped in _without_prefixes(modules):
        yield stripped, {}
    firsts = Counter(name.partition(".")[0] for name in modules)
    if len(firsts) > 1:
        (first, _), *_ = firsts.most_common(1)
        inside = {name: module for name, module in modules.items() if name.startswith(f"{first}.")}
        for stripped in _without_prefixes(inside):
            yield stripped, {name: module for name, module in modules.items() if name not in inside}


def _wanted(layer: Layer, module: Module) -> tuple[dict[str, list[tuple]], set[str]]:
    """The shapes that each entry of a layer's module may have, and which of them may be left out."""
    if layer.kind == "batch_norm":
        return {suffix: [layer.shape] for suffix in STATISTICS} | {TRACKED: [()]}, {TRACKED}
    *inside, inputs, outputs = layer.shape
    if outputs == ANY:
        outputs = next(iter(np.shape(module.get("weight"))), ANY)
    weights = [(outputs, inputs, *inside)]
    if layer.path[-2:-1] == ("se",):  # written as dense layers or as 1x1 convolutions
        weights.append((outputs, inputs, 1, 1))
    wanted = {"weight": weights}
    if layer.use_bias or layer.normalised:
        wanted["bias"] = [(outputs,)]
    return wanted, set() if layer.use_bias else {"bias"}


def _misfits(layers: Iterable[Layer], names: Iterable[str], modules: Iterable[Module]) -> list[str]:
    """What is wrong with each module as the counterpart of its layer, one phrase each."""
    found = []
    for layer, name, module in zip(layers, names, modules):
        wanted, optional = _wanted(layer, module)
        for suffix, shapes in wanted.items():
            if suffix not in module:
                if suffix not in optional:
                    found.append(f"{name}.{suffix} is missing, for the net's {layer.name}")
            elif tuple(module[suffix].shape) not in shapes:
                has = tuple(module[suffix].shape)
                found.append(f"{name}.{suffix} has the shape {has} where the net's {layer.name} takes {shapes[0]}")
        found += [
            f"{name}.{suffix} is left over: the net's {layer.name} has no place for it"
            for suffix in module.keys() - wanted.keys()
        ]
    return found


def explain_mismatch(model: nn.Module, layers: Sequence[Layer], weights: Weights, modules: dict[str, Module]) -> str:
    """Why there is no match, in one sentence that names both sides."""
    named = _problems_by_name(model, layers, modules)
    if named:
        problems = named
    elif not weights.ordered:
        problems = [
            f"its entries ({', '.join(list(modules)[:LISTED])}, ...) are not named as in any layout known for this "
            f"net ({', '.join(layouts_of(model))}), and this kind of file does not keep their order"
        ]
    else:
        problems = _misfits(layers, modules, modules.values())
        if len(modules) != len(layers):
            problems.insert(0, f"it has {len(modules)} modules where the net has {len(layers)} layers")
    listed = "; ".join(problems[:LISTED])
    more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
    only_classifier = all(f"the net's {layers[-1].name} " in problem for problem in problems)
    headless = (model.features_only or not model.num_classes) and len(problems) == 1
    hint = "; set num_classes to the file's, or in Python pass head='drop'" if only_classifier else ""
    hint = "; in Python, head='drop' leaves the classifier out" if headless else hint
    return f"{weights.origin} does not fit {type(model).__name__}: {listed}{more}{hint}"


def _problems_by_name(model: nn.Module, layers: Sequence[Layer], modules: dict[str, Module]) -> list[str]:
    """What keeps the modules from fitting the known layout they are nearest to; empty if none is near."""
    best, nearest = len(layers) // 2, []
    for stripped, others in _beside_others(modules):
        for layout in layouts_of(model).values():
            names = layout.names(layers) or ()
            if len(stripped.keys() & set(names)) > best:
                best = len(stripped.keys() & set(names))
                found = [stripped.get(name, {}) for name in names]
                nearest = _misfits(_expected(layout, layers, found[-1]), names, found)
                nearest += [
                    f"{name} ({_described(module)}) is left over: the net has no such layer"
                    for name, module in (stripped | others).items()
                    if name not in set(names) and name.partition(".")[0] not in layout.training_only
                ]
                missing = {field: v for field, v in layout.advised.items() if getattr(model, field) != v}
                nearest = [f"this net may need {field}={v!r}" for field, v in missing.items()] + nearest
    return nearest


def _described(module: Module) -> str:
    return ", ".join(f"{suffix} {tuple(value.shape)}" for suffix, value in module.items())
