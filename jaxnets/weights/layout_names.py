"""The names that code bases give the layers of a net: one function for each of their nets.

Each takes the layers in the order of their calls and returns the names of the modules in the same order, or None if the
code base has no such net.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from jaxnets.layer_list import Layer

Layers = Sequence[Layer]
Names = list[str] | None
Pair = tuple[str, str]  # a convolution and its BatchNorm
PLACE = r"stage(\d+)_block(\d+)"


def own_names(layers: Layers) -> Names:
    """Our own module paths, for nets that no other code base has."""
    return [layer.name for layer in layers]


def _names(layers: Layers, outside: dict[str, str | Pair], prefix: str, units: Callable[[list[str]], dict]) -> Names:
    """The names of all layers, given those outside the blocks and, after a prefix, those of a block's units.

    The latter may contain {stage}; {block} (within the stage), its {letter}, and {index} (over all blocks), from 0;
    {count} ({index} + 1) and {previous} ({stage} - 1). None if a layer is left without a name.
    """
    names = _flat(outside)
    blocks = [(name, list(members)) for name, members in groupby(layers, lambda layer: layer.path[0])]
    placed = [(name, members) for name, members in blocks if re.fullmatch(PLACE, name)]
    for index, (name, members) in enumerate(placed):
        stage, block = map(int, re.fullmatch(PLACE, name).groups())
        places = {"stage": stage, "block": block, "index": index, "count": index + 1, "previous": stage - 1}
        places["letter"] = "abcdefgh"[block % 8]
        inside = units(list(dict.fromkeys(layer.path[1] for layer in members)))
        names |= {f"{name}.{ours}": (prefix + theirs).format(**places) for ours, theirs in _flat(inside).items()}
    found = [names.get(layer.name) for layer in layers]
    return None if None in found else found


def _flat(names: dict[str, str | Pair]) -> dict[str, str]:
    """Every layer on its own instead of in pairs."""
    flat = {}
    for ours, theirs in names.items():
        if isinstance(theirs, str):
            flat[ours] = theirs
        else:
            flat[f"{ours}.conv"], flat[f"{ours}.bn"] = theirs
    return flat


def _numbered(units: list[str]) -> dict[str, Pair]:
    """conv1, bn1, conv2, bn2, ... in the order of the units."""
    return {unit: (f"conv{i}", f"bn{i}") for i, unit in enumerate(units, start=1)}


def mobilenet_v1_kuangliu(layers: Layers) -> Names:
    return _names(layers, {"stem": ("conv1", "bn1"), "classifier": "linear"}, "layers.{index}.", _numbered)


def mobilenet_v1_timm(layers: Layers) -> Names:
    outside = {"stem": ("conv_stem", "bn1"), "classifier": "classifier"}
    units = {"depthwise": ("conv_dw", "bn1"), "pointwise": ("conv_pw", "bn2")}
    return _names(layers, outside, "blocks.{stage}.{block}.", lambda _: units)


def mobilenet_v1_keras(layers: Layers) -> Names:
    outside = {"stem": ("conv1", "conv1_bn"), "classifier": "conv_preds"}
    units = {"depthwise": ("dw_{count}", "dw_{count}_bn"), "pointwise": ("pw_{count}", "pw_{count}_bn")}
    return _names(layers, outside, "conv_", lambda _: units)


def mobilenet_v2_torchvision(layers: Layers) -> Names:
    outside = {"stem": ("features.0.0", "features.0.1"), "classifier": "classifier.1"}
    outside["head"] = ("features.18.0", "features.18.1")

    def units(ours):
        last = len(ours) - 1
        names = {unit: (f"conv.{i}.0", f"conv.{i}.1") for i, unit in enumerate(ours[:-1])}
        return names | {"project": (f"conv.{last}", f"conv.{last + 1}")}

    return _names(layers, outside, "features.{count}.", units)


def mobilenet_v2_timm(layers: Layers) -> Names:
    outside = {"stem": ("conv_stem", "bn1"), "head": ("conv_head", "bn2"), "classifier": "classifier"}

    def units(ours):
        convs = ("conv_pw", "conv_dw", "conv_pwl") if "expand" in ours else ("conv_dw", "conv_pw")
        return {unit: (conv, f"bn{i}") for i, (unit, conv) in enumerate(zip(ours, convs), start=1)}

    return _names(layers, outside, "blocks.{stage}.{block}.", units)


def mobilenet_v2_kuangliu(layers: Layers) -> Names:
    outside = {"stem": ("conv1", "bn1"), "head": ("conv2", "bn2"), "classifier": "linear"}

    def units(ours):
        # That code base expands the first block too.
        return _numbered(ours) | {"shortcut": ("shortcut.0", "shortcut.1")} if "expand" in ours else {}

    return _names(layers, outside, "layers.{index}.", units)


def mobilenet_v2_keras(layers: Layers) -> Names:
    return _mobilenet_v2_keras(layers, "predictions", _keras_units)


def mobilenet_v2_keras_logits(layers: Layers) -> Names:
    # Keras's name for the classifier until about TensorFlow 2.0.
    return _mobilenet_v2_keras(layers, "Logits", _keras_units)


def mobilenet_v2_keras_published(layers: Layers) -> Names:
    # Keras reads its own files by the order of the layers, so they still have the names that their makers gave.
    inside = ("expand", "depthwise", "project")
    units = {unit: (f"mobl{{index}}_conv_{{index}}_{unit}", f"bn{{index}}_conv_{{index}}_bn_{unit}") for unit in inside}
    return _mobilenet_v2_keras(layers, "Logits", lambda _: units)


def _mobilenet_v2_keras(layers: Layers, classifier: str, units: Callable[[list[str]], dict]) -> Names:
    outside = {"stem": ("Conv1", "bn_Conv1"), "head": ("Conv_1", "Conv_1_bn"), "classifier": classifier}
    return _names(layers, outside, "", units)


def _keras_units(ours: list[str]) -> dict[str, Pair]:
    block = "block_{index}" if "expand" in ours else "expanded_conv"
    return {unit: (f"{block}_{unit}", f"{block}_{unit}_BN") for unit in ("expand", "depthwise", "project")}


def keras_classes(layers: Layers) -> Names:
    """Keras's names for layers in a `.keras` file: their classes, numbered in the order of their calls."""
    numbers: Counter[str] = Counter()
    names = []
    for layer in layers:
        depthwise = layer.kind == "conv" and layer.shape[-2] == 1
        name = {"conv": "conv2d", "batch_norm": "batch_normalization", "dense": "dense"}[layer.kind]
        name = "depthwise_conv2d" if depthwise else name
        names.append(f"{name}_{numbers[name]}" if numbers[name] else name)
        numbers[name] += 1
    return names


def keras_classes_mobilenet_v1(layers: Layers) -> Names:
    # Keras's classifier is a 1x1 convolution there.
    return keras_classes([replace(layer, kind="conv") if layer.kind == "dense" else layer for layer in layers])


def googlenet_torchvision(layers: Layers) -> Names:
    outside = {f"stem{i}": (f"conv{i}.conv", f"conv{i}.bn") for i in (1, 2, 3)} | {"classifier": "fc"}
    branches = {"conv1x1": "1", "reduce3x3": "2.0", "conv3x3": "2.1", "reduce_large": "3.0", "conv_large": "3.1"}
    branches["pool_project"] = "4.1"
    units = {unit: (f"{place}.conv", f"{place}.bn") for unit, place in branches.items()}
    return _names(layers, outside, "inception{stage}{letter}.branch", lambda _: units)


def resnet_torchvision(layers: Layers) -> Names:
    return _resnet(layers, "downsample", "fc")


def resnet_kuangliu(layers: Layers) -> Names:
    return _resnet(layers, "shortcut", "linear")


def _resnet(layers: Layers, shortcut: str, classifier: str) -> Names:
    def units(ours):
        return _numbered(ours) | {"shortcut": (f"{shortcut}.0", f"{shortcut}.1")}

    return _names(layers, {"stem": ("conv1", "bn1"), "classifier": classifier}, "layer{stage}.{block}.", units)


def vgg_torchvision(layers: Layers) -> Names:
    hidden = [layer.name for layer in layers if layer.path[0].startswith("hidden")]
    names = {name: f"classifier.{3 * i}" for i, name in enumerate(hidden)}
    return _vgg(layers, names | {"classifier": f"classifier.{3 * len(hidden)}"}) if hidden else None


def vgg_timm(layers: Layers) -> Names:
    *_, last = (layer for layer in layers if layer.kind == "conv")
    hidden = [layer for layer in layers if layer.path[0].startswith("hidden")]
    if len(hidden) != 2 or hidden[0].shape[0] != 7 * 7 * last.shape[-1]:
        return None
    return _vgg(layers, {"hidden0": "pre_logits.fc1", "hidden1": "pre_logits.fc2", "classifier": "head.fc"})


def vgg_kuangliu(layers: Layers) -> Names:
    return _vgg(layers, {"classifier": "classifier"})


def _vgg(layers: Layers, outside: dict[str, str]) -> Names:
    """Names with the convolutions numbered in one sequence with BatchNorms, activations and pools."""
    names, number, stage = dict(outside), 0, "stage1"
    for layer in layers:
        if layer.kind == "conv":
            number += layer.path[0].partition("_")[0] != stage  # a pool
            stage = layer.path[0].partition("_")[0]
            names[layer.name] = f"features.{number}"
            if layer.normalised:
                names[layer.path[0] + ".bn"] = f"features.{number + 1}"
            number += 3 if layer.normalised else 2
    found = [names.get(layer.name) for layer in layers]
    return None if None in found else found


def squeezenet_torchvision(layers: Layers) -> Names:
    # The numbering includes the pools, which hold no weights.
    numbers = (3, 4, 5, 7, 8, 9, 10, 12) if layers[0].shape[0] == 7 else (3, 4, 6, 7, 9, 10, 11, 12)
    names = {"stem": "features.0", "classifier": "classifier.1"}
    for fire, number in enumerate(numbers, start=2):
        for conv in ("squeeze", "expand1x1", "expand3x3"):
            names[f"fire{fire}.{conv}"] = f"features.{number}.{conv}"
    found = [names.get(layer.name) for layer in layers]
    return None if None in found else found


def shufflenet_v1_kuangliu(layers: Layers) -> Names:
    return _names(layers, {"stem": ("conv1", "bn1"), "classifier": "linear"}, "layer{previous}.{block}.", _numbered)


def shufflenet_v1_megvii(layers: Layers) -> Names:
    outside = {"stem": ("first_conv.0", "first_conv.1"), "classifier": "classifier.0"}
    units = {
        "pointwise1": ("1.0", "1.1"),
        "depthwise": ("1.3", "1.4"),
        "pointwise2": ("2.0", "2.1"),
    }
    return _names(layers, outside, "features.{index}.branch_main_", lambda _: units)


def shufflenet_v2_torchvision(layers: Layers) -> Names:
    outside = {"stem": ("conv1.0", "conv1.1"), "conv5": ("conv5.0", "conv5.1"), "classifier": "fc"}
    units = _shufflenet_v2_units("branch1", "branch2")
    return _names(layers, outside, "stage{stage}.{block}.", lambda _: units)


def shufflenet_v2_kuangliu(layers: Layers) -> Names:
    outside = {"stem": ("conv1", "bn1"), "conv5": ("conv2", "bn2"), "classifier": "linear"}

    def units(ours):
        return {} if "se" in ours else _numbered(ours)

    return _names(layers, outside, "layer{previous}.{block}.", units)


def shufflenet_v2_megvii(layers: Layers) -> Names:
    outside = {"stem": ("first_conv.0", "first_conv.1"), "conv5": ("conv_last.0", "conv_last.1")}
    outside["classifier"] = "classifier.0"
    units = _shufflenet_v2_units("proj", "main")
    return _names(layers, outside, "features.{index}.branch_", lambda _: units)


def _shufflenet_v2_units(left: str, right: str) -> dict[str, Pair]:
    """Names by a block's two sequences, whose numbering includes ReLUs."""
    first = {"left_depthwise": (left, 0), "left_pointwise": (left, 2)}
    first |= {"pointwise1": (right, 0), "depthwise": (right, 3), "pointwise2": (right, 5)}
    return {unit: (f"{branch}.{at}", f"{branch}.{at + 1}") for unit, (branch, at) in first.items()}
