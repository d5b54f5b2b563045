"""Native kernels: values and gradients against float64, non-finite values, transformations, determinism."""

import os
import subprocess
import sys
from functools import partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxnets
from jaxnets import ops
from jaxnets.errors import UserError
from jaxnets.ops import lazy, native, reference
from jaxnets.ops.lazy import Convolution
from jaxnets.ops.native import convolution, normalization
from tests.kernels import needs_kernels
from tests.slow import each_once, mark_slow
from tests.test_models import shapes_of

INF = float("inf")
BOUNDS = [(-INF, INF), (0.0, INF), (0.0, 6.0), (-INF, 0.5)]


pytestmark = needs_kernels


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def wide(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def assert_near(got, expected, tolerance):
    """Within `tolerance` of the largest expected value, or of 1, the scale of the inputs; array by array."""
    for g, e in zip(got, expected, strict=True):
        assert g.shape == e.shape
        if e.size:
            np.testing.assert_allclose(g, e, rtol=0, atol=tolerance * max(np.abs(e).max(), 1))


@partial(jax.jit, static_argnums=0)
def with_gradients(function, arrays, cotangent):
    """The function's outputs, and the gradients by its first output's cotangent."""

    def outputs(*arrays):
        y, *rest = function(*arrays)
        return y, rest

    y, vjp, rest = jax.vjp(outputs, *arrays, has_aux=True)
    return (y, *rest, *vjp(cotangent.astype(y.dtype)))


def compare_depthwise(x, kernel, stride, padding, tolerance=2e-6):
    def conv(formulation, x, kernel):
        return (formulation.depthwise_conv(x, kernel, (stride, stride), padding),)

    with jax.enable_x64():
        shape = jax.eval_shape(partial(conv, reference), x, kernel)[0].shape
        dy = normal(3, *shape)
        expected = with_gradients(partial(conv, reference), wide(x, kernel), dy)
        got = with_gradients(partial(conv, native), [jnp.asarray(x), jnp.asarray(kernel)], dy)
    assert_near(got, expected, tolerance)


@each_once({"channels": [1, 7, 24, 58, 144], "size": [3, 5], "stride": [1, 2]})
def test_depthwise(size, stride, channels):
    padding = ((size // 2,) * 2,) * 2
    compare_depthwise(normal(0, 3, 9, 6, channels), normal(1, size, size, 1, channels), stride, padding)


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_depthwise_of_any_shape(data):
    size, stride = data.draw(st.sampled_from([3, 5])), data.draw(st.sampled_from([1, 2]))
    padding = tuple((data.draw(st.integers(-2, 6)), data.draw(st.integers(-2, 6))) for _ in range(2))
    height, width = (data.draw(st.integers(max(1, size - sum(pads)), 11)) for pads in padding)
    images, channels = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    x, kernel = normal(0, images, height, width, channels), normal(1, size, size, 1, channels)
    compare_depthwise(x, kernel, stride, padding)


def test_depthwise_of_large_images_and_many():
    compare_depthwise(normal(0, 1, 75, 150, 36), normal(1, 3, 3, 1, 36), 1, ((1, 1), (1, 1)))
    compare_depthwise(normal(0, 70, 4, 4, 20), normal(1, 5, 5, 1, 20), 2, ((2, 2), (2, 2)))


@pytest.mark.parametrize(
    ("x", "kernel", "strides", "dtype"),
    [
        ((1, 8, 8, 4), (7, 7, 1, 4), (1, 1), np.float32),
        ((1, 8, 8, 4), (3, 3, 1, 8), (1, 1), np.float32),
        ((1, 8, 8, 4), (3, 3, 1, 4), (1, 2), np.float32),
        ((1, 8, 8, 4), (3, 3, 1, 4), (1, 1), jnp.bfloat16),
        ((1, 2, 8, 4), (3, 3, 1, 4), (1, 1), np.float32),  # the kernel does not fit: no output
    ],
)
def test_depthwise_that_others_compute(x, kernel, strides, dtype):
    x, kernel = normal(0, *x).astype(dtype), normal(1, *kernel).astype(dtype)
    expected = reference.depthwise_conv(x.astype(np.float32), kernel.astype(np.float32), strides, ops.NO_PADDING)
    got = native.depthwise_conv(jnp.asarray(x), jnp.asarray(kernel), strides, ops.NO_PADDING)
    assert got.dtype == dtype
    assert_near([got.astype(np.float32)], [expected], 1e-6 if dtype == np.float32 else 1e-2)


def batch_norm(formulation, bounds, x, scale, bias):
    return formulation.batch_norm(x, scale, bias, 1e-5, bounds, None)


def compare_batch_norm(x, bounds, tolerance=3e-6):
    channels = x.shape[-1]
    scale, bias = normal(1, channels) + 2, normal(2, channels)
    dy = normal(3, *x.shape)
    with jax.enable_x64():
        expected = with_gradients(partial(batch_norm, reference, bounds), wide(x, scale, bias), dy)
        got = with_gradients(partial(batch_norm, native, bounds), [jnp.asarray(a) for a in (x, scale, bias)], dy)
    assert_near(got, expected, tolerance)


@each_once({"bounds": BOUNDS, "channels": [1, 6, 24, 67]})
def test_batch_norm(bounds, channels):
    compare_batch_norm(3 * normal(0, 5, 7, 3, channels) + 1, bounds)


def test_batch_norm_of_many_rows():
    compare_batch_norm(normal(0, 16, 33, 32, 40), (0.0, 6.0))


@settings(max_examples=5, deadline=None)
@given(st.integers(1, 4), st.integers(3, 9), st.integers(3, 9), st.integers(1, 40), st.sampled_from(BOUNDS))
def test_batch_norm_of_any_shape(images, height, width, channels, bounds):
    compare_batch_norm(normal(0, images, height, width, channels), bounds)


@pytest.mark.parametrize(("mean", "std"), [(1e3, 1.0), (1e4, 1e-1), (-1e6, 1.0), (1.0, 1e-4)])
def test_batch_norm_of_a_large_mean_and_a_small_variance(mean, std):
    x = (mean + std * np.random.default_rng(0).normal(size=(8, 12, 12, 20))).astype(np.float32)
    scale, bias, dy = np.ones(20, np.float32), np.zeros(20, np.float32), normal(3, *x.shape)
    run = partial(jax.tree.map, np.asarray)
    with jax.enable_x64():
        bounds = ops.UNBOUNDED
        expected = run(with_gradients(partial(batch_norm, reference, bounds), wide(x, scale, bias), dy))
        arrays = [jnp.asarray(a) for a in (x, scale, bias)]
        got = run(with_gradients(partial(batch_norm, native, bounds), arrays, dy))
    np.testing.assert_allclose(got[2], expected[2], rtol=1e-6)
    assert_near(got, expected, 1e-5)


def test_one_outlier_first_does_not_spoil_the_variance():
    x = normal(0, 64, 16, 16, 3)
    x[0, 0, 0] = 1e4
    var = native.batch_norm(jnp.asarray(x), jnp.ones(3), jnp.zeros(3), 1e-5, ops.UNBOUNDED, None)[2]
    np.testing.assert_allclose(var, x.astype(np.float64).var((0, 1, 2)), rtol=1e-6)


@each_once(
    {
        "bad": [np.nan, INF, -INF],
        "where": ["x", "dy"],
        "place": [(0, 0, 0, 0), (0, 2, 3, 17), (1, 4, 4, 5)],
        "stride": [1, 2],
    }
)
def test_non_finite_values_spread_as_in_the_reference(stride, bad, where, place):
    x, kernel = normal(0, 2, 5, 5, 19), normal(1, 3, 3, 1, 19)
    dy = normal(2, *reference.depthwise_conv(x, kernel, (stride,) * 2, ((1, 1), (1, 1))).shape)
    target = x if where == "x" else dy
    target[tuple(min(p, n - 1) for p, n in zip(place, target.shape))] = bad

    def conv(formulation, x, kernel):
        return (formulation.depthwise_conv(x, kernel, (stride,) * 2, ((1, 1), (1, 1))),)

    expected = with_gradients(partial(conv, reference), (x, kernel), dy)
    got = with_gradients(partial(conv, native), (x, kernel), dy)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_allclose(g, e, rtol=1e-4, atol=1e-4)


@each_once(
    {
        "bad": [np.nan, INF, -INF],
        "where": ["x", "dy"],
        "bounds": BOUNDS,
        "place": [(0, 0, 0, 0), (1, 2, 3, 17)],
    }
)
def test_batch_norm_of_non_finite_values(bad, where, bounds, place):
    x, dy = normal(0, 2, 5, 5, 19), normal(1, 2, 5, 5, 19)
    (x if where == "x" else dy)[place] = bad
    arrays = x, normal(2, 19) + 2, normal(3, 19)
    expected = with_gradients(partial(batch_norm, reference, bounds), arrays, dy)
    got = with_gradients(partial(batch_norm, native, bounds), arrays, dy)
    for g, e in zip(got, expected, strict=True):
        assert (np.isfinite(g) == np.isfinite(e)).all()
        np.testing.assert_allclose(np.where(np.isfinite(e), g, 0), np.where(np.isfinite(e), e, 0), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got[1], np.where(np.isfinite(expected[1]), got[1], expected[1]))


def test_an_empty_batch():
    compare_depthwise(normal(0, 0, 5, 5, 8), normal(1, 3, 3, 1, 8), 1, ((1, 1), (1, 1)))
    y, mean, _ = native.batch_norm(jnp.zeros((0, 5, 5, 8)), jnp.ones(8), jnp.zeros(8), 1e-5, (0.0, 6.0), None)
    assert y.shape == (0, 5, 5, 8)
    assert np.isnan(mean).all()


def block(formulation, axis_name, x, kernel, scale, bias):
    """Depthwise, BatchNorm, ReLU6, twice, as the named formulation."""
    with ops.using(formulation):
        for strides in ((1, 1), (2, 2)):
            x = ops.depthwise_conv(x, kernel, strides=strides, padding=((1, 1), (1, 1)))
            x, mean, var = ops.batch_norm(x, scale, bias, bounds=(0.0, 6.0), axis_name=axis_name)
    return x, mean, var


def block_gradients(formulation, axis_name, *arrays):
    def loss(*arrays):
        y, mean, var = block(formulation, axis_name, *arrays)
        return (y * jnp.cos(jnp.arange(y.size).reshape(y.shape))).mean(), (mean, var)

    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(*arrays)


def block_arrays(*batch):
    return normal(0, *batch, 7, 6, 20), normal(1, 3, 3, 1, 20), normal(2, 20) + 2, normal(3, 20)


def assert_same(got, expected, rtol=1e-4):
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(g, e, rtol=rtol, atol=rtol * max(1e-3, np.abs(e).max()))


def twice(formulation):
    return partial(block_gradients, formulation, None)


TRANSFORMATIONS = {
    "jit": (jax.jit, (4,)),
    "vmap": (lambda f: jax.jit(jax.vmap(f, in_axes=(0, None, None, None))), (3, 4)),
    "vmap of the second axis": (lambda f: jax.jit(jax.vmap(f, in_axes=(1, None, None, None))), (4, 3)),
    "scan": (lambda f: lambda x, *p: lax.scan(lambda c, x: (c + 1, f(x, *p)), 0, x)[1], (3, 4)),
    "pmap": (lambda f: jax.pmap(f, in_axes=(0, None, None, None)), (4, 2)),
}


@pytest.mark.parametrize("name", [mark_slow(name) if name.startswith("vmap of") else name for name in TRANSFORMATIONS])
def test_transformations(name):
    transform, batch = TRANSFORMATIONS[name]
    arrays = block_arrays(*batch)
    assert_same(transform(twice("native"))(*arrays), transform(twice("xla"))(*arrays))


def test_kernels_mapped_too():
    arrays = block_arrays(3, 2)
    arrays = (arrays[0], *(np.stack([a, 2 * a, 3 * a]) for a in arrays[1:]))
    assert_same(jax.jit(jax.vmap(twice("native")))(*arrays), jax.jit(jax.vmap(twice("xla")))(*arrays))


def test_remat_and_scan_over_blocks():
    def gradient(formulation, *arrays):
        @jax.checkpoint
        def body(x, kernel):
            x = block(formulation, None, x, kernel, *arrays[2:])[0]
            return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)[:, :7, :6], x.mean()

        kernels = jnp.stack([arrays[1], arrays[1] * 0.5])
        return jax.jit(jax.grad(lambda x, k: lax.scan(body, x, k)[1].sum() ** 2, (0, 1)))(arrays[0], kernels)

    arrays = block_arrays(4)
    assert_same(gradient("native", *arrays), gradient("xla", *arrays))


def test_statistics_shared_by_devices():
    """pmap with axis_name: each device's share has the gradients of the whole batch."""
    x, *params = block_arrays(8)
    whole = jax.jit(twice("reference"))(x, *params)
    spread = jax.pmap(
        lambda x, *p: block("native", "devices", x, *p), axis_name="devices", in_axes=(0, None, None, None)
    )(x.reshape(4, 2, *x.shape[1:]), *params)
    for got, expected in zip(spread[1:], whole[0][1]):
        assert_same(got, np.stack([expected] * 4))
    y = block("reference", None, x, *params)[0]
    assert_same(np.reshape(spread[0], y.shape), y)


@each_once({"check_vma": [False, True], "axis_name": [None, "devices"]})
def test_shard_map(axis_name, check_vma):
    mesh = Mesh(np.array(jax.devices()[:4]), ("devices",))

    def run(formulation):
        def of_share(x, *params):
            (loss, _), gradients = block_gradients(formulation, axis_name, x, *params)
            return lax.pmean(loss, "devices"), gradients[0], lax.pmean(gradients[1:], "devices")

        specs = {"in_specs": (P("devices"), P(), P(), P()), "out_specs": (P(), P("devices"), P())}
        return jax.jit(jax.shard_map(of_share, mesh=mesh, check_vma=check_vma, **specs))(*block_arrays(8))

    assert_same(run("native"), run("xla"))


def test_shard_map_that_is_not_jitted():
    """Dense and 1x1 convolutions with a bias, and one with BatchNorm."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("devices",))
    pad = ((1, 1), (1, 1))

    def loss(x, kernel, bias):
        y = ops.conv_bias(Convolution(x, kernel, (1, 1), pad, 1), bias, bounds=(0.0, INF))
        z, *_ = ops.conv_batch_norm(Convolution(jnp.asarray(y), kernel, (1, 1), pad, 1), bias, bias)
        return (jnp.asarray(z) * jnp.cos(jnp.arange(z.size).reshape(z.shape))).mean()

    def run(name):
        def of_share(x, *params):
            dx, *gradients = jax.grad(loss, (0, 1, 2))(x, *params)
            return dx, lax.pmean(gradients, "devices")

        share = jax.shard_map(
            of_share, mesh=mesh, in_specs=(P("devices"), P(), P()), out_specs=(P("devices"), P()), check_vma=False
        )
        with ops.using(name):
            share = jax.jit(share) if name == "xla" else share
            return share(normal(0, 4, 6, 5, 8), normal(1, 3, 3, 8, 8), normal(2, 8) + 2)

    assert_same(run("native"), run("xla"), rtol=1e-3)


def test_second_derivatives_name_the_way_out():
    x, kernel, scale, bias = map(jnp.asarray, block_arrays(2))

    def loss(x):
        return block("native", None, x, kernel, scale, bias)[0].sum()

    with pytest.raises(UserError, match="JAXNETS_OPS=xla"):
        jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum())(x)


@pytest.mark.parametrize("rows", [3, 49])
def test_few_rows_that_an_affine_reads(rows):
    x, kernel, affine = normal(0, 1, rows, 1, 70), normal(1, 1, 1, 70, 200) / 8, normal(2, 3, 70)
    plan = convolution.plan_of(Convolution(x, kernel, (1, 1), ops.NO_PADDING, 1))
    normalized = lazy.LazyBatchNorm(jnp.asarray(x), jnp.asarray(affine), (0.0, 6.0), normalization.normalize)
    mean, gain, bias = affine.astype(np.float64)
    expected = np.clip((x - mean) * gain + bias, 0, 6) @ kernel[0, 0].astype(np.float64)
    assert_near(convolution.products(plan, normalized, kernel)[:1], [expected], 2e-6)


@each_once(
    {
        "shape": [(1, 8, 8, 16), (2, 13, 11, 24), (3, 6, 7, 33), (1, 27, 27, 140)],
        "features": [16, 48, 50, 130],
        "padding": [((1, 1), (1, 1)), ((0, 0), (0, 0)), ((2, 1), (0, 3)), ((1, 2), (-1, 1))],
        "bounds": BOUNDS,
        "joined": [False, True],
    }
)
def test_3x3_convolutions_in_tiles_are_as_near_as_sums_can_be(shape, features, padding, bounds, joined):
    """Winograd's: odd and even sides, channels that fill no vector, paddings of any kind, a sum with a shortcut."""
    x, kernel = normal(0, *shape), normal(1, 3, 3, shape[3], features) / np.sqrt(9 * shape[3], dtype=np.float32)
    gain, bias = 1 + normal(2, features) / 4, normal(3, features)
    other = normal(4, *Convolution(x, kernel, (1, 1), padding, 1).shape) if joined else None

    def output(x, kernel, gain, bias, other=None):
        of_conv = ops.UNBOUNDED if joined else bounds
        y = ops.conv_affine(Convolution(x, kernel, (1, 1), padding, 1), gain, bias, bounds=of_conv)
        return jnp.asarray(ops.add(other, y, bounds=bounds) if joined else y)

    operands = (x, kernel, gain, bias, *([other] if joined else []))
    with jax.enable_x64(), ops.using("reference"):
        expected = output(*wide(*operands))
    with ops.using("native"):
        got = output(*operands)
    assert_near([got], [expected], 3e-6)


@pytest.mark.parametrize("bad", [np.nan, INF, -INF])
@pytest.mark.parametrize("of_kernel", [False, True])
def test_what_is_not_finite_spreads_no_further_in_tiles(bad, of_kernel):
    x, kernel = normal(0, 1, 9, 10, 20), normal(1, 3, 3, 20, 40)
    if of_kernel:
        kernel[1, 2, 3, 17] = bad
    else:
        x[0, 4, 5, 7] = bad
    convolution = Convolution(x, kernel, (1, 1), ((1, 1), (1, 1)), 1)
    values = []
    for formulation in ("reference", "native"):
        with ops.using(formulation):
            values.append(np.asarray(ops.conv_bias(convolution, np.zeros(40, np.float32))))
    expected, got = values
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    np.testing.assert_allclose(got[finite], expected[finite], rtol=1e-4, atol=1e-4)


def test_the_same_bits_whatever_the_threads(tmp_path, repository):
    """Of training steps, and of one image in evaluation, whose kernels and rows are shared out to threads."""
    code = """
import os, sys, numpy as np, jax, jax.numpy as jnp
import jaxnets
from jaxnets import ops
from tests.test_ops_fused import separable, separable_arrays, side_by_side
from tests.test_ops_native import block_gradients, normal

arrays = normal(0, 33, 16, 16, 70), normal(1, 3, 3, 1, 70), normal(2, 70) + 2, normal(3, 70)
f = jax.jit(lambda *a: block_gradients("native", None, *a))
runs = [jax.tree.leaves(f(*arrays)) for _ in range(3)]
for other in runs[1:]:
    assert all((np.asarray(a) == np.asarray(b)).all() for a, b in zip(runs[0], other))
with ops.using("native"):
    image = jax.jit(lambda *a: jnp.asarray(separable(1)(*a)))(*separable_arrays(1, 13, 11, 60, 160))
    convolution = side_by_side(((1, 1), ((2, 2), (1, 1))))
    dense_gradients = jax.jit(jax.grad(lambda *a: jnp.asarray(convolution(*a)).sum(), (0, 1, 2, 3)))
    dense = dense_gradients(normal(4, 3, 29, 23, 5), normal(5, 5, 3, 5, 20), normal(6, 20), normal(7, 1, 1, 2, 3))
    x = normal(8, 2, 13, 11, 24)
    x[1, 5, 5, 3] = np.nan
    tiles = ops.conv_bias(ops.Convolution(x, normal(9, 3, 3, 24, 50), (1, 1), ((1, 1), (1, 1)), 1), normal(10, 50))
    tiles = jnp.asarray(tiles)
np.savez(sys.argv[1], image, tiles, *dense, *runs[0])
tasks = "/proc/self/task"
print(len(os.listdir(tasks)) if os.path.isdir(tasks) else os.environ["NPROC"])
"""
    # The number of devices would set that of threads too, which NPROC sets for XLA's pools.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    results, threads = [], []
    for count in (1, 23):
        path = tmp_path / f"{count}.npz"
        own = {"PYTHONPATH": str(repository), "XLA_FLAGS": " ".join(flags), "NPROC": str(count)}
        command = [sys.executable, "-c", code, str(path)]
        run = subprocess.run(command, check=True, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True)
        threads.append(int(run.stdout))
        results.append(np.load(path))
    assert threads[0] < threads[1]
    for name in results[0].files:
        np.testing.assert_array_equal(results[0][name], results[1][name])


@pytest.mark.parametrize(
    ("name", "training", "evaluation"),
    [
        ("mobilenet_v1_cifar", 1, 14),
        ("mobilenet_v2_cifar", 8, 26),
        ("shufflenet_v1_g3_cifar", 4, 20),
        ("shufflenet_v2_x1_0_cifar", 27, 21),
        ("squeezenet1_1_cifar", 9, 9),
    ],
)
def test_how_often_a_net_computes_what_could_wait_for_its_reader(name, training, evaluation, monkeypatch):
    """Every further one is an array written and read, which nothing else shows: what comes out is the same."""
    computed, compute = [], lazy.LazyArray.__jax_array__

    def note(self):
        if not self.computed:
            computed.append(type(self).__name__)
        return compute(self)

    monkeypatch.setattr(lazy.LazyArray, "__jax_array__", note)
    model = jaxnets.create_model(name)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    variables = shapes_of(model)
    for train, expected in ((True, training), (False, evaluation)):
        computed.clear()
        mutable = ["batch_stats"] if train else False
        apply = partial(model.apply, train=train, mutable=mutable, rngs={"dropout": jax.random.key(1)})
        with ops.using("native"):
            jax.eval_shape(apply, variables, images)
        assert len(computed) == expected


def test_a_lazy_array_of_its_own_type_is_itself():
    """As a net casts to its dtype what may be of it already."""
    x = np.ones((1, 4, 4, 8), np.float32)
    with ops.using("native"):
        convolution = ops.Convolution(x, np.ones((1, 1, 8, 8), np.float32), (1, 1), ops.NO_PADDING, 1)
        y, _, _ = ops.conv_batch_norm(convolution, np.ones(8, np.float32), np.zeros(8, np.float32))
    assert isinstance(y, ops.LazyBatchNorm) and y.astype(np.float32) is y and not y.computed
    assert y.astype(np.float16).dtype == np.float16
