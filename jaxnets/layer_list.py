"""The layers of a net that have weights, in the order in which its forward pass calls them."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxnets.models.initializers import conv_init, init_shapes
from jaxnets.models.layers import BatchNorm, Conv

TRACED_SIDE = 224  # an image side that every net takes; no weight depends on it


@dataclass(frozen=True)
class Layer:
    """One convolution, BatchNorm or dense layer: the path of its variables, and its shapes."""

    path: tuple[str, ...]
    kind: str  # "conv", "batch_norm" or "dense"
    shape: tuple[int, ...]  # of the kernel (HWIO, or inputs x outputs), or the channels of a BatchNorm
    use_bias: bool = True
    normalised: bool = False  # a BatchNorm comes next
    kernel_init: Callable | None = field(default=None, compare=False)
    input_shape: tuple[int, ...] = field(default=(), compare=False)  # of one image: (H, W, C), or (C,)
    output_shape: tuple[int, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        return ".".join(self.path)


@functools.lru_cache(maxsize=128)  # more than there are nets
def layers_of(model: nn.Module, image_size: int = TRACED_SIDE) -> tuple[Layer, ...]:
    """The layers of `model` in the order of their calls; it is only traced, nothing is computed.

    `image_size`, the side of the image in pixels, determines only `input_shape` and `output_shape`.
    """
    found: dict[tuple[str, ...], Layer] = {}

    def record(call, args, kwargs, context):
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, (Conv, BatchNorm, nn.Dense)):
            return call(*args, **kwargs)
        inputs = args[0].shape[-1]
        if isinstance(module, Conv):
            groups, k = module.feature_group_count, module.kernel_size
            shape = (k, k, inputs // groups, module.features)
            kernel_init = module.kernel_init or conv_init(groups)
            layer = Layer(module.path, "conv", shape, module.use_bias, kernel_init=kernel_init)
        elif isinstance(module, nn.Dense):
            shape = (inputs, module.features)
            layer = Layer(module.path, "dense", shape, module.use_bias, kernel_init=module.kernel_init)
        else:
            layer = Layer(module.path, "batch_norm", (inputs,))
        outputs = call(*args, **kwargs)
        found.setdefault(module.path, replace(layer, input_shape=args[0].shape[1:], output_shape=outputs.shape[1:]))
        return outputs

    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    with nn.intercept_methods(record):
        init_shapes(model, images)
    layers = list(found.values())
    return tuple(
        replace(layer, normalised=layer.kind == "conv" and after is not None and after.kind == "batch_norm")
        for layer, after in zip(layers, [*layers[1:], None])
    )
