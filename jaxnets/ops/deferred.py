"""What is computed together with what comes after it: a convolution, the output of a BatchNorm."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops.windows import output_size


class Convolution(NamedTuple):
    """A convolution's operands, as `jaxnets.ops.conv` takes them."""

    x: Any  # an array, Normalized or Filtered
    kernel: jax.Array
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    feature_group_count: int

    @property
    def shape(self):
        """Of the output."""
        sides = [n + low + high for n, (low, high) in zip(self.x.shape[1:3], self.padding)]
        size = output_size(np.empty((1, *sides, 1)), self.kernel, self.strides)
        return (self.x.shape[0], *size, self.kernel.shape[3])

    @property
    def dtype(self):
        """Of the output."""
        return self.x.dtype


class Deferred:
    """An array that is computed when `jnp.asarray` asks for it, once; until then its parts."""

    def __init__(self):
        self._array = None

    def array(self):
        """Compute it."""
        raise NotImplementedError

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def ndim(self):
        return len(self.shape)

    def __jax_array__(self):
        if self._array is None:
            self._array = self.array()
        return self._array

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.__jax_array__(), dtype)

    def __add__(self, other):
        return jnp.asarray(self) + jnp.asarray(other)

    __radd__ = __add__

    def __getitem__(self, index):
        return jnp.asarray(self)[index]

    def astype(self, dtype):
        return self if dtype == self.dtype else jnp.asarray(self).astype(dtype)


@jax.tree_util.register_pytree_node_class
class Normalized(Deferred):
    """clip((raw - mean) * gain + bias), an array of raw's shape, as its parts: a convolution normalises as it reads.

    Args:
      raw: `(N, H, W, C)`.
      affine: `(3, C)`: mean, gain, bias.
      bounds: `(low, high)` of the clipping.
      compute: of these three, the array.
    """

    def __init__(self, raw, affine, bounds, compute):
        super().__init__()
        self.raw, self.affine, self.bounds, self.compute = raw, affine, bounds, compute

    @property
    def shape(self):
        return self.raw.shape

    @property
    def dtype(self):
        return self.raw.dtype

    def array(self):
        return self.compute(self.raw, self.affine, self.bounds)

    def tree_flatten(self):
        return (self.raw, self.affine), (self.bounds, self.compute)

    @classmethod
    def tree_unflatten(cls, aux, parts):
        return cls(*parts, *aux)


@jax.tree_util.register_pytree_node_class
class Filtered(Deferred):
    """A depthwise convolution in evaluation as its parts: a 1x1 convolution computes it as it reads.

    Args:
      x: `(N, H, W, C)`.
      kernel: `(h, w, 1, C)`.
      affine: `(3, C)`: mean, gain, bias of its BatchNorm.
      plan: how it is computed.
      bounds: `(low, high)` that it is clipped to.
      compute: of these five, the array.
    """

    def __init__(self, x, kernel, affine, plan, bounds, compute):
        super().__init__()
        self.x, self.kernel, self.affine = x, kernel, affine
        self.plan, self.bounds, self.compute = plan, bounds, compute

    @property
    def shape(self):
        strides = (self.plan.stride,) * 2
        return Convolution(self.x, self.kernel, strides, self.plan.padding, self.plan.groups).shape

    @property
    def dtype(self):
        return self.x.dtype

    def array(self):
        return self.compute(self.x, self.kernel, self.affine, self.plan, self.bounds)

    def tree_flatten(self):
        return (self.x, self.kernel, self.affine), (self.plan, self.bounds, self.compute)

    @classmethod
    def tree_unflatten(cls, aux, parts):
        return cls(*parts, *aux)
