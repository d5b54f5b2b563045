"""Named recipes, and the words that a configuration accepts: `--config=configs/mnv2.py:x0_5,quick`."""

from collections.abc import Callable, Collection

import ml_collections

from jaxnets.errors import UserError


def default(config: ml_collections.ConfigDict) -> None:
    """40 epochs of Muon with label smoothing and cutout; BUILD.md has what each part contributed."""
    config.batch_size, config.num_epochs = 256, 40
    muon(config)
    config.augment.cutout, config.label_smoothing = 8, 0.1


def reference(config: ml_collections.ConfigDict) -> None:
    """The recipe of chenyaofo's published CIFAR-10 table, for comparison: 200 epochs of SGD, batches of 256.

    Remaining differences: chenyaofo's code also trains on an epoch's last, smaller batch and lowers the rate once per
    epoch rather than at every step; the table has the best of all epochs. Its MobileNetV2 and VGG have dropout.
    """
    config.batch_size, config.num_epochs = 256, 200
    config.std = (0.2023, 0.1994, 0.2010)
    config.optimizer.update(name="sgd", learning_rate=0.1, momentum=0.9, nesterov=True)
    config.optimizer.update(weight_decay=5e-4, decay_vectors=True)
    config.schedule.update(name="cosine", warmup_epochs=0.0, end_factor=0.0)
    config.augment.update(crop_padding=4, flip=True, cutout=0, mixup=0.0, cutmix=0.0)
    config.progressive_sizes, config.label_smoothing, config.ema_decay = (), 0.0, 0.0


def quick(config: ml_collections.ConfigDict) -> None:
    """As many epochs as two CPU cores train in 10 minutes (machine F of README's Results); each family sets the number.

    Three quarters of them, rounded down, see images of 16 pixels, at a quarter of the cost or less (never for VGG).
    ResNets and VGG-19, whose epochs take longer, see only part of the images. The numbers follow from the time of
    single steps; see BUILD.md.
    """
    config.batch_size = 128
    config.schedule.update(name="linear", warmup_epochs=1.0, end_factor=0.0)
    config.augment.crop_padding = 2  # a short run needs little of it
    config.progressive_sizes = (0.5, 0.5, 0.5, 1.0)
    config.eval_every_epochs = 100  # only at the end


def tutorial(config: ml_collections.ConfigDict) -> None:
    """What beginners' write-ups run: 10 epochs of Adam at 1e-4, batches of 148, no augmentation."""
    config.batch_size, config.num_epochs = 148, 10
    config.optimizer.update(name="adamw", learning_rate=1e-4, weight_decay=0.0)  # without decay AdamW is Adam
    config.optimizer.update(beta1=0.9, beta2=0.999, epsilon=1e-8, clip_norm=0.0)
    config.schedule.update(name="constant", warmup_epochs=0.0)
    config.augment.update(crop_padding=0, flip=False, cutout=0, mixup=0.0, cutmix=0.0)
    config.progressive_sizes, config.label_smoothing, config.ema_decay = (), 0.0, 0.0


RECIPES: dict[str, Callable[[ml_collections.ConfigDict], None]] = {
    "default": default,
    "reference": reference,
    "quick": quick,
    "tutorial": tutorial,
}


def choose(
    words: str, variants: Collection[str], variant: str, recipes: Collection[str] = tuple(RECIPES)
) -> tuple[str, Callable]:
    """The variant and the recipe named by comma-separated words, else `variant` and `default`.

    Raises UserError for an unknown word, and for words that contradict each other: two variants or two recipes.
    """
    chosen = dict.fromkeys(word.strip() for word in words.split(",")) if words else {}
    listed = f"the variants {', '.join(variants)} and the recipes {', '.join(recipes)}"
    for word in chosen:
        if word not in variants and word not in recipes:
            raise UserError(f"there is no variant or recipe {word!r}; there are {listed}")
    for known in (variants, recipes):
        named = [word for word in chosen if word in known]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} contradict each other: name one; there are {listed}")
    return (
        next((word for word in chosen if word in variants), variant),
        RECIPES[next((word for word in chosen if word in recipes), "default")],
    )


def muon(config: ml_collections.ConfigDict) -> None:
    """Muon as all recipes use it.

    What counts is the product of its decay and its rate: it sets how far kernels rotate in a step (2305.17212).
    """
    config.optimizer.update(name="muon", learning_rate=0.02, weight_decay=0.05)


def gentler(config: ml_collections.ConfigDict) -> None:
    """Lower the rate for nets without BatchNorm, which would diverge: SGD's to 1/10, with clipping; Muon's to 1/4."""
    if config.optimizer.name == "sgd":
        config.optimizer.learning_rate /= 10
        config.optimizer.clip_norm = 1.0
    elif config.optimizer.name == "muon":
        config.optimizer.learning_rate /= 4
