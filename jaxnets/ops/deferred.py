"""What is computed together with what comes after it: a convolution, the output of a BatchNorm."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxnets.ops.windows import output_size


class Convolution(NamedTuple):
    """A convolution's operands, as `jaxnets.ops.conv` takes them."""

    x: Any  # an array or Normalized
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


@jax.tree_util.register_pytree_node_class
class Normalized:
    """clip((raw - mean) * gain + bias), an array of raw's shape, as its parts.

    A convolution that reads it does so on the way; for anything else `jnp.asarray` computes the array, once.

    Args:
      raw: `(N, H, W, C)`.
      affine: `(3, C)`: mean, gain, bias.
      bounds: `(low, high)` of the clipping.
      compute: of these three, the array.
    """

    def __init__(self, raw, affine, bounds, compute):
        self.raw, self.affine, self.bounds, self.compute = raw, affine, bounds, compute
        self._array = None

    @property
    def shape(self):
        return self.raw.shape

    @property
    def size(self):
        return self.raw.size

    @property
    def ndim(self):
        return self.raw.ndim

    @property
    def dtype(self):
        return self.raw.dtype

    def __jax_array__(self):
        if self._array is None:
            self._array = self.compute(self.raw, self.affine, self.bounds)
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

    def tree_flatten(self):
        return (self.raw, self.affine), (self.bounds, self.compute)

    @classmethod
    def tree_unflatten(cls, aux, parts):
        return cls(*parts, *aux)
