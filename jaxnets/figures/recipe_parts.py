"""The default recipe without each of its parts, and with images that grow: the same small run."""

from typing import Any

from jaxnets import compare_entries
from jaxnets.figures import knobs
from jaxnets.figures.options import Options

TRAINS = True
NET = "shufflenet_v2_x0_5_cifar"
# The default recipe (its reasons: BUILD.md) on few and small images, where cutout is a quarter of a side.
RECIPE = (
    "optimizer.name=muon",
    "optimizer.learning_rate=0.02",
    "optimizer.weight_decay=0.05",
    "label_smoothing=0.1",
    "augment.cutout=4",
)
SMALL = (
    "train_split=train[:10000]",
    "eval_split=test",
    "image_size=16",
    "augment.crop_padding=2",
    "batch_size=128",
    "num_epochs=16",
    "eval_every_epochs=16",
)
KNOBS = {
    "optimizer.name=sgd": ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.weight_decay=5e-4"),
    "optimizer.weight_decay=5e-4": ("optimizer.weight_decay=5e-4",),
    "label_smoothing=0": ("label_smoothing=0.0",),
    "augment.cutout=0": ("augment.cutout=0",),
    "progressive_sizes=(0.5, 0.75, 1.0)": ("progressive_sizes=(0.5, 0.75, 1.0)",),
}


def measure(options: Options) -> dict[str, Any]:
    """The accuracy of the recipe, and for each change the difference from it, seed by seed; seconds of training."""
    return knobs.gains(entries(options), options)


def entries(options: Options) -> list[compare_entries.Entry]:
    """The recipe, and a run for each change."""
    setting = [f"--config.{field}" for field in (*RECIPE, *SMALL)]
    return knobs.variants(NET, setting, knobs.chosen(KNOBS, options), options)


draw = knobs.draw
