"""MobileNetV2 on the UCI handwritten digits: embedded, no download, a minute or two on two CPU cores."""

from configs import default, recipes


def get_config(words: str = ""):
    """A narrow MobileNetV2 with a stride-2 stem: the digits are 8x8, upsampled to 32x32. Has only its own recipe."""
    config = default.get_config()
    recipes.choose(words, ["x0_35"], "x0_35", ["default"])
    config.dataset = "digits"
    config.mean = (0.3, 0.3, 0.3)
    config.std = (0.3, 0.3, 0.3)
    config.augment.flip = False  # a mirrored digit is a different symbol
    config.augment.crop_padding = 3
    config.model.width = 0.35
    config.model.stem_stride = 2
    config.batch_size = 32
    config.num_epochs = 16
    config.optimizer.learning_rate = 0.05
    config.schedule.warmup_epochs = 2.0
    return config
