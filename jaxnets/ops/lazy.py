"""Lazy arrays, computed together with what reads them: convolutions and the outputs of BatchNorms."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxnets.ops.windows import output_size


class Convolution(NamedTuple):
    """A convolution's operands, as `jaxnets.ops.conv` takes them."""

    x: Any  # an array or `LazyArray`
    kernel: jax.Array
    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    feature_group_count: int

    @property
    def shape(self):
        """Shape of the output."""
        sides = [n + low + high for n, (low, high) in zip(self.x.shape[1:3], self.padding)]
        size = output_size(sides, self.kernel, self.strides)
        return (self.x.shape[0], *size, self.kernel.shape[3])

    @property
    def dtype(self):
        """Dtype of the output."""
        return self.x.dtype


class LazyArray:
    """A lazy array: keeps its operands until `jnp.asarray` computes it, once.

    JAX's transformations, and anything else that takes pytrees, get the computed array.
    """

    __array_priority__ = 100  # NumPy defers to this class's operators

    def __init__(self, *operands):
        self._operands, self._array = operands, None

    def __init_subclass__(cls):
        jax.tree_util.register_pytree_node_class(cls)

    def array(self):
        """Compute the array."""
        raise NotImplementedError

    @property
    def computed(self):
        """Whether it has been computed."""
        return self._array is not None

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def ndim(self):
        return len(self.shape)

    def __len__(self):
        return self.shape[0]

    def __iter__(self):
        return iter(jnp.asarray(self))  # by index it would never end: JAX arrays clamp an index that is too large

    def __getattr__(self, name):
        """Any other attribute is the array's."""
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.__jax_array__(), name)

    def __jax_array__(self):
        if self.computed:
            return self._array
        array = self.array()
        if _trace_of(array) in map(_trace_of, self._operands):  # else it belongs to a trace that `self` outlives
            self._array = array
        return array

    def __array__(self, dtype=None, copy=None):
        return self.__jax_array__().__array__(dtype, copy=copy)

    def astype(self, dtype):
        return self if dtype == self.dtype else jnp.asarray(self).astype(dtype)

    def tree_flatten(self):
        return (jnp.asarray(self),), None

    @classmethod
    def tree_unflatten(cls, aux, arrays):
        return arrays[0]


def _trace_of(array):
    return getattr(array, "_trace", None)


def _of_array(name):
    return lambda self, *args, **kwargs: getattr(jnp.asarray(self), name)(*args, **kwargs)


ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul")
OPERATORS = (*ARITHMETIC, *(f"r{name}" for name in ARITHMETIC), "neg", "pos", "abs", "getitem")
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
for _name in (f"__{name}__" for name in OPERATORS + COMPARISONS):  # Python looks these up only on the class
    setattr(LazyArray, _name, _of_array(_name))


class LazyBatchNorm(LazyArray):
    """clip((raw - mean) * gain + bias), of raw's shape, kept as its parts: a convolution normalises as it reads.

    Args:
      raw: `(N, H, W, C)`.
      affine: `(3, C)`: mean, gain, bias.
      bounds: `(low, high)` to clip to.
      compute: makes the array from these three.
    """

    def __init__(self, raw, affine, bounds, compute):
        super().__init__(raw, affine)
        self.raw, self.affine, self.bounds, self.compute = raw, affine, bounds, compute

    @property
    def shape(self):
        return self.raw.shape

    @property
    def dtype(self):
        return self.raw.dtype

    def array(self):
        return self.compute(self.raw, self.affine, self.bounds)


class LazyConv(LazyArray):
    """A convolution in evaluation, or a depthwise and a 1x1 one, kept as its parts: what reads it may be fused with it.

    Args:
      x: `(N, H, W, C)`, an array or `ChannelSlice`.
      layers: for each convolution, its kernel and `(3, C)` affine: mean, gain, bias.
      plans: how to compute each.
      bounds: for each, the `(low, high)` to clip to.
      compute: makes the array from all this.
    """

    def __init__(self, x, layers, plans, bounds, compute):
        super().__init__(x.whole if isinstance(x, ChannelSlice) else x, *itertools.chain(*layers))
        self.x, self.layers, self.plans, self.bounds, self.compute = x, layers, plans, bounds, compute

    @property
    def shape(self):
        x = self.x
        for (kernel, _), plan in zip(self.layers, self.plans):
            convolution = plan.convolution(x, kernel)
            x = jax.ShapeDtypeStruct(convolution.shape, convolution.dtype)
        return x.shape

    @property
    def dtype(self):
        return self.x.dtype

    @property
    def depthwise(self):
        """Whether it is a depthwise convolution alone."""
        return self.plans[-1].kind == "depthwise"

    def array(self):
        return self.compute(self)


class LazyBiasedConv(LazyArray):
    """clip(convolution + bias), kept as its parts: several of these may be computed into one array.

    Args:
      convolution: `Convolution` of an array.
      bias: `(C,)`.
      plan: how to compute it.
      bounds: `(low, high)` to clip to.
      compute: makes the array from a list of these.
    """

    def __init__(self, convolution, bias, plan, bounds, compute):
        super().__init__(convolution.x, convolution.kernel, bias)
        self.convolution, self.bias, self.plan, self.bounds, self.compute = convolution, bias, plan, bounds, compute

    @property
    def shape(self):
        return self.convolution.shape

    @property
    def dtype(self):
        return self.convolution.dtype

    def array(self):
        return self.compute([self])


class ChannelSlice(LazyArray):
    """`count` channels of the array `whole`, starting at `first`; `LazyConv` reads them in place."""

    def __init__(self, whole, first, count):
        super().__init__(whole)
        self.whole, self.first, self.count = whole, first, count

    @property
    def shape(self):
        return (*self.whole.shape[:3], self.count)

    @property
    def dtype(self):
        return self.whole.dtype

    def array(self):
        return self.whole[..., self.first : self.first + self.count]
