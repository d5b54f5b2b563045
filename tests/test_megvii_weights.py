"""megvii's order of channels in ours: exact reorderings, and an error where there is none.

That the nets then compute the same is in `test_parity`.
"""

from functools import partial

import jax
import numpy as np
import pytest

import jaxnets
from jaxnets import torch_weights
from jaxnets.errors import UserError
from jaxnets.layer_list import layers_of
from jaxnets.weights import megvii_weights


def orders_of(name, **fields):
    model = jaxnets.create_model(name, **fields)
    layers = layers_of(model)
    make = megvii_weights.shufflenet_v1_orders if "v1" in name else megvii_weights.shufflenet_v2_orders
    return make(model, layers), {layer.path: layer for layer in layers}


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("shufflenet_v1_g3", {}),
        ("shufflenet_v1_g3", {"width": 0.5}),
        ("shufflenet_v1_g3", {"width": 1.5}),
        ("shufflenet_v1_g2", {}),
        ("shufflenet_v1_g8", {"width": 2.0}),
        ("shufflenet_v2_x0_5", {}),
        ("shufflenet_v2_x2_0", {}),
    ],
)
def test_orders_lose_no_channel(name, fields):
    orders, layers = orders_of(name, **fields)
    assert orders
    for path, (outputs, inputs) in orders.items():
        channels = layers[path].shape[-1]
        if outputs is not None:
            assert sorted(outputs) == list(range(channels)), path
        if inputs is not None:
            assert inputs.shape == (channels, layers[path].shape[2])
            assert np.array_equal(np.sort(inputs, -1), np.sort(np.tile(np.arange(inputs.shape[1]), (channels, 1))))


@pytest.mark.parametrize("name", ["shufflenet_v1_g8", "shufflenet_v2_x1_0"])
def test_megviis_own_net_needs_only_rgb_for_bgr(name):
    orders, _ = orders_of(name, variant="megvii")
    assert orders.keys() == {("stem", "conv")}
    assert orders["stem", "conv"].inputs.tolist() == [[2, 1, 0]] * 24


def test_a_shuffle_that_no_order_gives_says_what_to_do():
    with pytest.raises(UserError, match="96 channels in 8 groups.*variant='megvii'"):
        orders_of("shufflenet_v1_g8")


def test_megviis_wider_net_names_the_field_that_it_needs():
    theirs = jaxnets.create_model("shufflenet_v2_x1_0", variant="megvii")
    shapes = jax.eval_shape(theirs.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state_dict = torch_weights.export(theirs, variables, "megvii")
    with pytest.raises(UserError, match="this net may need variant='megvii'; features.0.branch_proj.2.weight has"):
        torch_weights.load("shufflenet_v2_x1_0", state_dict)


def test_the_common_cifar_net_is_not_megviis():
    with pytest.raises(UserError, match="variant='megvii', not 'kuangliu'"):
        orders_of("shufflenet_v1_g3", variant="kuangliu")


@pytest.mark.parametrize("name", ["shufflenet_v1_g3", "shufflenet_v2_x0_5"])
def test_a_classifier_replaced_in_fine_tuning_may_have_a_bias(name):
    """Its module's names are megvii's all the same, and so is its order of channels."""
    model = jaxnets.create_model(name, num_classes=5, width=0.25 if "v1" in name else None)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    draw = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
    bias = np.zeros_like(variables["params"]["classifier"]["bias"])
    bias, variables["params"]["classifier"]["bias"] = variables["params"]["classifier"]["bias"], bias
    state_dict = torch_weights.export(model, variables, "megvii") | {"classifier.0.bias": bias}
    loaded = torch_weights.load(model, state_dict)
    variables["params"]["classifier"]["bias"] = bias
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)
