"""The shared layers against PyTorch's, in every padding and rounding that the nets rely on."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import SqueezeExcitation

from jaxnets.models.layers import (
    ACTIVATIONS,
    BatchNorm,
    Conv,
    ConvBN,
    SqueezeExcite,
    adaptive_avg_pool,
    avg_pool,
    drop_path,
    global_mean,
    make_divisible,
    max_pool,
)

few = settings(max_examples=15, deadline=None)
sides = st.integers(1, 12)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def nchw(x):
    return torch.tensor(np.moveaxis(np.asarray(x), -1, 1).copy())


def nhwc(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@given(st.floats(0.1, 5000), st.integers(1, 64))
def test_make_divisible(value, divisor):
    rounded = make_divisible(value, divisor)
    assert rounded % divisor == 0
    assert rounded >= divisor
    assert rounded >= 0.9 * value
    assert abs(rounded - value) < divisor
    if rounded > divisor and abs(rounded - value) > divisor / 2:  # not the nearest: that lost more than 10 %
        assert rounded - divisor < 0.9 * value


@given(st.integers(1, 500), st.integers(1, 64))
def test_make_divisible_keeps_what_is_divisible(multiple, divisor):
    assert make_divisible(multiple * divisor, divisor) == multiple * divisor


def pool_cases(f):
    return given(sides, sides, st.integers(1, 4), st.integers(1, 4), st.data())(f)


@few
@pool_cases
def test_max_pool_is_pytorchs(height, width, window, strides, data):
    padding = data.draw(st.integers(0, window // 2))
    ceil_mode = data.draw(st.booleans())
    x = random(2, height, width, 3)
    try:
        expected = nhwc(F.max_pool2d(nchw(x), window, strides, padding, ceil_mode=ceil_mode))
    except RuntimeError:
        with pytest.raises(ValueError, match="too small"):
            max_pool(x, window, strides, padding, ceil_mode)
    else:
        np.testing.assert_array_equal(max_pool(x, window, strides, padding, ceil_mode), expected)


@few
@pool_cases
def test_avg_pool_is_pytorchs(height, width, window, strides, data):
    padding = data.draw(st.integers(0, window // 2))
    x = random(2, height, width, 3)
    try:
        expected = nhwc(F.avg_pool2d(nchw(x), window, strides, padding))
    except RuntimeError:
        with pytest.raises(ValueError, match="too small"):
            avg_pool(x, window, strides, padding)
    else:
        pooled = jax.jit(avg_pool, static_argnums=(1, 2, 3))(x, window, strides, padding)
        np.testing.assert_allclose(pooled, expected, atol=1e-6)


@few
@given(sides, sides, st.integers(1, 8))
def test_adaptive_avg_pool_is_pytorchs(height, width, side):
    x = random(2, height, width, 3)
    expected = nhwc(F.adaptive_avg_pool2d(nchw(x), side))
    np.testing.assert_allclose(jax.jit(adaptive_avg_pool, static_argnums=1)(x, side), expected, atol=1e-5)
    rounded = jax.jit(adaptive_avg_pool, static_argnums=1)(jnp.asarray(x, jnp.bfloat16), side)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_allclose(rounded.astype(jnp.float32), expected, rtol=0.01, atol=0.01)


def test_global_mean_adds_up_in_float32():
    x = jnp.ones((1, 64, 64, 1), jnp.bfloat16).at[0, 0, 0, 0].set(3)
    mean = global_mean(x)
    assert mean.dtype == jnp.float32
    assert mean[0, 0] == 1 + 2 / 4096


@few
@given(
    st.integers(5, 9),
    st.integers(5, 9),
    st.sampled_from((1, 3, 5)),
    st.sampled_from((1, 2)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from(("torch", 0, 1)),
)
def test_conv_is_pytorchs(height, width, kernel_size, strides, groups, padding):
    x = random(2, height, width, 4)
    conv = Conv(8, kernel_size, strides, padding, groups)
    params = {
        "kernel": random(kernel_size, kernel_size, 4 // groups, 8, seed=1),
        "bias": random(8, seed=2),
    }
    kernel = torch.tensor(params["kernel"]).permute(3, 2, 0, 1)
    pad = kernel_size // 2 if padding == "torch" else padding
    expected = F.conv2d(nchw(x), kernel, torch.tensor(params["bias"]), strides, pad, groups=groups)
    np.testing.assert_allclose(jax.jit(conv.apply)({"params": params}, x), nhwc(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("padding", "side", "strides", "before", "after"),
    [
        ("same", 8, 2, 0, 1),
        ("same", 7, 2, 1, 1),
        ("same", 8, 1, 1, 1),
        ("same", 7, 1, 1, 1),
        ("keras", 8, 2, 0, 1),
        ("keras", 7, 2, 0, 1),
        ("keras", 7, 1, 1, 1),
    ],
)
def test_named_paddings_are_tensorflows_and_keras_mobilenets(padding, side, strides, before, after):
    x, kernel = random(1, side, side, 2), random(3, 3, 2, 4, seed=1)
    y = Conv(4, 3, strides, padding, use_bias=False).apply({"params": {"kernel": kernel}}, x)
    padded = F.pad(nchw(x), (before, after, before, after))
    expected = F.conv2d(padded, torch.tensor(kernel).permute(3, 2, 0, 1), stride=strides)
    np.testing.assert_allclose(y, nhwc(expected), atol=1e-5)


def test_conv_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="feature_group_count=3 must divide both the 4 input and the 6 output"):
        Conv(6, feature_group_count=3).init(jax.random.key(0), random(1, 4, 4, 4))
    with pytest.raises(ValueError, match="too small: a 7x7 convolution meets a map of 6x9"):
        Conv(6, 7, padding=0).init(jax.random.key(0), random(1, 6, 9, 3))


def test_weights_of_another_shape_are_refused():
    conv = Conv(6)
    variables = conv.init(jax.random.key(0), random(1, 4, 4, 4))
    with pytest.raises(
        ValueError, match=r"parameter kernel has the shape \(3, 3, 4, 6\), where the net has \(3, 3, 5, 6"
    ):
        conv.apply(variables, random(1, 4, 4, 5))


def test_conv_starts_with_unit_gain_in_every_grouping():
    x = random(8, 16, 16, 64)
    for groups in (1, 4, 64):
        conv = Conv(64, 3, feature_group_count=groups, use_bias=False)
        y, _ = jax.jit(conv.init_with_output)(jax.random.key(0), x)
        # He's variance: 2, which the ReLU halves; less at the zeros of the border.
        assert 1.4 < float(jnp.var(y)) < 2.4


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_are_pytorchs(activation):
    x = np.linspace(-8, 8, 401, dtype=np.float32)
    pytorchs = {"silu": F.silu, "hard_swish": F.hardswish, "tanh": torch.tanh, "identity": lambda x: x}
    expected = (pytorchs.get(activation) or getattr(F, activation))(torch.from_numpy(x))
    np.testing.assert_allclose(ACTIVATIONS[activation](x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["identity", "relu", "relu6", "selu", "silu"])
def test_batch_norm_is_pytorchs(activation):
    reference = torch.nn.BatchNorm2d(5, eps=1e-3, momentum=0.3)
    layer = BatchNorm(momentum=0.7, epsilon=1e-3, activation=activation)
    act = getattr(F, activation, lambda y: y)
    params = {"scale": random(5, seed=1), "bias": 3 * random(5, seed=2)}
    stats = {"mean": np.zeros(5, np.float32), "var": np.ones(5, np.float32)}
    reference.load_state_dict(
        {"weight": torch.tensor(params["scale"]), "bias": torch.tensor(params["bias"])}
        | {"running_mean": torch.zeros(5), "running_var": torch.ones(5), "num_batches_tracked": torch.tensor(0)}
    )
    for step in range(2):
        x = 2 * random(3, 4, 2, 5, seed=step + 3) + 1
        y, updated = layer.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        stats = updated["batch_stats"]
        np.testing.assert_allclose(y, nhwc(act(reference(nchw(x)))), atol=1e-5)
        np.testing.assert_allclose(stats["mean"], reference.running_mean, rtol=1e-5)
        np.testing.assert_allclose(stats["var"], reference.running_var, rtol=1e-5)
    reference.eval()
    y = layer.apply({"params": params, "batch_stats": stats}, x, train=False)
    np.testing.assert_allclose(y, nhwc(act(reference(nchw(x)))), atol=1e-5)


def test_batch_norm_over_devices_is_batch_norm_of_all():
    x = random(6, 3, 3, 4)
    alone, shared = BatchNorm(activation="relu"), BatchNorm(activation="relu", axis_name="devices")
    variables = alone.init(jax.random.key(0), x, train=True)

    def apply(layer, x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])

    expected, expected_stats = apply(alone, x)
    y, stats = jax.vmap(lambda x: apply(shared, x), axis_name="devices")(x.reshape(2, 3, 3, 3, 4))
    np.testing.assert_allclose(y.reshape(x.shape), expected, atol=1e-5)
    for device in range(2):
        jax.tree.map(
            lambda a, b, device=device: np.testing.assert_allclose(a[device], b, rtol=1e-4, atol=1e-6),
            stats,
            expected_stats,
        )


def test_batch_norm_refuses_a_single_value():
    x = random(1, 1, 1, 4)
    layer = BatchNorm()
    variables = layer.init(jax.random.key(0), x, train=True)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer.apply(variables, x, train=True, mutable=["batch_stats"])


def test_conv_bn_computes_in_its_dtype_with_float32_parameters():
    layer = ConvBN(4, dtype=jnp.bfloat16)
    y, variables = jax.jit(partial(layer.init_with_output, train=True))(jax.random.key(0), random(2, 5, 5, 3))
    assert y.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


def test_squeeze_excite_is_torchvisions():
    x = random(2, 5, 4, 32)
    reference = SqueezeExcitation(32, 2)
    layers = {"reduce": reference.fc1, "expand": reference.fc2}
    params = {
        name: {"kernel": layer.weight[:, :, 0, 0].T.detach().numpy(), "bias": layer.bias.detach().numpy()}
        for name, layer in layers.items()
    }
    for ratio in (16, 1 / 16):
        y = SqueezeExcite(ratio).apply({"params": params}, x)
        np.testing.assert_allclose(y, nhwc(reference(nchw(x))), atol=1e-6)


def test_drop_path_drops_whole_images_and_keeps_the_mean():
    class Branch(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return drop_path(x, 0.25, train)

    x = 1 + random(2000, 1, 2, 3) ** 2
    rngs = {"dropout": jax.random.key(0)}
    np.testing.assert_array_equal(Branch().apply({}, x, train=False), x)
    scale = np.asarray(Branch().apply({}, x, train=True, rngs=rngs)) / x
    np.testing.assert_allclose(scale, np.broadcast_to(scale[:, :1, :1, :1], scale.shape), rtol=1e-6)
    dropped = scale[:, 0, 0, 0] == 0
    np.testing.assert_allclose(scale[~dropped], 1 / 0.75, rtol=1e-6)
    assert abs(dropped.mean() - 0.25) < 0.05
