"""What each part of a recipe gives, the default one's and growing images: the same small run without it."""

from typing import Any

from jaxnets import compare_entries
from jaxnets.figures import knobs
from jaxnets.figures.options import Options

TRAINS = True
NET = "shufflenet_v2_x0_5_cifar"
# The default recipe, of which BUILD.md has the reasons, on few and small images, where cutout is a quarter of a side;
# and images that grow.
RECIPE = (
    "optimizer.name=muon",
    "optimizer.learning_rate=0.02",
    "optimizer.weight_decay=0.05",
    "label_smoothing=0.1",
    "augment.cutout=4",
    "progressive_sizes=(0.5, 0.75, 1.0)",
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
PARTS = {
    "optimizer.name=sgd": ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.weight_decay=5e-4"),
    "optimizer.weight_decay=5e-4": ("optimizer.weight_decay=5e-4",),
    "label_smoothing=0": ("label_smoothing=0.0",),
    "augment.cutout=0": ("augment.cutout=0",),
    "progressive_sizes=()": ("progressive_sizes=()",),
}


def measure(options: Options) -> dict[str, Any]:
    """The accuracy of the recipe, and without each part the difference to it, seed by seed; seconds of training."""
    return knobs.gains(entries(options), options)


def entries(options: Options) -> list[compare_entries.Entry]:
    """The recipe, and a run without each of its parts."""
    return knobs.variants(NET, [f"--config.{field}" for field in (*RECIPE, *SMALL)], PARTS, options)


draw = knobs.draw
