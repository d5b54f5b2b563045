"""TFDS builders that need no TensorFlow, and access to what TFDS has prepared and to folders of images."""

from jaxnets.datasets.cifar import Cifar10, Cifar100
from jaxnets.datasets.digits import Digits
from jaxnets.datasets.folder import VALIDATION, ImageFiles, ImageFolder, absolute, folder_path, is_folder, read_folder
from jaxnets.datasets.locate import BUILDERS, data_root, find_prepared, open_builder, where_it_still_is

__all__ = [
    "BUILDERS",
    "Cifar10",
    "Cifar100",
    "Digits",
    "ImageFiles",
    "ImageFolder",
    "VALIDATION",
    "absolute",
    "data_root",
    "find_prepared",
    "folder_path",
    "is_folder",
    "open_builder",
    "read_folder",
    "where_it_still_is",
]
