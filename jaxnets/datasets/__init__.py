"""TFDS builders that need no TensorFlow, and the way to any data set that TFDS has prepared."""

from jaxnets.datasets.cifar import Cifar10, Cifar100
from jaxnets.datasets.digits import Digits
from jaxnets.datasets.locate import BUILDERS, data_root, find_prepared, open_builder

__all__ = ["BUILDERS", "Cifar10", "Cifar100", "Digits", "data_root", "find_prepared", "open_builder"]
