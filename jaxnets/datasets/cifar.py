"""CIFAR-10 and CIFAR-100 as TFDS defines them, prepared without TensorFlow."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from jaxnets.datasets.archive import Archive, obtain, read_members
from jaxnets.errors import UserError

_IMAGE_BYTES = 3 * 32 * 32


class Cifar10(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """CIFAR-10: 60,000 colour images of 32x32 pixels in 10 classes.

    Name, version, features, ids and the order of the examples are those of TFDS's own builder. Not
    registered, so that TFDS's own `cifar10` stays available.
    """

    VERSION = tfds.core.Version("3.0.2")
    ARCHIVE = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        size=170_052_171,
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    )
    FOLDER = "cifar-10-batches-bin"
    # File -> images in it, in the order in which they are numbered.
    FILES = {
        "train": {f"data_batch_{number}.bin": 10_000 for number in range(1, 6)},
        "test": {"test_batch.bin": 10_000},
    }
    # The label bytes before each image: feature, file with the class names, number of classes.
    LABELS = (("label", "batches.meta.txt", 10),)

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        labels = {name: tfds.features.ClassLabel(num_classes=classes) for name, _, classes in self.LABELS}
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__.split("\n")[0],
            features=tfds.features.FeaturesDict(
                {"id": tfds.features.Text(), "image": tfds.features.Image(shape=(32, 32, 3)), **labels}
            ),
            supervised_keys=("image", "label"),
            homepage="https://www.cs.toronto.edu/~kriz/cifar.html",
            citation=(
                "@techreport{Krizhevsky09learningmultiple, author = {Alex Krizhevsky}, "
                "title = {Learning multiple layers of features from tiny images}, year = {2009}}"
            ),
        )

    def _split_generators(self, dl_manager):
        path = obtain(self.ARCHIVE, Path(self.data_dir_root))
        record_bytes = len(self.LABELS) + _IMAGE_BYTES
        sizes = {file: images * record_bytes for files in self.FILES.values() for file, images in files.items()}
        texts = {file: None for _, file, _ in self.LABELS}
        members = read_members(path, {f"{self.FOLDER}/{file}": size for file, size in (sizes | texts).items()})
        members = {name.rpartition("/")[2]: content for name, content in members.items()}
        for feature, file, classes in self.LABELS:
            names = members[file].decode("ascii", "replace").split()
            if len(names) != classes:
                raise UserError(f"{path} names {len(names)} classes in {file} instead of {classes}; replace it")
            self.info.features[feature].names = names
        return {
            split: self._generate_examples(split, b"".join(members[file] for file in files))
            for split, files in self.FILES.items()
        }

    def _generate_examples(self, split: str, content: bytes) -> Iterator[tuple[int, dict]]:
        labels = [name for name, _, _ in self.LABELS]
        records = np.frombuffer(content, np.uint8).reshape(-1, len(labels) + _IMAGE_BYTES)
        for index, record in enumerate(records):
            pixels = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
            example = {"id": f"{split}_{index:05d}", "image": encode_png(pixels)}
            # TFDS orders the examples by a hash of this key.
            yield index, example | {name: int(value) for name, value in zip(labels, record)}


class Cifar100(Cifar10, skip_registration=True):
    """CIFAR-100: 60,000 colour images of 32x32 pixels in 100 classes of 20 superclasses."""

    VERSION = tfds.core.Version("3.0.2")
    ARCHIVE = Archive(
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        size=168_513_733,
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    )
    FOLDER = "cifar-100-binary"
    FILES = {"train": {"train.bin": 50_000}, "test": {"test.bin": 10_000}}
    LABELS = (("coarse_label", "coarse_label_names.txt", 20), ("label", "fine_label_names.txt", 100))


def encode_png(pixels: np.ndarray) -> bytes:
    """The PNG file of a uint8 image, `(H, W)` or `(H, W, 3)`. TFDS itself would encode through TensorFlow."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()
