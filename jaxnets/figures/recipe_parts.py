"""The default recipe without each of its parts, with images that grow, and in larger batches: the same small run."""

from collections.abc import Sequence
from typing import Any

import ml_collections

from jaxnets import compare_entries, optim
from jaxnets.figures import knobs, training
from jaxnets.figures.options import Options

TRAINS = True
NET = "shufflenet_v2_x0_5_cifar"
# The default recipe (its reasons: BUILD.md) on few and small images, where cutout is a quarter of a side.
SETTING = (
    *training.MUON,
    "--config.label_smoothing=0.1",
    "--config.augment.cutout=4",
    "--config.train_split=train[:10000]",
    "--config.eval_split=test",
    "--config.image_size=16",
    "--config.augment.crop_padding=2",
    "--config.batch_size=128",
    "--config.num_epochs=16",
    "--config.eval_every_epochs=16",
)
KNOBS = {
    "optimizer.name=sgd": ("optimizer.name=sgd", "optimizer.learning_rate=0.1", "optimizer.weight_decay=5e-4"),
    "optimizer.weight_decay=5e-4": ("optimizer.weight_decay=5e-4",),
    "label_smoothing=0": ("label_smoothing=0.0",),
    "augment.cutout=0": ("augment.cutout=0",),
    "progressive_sizes=(0.5, 0.75, 1.0)": ("progressive_sizes=(0.5, 0.75, 1.0)",),
}


def larger_batches(base: ml_collections.ConfigDict) -> dict[str, Sequence[str]]:
    """Knobs with four times the batch: at the base's learning rate, and scaled by each rule from the base's batch."""
    size = 4 * base.batch_size
    found = {f"batch {size}": (f"batch_size={size}",)}
    for rule in ("sqrt", "linear"):
        # The field's value that gives the base's batch the base's rate.
        rate = base.optimizer.learning_rate / optim.scale_rate(1.0, base.batch_size, rule)
        scaled = f"optimizer.learning_rate={rate}", f"optimizer.batch_scaling={rule}"
        found[f"batch {size} with batch_scaling={rule}"] = (f"batch_size={size}", *scaled)
    return found


def measure(options: Options) -> dict[str, Any]:
    """The accuracy of the recipe, and for each change the difference from it, seed by seed; seconds of training."""
    return knobs.gains(entries(options), options)


def entries(options: Options) -> list[compare_entries.Entry]:
    """The recipe, and a run for each change."""
    (base,) = knobs.variants(NET, SETTING, {}, options)
    return knobs.variants(NET, SETTING, options.chosen(KNOBS | larger_batches(base.config)), options)


draw = knobs.draw
