"""The layers of a net, in the order of their calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxnets import create_model
from jaxnets.layer_list import layers_of


def test_layers_stand_in_forward_order():
    names = [layer.name for layer in layers_of(create_model("mobilenet_v2_cifar"))]
    assert names[:2] == ["stem.conv", "stem.bn"]
    block = ["expand", "depthwise", "project", "shortcut"]
    first = [f"stage0_block0.{unit}.{layer}" for unit in block for layer in ("conv", "bn")]
    assert names[2 : 2 + len(first)] == first
    assert names[-3:] == ["head.conv", "head.bn", "classifier"]


def test_a_layer_knows_its_bias_and_its_batch_norm():
    stem, norm, *_, classifier = layers_of(create_model("vgg16_bn_cifar"))
    assert stem.normalised and not stem.use_bias and norm.kind == "batch_norm"
    assert classifier.use_bias and classifier.kind == "dense" and not classifier.normalised


@pytest.mark.parametrize("name", ["mobilenet_v2_mini", "shufflenet_v1_g3_cifar", "squeezenet1_1_cifar", "googlenet"])
def test_layers_account_for_every_variable(name):
    model = create_model(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    sizes = {"dense": 1, "conv": 1, "batch_norm": 4}
    counted = sum(sizes[layer.kind] * np.prod(layer.shape) for layer in layers_of(model))
    counted += sum(layer.shape[-1] for layer in layers_of(model) if layer.kind != "batch_norm" and layer.use_bias)
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(variables))
