"""The operators' arguments, checked by shape and dtype alone: ValueError, in one sentence, for what does not fit."""

import operator

import jax.numpy as jnp

from jaxnets.ops.lazy import Convolution, LazyArray

PADDING = (("top", "bottom"), ("left", "right"))


def array(name, x, shape=("N", "H", "W", "C"), floating=True):
    """x, as a JAX array unless it is lazy; ValueError for another shape or, if `floating`, a non-floating dtype.

    A letter in `shape` stands for any size, None for any shape.
    """
    x = x if isinstance(x, LazyArray) else jnp.asarray(x)
    if shape is not None:
        sizes = [n if isinstance(wanted, str) else wanted for wanted, n in zip(shape, x.shape)]
        if len(shape) != x.ndim or x.shape != tuple(sizes):
            raise ValueError(f"{name} must be {_spelt(shape)}, not {x.shape}")
    if floating and not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be of a floating dtype, not {x.dtype}")
    return x


def integers(name, value, form="an integer", least=1):
    """`value` as ints, in tuples nested like the words of `form`; ValueError for anything else or below `least`."""

    def read(value, form):
        if not isinstance(form, str):
            return tuple(read(*pair) for pair in zip(value, form, strict=True))
        if least is not None and value < least:
            raise ValueError
        return operator.index(value)

    try:
        return read(value, form)
    except (TypeError, ValueError):
        kind = form if isinstance(form, str) else f"{_spelt(form)}, integers"
        limit = "" if least is None else f" of at least {least}"
        raise ValueError(f"{name} must be {kind}{limit}, not {value!r}") from None


def _spelt(words):
    return str(words).replace("'", "")


def bounds(bounds):
    """`bounds` as two floats, or ValueError."""
    try:
        low, high = map(float, bounds)
        if low <= high:
            return low, high
    except (TypeError, ValueError):
        pass
    raise ValueError(f"bounds must be (low, high), low no greater than high, not {bounds!r}")


def groups(name, number, channels):
    """The number of groups, or ValueError if they do not divide the channels."""
    number = integers(name, number)
    if channels % number:
        raise ValueError(f"{number} groups must divide the {channels} channels")
    return number


def eager_convolution(x, *how):
    """`convolution` for the arguments of `conv`, with a lazy x computed."""
    return convolution(Convolution(jnp.asarray(x), *how))


def convolution(given):
    """The convolution with JAX arrays (a lazy x stays lazy) and ints in tuples; ValueError if it is invalid."""
    x, kernel, strides, padding, groups = given
    x, kernel = array("x", x), array("kernel", kernel, ("h", "w", "I", "O"))
    strides = integers("strides", strides, ("down", "across"))
    padding = integers("padding", padding, PADDING, least=None)
    groups = integers("feature_group_count", groups)
    if x.dtype != kernel.dtype:
        raise ValueError(f"a convolution takes one dtype, not x {x.dtype} and kernel {kernel.dtype}")
    if x.shape[3] != kernel.shape[2] * groups or kernel.shape[3] % groups:
        raise ValueError(
            f"a kernel {kernel.shape} with feature_group_count={groups} does not fit an input with "
            f"{x.shape[3]} channels: it needs {kernel.shape[2]} of them for each group, and groups that divide "
            f"its {kernel.shape[3]} outputs"
        )
    if 0 in kernel.shape[:2]:
        raise ValueError(f"the kernel of a convolution must have a height and a width, not be {kernel.shape}")
    if min(_padded_sides(x, padding)) < 0:
        raise ValueError(f"padding {padding} must not crop more than there is of an image x {x.shape}")
    return Convolution(x, kernel, strides, padding, groups)


def pooling(x, window, strides, padding):
    """The arguments of `max_pool`, converted as `convolution` converts those of `conv`, or ValueError."""
    x, window, strides = array("x", x), integers("window", window), integers("strides", strides)
    padding = integers("padding", padding, PADDING, least=0)
    if min(_padded_sides(x, padding)) < window:
        raise ValueError(f"a window of {window}x{window} must fit an image x {x.shape} with padding {padding}")
    return x, window, strides, padding


def _padded_sides(x, padding):
    return [side + low + high for side, (low, high) in zip(x.shape[1:3], padding)]
