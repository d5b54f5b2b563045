"""What each knob of a recipe contributes: the same small run with one field changed."""

from typing import Any

from jaxnets import compare_entries
from jaxnets.figures import knobs
from jaxnets.figures.options import Options

TRAINS = True
NET = "shufflenet_v2_x0_5_cifar"
# Few images, seen often enough for regularisation against memorising them to matter.
SETTING = (
    *compare_entries.PLAIN,
    "--config.optimizer.name=sgd",
    "--config.optimizer.weight_decay=5e-4",
    "--config.optimizer.learning_rate=0.1",
    "--config.batch_size=128",
    "--config.train_split=train[:10000]",
    "--config.eval_split=test",
    "--config.image_size=16",
    "--config.augment.crop_padding=2",
    "--config.num_epochs=10",
    "--config.eval_every_epochs=10",
)
KNOBS = {
    "ema_decay=0.99": ("ema_decay=0.99",),
    "label_smoothing=0.1": ("label_smoothing=0.1",),
    "augment.cutout=4": ("augment.cutout=4",),
    "augment.mixup=0.2": ("augment.mixup=0.2",),
    "augment.cutmix=1.0": ("augment.cutmix=1.0",),
    "crop_area=0.5": ("crop_area=0.5", "augment.crop_padding=0"),
    "progressive_sizes=(0.75, 1.0)": ("progressive_sizes=(0.75, 1.0)",),
    "schedule.name=one_cycle": ("schedule.name=one_cycle", "schedule.warmup_epochs=3.0"),
    "optimizer.nesterov=False": ("optimizer.nesterov=False",),
    "optimizer.name=muon": ("optimizer.name=muon", "optimizer.learning_rate=0.02"),
}


def measure(options: Options) -> dict[str, Any]:
    """The accuracy of the base, and for each knob the difference from it, seed by seed; seconds of training."""
    return knobs.gains(entries(options), options)


def entries(options: Options) -> list[compare_entries.Entry]:
    """The base, and a run for each knob."""
    return knobs.variants(NET, SETTING, options.chosen(KNOBS), options)


draw = knobs.draw
