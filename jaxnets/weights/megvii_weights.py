"""megvii's ShuffleNet weights in our order of channels.

megvii's code takes BGR images, shuffles by other permutations than the papers, and has a classifier without bias.
Reordering the channels of its layers gives the same net in our order, without changing any result.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from jaxnets.errors import UserError
from jaxnets.layer_list import Layer

BGR = np.array([2, 1, 0])


class ChannelOrder(NamedTuple):
    """Which channels of the file's layer are ours, None if they are in the same order.

    `outputs[o]` is the file's output channel that is our `o`, and `inputs[o, i]` the file's input channel, within
    the group of that output, that is our `i`.
    """

    outputs: np.ndarray | None = None
    inputs: np.ndarray | None = None


Orders = dict[tuple[str, ...], ChannelOrder]


def shufflenet_v1_orders(model: nn.Module, layers: Sequence[Layer]) -> Orders:
    """The channel orders of megvii's ShuffleNetV1; UserError if only `variant="megvii"` has its shuffle."""
    by_name = {layer.name: layer for layer in layers}
    orders = _bgr(by_name)
    if model.variant == "kuangliu":
        raise UserError("these are megvii's weights: the net needs variant='megvii', not 'kuangliu'")
    if model.variant == "megvii" or model.feature_group_count == 1:
        return orders
    for layer in layers:
        if layer.path[-2:] == ("pointwise1", "conv"):
            unit = layer.path[0]
            hidden, groups = layer.shape[-1], model.feature_group_count
            outputs, depthwise, inputs = _v1_unit_orders(hidden, groups, grouped=unit != "stage2_block0")
            added = by_name[f"{unit}.pointwise2.conv"].shape[-1]
            for part in ("conv", "bn"):
                orders[unit, "pointwise1", part] = ChannelOrder(outputs)
                orders[unit, "depthwise", part] = ChannelOrder(depthwise)
            orders[unit, "pointwise2", "conv"] = ChannelOrder(None, np.repeat(inputs, added // groups, axis=0))
    return orders


def _bgr(by_name: dict[str, Layer]) -> Orders:
    stem = by_name["stem.conv"]
    return {stem.path: ChannelOrder(None, np.tile(BGR, (stem.shape[-1], 1)))}


def _v1_unit_orders(hidden: int, groups: int, grouped: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Orders of a unit's first convolution's outputs, depthwise channels, and second convolution's inputs by group.

    Both shuffles give each group of the second convolution channels from every group of the first. Where they give
    equally many, ours can take the place of theirs one by one.
    """
    size = hidden // groups
    # The source, in the first convolution's outputs, of each input of the second one.
    ours = np.arange(hidden).reshape(groups, size).T.reshape(groups, size)
    theirs = np.arange(hidden).reshape(size, groups).T.reshape(groups, size)
    outputs = np.empty(hidden, int)
    inputs = np.empty((groups, size), int)
    for group in range(groups):
        # Stable sorts by group of origin bring partners to the same place.
        origins = [(source[group] // size if grouped else source[group] * 0) for source in (ours, theirs)]
        mine, other = (np.argsort(origin, kind="stable") for origin in origins)
        if not np.array_equal(origins[0][mine], origins[1][other]):
            raise UserError(
                f"megvii's channel shuffle of {hidden} channels in {groups} groups cannot be obtained by reordering "
                "the weights: make the net with variant='megvii'"
            )
        inputs[group, mine] = other
        outputs[ours[group, mine]] = theirs[group, other]
    # Ours shuffles before the depthwise convolution, megvii after it.
    return outputs, outputs[ours.reshape(-1)], inputs


def shufflenet_v2_orders(model: nn.Module, layers: Sequence[Layer]) -> Orders:
    """The channel orders of megvii's ShuffleNetV2, which splits even from odd channels at a unit's input."""
    by_name = {layer.name: layer for layer in layers}
    orders = _bgr(by_name)
    if model.variant == "megvii":
        return orders

    def put(unit: str, layer: str, outputs: np.ndarray | None, inputs: np.ndarray | None = None):
        channels = by_name[f"{unit}.{layer}.conv"].shape[-1]
        inputs = inputs if inputs is None else np.tile(inputs, (channels, 1))
        orders[unit, layer, "conv"] = ChannelOrder(outputs, inputs)
        orders[unit, layer, "bn"] = ChannelOrder(outputs)

    stage_input = np.arange(by_name["stem.conv"].shape[-1])  # the file's channel for each of ours
    for unit in dict.fromkeys(layer.path[0] for layer in layers):
        if unit.endswith("_block0"):
            half = by_name[f"{unit}.left_pointwise.conv"].shape[-1]
            left, right = _birth_orders(half)
            put(unit, "left_depthwise", stage_input)
            put(unit, "left_pointwise", left, stage_input)
            put(unit, "pointwise1", None, stage_input)
            put(unit, "pointwise2", right)
            # Every channel is numbered by its place in the file's unit, counting on from unit to unit.
            theirs, born = np.arange(2 * half), 2 * half
            ours = np.stack((left, half + right), -1).reshape(-1)
        elif "_block" in unit:
            put(unit, "pointwise1", None, _places(ours[half:], theirs[1::2]))
            put(unit, "pointwise2", right)
            theirs = np.concatenate((theirs[0::2], born + np.arange(half)))
            ours = np.stack((ours[:half], born + right), -1).reshape(-1)
            born += half
        stage_input = _places(ours, theirs) if "_block" in unit else stage_input
    if "conv5.conv" in by_name:
        features = by_name["conv5.conv"].shape[-1]
        orders["conv5", "conv"] = ChannelOrder(None, np.tile(stage_input, (features, 1)))
    return orders


def _places(wanted: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The position of each number of `wanted` in `among`, which has the same numbers."""
    place = np.empty(among.max() + 1, int)
    place[among] = np.arange(len(among))
    return place[wanted]


def _birth_orders(half: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of the file's outputs of a left and of a right branch are ours.

    A channel passes through some units by the identity before one takes it in. In the file, each of them halves its
    place in the output, until it is odd; in ours, each doubles it, until it is in the second half. In both, equally
    many of a branch's channels pass through j units.
    """
    index = np.arange(half)

    def order(our_places, their_places):
        ours = [next((j for j in range(64) if place << j >= half), 64) for place in our_places]
        theirs = [next((j for j in range(64) if place >> j & 1), 64) for place in their_places]
        outputs = np.empty(half, int)
        outputs[np.argsort(ours, kind="stable")] = np.argsort(theirs, kind="stable")
        return outputs

    return order(2 * index, index), order(2 * index + 1, half + index)
