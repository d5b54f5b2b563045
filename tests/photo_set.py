"""A small foreign data set, of images of many sizes and kinds, as TFDS prepares it; damage to a record."""

import io
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

MODES = {  # width, height, mode, file format
    0: (32, 32, "RGB", "PNG"),
    1: (32, 32, "L", "PNG"),
    2: (48, 32, "RGB", "JPEG"),
    3: (100, 140, "RGB", "PNG"),
    4: (20, 20, "RGBA", "PNG"),
    5: (32, 32, "P", "PNG"),
    6: (32, 32, "L", "JPEG"),
    7: (32, 32, "RGB", "BMP"),
}


def noise(index: int) -> Image.Image:
    width, height, mode, _ = MODES[index]
    rng = np.random.default_rng(index)
    channels = {"L": 1, "P": 1, "RGB": 3, "RGBA": 4}[mode]
    pixels = rng.integers(0, 256, (height, width, channels), np.uint8)
    if mode == "RGBA":
        pixels[..., 3] = 255
    image = Image.fromarray(pixels.squeeze())
    return image.convert("P") if mode == "P" else image


class Photos(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A foreign image classification set: no class names, images of many sizes and kinds."""

    VERSION = tfds.core.Version("2.0.0")
    LABEL = tfds.features.ClassLabel(num_classes=4)
    labels = tuple(range(4)) * 2

    def _info(self):
        features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": self.LABEL})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(), "validation": self._generate_examples()}

    def _generate_examples(self):
        for index, (_, _, _, file_format) in MODES.items():
            file = io.BytesIO()
            noise(index).save(file, file_format)
            yield index, {"image": file.getvalue(), "label": self.labels[index]}


def flip_one_record(shard: Path, record: bytes) -> None:
    """Change a byte inside a record that lies uncompressed in a shard."""
    content = bytearray(shard.read_bytes())
    content[content.index(record) + len(record) // 2] ^= 0xFF
    shard.write_bytes(content)
