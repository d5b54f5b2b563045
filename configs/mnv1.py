"""MobileNetV1 on CIFAR-10."""

from configs import default, recipes

WIDTHS = {"x0_25": 0.25, "x0_5": 0.5, "x0_75": 0.75, "x1_0": 1.0}
QUICK_EPOCHS = {"x0_25": 60, "x0_5": 32, "x0_75": 18, "x1_0": 12}


def get_config(words: str = ""):
    """The CIFAR net of the named width (default: x1_0), trained by a recipe of `recipes`."""
    config = default.get_config()
    variant, recipe = recipes.choose(words, WIDTHS, "x1_0")
    config.model.name = "mobilenet_v1_cifar"
    if WIDTHS[variant] != 1:  # 1 stays unset (the net's default), so that another net can be named
        config.model.width = WIDTHS[variant]
    if recipe is recipes.quick:
        config.num_epochs = QUICK_EPOCHS[variant]
    recipe(config)
    return config
