"""A net of two convolutions: statistics, depthwise kernels, dropout, and nothing that takes long to compile."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict

from configs import digits
from jaxnets import models
from jaxnets.errors import UserError
from jaxnets.models.net import Net


class TinyNet(Net):
    """A strided and a depthwise convolution with BatchNorm, and the classifier."""

    @nn.compact
    def __call__(self, images, train=False):
        x = self.conv_bn(8, 3, 2)(self.prepare(images), train)
        x = self.conv_bn(8, 3, feature_group_count=8)(x, train)
        return self.classify(x, train)


def first_variables() -> dict[str, Any]:
    """Of the net for the ten classes of the digits."""
    return jax.tree.map(np.array, _drawn())


@functools.cache
def _drawn():
    return jax.jit(TinyNet(num_classes=10).init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """The net is known as "tiny" for a while."""
    models.MODELS["tiny"] = TinyNet
    try:
        yield
    finally:
        del models.MODELS["tiny"]


def small_digits():
    """The configuration of two epochs of five steps of the net called "tiny" on a few small digits."""
    config = digits.get_config()
    config.train_split, config.eval_split = "train[:160]", "test[:50]"
    config.image_size = 16
    config.augment.crop_padding = 1
    config.model.name = "tiny"
    config.model.stem_stride = None
    config.model.width = None
    config.batch_size, config.eval_batch_size = 32, 16
    config.num_epochs = 2
    config.sync_batch_norm = True
    config.num_workers = 0
    return config


def make_config(data_dir: Path, **fields: Any) -> ConfigDict:
    """`small_digits` with `fields`, with __ for dots, of data in a folder."""
    config = small_digits()
    config.data_dir = str(data_dir)
    config.compilation_cache = False  # the suite's own is set in conftest.py
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


@contextlib.contextmanager
def configurations(data_dir: Path) -> Iterator[Callable[..., ConfigDict]]:
    """`make_config` of data in a folder, with a record every other step, while the net is known."""
    with registered():
        yield partial(make_config, data_dir, log_every_steps=2)


def diverging_at(width, train):
    """`train(config, directory)`, which fails for nets of a width."""

    def fail(config, directory):
        if config.model.width == width:
            raise UserError("the loss became nan")
        return train(config, directory)

    return fail
