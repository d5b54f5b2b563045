"""Convolutions and BatchNorm in C++ kernels, for float32 on the CPU; `xla` does the rest.

A convolution followed by BatchNorm writes its products once and takes their moments on the way; its normalised and
clipped values are written only if something other than a convolution needs them (`LazyBatchNorm`): the next
convolution normalises what it reads. Likewise, each convolution's gradient reads the output's cotangent, the output
and the input once, and returns the gradient at the input of the BatchNorm that the convolution read through.

There are first derivatives only, in reverse mode.
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
