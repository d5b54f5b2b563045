"""Convolutions, BatchNorm and channel shuffle: one function each, however it is computed.

The only place that knows how a convolution is computed. Arrays are NHWC, kernels HWIO
`(height, width, input channels / feature_group_count, output channels)`.

Two sets of formulations exist: `reference` (lax, plain autodiff) and `xla` (portable, with their own
gradients). `JAXNETS_OPS=reference|xla` or `with using(...)` forces one.
"""

import contextlib
import contextvars
import os

import jax

from jaxnets.errors import UserError
from jaxnets.ops import reference, xla

UNBOUNDED = (-float("inf"), float("inf"))
FORMULATIONS = {"reference": reference, "xla": xla}

_forced = contextvars.ContextVar("jaxnets_ops", default=None)


@contextlib.contextmanager
def using(name):
    """Compute with the formulations `name`, "reference" or "xla", in this scope.

    Read where an operator is traced: a function that `jax.jit` has compiled already keeps what it has.
    Raises UserError for any other name.
    """
    _check_name(name, "ops.using")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def formulation():
    """Name of the formulations in use: `using`, else JAXNETS_OPS, else the platform's."""
    name = _forced.get() or os.environ.get("JAXNETS_OPS")
    if name:
        return _check_name(name, "JAXNETS_OPS")
    # On other platforms nothing has been measured yet.
    return "xla" if jax.default_backend() == "cpu" else "reference"


def _check_name(name, source):
    if name not in FORMULATIONS:
        raise UserError(f"{source} is {name!r}; it must be one of {', '.join(FORMULATIONS)}")
    return name


def conv(x, kernel, *, strides=(1, 1), padding=((0, 0), (0, 0)), feature_group_count=1):
    """2-D convolution, `(N, H, W, C) -> (N, H', W', O)`: whichever of those below fits the kernel."""
    if feature_group_count == x.shape[-1] and feature_group_count > 1:
        return depthwise_conv(x, kernel, strides=strides, padding=padding)
    if feature_group_count > 1:
        return grouped_conv(x, kernel, strides=strides, padding=padding, feature_group_count=feature_group_count)
    if kernel.shape[:2] == (1, 1) and not any(map(any, padding)):
        return pointwise_conv(x, kernel, strides=strides)
    return FORMULATIONS[formulation()].conv(x, kernel, strides, padding, 1)


def depthwise_conv(x, kernel, *, strides=(1, 1), padding=((0, 0), (0, 0))):
    """Each channel by its own filters: x `(N, H, W, C)`, kernel `(h, w, 1, C * multiplier)`."""
    return FORMULATIONS[formulation()].depthwise_conv(x, kernel, strides, padding)


def pointwise_conv(x, kernel, *, strides=(1, 1)):
    """1x1 convolution without padding, kernel `(1, 1, C, O)`."""
    return FORMULATIONS[formulation()].pointwise_conv(x, kernel, strides)


def grouped_conv(x, kernel, *, strides=(1, 1), padding=((0, 0), (0, 0)), feature_group_count):
    """Convolution within each of `feature_group_count` groups of channels, kernel `(h, w, C / groups, O)`."""
    return FORMULATIONS[formulation()].grouped_conv(x, kernel, strides, padding, feature_group_count)


def batch_norm(x, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None):
    """Normalise by the batch's statistics, scale, shift and clip: `(y, mean, biased variance)`."""
    return FORMULATIONS[formulation()].batch_norm(x, scale, bias, epsilon, bounds, axis_name)


def channel_shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, figure 1)."""
    return FORMULATIONS[formulation()].channel_shuffle(x, groups)
