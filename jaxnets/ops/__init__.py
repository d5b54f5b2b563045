"""Convolutions, BatchNorm and channel shuffle: one function each, however it is computed.

The only place that knows how a convolution is computed. Arrays are NHWC, kernels HWIO
`(height, width, input channels / feature_group_count, output channels)`.
"""

from jaxnets.ops import reference

UNBOUNDED = (-float("inf"), float("inf"))


def conv(x, kernel, *, strides=(1, 1), padding=((0, 0), (0, 0)), feature_group_count=1):
    """2-D convolution, `(N, H, W, C) -> (N, H', W', O)`."""
    return reference.conv(x, kernel, strides, padding, feature_group_count)


def batch_norm(x, scale, bias, *, epsilon=1e-5, bounds=UNBOUNDED, axis_name=None):
    """Normalise by the batch's statistics, scale, shift and clip: `(y, mean, biased variance)`."""
    return reference.batch_norm(x, scale, bias, epsilon, bounds, axis_name)


def channel_shuffle(x, groups):
    """Interleave the channels of `groups` groups (ShuffleNet, figure 1)."""
    return reference.channel_shuffle(x, groups)
