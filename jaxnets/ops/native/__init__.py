"""Convolutions and BatchNorm by C++ kernels, on the CPU and in float32; the rest is `xla`'s.

A convolution followed by BatchNorm writes its products once and takes their moments on the way; its normalised and
clipped values are written only where something other than a convolution wants them (`LazyBatchNorm`): the next
convolution normalises what it reads. The gradients likewise: each convolution's reads its output's gradient, its
output and its input once, and gives the gradient before the BatchNorm that it read through.

All of it has first derivatives in reverse mode and no others.
"""

from jaxnets.ops.native.channels import channel_shuffle, interleave
from jaxnets.ops.native.convolution import (
    concatenate,
    conv,
    conv_batch_norm,
    conv_bias,
    depthwise_conv,
    grouped_conv,
    plan_of,
    pointwise_conv,
)
from jaxnets.ops.native.evaluation import conv_affine, evaluate
from jaxnets.ops.native.normalization import add, batch_norm
from jaxnets.ops.native.pooling import avg_pool, max_pool
from jaxnets.ops.native.stem import pooled_stem, stem_parts
from jaxnets.ops.reference import add_bias

__all__ = [
    "add",
    "add_bias",
    "avg_pool",
    "batch_norm",
    "channel_shuffle",
    "concatenate",
    "conv",
    "conv_affine",
    "conv_batch_norm",
    "conv_bias",
    "depthwise_conv",
    "evaluate",
    "grouped_conv",
    "interleave",
    "max_pool",
    "plan_of",
    "pointwise_conv",
    "pooled_stem",
    "stem_parts",
]
