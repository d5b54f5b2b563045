"""The formulations for GPUs, computed on a CPU: their sums, statistics and gradients; `test_ops` has the operators."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxnets import create_model, ops
from jaxnets.ops.gpu_batch_norm import GOLDEN_RATIO
from jaxnets.ops.gpu_sums import sums
from tests.slow import slow_after
from tests.tiny_net import registered

RELU = (0.0, float("inf"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@settings(max_examples=10, deadline=None)
@given(st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(1, 13), st.integers(1, 9)))
def test_sums_of_maps_of_any_size(shape):
    a, b = normal(0, *shape), normal(1, *shape)
    for got, expected in zip(jax.jit(sums)(a, b), (a, b), strict=True):
        np.testing.assert_allclose(got, np.asarray(expected, np.float64).sum((0, 1, 2)), rtol=1e-6, atol=1e-5)


def test_sums_are_of_parts_first():
    """Parts of 16 rows each, or XLA reduces all 4,096 in a few blocks of threads."""
    text = jax.jit(lambda x: sums(x)[0]).lower(jnp.zeros((256, 4, 4, 232))).as_text()
    assert "tensor<256x16x232xf32>" in text and "optimization_barrier" in text


@pytest.mark.parametrize("shape", [(12, 7, 7, 16), (4, 1, 1, 16), (8, 2, 2, 16), (512, 2, 2, 16)])
def test_sums_leave_a_batch_where_jit_has_spread_it(shape):
    devices = NamedSharding(Mesh(np.array(jax.devices()[:4]), ("batch",)), PartitionSpec("batch"))
    x = jax.ShapeDtypeStruct(shape, np.float32, sharding=devices)
    text = jax.jit(sums).lower(x, x).compile().as_text()
    assert {*re.findall(r"(\S+?)\{\S*\} all-gather", text)} == {"f32[4,16]"}, "what each device has summed, no more"


@pytest.mark.parametrize("position", [0, 2048, 4095, *(int(GOLDEN_RATIO * i % 1 * 4096) for i in (1, 2, 3))])
def test_statistics_in_one_pass_are_exact_wherever_an_outlier_is(position):
    """Also where it is one of the three values that the others are counted from: from it alone, 4,096 times worse."""
    x = 1e4 + normal(0, 4096, 3)
    x[position] = 0
    with ops.using("gpu"):
        y, mean, var = ops.batch_norm(x.reshape(64, 8, 8, 3), np.ones(3, np.float32), np.zeros(3, np.float32))
    wide = np.float64(x)
    np.testing.assert_allclose(mean, wide.mean(0), rtol=1e-7)
    np.testing.assert_allclose(var, wide.var(0), rtol=1e-6)
    expected = (wide - wide.mean(0)) / np.sqrt(wide.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(x.shape), expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_statistics_of_bfloat16_are_those_of_its_values(mean):
    """Also 30 deviations from 0, where a value has no more than three bits for what it differs from the mean by."""
    x = jnp.asarray(mean + normal(0, 64, 8, 8, 3), jnp.bfloat16)
    with ops.using("gpu"):
        _, got_mean, got_var = ops.batch_norm(x, np.ones(3, np.float32), np.zeros(3, np.float32))
    exact = np.float64(x).reshape(-1, 3)
    np.testing.assert_allclose(got_mean, exact.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got_var, exact.var(0), rtol=1e-3)


def test_bfloat16_on_several_devices_is_normalised_as_the_whole_batch():
    """Values and gradients, by `shard_map`, which checks what differs between devices, and by `pmap`."""
    x = jnp.asarray(3 + normal(0, 16, 4, 4, 3), jnp.bfloat16)
    mesh, spec = Mesh(np.array(jax.devices()[:4]), ("batch",)), PartitionSpec("batch")

    def loss(x, axis_name):
        y, _, _ = ops.batch_norm(x, jnp.ones(3), jnp.zeros(3), bounds=RELU, axis_name=axis_name)
        return jnp.sum(jnp.sin(y.astype(jnp.float32)))

    gradient = functools.partial(jax.grad(loss), axis_name="batch")
    with ops.using("gpu"):
        expected = jax.jit(functools.partial(jax.grad(loss), axis_name=None))(x)
        sharded = jax.jit(jax.shard_map(gradient, mesh=mesh, in_specs=spec, out_specs=spec))(x)
        mapped = jax.pmap(gradient, axis_name="batch")(x.reshape(4, 4, 4, 4, 3)).reshape(x.shape)
    for got in (sharded, mapped):
        np.testing.assert_allclose(np.float32(got), np.float32(expected), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("bounds", [ops.UNBOUNDED, RELU, (-0.5, 0.5)])
def test_bias(bounds):
    def function(x, bias):
        convolution = ops.Convolution(x, jnp.eye(5)[None, None], (1, 1), ops.NO_PADDING, 1)
        return jnp.tanh(ops.conv_bias(convolution, bias, bounds=bounds)).sum()

    arrays = normal(0, 3, 4, 5, 5), normal(1, 5)
    with ops.using("gpu"):
        got = jax.jit(jax.grad(function, (0, 1)))(*arrays)
    with ops.using("reference"), jax.enable_x64(True):
        expected = jax.jit(jax.grad(function, (0, 1)))(*map(np.float64, arrays))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_bias_without_clipping_keeps_nothing_of_its_output():
    with ops.using("gpu"):
        _, saved = jax.vjp(
            lambda x, bias: ops.gpu.add_bias(x, bias, ops.UNBOUNDED), normal(0, 2, 3, 3, 5), normal(1, 5)
        )
    assert [leaf.shape for leaf in jax.tree.leaves(saved)] == [(5,)]


def test_an_average_of_bfloat16_is_rounded_once():
    x = jnp.asarray(normal(0, 2, 9, 9, 4) + 3, jnp.bfloat16)
    with ops.using("gpu"):
        got = ops.avg_pool(x, 3, strides=2, padding=((1, 1), (1, 1)))
    with ops.using("reference"):
        expected = ops.avg_pool(x.astype(np.float32), 3, strides=2, padding=((1, 1), (1, 1)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(got), np.float32(expected.astype(jnp.bfloat16)))


def test_a_gradient_of_overlapping_windows_is_rounded_once():
    """Of a maximum that four windows share: 256 + 1 + 1 + 1 would stay 256 in bfloat16, added one by one."""
    x = jnp.zeros((1, 5, 5, 1), jnp.bfloat16).at[0, 2, 2, 0].set(1)
    dy = jnp.array([[256, 1], [1, 1]], jnp.bfloat16)[None, :, :, None]
    for name in ("gpu", "xla"):
        with ops.using(name):
            (dx,) = jax.vjp(lambda x: ops.max_pool(x, 3, strides=2), x)[1](dy)
        assert dx.dtype == jnp.bfloat16 and dx[0, 2, 2, 0] == 260 and dx.sum() == 260


def make_net(name, **fields):
    """One of the nets, or the one called "tiny"."""
    with registered():
        return create_model(name, num_classes=5, **fields)


@functools.cache
def gradients(name, dtype, net):
    """Loss, statistics and gradients of a net in training."""
    model = make_net(net, dtype=dtype, dropout=0.0)
    images, labels = normal(0, 12, 32, 32, 3), jnp.arange(12) % 5
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
    variables = jax.tree.map(lambda a: normal(a.size, *a.shape) / 4 + (a.ndim == 1), shapes)

    def loss(params):
        logits, updated = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(logits)[jnp.arange(12), labels].mean(), updated

    with ops.using(name):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables["params"])


def test_a_net_has_the_reference_s_loss_gradients_and_statistics():
    got, expected = (gradients(name, jnp.float32, "tiny") for name in ("gpu", "reference"))
    assert jax.tree.leaves(expected[0][1])
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * max(1e-2, np.abs(b).max()))


@pytest.mark.parametrize(
    "net",
    slow_after(
        1,
        ["tiny", "squeezenet1_1_cifar", "mobilenet_v2_mini", "shufflenet_v1_g3_cifar", "shufflenet_v2_x0_5_cifar"],
    ),
)
def test_in_bfloat16_it_is_as_near_to_float32_as_the_reference(net):
    """Of every tensor, in its norm: of single values of a net that has just begun rounding says little."""
    exact = jax.tree.leaves(gradients("reference", jnp.float32, net))

    def errors(name):
        found = jax.tree.leaves(gradients(name, jnp.bfloat16, net))
        return np.array([np.linalg.norm(a - b) / max(1e-2, np.linalg.norm(b)) for a, b in zip(found, exact)])

    ours, theirs = errors("gpu"), errors("reference")
    of_mean = 1.5 if net == "tiny" else 1.2  # a mean of few tensors varies more
    assert ours.max() < max(0.2, 1.5 * theirs.max()) and ours.mean() < of_mean * theirs.mean()


@pytest.mark.parametrize("dtype, convolutions", [(jnp.float32, 0), (jnp.bfloat16, 3), (jnp.float16, 3)])
def test_depthwise_kernels_are_the_library_s_in_half_precision_alone(dtype, convolutions):
    """The convolution, and the gradients of image and kernel."""

    def gradients(x, kernel):
        y, back = jax.vjp(lambda *xs: ops.depthwise_conv(*xs, strides=(1, 1), padding=((1, 1), (1, 1))), x, kernel)
        return y, back(y)

    with ops.using("gpu"):
        text = jax.jit(gradients).lower(jnp.zeros((2, 8, 8, 6), dtype), jnp.zeros((3, 3, 1, 6), dtype)).as_text()
    assert text.count("stablehlo.convolution") == convolutions


@pytest.mark.parametrize(
    ("net", "dtype", "convolutions"),
    slow_after(2, [("tiny", jnp.float32, 2), ("tiny", jnp.bfloat16, 5), ("shufflenet_v2_x0_5_cifar", jnp.float32, 2)]),
)
def test_training_lowers_for_gpus_without_one(net, dtype, convolutions):
    """Nothing in it is the CPU's alone; in float32 depthwise kernels are no convolutions of XLA's, forward or back."""
    model = make_net(net, dtype=dtype)
    images = jax.ShapeDtypeStruct((4, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)

    def loss(params, batch_stats, images):
        logits, _ = model.apply(
            {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
        )
        return logits.sum()

    with ops.using("gpu"):
        traced = jax.jit(jax.grad(loss)).trace(variables["params"], variables["batch_stats"], images)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "jaxnets_" not in text  # the native operators' calls
    # The stem and its kernel's gradient, the image's is not wanted; in half precision a depthwise one and its two.
    assert text.count("stablehlo.convolution") == convolutions
