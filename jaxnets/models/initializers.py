"""Initial kernels: normal, each drawn separately, or all those of a net at once.

XLA takes a tenth of a second or more to compile a draw, and longer for the 58 of mobilenet_v2_cifar than for its
training step.
"""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from jaxnets import ops

Initializer = Callable[..., Any]  # of a key, a shape and a dtype, as in `nn.initializers`

_put_off = contextvars.ContextVar("kernels are drawn later", default=False)


class Undrawn(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A kernel that is drawn later; until then, flax's modules see zeros."""

    zeros: jax.Array
    stddev: float = flax.struct.field(pytree_node=False)

    def unbox(self):
        return self.zeros

    def replace_boxed(self, val):
        return self.replace(zeros=val)

    def add_axis(self, index, params):
        return self

    def remove_axis(self, index, params):
        return self


def normal(stddev_of: Callable[[tuple[int, ...]], float]) -> Initializer:
    """Mean 0, with a standard deviation that depends on the kernel's shape."""

    def init(key, shape, dtype=jnp.float32):
        if _put_off.get():
            return Undrawn(jnp.zeros(shape, dtype), stddev_of(shape))
        return stddev_of(shape) * jax.random.normal(key, shape, dtype)

    return init


dense_init = normal(lambda shape: 0.01)  # torchvision's for the classifiers of light nets


def conv_init(feature_group_count: int) -> Initializer:
    """He normal over the fan-out of one output group, so that a depthwise kernel starts with unit gain."""
    return normal(lambda shape: math.sqrt(2 * feature_group_count / (math.prod(shape[:-2]) * shape[-1])))


def init_at_once(model: nn.Module, key: jax.Array, *args, **kwargs) -> dict[str, Any]:
    """`model.init` with the same distributions, but a single draw for all kernels of this module's initializers."""
    key, key_of_kernels = jax.random.split(key)
    with _drawn_later():
        variables = model.init(key, *args, **kwargs)
    leaves, tree = jax.tree.flatten(variables, is_leaf=_is_undrawn)
    sizes = [leaf.zeros.size if _is_undrawn(leaf) else 0 for leaf in leaves]
    # Without the barrier, the draw would be repeated for each kernel's share.
    drawn = jax.lax.optimization_barrier(jax.random.normal(key_of_kernels, (sum(sizes),)))
    for at, (leaf, part) in enumerate(zip(leaves, jnp.split(drawn, np.cumsum(sizes)[:-1]))):
        if _is_undrawn(leaf):
            leaves[at] = (leaf.stddev * part.reshape(leaf.zeros.shape)).astype(leaf.zeros.dtype)
    return jax.tree.unflatten(tree, leaves)


def init_shapes(model: nn.Module, images: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The shapes of a net's variables for such images `(N, H, W, 3)`, found fast: without draws, through `lax`."""
    with ops.using("reference"), _drawn_later():
        return nn.meta.unbox(jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images))


def _is_undrawn(leaf) -> bool:
    return isinstance(leaf, Undrawn)


@contextlib.contextmanager
def _drawn_later() -> Iterator[None]:
    token = _put_off.set(True)
    try:
        yield
    finally:
        _put_off.reset(token)
