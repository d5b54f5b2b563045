"""The operators under JAX's transformations and on several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from jaxnets import ops
from tests.kernels import NATIVE
from tests.slow import each_once

SAME = ((1, 1), (1, 1))
CHANNELS = 4
PORTABLE = ("xla", "gpu")


def arrays(batch=8):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, batch, 4, 4, CHANNELS))
    parameters = rng.normal(size=(3, 3, 1, CHANNELS)), 1 + rng.random(CHANNELS), rng.normal(size=CHANNELS)
    return jax.tree.map(lambda a: np.asarray(a, np.float32), (parameters, x, weight))


def loss(parameters, x, weight, axis_name=None):
    """A small net of all operators with a gradient of their own."""
    kernel, scale, bias = parameters
    y = ops.depthwise_conv(x, kernel, strides=(2, 2), padding=SAME)
    y, _, _ = ops.batch_norm(y, scale, bias, bounds=(-1.0, 1.0), axis_name=axis_name)
    y = ops.channel_shuffle(y, 2)
    return (jnp.tanh(y) * weight[:, ::2, ::2]).mean()


def gradients(name, transform=lambda f: f):
    with ops.using(name):
        return jax.jit(transform(jax.grad(loss, (0, 1))))(*arrays())


def assert_trees_close(got, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda *args: jax.grad(jax.checkpoint(loss), (0, 1))(*args),
        lambda f: lambda *args: lax.map(lambda _: f(*args), jnp.arange(1)),
        lambda f: lambda *args: jax.vmap(lambda w: f(*args[:2], w))(args[2][None]),
    ],
    ids=["remat", "scan", "vmap"],
)
@pytest.mark.parametrize("name", PORTABLE)
def test_transformations(name, transform):
    got = jax.tree.map(lambda a, b: a.reshape(b.shape), gradients(name, transform), expected := gradients("reference"))
    assert_trees_close(got, expected)


@pytest.mark.parametrize("name", PORTABLE)
def test_vmap_over_different_kernels(name):
    parameters, x, weight = arrays()
    stacked = jax.tree.map(lambda a: np.stack([a, 2 * a]), parameters)
    with ops.using(name):
        got = jax.jit(jax.vmap(jax.grad(loss), (0, None, None)))(stacked, x, weight)
        expected = jax.jit(jax.grad(loss))(jax.tree.map(lambda a: 2 * a, parameters), x, weight)
    assert_trees_close(jax.tree.map(lambda a: a[1], got), expected)


@pytest.mark.parametrize("name", PORTABLE)
@pytest.mark.parametrize("forward_over_reverse", [False, True])
def test_second_derivatives(name, forward_over_reverse):
    def product_with_hessian(name):
        def function(*args):
            directions = jax.tree.map(jnp.cos, args[:2])
            gradient = lambda *a: jax.grad(loss, (0, 1))(*a, args[2])  # noqa: E731
            if forward_over_reverse:
                return jax.jvp(gradient, args[:2], directions)[1]
            return jax.vjp(gradient, *args[:2])[1](directions)

        with ops.using(name):
            return jax.jit(function)(*arrays())

    assert_trees_close(product_with_hessian(name), product_with_hessian("reference"), 1e-4)


@pytest.mark.parametrize("name", PORTABLE)
def test_forward_mode_raises_and_works_with_the_reference(name):
    x, kernel = arrays()[1], arrays()[0][0]
    function = lambda x: ops.depthwise_conv(x, kernel)  # noqa: E731
    with ops.using(name), pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(function, (x,), (x,))
    with ops.using("reference"):
        y, tangent = jax.jvp(function, (x,), (x,))
    np.testing.assert_allclose(y, tangent, rtol=1e-6)  # linear


# The gradient of what is the same everywhere comes summed where shard_map is checked.
WAYS = ("shard_map, checked", "vmap", "shard_map", "pmap")


def shared_gradients(way, parameters, x, weight):
    """The gradients of a batch that 4 devices, or parts of one, share."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("batch",))
    batch, same = PartitionSpec("batch"), PartitionSpec()
    checked = way == "shard_map, checked"

    def step(parameters, x, weight):
        gradient, of_x = jax.grad(loss, (0, 1))(parameters, x, weight, "batch")
        return jax.tree.map(lambda g: g / 4, gradient) if checked else lax.pmean(gradient, "batch"), of_x / 4

    if way.startswith("shard_map"):
        specs = {"in_specs": (same, batch, batch), "out_specs": (same, batch)}
        return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=checked, **specs))(parameters, x, weight)
    of_parts = {
        "pmap": jax.pmap(step, "batch", in_axes=(None, 0, 0), devices=jax.devices()[:4]),
        "vmap": jax.jit(jax.vmap(step, (None, 0, 0), axis_name="batch")),
    }
    gradient, of_x = of_parts[way](parameters, *(a.reshape(4, -1, *a.shape[1:]) for a in (x, weight)))
    return jax.tree.map(lambda a: a[0], gradient), of_x.reshape(x.shape)


@each_once({"name": ["reference", "xla", NATIVE, "gpu"], "way": WAYS})
def test_statistics_of_4_devices_have_the_gradient_of_1(name, way):
    parameters, x, weight = arrays(batch=16)
    with ops.using("reference"):
        expected = jax.jit(jax.grad(loss, (0, 1)))(parameters, x, weight)
    with ops.using(name):
        got = shared_gradients(way, parameters, x, weight)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert np.abs(a - b).max() < 1e-5 * np.abs(b).max()
