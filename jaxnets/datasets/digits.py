"""The handwritten digits that scikit-learn ships, as a TFDS builder."""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from jaxnets.datasets.cifar import encode_png


class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """UCI handwritten digits: 1,797 grey images of 8x8 pixels in 10 classes.

    They are the test set of UCI's optdigits, the part in scikit-learn, split anew here: sorted by class (within
    a class in scikit-learn's order), every fifth image, starting with the first, is a test image. That makes
    1,437 training and 360 test images, with the same share of each class in both. The same writers occur in both.
    The pixels 0 ... 16 are scaled to 0 ... 255.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, file_format: str = "array_record", **kwargs):
        super().__init__(file_format=file_format, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=type(self).__doc__.split("\n")[0],
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(8, 8, 1)),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
        )

    def _split_generators(self, dl_manager):
        from sklearn.datasets import load_digits  # takes a second to import, and only the first run needs it

        digits = load_digits()
        pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)
        by_class = np.argsort(digits.target, kind="stable")
        test = np.zeros(len(pixels), bool)
        test[by_class[::5]] = True
        return {
            "train": self._generate_examples(pixels, digits.target, np.flatnonzero(~test)),
            "test": self._generate_examples(pixels, digits.target, np.flatnonzero(test)),
        }

    def _generate_examples(self, pixels, labels, indices) -> Iterator[tuple[int, dict]]:
        for index in map(int, indices):
            yield (
                index,
                {
                    "id": f"digits_{index:04d}",  # the index in scikit-learn's arrays
                    "image": encode_png(pixels[index]),
                    "label": int(labels[index]),
                },
            )
